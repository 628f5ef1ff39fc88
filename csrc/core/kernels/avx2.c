/* AVX2 and FMA: 16 registers of 32 bytes, 12 of them accumulators. */
#include "../compiler.h"
#include "kernels.h"
#include "philox.h"

#if ML_X86

#include <immintrin.h>

#define VECTOR_BYTES 32
#define REGISTERS 16
#define TILE_ROWS 6
#define TILE_VECTORS 2
#define MULTIPLY_LOW(a, b) ((__typeof__(a))_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))

/* Eight 32-bit lanes from place 8 - n on: the first n are on. */
static const int32_t lane_masks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};

#define REAL float
#define REAL_BYTES 4
#define LOAD_SOME(p, n) \
  ((NAME(vector))_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i *)(lane_masks + 8 - (n)))))
#define CONVERT(v, to) ((to)_mm256_cvtepu16_epi32((__m128i)(v)))
#define NAME(op) ml_##op##_f32_avx2
#include "products.h"

#define REAL double
#define REAL_BYTES 8
#define LOAD_SOME(p, n) \
  ((NAME(vector))_mm256_maskload_pd(p, _mm256_loadu_si256((const __m256i *)(lane_masks + 8 - 2 * (n)))))
#define NAME(op) ml_##op##_f64_avx2
#include "products.h"

#define NAME(op) ml_##op##_avx2
#include "bf16.h"

static bool supported(void) { return ML_CPU_HAS("avx2") && ML_CPU_HAS("fma"); }

const ml_kernels ml_kernels_avx2 = {
    .isa = ML_AVX2,
    .name = "avx2",
    .supported = supported,
    .products = {[ML_F32] = &ml_table_f32_avx2, [ML_F64] = &ml_table_f64_avx2, [ML_BF16] = &ml_table_bf16_f32_avx2},
    .bf16 = &ml_bf16_table_avx2,
    .routing = {[ML_F32] = &ml_routing_f32_avx2, [ML_F64] = &ml_routing_f64_avx2},
};

#endif
