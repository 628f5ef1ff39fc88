/* NEON, which every AArch64 CPU has: 32 registers of 16 bytes, 16 of them accumulators; of 24, as on AVX-512, gcc 12
 * keeps two on the stack. */
#include "../compiler.h"
#include "kernels.h"
#include "philox.h"

#if ML_ARM64

#include <arm_neon.h>

#define VECTOR_BYTES 16
#define REGISTERS 32
#define TILE_ROWS 4
#define TILE_VECTORS 4
#define MULTIPLY_LOW(a, b) ((__typeof__(a))vmull_u32(vmovn_u64((uint64x2_t)(a)), vmovn_u64((uint64x2_t)(b))))

#define REAL float
#define REAL_BYTES 4
#define NAME(op) ml_##op##_f32_neon
#include "products.h"

#define REAL double
#define REAL_BYTES 8
#define NAME(op) ml_##op##_f64_neon
#include "products.h"

#define NAME(op) ml_##op##_neon
#include "bf16.h"

static bool supported(void) { return true; }

const ml_kernels ml_kernels_neon = {
    .isa = ML_NEON,
    .name = "neon",
    .supported = supported,
    .products = {[ML_F32] = &ml_table_f32_neon, [ML_F64] = &ml_table_f64_neon, [ML_BF16] = &ml_table_bf16_f32_neon},
    .bf16 = &ml_bf16_table_neon,
    .routing = {[ML_F32] = &ml_routing_f32_neon, [ML_F64] = &ml_routing_f64_neon},
};

#endif
