/* From sources to binaries, without a GPU: what driver.c and the border use of program.c and cache.c. */
#ifndef MOELORA_PROGRAM_H
#define MOELORA_PROGRAM_H

#include "driver.h"

/* Sets this thread's ml_cuda_message and returns status. */
__attribute__((format(printf, 2, 3))) ml_cuda_status ml_cuda_fail(ml_cuda_status status, const char *format, ...);

/* A shared library, and a function of one; NULL: there is none. The library is kept. */
void *ml_library_open(const char *name, bool only_if_loaded);
bool ml_library_functions(void *library, const char *const *names, size_t n, void *functions, const char **missing);

/* The version of CUDA that the driver supports, 1000 major + 10 minor, and how many GPUs it offers; opens it. */
ml_cuda_status ml_cuda_driver(int *version, int *n_gpus);

/* ---- sources ---- */

/* A file of csrc/cuda; setup.py writes their list: sources (.cu) and what they include. The last has no name. */
typedef struct {
  const char *name;
  const unsigned char *text; /* ends with a NUL */
} ml_file;
extern const ml_file ml_cuda_files[];

enum { ML_ARCH_BYTES = 16, ML_OPTION_BYTES = 32 };

const char *ml_source_name(ml_source source); /* of its file */
bool ml_source_for_hopper(ml_source source);  /* whether it uses what sm_90a alone has */

/* The names of a source's options; their number, or -1 where this build has no such file. */
int ml_source_options(ml_source source, char names[ML_MAX_OPTIONS][ML_OPTION_BYTES]);

/* ---- compiling ---- */

enum { ML_PATH_BYTES = 4096, ML_KEY_BYTES = 488 };

/* NVRTC's version, which opens it. */
ml_cuda_status ml_cuda_compiler(int *major, int *minor);

/* The architecture that a source is compiled for, to run on GPUs of capability major.minor. */
ml_cuda_status ml_arch_for(ml_source source, int major, int minor, char arch[ML_ARCH_BYTES]);

/* A variant's binary: from the cache, else compiled and put there. The caller frees it. Binaries of different drivers
 * don't mix; 0: without a driver. */
ml_cuda_status ml_cubin_of(const ml_variant *variant, const char *arch, int driver, void **cubin, size_t *bytes);

/* The folder of the cache; false: there is none. */
bool ml_cuda_cache(char folder[ML_PATH_BYTES]);

/* ---- cache.c: compiled kernels on disk, files named by a hash of their keys ----
 *
 * Processes may use one folder at once. Nothing here is an error: what can't be read or trusted isn't there, what can't be
 * written is not written. A key is a text of less than ML_KEY_BYTES. */

/* The folder: `given`, where not NULL, else from the environment; false: there is none. It may not exist yet. */
bool ml_cache_folder(const char *given, char folder[ML_PATH_BYTES]);

/* What was put under that key, to be freed; NULL: nothing. */
void *ml_cache_read(const char *folder, const char *key, size_t *bytes);
void ml_cache_write(const char *folder, const char *key, const void *data, size_t bytes);

/* FNV-1a, from what came before or ML_HASH_START. */
#define ML_HASH_START 0xcbf29ce484222325u
uint64_t ml_hash(uint64_t hash, const void *data, size_t bytes);

#endif
