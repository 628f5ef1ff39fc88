/* csrc/cuda/driver.c over fake_driver.c, with two GPUs of capability 9.0 and real binaries: test_driver NVRTC, its path.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_driver.h"
#include "program.h"

static const char mix[] =
    "//options: ML_VALUE\n"
    "#include \"arguments.h\"\n"
    "extern \"C\" __global__ void fill(int *at, int n) { if (n) *at = ML_VALUE + OTHER; }\n"
    "extern \"C\" __global__ void fill_twice(int *at) { at[0] = at[1] = ML_VALUE; }\n";
static const char broken[] = "//options: ML_VALUE\n__global__ void broken() { missing(); }\n";
const ml_file ml_cuda_files[] = {{"mix.cu", (const unsigned char *)mix},
                                 {"route.cu", (const unsigned char *)broken},
                                 {"dual.cu", (const unsigned char *)mix},
                                 {"arguments.h", (const unsigned char *)"enum { OTHER = 3 };\n"},
                                 {NULL, NULL}};

static fake_state *fake;
static int failures;

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      failures++;                                                                        \
      printf("%s:%d: not %s (%s)\n", __FILE__, __LINE__, #condition, ml_cuda_message()); \
    }                                                                                    \
  } while (0)
#define OK(call) CHECK((call) == ML_CUDA_OK)
#define SAYS(text) CHECK(strstr(ml_cuda_message(), text))

static CUcontext context_of(int ordinal) { return (CUcontext)(intptr_t)(1000 * (ordinal + 7)); }

/* What of libcuda the test itself calls. */
static unsigned (*push)(CUcontext), (*pop)(CUcontext *), (*current)(CUcontext *);

static void open_fake(void) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  const char *const names[] = {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuCtxGetCurrent"}, *missing;
  void *functions[3];
  if (!library || !ml_library_functions(library, names, 3, functions, &missing)) abort();
  memcpy(&push, &functions[0], sizeof push);
  memcpy(&pop, &functions[1], sizeof pop);
  memcpy(&current, &functions[2], sizeof current);
  fake = dlsym(library, "fake");
}

static const ml_gpu *gpu(int ordinal) {
  const ml_gpu *found = NULL;
  OK(ml_gpu_at(ordinal, &found));
  return found;
}

static void test_gpus(void) {
  const ml_gpu *none = NULL;
  CHECK(gpu(1)->ordinal == 1 && gpu(1)->major == 9 && gpu(1)->minor == 0 && gpu(1)->multiprocessors == 108);
  CHECK(gpu(1)->shared_bytes == 232448 && gpu(0) != gpu(1) && gpu(1) == gpu(1));
  for (int ordinal = -1; ordinal <= 1000; ordinal += ordinal == -1 ? 3 : 499) {
    CHECK(ml_gpu_at(ordinal, &none) == ML_CUDA_NO_DEVICE);
    SAYS("the NVIDIA driver offers 2");
  }
  CHECK(fake->retains == 0); /* looking takes no memory of a GPU */
}

