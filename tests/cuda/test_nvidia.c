/* csrc/cuda/nvidia.h against NVIDIA's own headers: it compiles where they agree. */
#include <cuda.h>
#include <nvrtc.h>

#include "driver.h"
#include "nvidia.h"

#define SAME(a, b) _Static_assert((long)(a) == (long)(b), #a " is " #b)
#define FIELD(ours, our_field, theirs, their_field)               \
  SAME(offsetof(ours, our_field), offsetof(theirs, their_field)); \
  SAME(sizeof(((ours *)0)->our_field), sizeof(((theirs *)0)->their_field))

SAME(ML_CU_SUCCESS, CUDA_SUCCESS);
SAME(ML_CU_OUT_OF_MEMORY, CUDA_ERROR_OUT_OF_MEMORY);
SAME(ML_CU_NO_DEVICE, CUDA_ERROR_NO_DEVICE);
SAME(ML_CU_DEVICE_MULTIPROCESSORS, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME(ML_CU_DEVICE_MAJOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME(ML_CU_DEVICE_MINOR, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME(ML_CU_DEVICE_SHARED_BYTES, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
SAME(ML_CU_FUNCTION_SHARED_BYTES, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
SAME(ML_CU_FUNCTION_SHARED_PERCENT, CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT);
SAME(ML_CU_LAUNCH_CLUSTER, CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION);
SAME(ML_CU_LAUNCH_EARLY, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
SAME(ML_CU_TENSOR_F16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
SAME(ML_CU_TENSOR_BF16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
SAME(ML_CU_TENSOR_SWIZZLE_128, CU_TENSOR_MAP_SWIZZLE_128B);
SAME(ML_CU_TENSOR_L2_256, CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
SAME(ML_CU_TENSOR_PLAIN, CU_TENSOR_MAP_INTERLEAVE_NONE);
SAME(ML_CU_TENSOR_PLAIN, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
SAME(ML_NVRTC_SUCCESS, NVRTC_SUCCESS);
SAME(ML_NVRTC_OUT_OF_MEMORY, NVRTC_ERROR_OUT_OF_MEMORY);

SAME(sizeof(ml_cu_launch_attribute), sizeof(CUlaunchAttribute));
FIELD(ml_cu_launch_attribute, id, CUlaunchAttribute, id);
FIELD(ml_cu_launch_attribute, value, CUlaunchAttribute, value);
FIELD(ml_cu_launch_attribute, value.cluster, CUlaunchAttribute, value.clusterDim);
FIELD(ml_cu_launch_attribute, value.early, CUlaunchAttribute, value.programmaticStreamSerializationAllowed);

SAME(sizeof(ml_cu_launch_config), sizeof(CUlaunchConfig));
FIELD(ml_cu_launch_config, grid[0], CUlaunchConfig, gridDimX);
FIELD(ml_cu_launch_config, grid[2], CUlaunchConfig, gridDimZ);
FIELD(ml_cu_launch_config, block[0], CUlaunchConfig, blockDimX);
FIELD(ml_cu_launch_config, block[2], CUlaunchConfig, blockDimZ);
FIELD(ml_cu_launch_config, shared_bytes, CUlaunchConfig, sharedMemBytes);
FIELD(ml_cu_launch_config, stream, CUlaunchConfig, hStream);
FIELD(ml_cu_launch_config, attributes, CUlaunchConfig, attrs);
FIELD(ml_cu_launch_config, n_attributes, CUlaunchConfig, numAttrs);

SAME(sizeof(ml_tensor_map), sizeof(CUtensorMap));

/* Assigning warns of prototypes that differ in more than the name of an enumeration. What cuda.h's macros make of a name
 * is the symbol that libcuda has; test_nvidia.py looks at those. */
#define POINTER(name, parameters) unsigned(*our_##name) parameters;
ML_CU_FUNCTIONS(POINTER)
ML_NVRTC_FUNCTIONS(POINTER)

void assign(void) {
  our_cuInit = cuInit;
  our_cuDriverGetVersion = cuDriverGetVersion;
  our_cuGetErrorString = cuGetErrorString;
  our_cuDeviceGetCount = cuDeviceGetCount;
  our_cuDeviceGet = cuDeviceGet;
  our_cuDeviceGetAttribute = cuDeviceGetAttribute;
  our_cuDevicePrimaryCtxRetain = cuDevicePrimaryCtxRetain;
  our_cuCtxGetCurrent = cuCtxGetCurrent;
  our_cuLibraryLoadData = cuLibraryLoadData;
  our_cuLibraryGetKernel = cuLibraryGetKernel;
  our_cuKernelSetAttribute = cuKernelSetAttribute;
  our_cuKernelGetFunction = cuKernelGetFunction;
  our_nvrtcVersion = nvrtcVersion;
  our_nvrtcGetNumSupportedArchs = nvrtcGetNumSupportedArchs;
  our_nvrtcGetSupportedArchs = nvrtcGetSupportedArchs;
  our_nvrtcCreateProgram = nvrtcCreateProgram;
  our_nvrtcDestroyProgram = nvrtcDestroyProgram;
  our_nvrtcCompileProgram = nvrtcCompileProgram;
  our_nvrtcGetCUBINSize = nvrtcGetCUBINSize;
  our_nvrtcGetCUBIN = nvrtcGetCUBIN;
  our_nvrtcGetProgramLogSize = nvrtcGetProgramLogSize;
  our_nvrtcGetProgramLog = nvrtcGetProgramLog;
  our_cuLaunchKernelEx = cuLaunchKernelEx;
  our_cuTensorMapEncodeTiled = cuTensorMapEncodeTiled;
  our_cuCtxPushCurrent_v2 = cuCtxPushCurrent;
  our_cuCtxPopCurrent_v2 = cuCtxPopCurrent;
}
