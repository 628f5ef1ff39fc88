/* How many blocks route.cu's kernels are launched with, and in which variant. Sums over tokens are taken in an order
 * that follows from these, so they depend on shape, dtype and GPU alone. */
#include "cuda_route.h"

#include <float.h>

/* A block takes as many tokens as it has room for, round after round.
 *
 * THREADS, SUM_THREADS: as in route.cu. BLOCKS: of a multiprocessor; on an H200 3 were up to 17 % faster than 4 where
 * 256 experts meet 16384 tokens, and up to 9 % slower where they meet 4096. MAX_ROUNDS: of a block, for its sums.
 * A single block needs no second kernel for the sums, which is faster up to LONE_ROUNDS. */
enum { MAX_EXPERTS = 256, THREADS = 256, SUM_THREADS = 1024, BLOCKS = 4, MAX_ROUNDS = 32, LONE_ROUNDS = 2 };

bool ml_cuda_routes(int64_t tokens, int64_t experts) {
  return tokens >= 0 && tokens <= 1 << 30 && experts >= 1 && experts <= MAX_EXPERTS;
}

static int width_of(const ml_routed_rows *in) {
  int width = 1;
  while (width < in->experts) width *= 2;
  return width;
}

static int lanes_of(const ml_routed_rows *in) { return width_of(in) < 32 ? width_of(in) : 32; }

static int rounds_of(const ml_routed_rows *in) {
  int tokens = THREADS / lanes_of(in);
  return in->tokens > 0 ? (in->tokens - 1) / tokens + 1 : 1;
}

static int blocks_for(const ml_route_place *place, const ml_routed_rows *in) {
  int rounds = rounds_of(in), most = BLOCKS * place->gpu->multiprocessors, least = (rounds - 1) / MAX_ROUNDS + 1;
  return rounds < most ? rounds : least > most ? least : most;
}

static int forward_blocks(const ml_route_place *place, const ml_routed_rows *in) {
  return rounds_of(in) <= LONE_ROUNDS ? 1 : blocks_for(place, in);
}

int64_t ml_cuda_route_workspace(const ml_route_place *place, const ml_routed_rows *in) {
  int64_t blocks = forward_blocks(place, in);
  return blocks > 1 ? blocks * in->experts * (int64_t)(sizeof(double) + sizeof(int)) : 0;
}

static void complete(const ml_route_place *place, ml_routed_rows *in) {
  const double least = place->dtype == ML_CUDA_F64 ? DBL_MIN : (double)FLT_MIN;
  const double most = place->dtype == ML_CUDA_F64 ? DBL_MAX : (double)FLT_MAX;
  double rate = 1 / place->temperature;
  in->rate = rate < least ? least : rate > most ? most : rate;
  in->renormalize = in->renormalize && in->top_k < in->experts; /* all of them sum to 1 as they are */
}

static ml_cuda_status launch(const ml_route_place *place, const ml_routed_rows *in, const char *entry, ml_launch shape,
                             void *arguments) {
  const ml_variant variant = {.source = ML_ROUTE,
                              .options = {(int16_t)place->dtype, (int16_t)width_of(in), in->top_k > 0}};
  ml_kernel *kernel;
  ml_cuda_status status = ml_kernel_of(place->gpu, &variant, entry, 0, &kernel);
  return status == ML_CUDA_OK ? ml_launch_kernel(place->gpu, kernel, &shape, place->stream, &arguments) : status;
}

ml_cuda_status ml_cuda_route(const ml_route_place *place, ml_route_forward call, void *workspace) {
  ml_routed_rows *in = &call.in;
  complete(place, in);
  call.blocks = forward_blocks(place, in);
  call.block_sums = workspace;
  call.block_counts = call.blocks > 1 ? (int *)(call.block_sums + (int64_t)call.blocks * in->experts) : NULL;
  ml_launch shape = {.grid = (unsigned)call.blocks, .block = THREADS};
  ml_cuda_status status = launch(place, in, "ml_route", shape, &call);
  if (status != ML_CUDA_OK || call.blocks == 1) return status;
  int lanes = lanes_of(in);
  ml_launch sums = {
      .grid = (unsigned)((in->experts - 1) / lanes + 1), .block = SUM_THREADS, .early = place->gpu->major >= 9};
  return launch(place, in, "ml_route_sums", sums, &call);
}

ml_cuda_status ml_cuda_route_backward(const ml_route_place *place, ml_route_gradient call) {
  complete(place, &call.in);
  if (call.in.tokens == 0) return ML_CUDA_OK;
  ml_launch shape = {.grid = (unsigned)blocks_for(place, &call.in), .block = THREADS};
  return launch(place, &call.in, "ml_route_backward", shape, &call);
}
