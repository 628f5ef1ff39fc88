/* What moelora uses of a CUDA driver and of NVRTC, which are opened at run time: nothing here needs a toolkit, a GPU or
 * a header of NVIDIA's to compile, and nothing links to them.
 *
 * No function aborts or prints. What fails returns an ml_cuda_status; ml_cuda_message() then has a sentence, of this
 * thread's last failure, that says what was tried and what the driver or the compiler answered.
 */
#ifndef MOELORA_DRIVER_H
#define MOELORA_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
  ML_CUDA_OK = 0,
  ML_CUDA_NO_DRIVER,   /* no libcuda, or one that is too old */
  ML_CUDA_NO_COMPILER, /* no NVRTC */
  ML_CUDA_NO_DEVICE,   /* no such GPU */
  ML_CUDA_OLD_DEVICE,  /* compute capability below 8.0 */
  ML_CUDA_COMPILE,     /* NVRTC refused a source: a defect of ours or a compiler that is too old */
  ML_CUDA_DRIVER,      /* the driver refused a call */
  ML_CUDA_NO_MEMORY,
  ML_CUDA_VALUE,      /* an argument makes no sense */
  ML_CUDA_UNSUPPORTED /* no kernel for this shape, dtype or GPU: torch's operations do it */
} ml_cuda_status;

const char *ml_cuda_message(void); /* never NULL; of the calling thread */

/* ---- the GPU ---- */

typedef struct {
  int ordinal, major, minor, multiprocessors;
  int shared_bytes; /* a block's largest dynamic shared memory */
} ml_gpu;

/* Opens the driver at the first call. *gpu lives as long as the process. */
ml_cuda_status ml_gpu_at(int ordinal, const ml_gpu **gpu);

/* Where NVRTC and the cache of compiled kernels are looked for; NULL leaves a place as it was, "" takes it back. Copies are
 * made. NVRTC's places, in this order: libraries that this process has loaded, `nvrtc` (the path of a libnvrtc), the
 * dynamic loader's own search. The cache is `cache`, else $MOELORA_CACHE, else $XDG_CACHE_HOME/moelora, else
 * ~/.cache/moelora. */
void ml_cuda_set_places(const char *nvrtc, const char *cache);

/* ---- kernels ---- */

/* The sources that are embedded, by the names of their files. */
typedef enum {
  ML_PREPARE,
  ML_MIX,
  ML_ROUTE,
  ML_DUAL,
  ML_SHARED,
  ML_PROJECT,
  ML_COLLECT,
  ML_FEW,
  ML_DECODE,
  ML_DROPOUT,
  ML_N_SOURCES
} ml_source;

/* One compiled form of a source: the GPU's architecture and the values of the macros that the source names in its first
 * line, as in "//options: ML_F16 ML_COLS". Options that a source doesn't name are 0. */
enum { ML_MAX_OPTIONS = 6 };
typedef struct {
  ml_source source;
  int16_t options[ML_MAX_OPTIONS];
} ml_variant;

typedef struct ml_kernel ml_kernel; /* for the GPUs that it was asked for; lives as long as the process */

/* The function `entry` of a variant: from memory, from the cache on disk, or compiled now (about a second). Thread-safe.
 * A variant that failed once fails at once from then on. `shared_bytes`: dynamic shared memory it may be launched with. */
ml_cuda_status ml_kernel_of(const ml_gpu *gpu, const ml_variant *variant, const char *entry, int shared_bytes,
                            ml_kernel **kernel);

/* Compiles a variant for an architecture such as "sm_90a" without a driver or a GPU, past the cache. *cubin, and *log where
 * there is anything to say, the compiler's text, are the caller's to free. */
ml_cuda_status ml_variant_compile(const ml_variant *variant, const char *arch, void **cubin, size_t *bytes, char **log);

/* ---- launches ---- */

typedef struct {
  unsigned grid, block, shared_bytes;
  unsigned cluster; /* blocks in a cluster, 0 or 1: none */
  bool early; /* may start before the kernel launched before it has ended (programmatic dependent launch): it waits by
                       griddepcontrol.wait */
} ml_launch;

/* On `stream` of the GPU, whatever context the calling thread has: a CUstream of its primary context. `arguments`: a
 * pointer to each, as cuLaunchKernelEx takes them. */
ml_cuda_status ml_launch_kernel(const ml_gpu *gpu, ml_kernel *kernel, const ml_launch *launch, void *stream,
                                void **arguments);

/* A CUtensorMap: a matrix [rows, cols] of 16-bit elements that the copy engine reads or writes in boxes [box_rows, 64],
 * in the 128-byte swizzle; what lies outside is read as zeros, and not written. data and row_bytes: multiples of 16. For a
 * kernel on that GPU, whatever context the calling thread has. */
typedef struct {
  _Alignas(64) uint64_t words[16];
} ml_tensor_map;
ml_cuda_status ml_tensor_map_of(const ml_gpu *gpu, ml_tensor_map *map, bool f16, const void *data, int64_t rows,
                                int64_t cols, int64_t row_bytes, int box_rows);

#endif
