/* Which kernels run: the best the CPU has, unless MOELORA_ISA or ml_set_isa names another. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "compiler.h"
#include "kernels/kernels.h"
#include "threads.h"

/* Worst first. */
static const ml_kernels *const compiled[] = {
    &ml_kernels_portable,
#if ML_X86
    &ml_kernels_avx2,
    &ml_kernels_avx512,
    &ml_kernels_avx512bf16,
#elif ML_ARM64
    &ml_kernels_neon,
#endif
};
enum { N_COMPILED = (int)(sizeof compiled / sizeof compiled[0]) };

static const char *available[N_COMPILED + 1];
static const ml_kernels *best;
static _Atomic(const ml_kernels *) active;
static ml_status init_status;

static const ml_kernels *find(const char *name) {
  for (int i = 0; i < N_COMPILED; i++)
    if (strcmp(compiled[i]->name, name) == 0 && compiled[i]->supported()) return compiled[i];
  return NULL;
}

static ml_status activate(const char *name) {
  const ml_kernels *kernels = name && *name ? find(name) : best;
  if (!kernels) return ML_ERR_ISA;
  atomic_store(&active, kernels);
  return ML_OK;
}

static void init(void) {
  int n = 0;
  for (int i = 0; i < N_COMPILED; i++)
    if (compiled[i]->supported()) {
      if (!compiled[i]->preferred || compiled[i]->preferred()) best = compiled[i];
      available[n++] = compiled[i]->name;
    }
  atomic_store(&active, best);
  const char *wanted = getenv("MOELORA_ISA");
  if (wanted && *wanted) init_status = activate(wanted);
  ml_status base_status = ml_set_base(getenv("MOELORA_BASE_PRODUCT"));
  if (init_status == ML_OK) init_status = base_status;
  ml_threads_init();
}

ml_status ml_init(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, init);
  return init_status;
}

ml_status ml_set_isa(const char *name) {
  ml_init(); /* a MOELORA_ISA that failed there does not matter here */
  return activate(name);
}

const ml_kernels *ml_active_kernels(void) {
  const ml_kernels *kernels = atomic_load_explicit(&active, memory_order_acquire);
  if (kernels) return kernels;
  ml_init();
  return atomic_load(&active);
}

const char *ml_get_isa(void) { return ml_active_kernels()->name; }

const char *const *ml_isa_available(void) {
  ml_init();
  return available;
}

const char *ml_status_message(ml_status status) {
  switch (status) {
    case ML_OK: return "no error";
    case ML_ERR_NULL: return "a required array is missing";
    case ML_ERR_DTYPE: return "the dtype is neither float32 nor float64";
    case ML_ERR_SHAPE: return "a dimension that must be positive is not";
    case ML_ERR_TOP_K: return "top_k is outside [1, number of experts]";
    case ML_ERR_VALUE: return "a number is outside its domain";
    case ML_ERR_OVERFLOW: return "a size does not fit in the address space";
    case ML_ERR_NO_MEMORY: return "there is not enough memory for the workspace";
    case ML_ERR_ISA: return "this instruction set is unknown or missing on this CPU";
    case ML_ERR_BASE: return "the base product is computed by \"own\" or by \"torch\"";
  }
  return "unknown status";
}
