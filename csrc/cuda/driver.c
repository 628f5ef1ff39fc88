#include "driver.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "nvidia.h"
#include "program.h"

/* ---- the driver ---- */

#define POINTER(name, parameters) unsigned(*name) parameters;
#define NAME(name, parameters) #name,
static struct {
  ML_CU_FUNCTIONS(POINTER)
} cu;
static const char *const cu_names[] = {ML_CU_FUNCTIONS(NAME)};
enum { N_CU = sizeof cu_names / sizeof *cu_names };
_Static_assert(sizeof cu == N_CU * sizeof(void *), "a table of pointers");

enum { LEAST_DRIVER = 12000, MAX_GPUS = 64 };

static struct {
  ml_cuda_status status;
  char *message; /* of a status that is not OK */
  int version, n_gpus;
} driver;

/* The driver refused `what`. */
static ml_cuda_status refused(unsigned result, const char *what) {
  const char *text = NULL;
  cu.cuGetErrorString(result, &text);
  return ml_cuda_fail(result == ML_CU_OUT_OF_MEMORY ? ML_CUDA_NO_MEMORY : ML_CUDA_DRIVER,
                      "the NVIDIA driver refused %s: error %u, %s", what, result, text ? text : "unknown");
}

static ml_cuda_status open_driver(void) {
  void *library = ml_library_open("libcuda.so.1", false);
  const char *missing;
  if (!library) return ml_cuda_fail(ML_CUDA_NO_DRIVER, "there is no NVIDIA driver (libcuda.so.1)");
  if (!ml_library_functions(library, cu_names, N_CU, &cu, &missing))
    return ml_cuda_fail(ML_CUDA_NO_DRIVER, "the NVIDIA driver is too old: it has no %s", missing);
  unsigned result = cu.cuDriverGetVersion(&driver.version);
  if (result != ML_CU_SUCCESS) return refused(result, "cuDriverGetVersion");
  if (driver.version < LEAST_DRIVER)
    return ml_cuda_fail(ML_CUDA_NO_DRIVER, "the NVIDIA driver is too old: it supports CUDA %d.%d, 12.0 is needed",
                        driver.version / 1000, driver.version % 1000 / 10);
  result = cu.cuInit(0);
  if (result == ML_CU_NO_DEVICE) return ml_cuda_fail(ML_CUDA_NO_DEVICE, "the NVIDIA driver has no GPU to offer");
  if (result != ML_CU_SUCCESS) return refused(result, "cuInit");
  result = cu.cuDeviceGetCount(&driver.n_gpus);
  return result == ML_CU_SUCCESS ? ML_CUDA_OK : refused(result, "cuDeviceGetCount");
}

static void open_once(void) {
  driver.status = open_driver();
  if (driver.status != ML_CUDA_OK) driver.message = strdup(ml_cuda_message());
}

static ml_cuda_status again(ml_cuda_status status, const char *message) {
  return ml_cuda_fail(status, "%s", message ? message : "there is no memory for a message");
}

ml_cuda_status ml_cuda_driver(int *version, int *n_gpus) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, open_once);
  *version = driver.version;
  *n_gpus = driver.n_gpus;
  return driver.status == ML_CUDA_OK ? ML_CUDA_OK : again(driver.status, driver.message);
}

/* ---- GPUs ---- */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all that is written below */

static struct {
  ml_gpu gpu;
  _Atomic bool known;
  CUdevice device;
  _Atomic(CUcontext) context; /* the primary one; NULL until it is wanted, since it takes memory of the GPU */
} gpus[MAX_GPUS];

static ml_cuda_status read_gpu(int ordinal) {
  static const unsigned attributes[] = {ML_CU_DEVICE_MAJOR, ML_CU_DEVICE_MINOR, ML_CU_DEVICE_MULTIPROCESSORS,
                                        ML_CU_DEVICE_SHARED_BYTES};
  ml_gpu *gpu = &gpus[ordinal].gpu;
  int *values[] = {&gpu->major, &gpu->minor, &gpu->multiprocessors, &gpu->shared_bytes};
  gpu->ordinal = ordinal;
  unsigned result = cu.cuDeviceGet(&gpus[ordinal].device, ordinal);
  for (int i = 0; i < 4 && result == ML_CU_SUCCESS; i++)
    result = cu.cuDeviceGetAttribute(values[i], attributes[i], gpus[ordinal].device);
  return result == ML_CU_SUCCESS ? ML_CUDA_OK : refused(result, "to describe a GPU");
}

