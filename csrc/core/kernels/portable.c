/* Vectors of 16 bytes: SSE2, or what the compiler makes of them elsewhere. */
#include "../compiler.h"
#include "kernels.h"
#include "philox.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#define MULTIPLY_LOW(a, b) ((__typeof__(a))_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#else
#define MULTIPLY_LOW(a, b) (((a) & UINT32_MAX) * (b))
#endif

#define VECTOR_BYTES 16
#define REGISTERS 16
#define TILE_ROWS 4
#define TILE_VECTORS 2

#define REAL float
#define REAL_BYTES 4
#define NAME(op) ml_##op##_f32_portable
#include "products.h"

#define REAL double
#define REAL_BYTES 8
#define NAME(op) ml_##op##_f64_portable
#include "products.h"

#define NAME(op) ml_##op##_portable
#include "bf16.h"

static bool supported(void) { return true; }

const ml_kernels ml_kernels_portable = {
    .isa = ML_PORTABLE,
    .name = "portable",
    .supported = supported,
    .products = {[ML_F32] = &ml_table_f32_portable,
                 [ML_F64] = &ml_table_f64_portable,
                 [ML_BF16] = &ml_table_bf16_f32_portable},
    .bf16 = &ml_bf16_table_portable,
    .routing = {[ML_F32] = &ml_routing_f32_portable, [ML_F64] = &ml_routing_f64_portable},
};
