/* Measured on an Intel Xeon (Emerald Rapids), 2 threads, d 768 .. 4096, R 64 and 128. Portable vectors and NEON have not
 * been measured where they are native: they take what a register file of their size took. `outer` was measured on an AMD
 * EPYC (Zen 4), one thread, R 32 and 64. */
#include "regimes.h"

#include <stdatomic.h>
#include <string.h>

#include "compiler.h"

static const ml_regime regimes[ML_ISAS][3] = {
    /* dots short_sums spread_rows spread_lanes in_place collect_in_place outer turned_in_place base_dots base_in_place */
    [ML_PORTABLE] = {[ML_F32] = {48, 9, 9, 0, 9, 25, 9, 33, 48, 17},
                     [ML_F64] = {48, 9, 9, 0, 9, 25, 9, 33, 48, 17},
                     [ML_BF16] = {48, 0, 9, 0, 0, 25, 9, 33, 0, 0}},
    [ML_AVX2] = {[ML_F32] = {64, 9, 13, 0, 9, 25, 9, 33, 48, 17},
                 [ML_F64] = {48, 9, 9, 0, 9, 25, 9, 33, 48, 17},
                 [ML_BF16] = {64, 0, 13, 0, 0, 25, 9, 33, 0, 0}},
    [ML_AVX512] = {[ML_F32] = {96, 17, 9, 48, 9, 25, 13, 129, 96, 17},
                   [ML_F64] = {48, 9, 9, 48, 9, 25, 13, 129, 48, 17},
                   [ML_BF16] = {96, 0, 9, 48, 0, 25, 13, 129, 0, 0}},
    [ML_NEON] = {[ML_F32] = {48, 9, 9, 0, 9, 25, 9, 33, 48, 17},
                 [ML_F64] = {48, 9, 9, 0, 9, 25, 9, 33, 48, 17},
                 [ML_BF16] = {48, 0, 9, 0, 0, 25, 9, 33, 0, 0}},
};

const ml_regime *ml_regime_of(ml_isa isa, ml_dtype of_factors) { return &regimes[isa][of_factors]; }

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

static const char *const base_names[] = {NULL, "own", "torch"};
enum { BY_SHAPE, OWN, N_BASE = 3 };
static atomic_int base_choice; /* index of a name */

ml_status ml_set_base(const char *name) {
  int i = BY_SHAPE;
  if (name && *name)
    for (i = OWN; i < N_BASE && strcmp(name, base_names[i]) != 0; i++) continue;
  if (i == N_BASE) return ML_ERR_BASE;
  atomic_store(&base_choice, i);
  return ML_OK;
}

const char *ml_get_base(void) { return base_names[atomic_load(&base_choice)]; }

ml_base_limits ml_base_rule(void) {
  ml_isa isa = ml_active_kernels()->isa;
  const ml_regime *regime = ml_regime_of(isa, ML_F32);
  if (mkl_is_slow(isa)) return (ml_base_limits){INT64_MAX, INT64_MAX};
  return (ml_base_limits){regime->base_dots, regime->base_in_place};
}

bool ml_base_is_faster(ml_dtype dtype, int64_t tokens, bool transposed) {
  int choice = atomic_load_explicit(&base_choice, memory_order_relaxed);
  if (dtype == ML_BF16) return false; /* the core has no such product */
  if (choice != BY_SHAPE) return choice == OWN;
  if (dtype != ML_F32 || tokens <= 0) return false;
  ml_base_limits limits = ml_base_rule();
  return tokens < (transposed ? limits.transposed : limits.product);
}