ml_cuda_status ml_gpu_at(int ordinal, const ml_gpu **gpu) {
  if (ordinal < 0 || ordinal >= MAX_GPUS || !atomic_load_explicit(&gpus[ordinal].known, memory_order_acquire)) {
    int version, n_gpus;
    ml_cuda_status status = ml_cuda_driver(&version, &n_gpus);
    if (status != ML_CUDA_OK) return status;
    if (ordinal < 0 || ordinal >= n_gpus || ordinal >= MAX_GPUS)
      return ml_cuda_fail(ML_CUDA_NO_DEVICE, "there is no GPU %d: the NVIDIA driver offers %d", ordinal, n_gpus);
    pthread_mutex_lock(&lock);
    status = read_gpu(ordinal);
    if (status == ML_CUDA_OK) atomic_store_explicit(&gpus[ordinal].known, true, memory_order_release);
    pthread_mutex_unlock(&lock);
    if (status != ML_CUDA_OK) return status;
  }
  *gpu = &gpus[ordinal].gpu;
  if ((*gpu)->major < 8)
    return ml_cuda_fail(ML_CUDA_OLD_DEVICE, "GPU %d has compute capability %d.%d, 8.0 is needed", ordinal,
                        (*gpu)->major, (*gpu)->minor);
  return ML_CUDA_OK;
}

/* The caller holds the lock. */
static unsigned retain(const ml_gpu *gpu) {
  CUcontext context = atomic_load_explicit(&gpus[gpu->ordinal].context, memory_order_relaxed);
  if (context) return ML_CU_SUCCESS;
  unsigned result = cu.cuDevicePrimaryCtxRetain(&context, gpus[gpu->ordinal].device);
  if (result == ML_CU_SUCCESS) atomic_store_explicit(&gpus[gpu->ordinal].context, context, memory_order_release);
  return result;
}

/* Makes the GPU's context, which is retained, that of this thread, unless it is; *pushed: leave it again. */
static unsigned enter(const ml_gpu *gpu, bool *pushed) {
  CUcontext current = NULL, context = atomic_load_explicit(&gpus[gpu->ordinal].context, memory_order_acquire);
  *pushed = false;
  unsigned result = cu.cuCtxGetCurrent(&current);
  if (result != ML_CU_SUCCESS || current == context) return result;
  result = cu.cuCtxPushCurrent_v2(context);
  *pushed = result == ML_CU_SUCCESS;
  return result;
}

static void leave(bool pushed) {
  CUcontext context;
  if (pushed) cu.cuCtxPopCurrent_v2(&context);
}

/* ---- kernels ---- */

/* A variant that was compiled for GPUs of one capability, or why it could not be. */
typedef struct program {
  struct program *next;
  ml_variant variant;
  int major, minor;
  ml_cuda_status status;
  char *message;
  CUlibrary library;
} program;

struct ml_kernel {
  ml_kernel *next; /* in its bucket */
  ml_variant variant;
  int major, minor;
  const char *entry;
  CUkernel kernel;
  struct {
    _Atomic(CUfunction) function; /* NULL: not made ready there */
    _Atomic int shared_bytes;
  } on[MAX_GPUS];
};

static program *programs;

/* Kernels are added under the lock, before the first of their bucket, and never removed or changed; so they are read
 * without it. */
enum { N_BUCKETS = 256 };
static _Atomic(ml_kernel *) buckets[N_BUCKETS];

static bool same_variant(const ml_variant *a, const ml_variant *b) {
  _Static_assert(sizeof *a == sizeof a->source + sizeof a->options, "without padding");
  return memcmp(a, b, sizeof *a) == 0;
}

static _Atomic(ml_kernel *) *bucket_of(const ml_gpu *gpu, const ml_variant *variant) {
  uint64_t words[2];
  _Static_assert(sizeof words == sizeof *variant, "two words");
  memcpy(words, variant, sizeof words);
  uint64_t hash = (words[0] * 31 + words[1] + (uint64_t)(gpu->major * 16 + gpu->minor)) * 0x9e3779b97f4a7c15u;
  return &buckets[hash >> 56];
}

static ml_kernel *find(ml_kernel *from, const ml_gpu *gpu, const ml_variant *variant, const char *entry) {
  for (; from; from = from->next)
    if (same_variant(&from->variant, variant) && from->major == gpu->major && from->minor == gpu->minor &&
        strcmp(from->entry, entry) == 0)
      return from;
  return NULL;
}

