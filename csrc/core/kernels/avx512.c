/* AVX-512: 32 registers of 64 bytes, 24 of them accumulators. */
#include "../compiler.h"
#include "kernels.h"
#include "philox.h"

#if ML_X86

#include <immintrin.h>

#define VECTOR_BYTES 64
#define REGISTERS 32
#define TILE_ROWS 6
#define TILE_VECTORS 4
#define MULTIPLY_LOW(a, b) ((__typeof__(a))_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))

#define REAL float
#define REAL_BYTES 4
#define LOAD_SOME(p, n) ((NAME(vector))_mm512_maskz_loadu_ps((__mmask16)((1u << (n)) - 1), p))
#define CONVERT(v, to) ((to)_mm512_cvtepu16_epi32((__m256i)(v)))
#define LOAD_SOME_NARROW(p, n) _mm256_maskz_loadu_epi16((__mmask16)((1u << (n)) - 1), p)
#define NAME(op) ml_##op##_f32_avx512
#include "products.h"

#define REAL double
#define REAL_BYTES 8
#define LOAD_SOME(p, n) ((NAME(vector))_mm512_maskz_loadu_pd((__mmask8)((1u << (n)) - 1), p))
#define NAME(op) ml_##op##_f64_avx512
#include "products.h"

#define NAME(op) ml_##op##_avx512
#include "bf16.h"

static bool supported(void) {
  return ML_CPU_HAS("avx512f") && ML_CPU_HAS("avx512bw") && ML_CPU_HAS("avx512dq") && ML_CPU_HAS("avx512vl");
}

const ml_kernels ml_kernels_avx512 = {
    .isa = ML_AVX512,
    .name = "avx512",
    .supported = supported,
    .products = {[ML_F32] = &ml_table_f32_avx512,
                 [ML_F64] = &ml_table_f64_avx512,
                 [ML_BF16] = &ml_table_bf16_f32_avx512},
    .bf16 = &ml_bf16_table_avx512,
    .routing = {[ML_F32] = &ml_routing_f32_avx512, [ML_F64] = &ml_routing_f64_avx512},
};

#endif
