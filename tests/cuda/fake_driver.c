/* A libcuda of version VERSION with COUNT GPUs of capability MAJOR.0, which runs nothing; cuInit answers INIT. */
#include "nvidia.h"

unsigned cuInit(unsigned flags) { return flags == 0 ? INIT : 1; }

unsigned cuDriverGetVersion(int *version) {
  *version = VERSION;
  return ML_CU_SUCCESS;
}

unsigned cuGetErrorString(unsigned result, const char **text) {
  *text = result == 999 ? "it is broken" : "another error";
  return ML_CU_SUCCESS;
}

unsigned cuDeviceGetCount(int *count) {
  *count = COUNT;
  return ML_CU_SUCCESS;
}

unsigned cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal + 7;
  return ordinal < COUNT ? ML_CU_SUCCESS : 101;
}

unsigned cuDeviceGetAttribute(int *value, unsigned attribute, CUdevice device) {
  switch (attribute) {
    case ML_CU_DEVICE_MAJOR: *value = device == 7 ? MAJOR : 9; break;
    case ML_CU_DEVICE_MINOR: *value = 0; break;
    case ML_CU_DEVICE_MULTIPROCESSORS: *value = 100 + device; break;
    case ML_CU_DEVICE_SHARED_BYTES: *value = 232448; break;
    default: return 1;
  }
  return ML_CU_SUCCESS;
}

/* What is never called here. */
#define UNUSED(name) \
  unsigned name(void) { return 999; }
UNUSED(cuDevicePrimaryCtxRetain)
UNUSED(cuCtxGetCurrent)
UNUSED(cuCtxPushCurrent_v2)
UNUSED(cuCtxPopCurrent_v2)
UNUSED(cuLibraryLoadData)
UNUSED(cuLibraryGetKernel)
UNUSED(cuKernelSetAttribute)
UNUSED(cuKernelGetFunction)
UNUSED(cuTensorMapEncodeTiled)
#if !defined(WITHOUT_LAUNCHES)
UNUSED(cuLaunchKernelEx)
#endif