static ml_cuda_status load(program *p) {
  char arch[ML_ARCH_BYTES];
  void *cubin = NULL;
  size_t bytes = 0;
  ml_cuda_status status = ml_arch_for(p->variant.source, p->major, p->minor, arch);
  if (status == ML_CUDA_OK) status = ml_cubin_of(&p->variant, arch, driver.version, &cubin, &bytes);
  if (status != ML_CUDA_OK) return status;
  unsigned result = cu.cuLibraryLoadData(&p->library, cubin, NULL, NULL, 0, NULL, NULL, 0);
  free(cubin);
  return result == ML_CU_SUCCESS ? ML_CUDA_OK : refused(result, ml_source_name(p->variant.source));
}

/* Whether the next try may do better: a GPU that was full or busy. */
static bool passes(ml_cuda_status status) { return status == ML_CUDA_NO_MEMORY || status == ML_CUDA_DRIVER; }

static ml_cuda_status no_memory(void) { return ml_cuda_fail(ML_CUDA_NO_MEMORY, "there is no memory for a kernel"); }

/* The program of a variant; one that can't be is kept, too, for its compiler would be asked in vain each time. The caller
 * holds the lock. */
static ml_cuda_status program_of(const ml_gpu *gpu, const ml_variant *variant, program **found) {
  for (program *p = programs; p; p = p->next)
    if (same_variant(&p->variant, variant) && p->major == gpu->major && p->minor == gpu->minor) {
      *found = p;
      return p->status == ML_CUDA_OK ? ML_CUDA_OK : again(p->status, p->message);
    }
  program *p = *found = calloc(1, sizeof *p);
  if (!p) return no_memory();
  *p = (program){.next = programs, .variant = *variant, .major = gpu->major, .minor = gpu->minor};
  ml_cuda_status status = p->status = load(p);
  if (passes(status)) {
    free(p);
    return status;
  }
  if (status != ML_CUDA_OK) p->message = strdup(ml_cuda_message());
  programs = p;
  return status;
}

/* Adds a kernel. The caller holds the lock. */
static ml_cuda_status add(const ml_gpu *gpu, const ml_variant *variant, const char *entry, ml_kernel **added) {
  program *p;
  ml_cuda_status status = program_of(gpu, variant, &p);
  if (status != ML_CUDA_OK) return status;
  CUkernel loaded;
  unsigned result = cu.cuLibraryGetKernel(&loaded, p->library, entry);
  if (result != ML_CU_SUCCESS) return refused(result, entry);
  ml_kernel *kernel = *added = calloc(1, sizeof *kernel);
  char *name = kernel ? strdup(entry) : NULL;
  if (!name) {
    free(kernel);
    return no_memory();
  }
  kernel->variant = *variant;
  kernel->major = gpu->major;
  kernel->minor = gpu->minor;
  kernel->entry = name;
  kernel->kernel = loaded;
  _Atomic(ml_kernel *) *bucket = bucket_of(gpu, variant);
  kernel->next = atomic_load_explicit(bucket, memory_order_relaxed);
  atomic_store_explicit(bucket, kernel, memory_order_release);
  return ML_CUDA_OK;
}

/* Readies a kernel for a GPU: what is loaded lazily is loaded now. The caller holds the lock. */
static ml_cuda_status ready(const ml_gpu *gpu, ml_kernel *kernel, int shared_bytes) {
  int at = gpu->ordinal;
  CUfunction function = NULL;
  bool pushed = false;
  unsigned result = retain(gpu);
  if (result == ML_CU_SUCCESS) result = enter(gpu, &pushed);
  if (result == ML_CU_SUCCESS)
    result = cu.cuKernelSetAttribute(ML_CU_FUNCTION_SHARED_BYTES, shared_bytes, kernel->kernel, gpus[at].device);
  /* A multiprocessor divides its memory anew only while it is idle; a kernel that starts early is to find it divided so. */
  if (result == ML_CU_SUCCESS)
    result = cu.cuKernelSetAttribute(ML_CU_FUNCTION_SHARED_PERCENT, 100, kernel->kernel, gpus[at].device);
  if (result == ML_CU_SUCCESS) result = cu.cuKernelGetFunction(&function, kernel->kernel);
  leave(pushed);
  if (result != ML_CU_SUCCESS) return refused(result, kernel->entry);
  atomic_store_explicit(&kernel->on[at].shared_bytes, shared_bytes, memory_order_release);
  atomic_store_explicit(&kernel->on[at].function, function, memory_order_release);
  return ML_CUDA_OK;
}