static void test_a_launch(void) {
  ml_kernel *kernel = NULL;
  CUcontext now = NULL;
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {5}}, "fill", 100000, &kernel));
  CHECK(fake->shared_bytes == 100000 && fake->retains == 1);
  int n = 42;
  void *arguments[] = {&n}, *stream = &n;
  ml_launch plain = {.grid = 3, .block = 64, .shared_bytes = 1000};
  OK(ml_launch_kernel(gpu(0), kernel, &plain, stream, arguments));
  const ml_cu_launch_config *config = &fake->config;
  CHECK(config->grid[0] == 3 && config->grid[1] == 1 && config->grid[2] == 1);
  CHECK(config->block[0] == 64 && config->block[1] == 1 && config->block[2] == 1);
  CHECK(config->shared_bytes == 1000 && config->stream == stream && config->n_attributes == 0);
  CHECK(fake->argument == 42 && fake->context == context_of(0));
  current(&now);
  CHECK(now == NULL);

  ml_launch early = {.grid = 8, .block = 32, .cluster = 4, .early = true};
  push(context_of(1)); /* another GPU's stays what it was */
  OK(ml_launch_kernel(gpu(0), kernel, &early, stream, arguments));
  CHECK(config->n_attributes == 2);
  CHECK(fake->attributes[0].id == ML_CU_LAUNCH_CLUSTER && fake->attributes[0].value.cluster.x == 4);
  CHECK(fake->attributes[0].value.cluster.y == 1 && fake->attributes[0].value.cluster.z == 1);
  CHECK(fake->attributes[1].id == ML_CU_LAUNCH_EARLY && fake->attributes[1].value.early == 1);
  CHECK(fake->context == context_of(0));
  current(&now);
  CHECK(now == context_of(1));

  CHECK(ml_launch_kernel(gpu(1), kernel, &plain, stream, arguments) == ML_CUDA_VALUE);
  SAYS("fill was not asked for on GPU 1");
  ml_kernel *same = NULL;
  OK(ml_kernel_of(gpu(1), &(ml_variant){ML_MIX, {5}}, "fill", 0, &same));
  CHECK(same == kernel && fake->loads == 1);
  OK(ml_launch_kernel(gpu(1), kernel, &plain, stream, arguments));
  CHECK(fake->context == context_of(1));

  fake->answer = 999;
  CHECK(ml_launch_kernel(gpu(0), kernel, &plain, stream, arguments) == ML_CUDA_DRIVER);
  SAYS("the NVIDIA driver refused fill: error 999, it is broken");
  fake->answer = ML_CU_OUT_OF_MEMORY;
  CHECK(ml_launch_kernel(gpu(0), kernel, &plain, stream, arguments) == ML_CUDA_NO_MEMORY);
  fake->answer = 0;
  current(&now);
  CHECK(now == context_of(1)); /* after a failure, too */
  pop(&now);
}

static void test_kernels(void) {
  ml_kernel *fill = NULL, *twice = NULL, *other = NULL, *none = NULL;
  int loads = fake->loads;
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "fill", 0, &fill));
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "fill_twice", 0, &twice));
  CHECK(fill != twice && fake->loads == loads + 1); /* one binary has both */
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {7}}, "fill", 0, &other));
  CHECK(other != fill && fake->loads == loads + 2);
  fake->shared_bytes = -1;
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "fill", 0, &other));
  CHECK(other == fill && fake->shared_bytes == -1); /* nothing is done again, but what is more than before */
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "fill", 2000, &other));
  CHECK(other == fill && fake->shared_bytes == 2000);
  CHECK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "fill", 1 << 20, &other) == ML_CUDA_DRIVER);
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "fill", 1000, &other));
  CHECK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6}}, "nothing", 0, &none) == ML_CUDA_DRIVER);
  SAYS("the NVIDIA driver refused nothing: error 500");
  CHECK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {6, 1}}, "fill", 0, &none) == ML_CUDA_VALUE);
  CHECK(ml_kernel_of(gpu(0), &(ml_variant){ML_COLLECT, {0}}, "fill", 0, &none) == ML_CUDA_UNSUPPORTED);
  SAYS("collect.cu is no part of this build");
}

static void test_what_fails_once_fails_at_once(void) {
  ml_kernel *none = NULL;
  char first[2048];
  CHECK(ml_kernel_of(gpu(0), &(ml_variant){ML_ROUTE, {1}}, "broken", 0, &none) == ML_CUDA_COMPILE);
  SAYS("doesn't compile route.cu, --gpu-architecture=sm_90 ");
  SAYS("identifier \"missing\" is undefined");
  snprintf(first, sizeof first, "%s", ml_cuda_message());
  struct timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < 1000; i++)
    CHECK(ml_kernel_of(gpu(i % 2), &(ml_variant){ML_ROUTE, {1}}, "broken", 0, &none) == ML_CUDA_COMPILE);
  clock_gettime(CLOCK_MONOTONIC, &end);
  CHECK(end.tv_sec - start.tv_sec < 2); /* a compiler would take more than a minute */
  CHECK(strcmp(first, ml_cuda_message()) == 0);
}

