/* The facts of NVIDIA's driver API (CUDA 12.0) and of NVRTC that are used: names, numbers and layouts, since none of
 * NVIDIA's headers exists where this is compiled. tests/cuda/test_nvidia.c compares them with those headers.
 */
#ifndef MOELORA_NVIDIA_H
#define MOELORA_NVIDIA_H

#include <stddef.h>
#include <stdint.h>

typedef int CUdevice;
typedef struct CUctx_st *CUcontext;
typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct _nvrtcProgram *nvrtcProgram;

/* Enumerations of the driver and of NVRTC are unsigned ints: results, attributes, options. */
enum {
  ML_CU_SUCCESS = 0,
  ML_CU_OUT_OF_MEMORY = 2,
  ML_CU_NO_DEVICE = 100,

  ML_CU_DEVICE_MULTIPROCESSORS = 16,
  ML_CU_DEVICE_MAJOR = 75,
  ML_CU_DEVICE_MINOR = 76,
  ML_CU_DEVICE_SHARED_BYTES = 97, /* of a block, at most */

  ML_CU_FUNCTION_SHARED_BYTES = 8, /* dynamic ones, at most */

  ML_CU_LAUNCH_CLUSTER = 4,
  ML_CU_LAUNCH_EARLY = 6, /* programmatic stream serialization */

  ML_CU_TENSOR_F16 = 6,
  ML_CU_TENSOR_BF16 = 9,
  ML_CU_TENSOR_SWIZZLE_128 = 3,
  ML_CU_TENSOR_L2_256 = 3,
  ML_CU_TENSOR_PLAIN = 0, /* no interleave; zeros out of bounds */

  ML_NVRTC_SUCCESS = 0,
  ML_NVRTC_OUT_OF_MEMORY = 1
};

/* CUlaunchAttribute */
typedef struct {
  unsigned id, padding;
  union {
    char bytes[64];
    struct {
      unsigned x, y, z;
    } cluster;
    int early;
  } value;
} ml_cu_launch_attribute;

/* CUlaunchConfig */
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  CUstream stream;
  ml_cu_launch_attribute *attributes;
  unsigned n_attributes;
} ml_cu_launch_config;

/* X(the symbol in libcuda, its parameters) */
#define ML_CU_FUNCTIONS(X)                                                                                      \
  X(cuInit, (unsigned flags))                                                                                   \
  X(cuDriverGetVersion, (int *version))                                                                         \
  X(cuGetErrorString, (unsigned result, const char **text))                                                     \
  X(cuDeviceGetCount, (int *count))                                                                             \
  X(cuDeviceGet, (CUdevice * device, int ordinal))                                                              \
  X(cuDeviceGetAttribute, (int *value, unsigned attribute, CUdevice device))                                    \
  X(cuDevicePrimaryCtxRetain, (CUcontext * context, CUdevice device))                                           \
  X(cuCtxGetCurrent, (CUcontext * context))                                                                     \
  X(cuCtxPushCurrent_v2, (CUcontext context))                                                                   \
  X(cuCtxPopCurrent_v2, (CUcontext * context))                                                                  \
  X(cuLibraryLoadData, (CUlibrary * library, const void *code, unsigned *jit_options, void **jit_values,        \
                        unsigned n_jit_options, unsigned *options, void **values, unsigned n_options))          \
  X(cuLibraryGetKernel, (CUkernel * kernel, CUlibrary library, const char *name))                               \
  X(cuKernelSetAttribute, (unsigned attribute, int value, CUkernel kernel, CUdevice device))                    \
  X(cuKernelGetFunction, (CUfunction * function, CUkernel kernel))                                              \
  X(cuLaunchKernelEx, (const ml_cu_launch_config *config, CUfunction function, void **arguments, void **extra)) \
  X(cuTensorMapEncodeTiled, (void *map, unsigned type, uint32_t rank, void *data, const uint64_t *dims,         \
                             const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,     \
                             unsigned interleave, unsigned swizzle, unsigned promotion, unsigned fill))

/* X(the symbol in libnvrtc, its parameters) */
#define ML_NVRTC_FUNCTIONS(X)                                                                         \
  X(nvrtcVersion, (int *major, int *minor))                                                           \
  X(nvrtcGetNumSupportedArchs, (int *count))                                                          \
  X(nvrtcGetSupportedArchs, (int *archs))                                                             \
  X(nvrtcCreateProgram, (nvrtcProgram * program, const char *source, const char *name, int n_headers, \
                         const char *const *headers, const char *const *names))                       \
  X(nvrtcDestroyProgram, (nvrtcProgram * program))                                                    \
  X(nvrtcCompileProgram, (nvrtcProgram program, int n_options, const char *const *options))           \
  X(nvrtcGetCUBINSize, (nvrtcProgram program, size_t *bytes))                                         \
  X(nvrtcGetCUBIN, (nvrtcProgram program, char *cubin))                                               \
  X(nvrtcGetProgramLogSize, (nvrtcProgram program, size_t *bytes))                                    \
  X(nvrtcGetProgramLog, (nvrtcProgram program, char *log))

#endif
