/* A libcuda of version VERSION with COUNT GPUs of capability MAJOR.0, which runs nothing, but is as strict about contexts
 * as a real one; cuInit answers INIT. */
#define _GNU_SOURCE
#include "fake_driver.h"

#include <stdatomic.h>
#include <string.h>

enum { INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500, FIRST_DEVICE = 7 };

fake_state fake;
static _Thread_local CUcontext stack[8];
static _Thread_local int depth;

unsigned cuInit(unsigned flags) { return flags == 0 ? INIT : INVALID_VALUE; }

unsigned cuDriverGetVersion(int *version) {
  *version = VERSION;
  return ML_CU_SUCCESS;
}

unsigned cuGetErrorString(unsigned result, const char **text) {
  *text = result == 999 ? "it is broken" : "another error";
  return ML_CU_SUCCESS;
}

/* ---- GPUs ---- */

unsigned cuDeviceGetCount(int *count) {
  *count = COUNT;
  return ML_CU_SUCCESS;
}

unsigned cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal + FIRST_DEVICE;
  return ordinal < COUNT ? ML_CU_SUCCESS : INVALID_DEVICE;
}

unsigned cuDeviceGetAttribute(int *value, unsigned attribute, CUdevice device) {
  switch (attribute) {
    case ML_CU_DEVICE_MAJOR: *value = device == FIRST_DEVICE ? MAJOR : 9; break;
    case ML_CU_DEVICE_MINOR: *value = 0; break;
    case ML_CU_DEVICE_MULTIPROCESSORS: *value = 100 + device; break;
    case ML_CU_DEVICE_SHARED_BYTES: *value = 232448; break;
    default: return INVALID_VALUE;
  }
  return ML_CU_SUCCESS;
}

/* ---- contexts: of device d, the number 1000 d ---- */

unsigned cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  fake.retains++;
  *context = (CUcontext)(intptr_t)(1000 * device);
  return ML_CU_SUCCESS;
}

unsigned cuCtxGetCurrent(CUcontext *context) {
  *context = depth > 0 ? stack[depth - 1] : NULL;
  return ML_CU_SUCCESS;
}

unsigned cuCtxPushCurrent_v2(CUcontext context) {
  stack[depth++] = context;
  return ML_CU_SUCCESS;
}

unsigned cuCtxPopCurrent_v2(CUcontext *context) {
  if (depth == 0) return INVALID_CONTEXT;
  *context = stack[--depth];
  return ML_CU_SUCCESS;
}

/* ---- kernels: numbers; a function is its kernel plus its context ---- */

static char code[1 << 16]; /* of the library that was loaded last */

unsigned cuLibraryLoadData(CUlibrary *library, const void *data, unsigned *jit_options, void **jit_values,
                           unsigned n_jit_options, unsigned *options, void **values, unsigned n_options) {
  (void)jit_options, (void)jit_values, (void)options, (void)values;
  if (memcmp(data,
             "\x7f"
             "ELF",
             4) != 0 ||
      n_jit_options + n_options > 0)
    return INVALID_VALUE;
  if (fake.answer_to_load) return fake.answer_to_load;
  memcpy(code, data, 4096); /* binaries of tests are larger, and name their kernels at the beginning */
  *library = (CUlibrary)(intptr_t)++fake.loads;
  return ML_CU_SUCCESS;
}

unsigned cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
  *kernel = (CUkernel)library;
  return memmem(code, sizeof code, name, strlen(name)) ? ML_CU_SUCCESS : NOT_FOUND;
}

unsigned cuKernelSetAttribute(unsigned attribute, int value, CUkernel kernel, CUdevice device) {
  (void)kernel;
  if (attribute == ML_CU_FUNCTION_SHARED_PERCENT && value == 100) return ML_CU_SUCCESS;
  if (attribute != ML_CU_FUNCTION_SHARED_BYTES || device < FIRST_DEVICE || value > 232448) return INVALID_VALUE;
  fake.shared_bytes = value;
  return ML_CU_SUCCESS;
}

unsigned cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
  if (depth == 0) return INVALID_CONTEXT;
  *function = (CUfunction)((intptr_t)kernel + (intptr_t)stack[depth - 1]);
  return ML_CU_SUCCESS;
}

unsigned cuTensorMapEncodeTiled(void) { return depth == 0 ? INVALID_CONTEXT : INVALID_VALUE; }

unsigned cuGetExportTable(void) { return NOT_FOUND; } /* NVRTC wants to ask a driver, too */

#if !defined(WITHOUT_LAUNCHES)
unsigned cuLaunchKernelEx(const struct CUlaunchConfig_st *given, CUfunction function, void **arguments, void **extra) {
  const ml_cu_launch_config *config = (const ml_cu_launch_config *)given;
  if (depth == 0 || (intptr_t)function / 1000 * 1000 != (intptr_t)stack[depth - 1]) return INVALID_CONTEXT;
  if (extra || config->n_attributes > 4) return INVALID_VALUE;
  fake.config = *config;
  memcpy(fake.attributes, config->attributes, config->n_attributes * sizeof *config->attributes);
  fake.function = function;
  fake.context = stack[depth - 1];
  fake.argument = *(int *)arguments[0];
  fake.launches++;
  return fake.answer;
}
#endif
