/* Measured on an Intel Xeon (Emerald Rapids), 2 threads, d 768 .. 4096, R 64 and 128. Portable vectors and NEON have not
 * been measured where they are native: they take what a register file of their size took. */
#include "regimes.h"

#include "compiler.h"

static const ml_regime regimes[ML_ISAS][2] = {
    /*                           dots short_sums spread_rows spread_lanes in_place base_dots base_in_place */
    [ML_PORTABLE] = {[ML_F32] = {48, 9, 9, 0, 9, 48, 17}, [ML_F64] = {48, 9, 9, 0, 9, 48, 17}},
    [ML_AVX2] = {[ML_F32] = {64, 9, 13, 0, 9, 48, 17}, [ML_F64] = {48, 9, 9, 0, 9, 48, 17}},
    [ML_AVX512] = {[ML_F32] = {96, 9, 9, 48, 9, 96, 17}, [ML_F64] = {48, 9, 9, 48, 9, 48, 17}},
    [ML_NEON] = {[ML_F32] = {48, 9, 9, 0, 9, 48, 17}, [ML_F64] = {48, 9, 9, 0, 9, 48, 17}},
};

const ml_regime *ml_regime_of(ml_isa isa, ml_dtype dtype) { return &regimes[isa][dtype]; }

/* What MKL, which torch computes with, reaches of the peak depends on who made the CPU: 92 % on Intel's, 40 % on an AMD
 * EPYC with AVX-512, where OpenBLAS has 80 %. */
static bool mkl_is_slow(ml_isa isa) {
#if ML_X86
  return isa == ML_AVX512 && !__builtin_cpu_is("intel");
#else
  (void)isa;
  return false;
#endif
}

bool ml_base_is_faster(ml_dtype dtype, int64_t tokens, bool transposed) {
  ml_isa isa = ml_active_kernels()->isa;
  const ml_regime *regime = ml_regime_of(isa, dtype);
  if (dtype != ML_F32 || tokens <= 0) return false;
  return tokens < (transposed ? regime->base_in_place : regime->base_dots) || mkl_is_slow(isa);
}
