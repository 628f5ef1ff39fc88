#if defined(__linux__)
#define _GNU_SOURCE
#endif
#include "program.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if !defined(_WIN32)
#include <dlfcn.h>
#endif

#include "nvidia.h"

/* ---- messages ---- */

static _Thread_local char message[2048];

const char *ml_cuda_message(void) { return message; }

ml_cuda_status ml_cuda_fail(ml_cuda_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

/* ---- libraries ---- */

#if defined(_WIN32)

void *ml_library_open(const char *name, bool only_if_loaded) { return (void)name, (void)only_if_loaded, NULL; }

static void *function_of(void *library, const char *name) { return (void)library, (void)name, NULL; }

#else

void *ml_library_open(const char *name, bool only_if_loaded) {
  return dlopen(name, RTLD_NOW | RTLD_LOCAL | (only_if_loaded ? RTLD_NOLOAD : 0));
}

static void *function_of(void *library, const char *name) { return dlsym(library, name); }

#endif

bool ml_library_functions(void *library, const char *const *names, size_t n, void *functions, const char **missing) {
  for (size_t i = 0; i < n; i++) {
    void *function = function_of(library, names[i]);
    *missing = names[i];
    if (!function) return false;
    memcpy((char *)functions + i * sizeof function, &function, sizeof function); /* ISO C has no cast for this */
  }
  return true;
}

/* ---- sources ---- */

static const struct {
  const char *file;
  bool hopper;
} sources[ML_N_SOURCES] = {
    [ML_PREPARE] = {"prepare.cu", false}, [ML_MIX] = {"mix.cu", false},  [ML_ROUTE] = {"route.cu", false},
    [ML_SHARED] = {"shared.cu", true},    [ML_DUAL] = {"dual.cu", true}, [ML_PROJECT] = {"project.cu", true},
    [ML_COLLECT] = {"collect.cu", true},  [ML_FEW] = {"few.cu", true},   [ML_DECODE] = {"decode.cu", true},
    [ML_DROPOUT] = {"dropout.cu", false},
};

const char *ml_source_name(ml_source source) { return sources[source].file; }

bool ml_source_for_hopper(ml_source source) { return sources[source].hopper; }

static bool is_source(const ml_file *file) {
  const char *ending = strrchr(file->name, '.');
  return strcmp(ending, ".cu") == 0;
}

static const char *text_of(ml_source source) {
  for (const ml_file *file = ml_cuda_files; file->name; file++)
    if (strcmp(file->name, sources[source].file) == 0) return (const char *)file->text;
  return NULL;
}

int ml_source_options(ml_source source, char names[ML_MAX_OPTIONS][ML_OPTION_BYTES]) {
  static const char opening[] = "//options:";
  const char *at = text_of(source);
  if (!at) return -1;
  if (strncmp(at, opening, sizeof opening - 1) != 0) return 0;
  at += sizeof opening - 1;
  for (int n = 0;; n++) {
    at += strspn(at, " ");
    size_t length = strcspn(at, " \r\n");
    if (length == 0 || n == ML_MAX_OPTIONS || length >= ML_OPTION_BYTES) return n;
    memcpy(names[n], at, length);
    names[n][length] = '\0';
    at += length;
  }
}

/* ---- NVRTC ---- */

#define POINTER(name, parameters) unsigned(*name) parameters;
#define NAME(name, parameters) #name,
static struct {
  ML_NVRTC_FUNCTIONS(POINTER)
} nvrtc;
static const char *const nvrtc_names[] = {ML_NVRTC_FUNCTIONS(NAME)};
enum { N_NVRTC = sizeof nvrtc_names / sizeof *nvrtc_names };
_Static_assert(sizeof nvrtc == N_NVRTC * sizeof(void *), "a table of pointers");

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of what follows */
static char nvrtc_place[ML_PATH_BYTES], cache_place[ML_PATH_BYTES];
static int nvrtc_major, nvrtc_minor; /* 0: not open */

void ml_cuda_set_places(const char *nvrtc_path, const char *cache) {
  pthread_mutex_lock(&lock);
  if (nvrtc_path) snprintf(nvrtc_place, sizeof nvrtc_place, "%s", nvrtc_path);
  if (cache) snprintf(cache_place, sizeof cache_place, "%s", cache);
  pthread_mutex_unlock(&lock);
}

/* Finds NVRTC and its functions; the caller holds the lock. */
static ml_cuda_status open_nvrtc(void) {
  static const char *const names[] = {"libnvrtc.so.13", "libnvrtc.so.12"};
  enum { N = sizeof names / sizeof *names };
  if (nvrtc_major) return ML_CUDA_OK;
  void *library = NULL;
  for (int i = 0; i < N && !library; i++) library = ml_library_open(names[i], true);
  if (!library && *nvrtc_place) library = ml_library_open(nvrtc_place, false);
  for (int i = 0; i < N && !library; i++) library = ml_library_open(names[i], false);
  if (!library)
    return ml_cuda_fail(ML_CUDA_NO_COMPILER,
                        "NVRTC, CUDA's run-time compiler (%s), is not found: pip install "
                        "nvidia-cuda-nvrtc, of the CUDA version that the driver supports",
                        names[0]);
  const char *missing;
  int major = 0;
  if (!ml_library_functions(library, nvrtc_names, N_NVRTC, &nvrtc, &missing))
    return ml_cuda_fail(ML_CUDA_NO_COMPILER, "the NVRTC that was found is too old: it has no %s", missing);
  if (nvrtc.nvrtcVersion(&major, &nvrtc_minor) != ML_NVRTC_SUCCESS || major < 12)
    return ml_cuda_fail(ML_CUDA_NO_COMPILER, "the NVRTC that was found is too old: version %d, 12 is needed", major);
  nvrtc_major = major;
  return ML_CUDA_OK;
}

ml_cuda_status ml_cuda_compiler(int *major, int *minor) {
  pthread_mutex_lock(&lock);
  ml_cuda_status status = open_nvrtc();
  *major = nvrtc_major;
  *minor = nvrtc_minor;
  pthread_mutex_unlock(&lock);
  return status;
}

ml_cuda_status ml_arch_for(ml_source source, int major, int minor, char arch[ML_ARCH_BYTES]) {
  int nvrtc_version[2], n = 0, archs[64], best = 0;
  ml_cuda_status status = ml_cuda_compiler(&nvrtc_version[0], &nvrtc_version[1]);
  if (status != ML_CUDA_OK) return status;
  if (sources[source].hopper) {
    if (major != 9)
      return ml_cuda_fail(ML_CUDA_UNSUPPORTED, "%s is for GPUs of capability 9.0, this one has %d.%d",
                          sources[source].file, major, minor);
    snprintf(arch, ML_ARCH_BYTES, "sm_90a");
    return ML_CUDA_OK;
  }
  /* The GPU may be younger than the compiler: binaries run on later minor versions, too. */
  if (nvrtc.nvrtcGetNumSupportedArchs(&n) == ML_NVRTC_SUCCESS && n <= (int)(sizeof archs / sizeof *archs) &&
      nvrtc.nvrtcGetSupportedArchs(archs) == ML_NVRTC_SUCCESS)
    for (int i = 0; i < n; i++)
      if (archs[i] / 10 == major && archs[i] % 10 <= minor && archs[i] > best) best = archs[i];
  if (!best)
    return ml_cuda_fail(ML_CUDA_UNSUPPORTED, "NVRTC %d.%d doesn't know GPUs of capability %d.%d", nvrtc_version[0],
                        nvrtc_version[1], major, minor);
  snprintf(arch, ML_ARCH_BYTES, "sm_%d", best);
  return ML_CUDA_OK;
}

/* ---- compiling ---- */

enum { FLAG_BYTES = 64, MAX_FLAGS = ML_MAX_OPTIONS + 3, MAX_HEADERS = 16 };

typedef struct {
  const char *name, *text;
  char flags[MAX_FLAGS][FLAG_BYTES];
  int n_flags;
} job;

/* How a variant is compiled for an architecture. */
static ml_cuda_status plan(job *j, const ml_variant *variant, const char *arch) {
  char options[ML_MAX_OPTIONS][ML_OPTION_BYTES];
  if ((unsigned)variant->source >= ML_N_SOURCES) return ml_cuda_fail(ML_CUDA_VALUE, "there is no such source");
  *j = (job){.name = sources[variant->source].file, .text = text_of(variant->source)};
  int n = ml_source_options(variant->source, options);
  if (n < 0) return ml_cuda_fail(ML_CUDA_UNSUPPORTED, "%s is no part of this build", j->name);
  for (int i = n; i < ML_MAX_OPTIONS; i++)
    if (variant->options[i] != 0)
      return ml_cuda_fail(ML_CUDA_VALUE, "%s names %d options, so option %d must be 0, not %d", j->name, n, i + 1,
                          variant->options[i]);
  if (strlen(arch) >= ML_ARCH_BYTES) return ml_cuda_fail(ML_CUDA_VALUE, "there is no architecture %s", arch);
  snprintf(j->flags[j->n_flags++], FLAG_BYTES, "--gpu-architecture=%s", arch);
  snprintf(j->flags[j->n_flags++], FLAG_BYTES, "--std=c++17");
  snprintf(j->flags[j->n_flags++], FLAG_BYTES, "--diag-suppress=177"); /* variables that other variants use */
  for (int i = 0; i < n; i++)
    snprintf(j->flags[j->n_flags++], FLAG_BYTES, "-D%.*s=%d", ML_OPTION_BYTES, options[i], variant->options[i]);
  return ML_CUDA_OK;
}

/* What the compiler wrote, to be freed; NULL: nothing. */
static char *log_of(nvrtcProgram program) {
  size_t bytes = 0;
  if (nvrtc.nvrtcGetProgramLogSize(program, &bytes) != ML_NVRTC_SUCCESS || bytes <= 1) return NULL;
  char *log = malloc(bytes);
  if (log && nvrtc.nvrtcGetProgramLog(program, log) != ML_NVRTC_SUCCESS) {
    free(log);
    return NULL;
  }
  return log;
}

static ml_cuda_status compile(const job *j, void **cubin, size_t *bytes, char **log) {
  const char *texts[MAX_HEADERS], *names[MAX_HEADERS], *flags[MAX_FLAGS];
  int n_headers = 0;
  for (const ml_file *file = ml_cuda_files; file->name; file++)
    if (!is_source(file) && n_headers < MAX_HEADERS) {
      names[n_headers] = file->name;
      texts[n_headers++] = (const char *)file->text;
    }
  for (int i = 0; i < j->n_flags; i++) flags[i] = j->flags[i];

  ml_cuda_status status = ML_CUDA_OK;
  nvrtcProgram program = NULL;
  unsigned result = nvrtc.nvrtcCreateProgram(&program, j->text, j->name, n_headers, texts, names);
  if (result == ML_NVRTC_SUCCESS) {
    result = nvrtc.nvrtcCompileProgram(program, j->n_flags, flags);
    *log = log_of(program);
  }
  if (result == ML_NVRTC_SUCCESS) result = nvrtc.nvrtcGetCUBINSize(program, bytes);
  if (result == ML_NVRTC_SUCCESS) {
    *cubin = malloc(*bytes);
    result = *cubin ? nvrtc.nvrtcGetCUBIN(program, *cubin) : ML_NVRTC_OUT_OF_MEMORY;
  }
  if (result != ML_NVRTC_SUCCESS) {
    status = ml_cuda_fail(result == ML_NVRTC_OUT_OF_MEMORY ? ML_CUDA_NO_MEMORY : ML_CUDA_COMPILE,
                          "NVRTC %d.%d doesn't compile %s, %s (error %u): %s", nvrtc_major, nvrtc_minor, j->name,
                          flags[0], result, *log ? *log : "it says nothing");
    free(*cubin);
    *cubin = NULL;
  }
  if (program) nvrtc.nvrtcDestroyProgram(&program);
  return status;
}

ml_cuda_status ml_variant_compile(const ml_variant *variant, const char *arch, void **cubin, size_t *bytes,
                                  char **log) {
  int major, minor;
  job j;
  *cubin = *log = NULL;
  ml_cuda_status status = ml_cuda_compiler(&major, &minor);
  if (status == ML_CUDA_OK) status = plan(&j, variant, arch);
  return status == ML_CUDA_OK ? compile(&j, cubin, bytes, log) : status;
}

/* All that a binary depends on, as a text; the files by a hash. */
static void key_of(char *key, size_t size, const job *j, int driver) {
  uint64_t files = ml_hash(ML_HASH_START, j->text, strlen(j->text));
  for (const ml_file *file = ml_cuda_files; file->name; file++)
    if (!is_source(file)) {
      files = ml_hash(files, file->name, strlen(file->name) + 1);
      files = ml_hash(files, file->text, strlen((const char *)file->text) + 1);
    }
  int used = snprintf(key, size, "%s %016llx NVRTC %d.%d driver %d", j->name, (unsigned long long)files, nvrtc_major,
                      nvrtc_minor, driver);
  for (int i = 0; i < j->n_flags && used > 0 && (size_t)used < size; i++)
    used += snprintf(key + used, size - (size_t)used, " %s", j->flags[i]);
}

bool ml_cuda_cache(char folder[ML_PATH_BYTES]) {
  char place[ML_PATH_BYTES];
  pthread_mutex_lock(&lock);
  memcpy(place, cache_place, sizeof place);
  pthread_mutex_unlock(&lock);
  return ml_cache_folder(*place ? place : NULL, folder);
}

ml_cuda_status ml_cubin_of(const ml_variant *variant, const char *arch, int driver, void **cubin, size_t *bytes) {
  char key[ML_KEY_BYTES], folder[ML_PATH_BYTES], *log = NULL;
  int major, minor;
  job j;
  *cubin = NULL;
  ml_cuda_status status = ml_cuda_compiler(&major, &minor);
  if (status == ML_CUDA_OK) status = plan(&j, variant, arch);
  if (status != ML_CUDA_OK) return status;
  key_of(key, sizeof key, &j, driver);
  bool cached = ml_cuda_cache(folder);
  if (cached) *cubin = ml_cache_read(folder, key, bytes);
  if (*cubin) return ML_CUDA_OK;
  status = compile(&j, cubin, bytes, &log);
  if (status == ML_CUDA_OK && cached) ml_cache_write(folder, key, *cubin, *bytes);
  free(log);
  return status;
}