static void test_what_passes_is_tried_again(void) {
  ml_kernel *kernel = NULL;
  int loads = fake->loads;
  for (int i = 0; i < 2; i++) {
    fake->answer_to_load = i == 0 ? ML_CU_OUT_OF_MEMORY : 999;
    CHECK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {8}}, "fill", 0, &kernel) ==
          (i == 0 ? ML_CUDA_NO_MEMORY : ML_CUDA_DRIVER));
    SAYS("the NVIDIA driver refused mix.cu");
  }
  fake->answer_to_load = 0;
  OK(ml_kernel_of(gpu(0), &(ml_variant){ML_MIX, {8}}, "fill", 0, &kernel));
  CHECK(fake->loads == loads + 1);
}

static void *ask(void *failed) {
  char before[2048];
  snprintf(before, sizeof before, "%s", ml_cuda_message());
  if (*before) ++*(int *)failed; /* of another thread */
  for (int i = 0; i < 200; i++) {
    ml_kernel *kernel = NULL;
    ml_variant variant = {ML_DUAL, {(int16_t)(i % 4)}};
    int n = i;
    void *arguments[] = {&n};
    if (ml_kernel_of(gpu(i / 4 % 2), &variant, "fill", 0, &kernel) != ML_CUDA_OK ||
        ml_launch_kernel(gpu(i / 4 % 2), kernel, &(ml_launch){.grid = 1, .block = 1}, NULL, arguments) != ML_CUDA_OK)
      ++*(int *)failed;
  }
  return NULL;
}

static void test_threads(void) {
  enum { N = 8 };
  pthread_t threads[N];
  int failed[N] = {0}, loads = fake->loads;
  for (int i = 0; i < N; i++) pthread_create(&threads[i], NULL, ask, &failed[i]);
  for (int i = 0; i < N; i++) pthread_join(threads[i], NULL);
  for (int i = 0; i < N; i++) CHECK(failed[i] == 0);
  CHECK(fake->loads == loads + 4); /* each variant once */
}

static void test_a_tensor_map_that_is_refused(void) {
  ml_tensor_map map;
  CHECK(ml_tensor_map_of(gpu(0), &map, false, NULL, 1, 1, 16, 64) == ML_CUDA_DRIVER);
  SAYS("the NVIDIA driver refused a tensor map: error 1, another error");
}

/* What looking a kernel up costs beside a launch that does nothing. */
static void measure(void) {
  enum { ROUNDS = 1000000 };
  struct timespec start, end;
  ml_kernel *kernel = NULL;
  int n = 0;
  void *arguments[] = {&n};
  const ml_gpu *at = gpu(0);
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (int i = 0; i < ROUNDS; i++) {
    ml_kernel_of(at, &(ml_variant){ML_MIX, {6}}, "fill", 0, &kernel);
    ml_launch_kernel(at, kernel, &(ml_launch){.grid = 1, .block = 1, .cluster = 2, .early = true}, NULL, arguments);
  }
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("%.0f ns to look a kernel up and launch it\n",
         ((double)(end.tv_sec - start.tv_sec) * 1e9 + (double)(end.tv_nsec - start.tv_nsec)) / ROUNDS);
}

int main(int n_args, char **args) {
  if (n_args != 2) return 2;
  ml_cuda_set_places(args[1], NULL);
  open_fake();
  test_gpus();
  test_a_launch();
  test_kernels();
  test_what_fails_once_fails_at_once();
  test_what_passes_is_tried_again();
  test_threads();
  test_a_tensor_map_that_is_refused();
  measure();
  return failures > 0;
}