static bool is_ready(const ml_gpu *gpu, ml_kernel *kernel, int shared_bytes) {
  return atomic_load_explicit(&kernel->on[gpu->ordinal].function, memory_order_acquire) &&
         atomic_load_explicit(&kernel->on[gpu->ordinal].shared_bytes, memory_order_acquire) >= shared_bytes;
}

ml_cuda_status ml_kernel_of(const ml_gpu *gpu, const ml_variant *variant, const char *entry, int shared_bytes,
                            ml_kernel **kernel) {
  _Atomic(ml_kernel *) *bucket = bucket_of(gpu, variant);
  ml_kernel *found = find(atomic_load_explicit(bucket, memory_order_acquire), gpu, variant, entry);
  if (found && is_ready(gpu, found, shared_bytes)) {
    *kernel = found;
    return ML_CUDA_OK;
  }
  ml_cuda_status status = ML_CUDA_OK;
  pthread_mutex_lock(&lock);
  found = find(atomic_load_explicit(bucket, memory_order_relaxed), gpu, variant, entry);
  if (!found) status = add(gpu, variant, entry, &found);
  if (status == ML_CUDA_OK && !is_ready(gpu, found, shared_bytes)) status = ready(gpu, found, shared_bytes);
  pthread_mutex_unlock(&lock);
  *kernel = found;
  return status;
}

/* ---- launches ---- */

ml_cuda_status ml_launch_kernel(const ml_gpu *gpu, ml_kernel *kernel, const ml_launch *launch, void *stream,
                                void **arguments) {
  CUfunction function = atomic_load_explicit(&kernel->on[gpu->ordinal].function, memory_order_acquire);
  if (!function) return ml_cuda_fail(ML_CUDA_VALUE, "%s was not asked for on GPU %d", kernel->entry, gpu->ordinal);
  ml_cu_launch_attribute attributes[2];
  ml_cu_launch_config config = {.grid = {launch->grid, 1, 1},
                                .block = {launch->block, 1, 1},
                                .shared_bytes = launch->shared_bytes,
                                .stream = stream,
                                .attributes = attributes};
  if (launch->cluster > 1) {
    ml_cu_launch_attribute *cluster = &attributes[config.n_attributes++];
    cluster->id = ML_CU_LAUNCH_CLUSTER;
    cluster->value.cluster.x = launch->cluster;
    cluster->value.cluster.y = cluster->value.cluster.z = 1;
  }
  if (launch->early) {
    ml_cu_launch_attribute *early = &attributes[config.n_attributes++];
    early->id = ML_CU_LAUNCH_EARLY;
    early->value.early = 1;
  }
  bool pushed;
  unsigned result = enter(gpu, &pushed);
  if (result == ML_CU_SUCCESS)
    result = cu.cuLaunchKernelEx((const struct CUlaunchConfig_st *)&config, function, arguments, NULL);
  leave(pushed);
  return result == ML_CU_SUCCESS ? ML_CUDA_OK : refused(result, kernel->entry);
}

ml_cuda_status ml_tensor_map_of(const ml_gpu *gpu, ml_tensor_map *map, bool f16, const void *data, int64_t rows,
                                int64_t cols, int64_t row_bytes, int box_rows) {
  uint64_t dims[] = {(uint64_t)cols, (uint64_t)rows}, strides[] = {(uint64_t)row_bytes};
  uint32_t box[] = {64, (uint32_t)box_rows}, steps[] = {1, 1};
  void *address;
  memcpy(&address, &data, sizeof address); /* the driver only writes it down */
  unsigned result = ML_CU_SUCCESS;
  if (!atomic_load_explicit(&gpus[gpu->ordinal].context, memory_order_acquire)) {
    pthread_mutex_lock(&lock);
    result = retain(gpu);
    pthread_mutex_unlock(&lock);
  }
  bool pushed = false; /* a thread of autograd's may have no context yet, and without one the driver refuses */
  if (result == ML_CU_SUCCESS) result = enter(gpu, &pushed);
  if (result == ML_CU_SUCCESS)
    result = cu.cuTensorMapEncodeTiled((struct CUtensorMap_st *)map, f16 ? ML_CU_TENSOR_F16 : ML_CU_TENSOR_BF16, 2,
                                       address, dims, strides, box, steps, ML_CU_TENSOR_PLAIN, ML_CU_TENSOR_SWIZZLE_128,
                                       ML_CU_TENSOR_L2_256, ML_CU_TENSOR_PLAIN);
  leave(pushed);
  return result == ML_CU_SUCCESS ? ML_CUDA_OK : refused(result, "a tensor map");
}
