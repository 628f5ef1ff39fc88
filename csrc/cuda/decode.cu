//options: ML_F16 ML_TOKENS ML_BIAS
/* A layer for a few tokens, on Hopper: y = x W^T + mixed B^T (+ bias), when all time goes into reading W.
 *
 * The product is turned, y^T [n, T] = W x^T, so that W's rows fill the tiles: 128 of them in a block, with up to ML_TOKENS (8, 16,
 * 32, 64) tokens. The blocks of a cluster share the sum, whose last part is that over the narrow side; they add what they have
 * in the order of their ranks. W streams in while the kernels before still make the narrow side. Two blocks fit a
 * multiprocessor.
 */
#include "hopper.cuh"

enum {
  ROWS = 128,
  W_BYTES = ROWS * 128,
  X_BYTES = ML_TOKENS * 128,
  STAGE_BYTES = W_BYTES + X_BYTES,
  STAGES = ML_TOKENS > 32 ? 4 : 5,
  BARRIERS = STAGES * STAGE_BYTES
};

extern "C" __global__ __launch_bounds__(384, 2) void ml_decode(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ tensor_map b, u16 *y, const u16 *bias, int tokens, int n, int depth, int columns) {
  extern __shared__ char memory[];
  u32 base = (shared_address(memory) + 1023) & ~1023u, full = base + BARRIERS, empty = full + 8 * STAGES;
  int rank = (int)cluster_rank(), ranks = (int)cluster_size(), row = blockIdx.x / ranks * ROWS;
  int depth_x = (depth + 63) / 64, steps = depth_x + columns / 64;
  int begin = steps * rank / ranks, end = steps * (rank + 1) / ranks;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2);
    }
    barrier_init_done();
  }
  __syncthreads();

  float d[ML_TOKENS / 2];
  int group = (int)(threadIdx.x >> 7) - 1, t = threadIdx.x & 127;
  if (group < 0) {
    if (threadIdx.x == 0) {
      for (int k = begin; k < end; k++) {
        int i = k - begin, s = i % STAGES, within = (k < depth_x ? k : k - depth_x) * 64;
        bool wide = k < depth_x;
        barrier_wait(empty + 8 * s, i / STAGES % 2 ^ 1);
        barrier_expect(full + 8 * s, STAGE_BYTES);
        if (k == (begin > depth_x ? begin : depth_x)) {
          wait_for_predecessor();
          fence_all();
        }
        load_box(base + s * STAGE_BYTES, wide ? &w : &b, full + 8 * s, within, row);
        load_box(base + s * STAGE_BYTES + W_BYTES, wide ? &x : &mixed, full + 8 * s, within, 0);
      }
      wait_for_predecessor(); /* whose end nobody behind this kernel waits for otherwise */
    }
  } else {
    int before = 0;
    for (int i = 0; i < end - begin; i++) {
      int s = i % STAGES;
      u32 at = base + s * STAGE_BYTES;
      barrier_wait(full + 8 * s, i / STAGES % 2);
      products_begin();
      u64 left = operand_k(at + group * 8192), right = operand_k(at + W_BYTES);
#pragma unroll
      for (int k = 0; k < 4; k++)
        multiply<0, 0>(d, left + DEPTH_STEP_K * k, right + DEPTH_STEP_K * k, i > 0 || k > 0);
      products_commit();
      products_wait<1>();
      if (i > 0 && t == 0) barrier_arrive(empty + 8 * before);
      before = s;
    }
    products_wait<0>();
    settle(d);
    if (end == begin) {
#pragma unroll
      for (int i = 0; i < ML_TOKENS / 2; i++) d[i] = 0;
    }
  }
  __syncthreads(); /* nothing is on its way into shared memory any more: partial sums take its place */
  u32 part = base + (group * 128 + t) * 16;
  if (group >= 0 && ranks > 1) keep_part(part, d);
  if (ranks > 1) cluster_sync();
  int warp = group * 4 + (t >> 5);
  if (group >= 0 && warp * ranks / 8 == rank) { /* each block finishes the rows of some warps */
    if (ranks > 1) sum_parts(d, part, ranks);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int column = row + warp * 16 + ((t & 31) >> 2) + 8 * half;
      float add = 0;
#if ML_BIAS
      add = column < n ? widen(bias[column]) : 0.f;
#endif
#pragma unroll
      for (int j = 0; j < ML_TOKENS / 8; j++) {
        u32 both = narrow(d[4 * j + 2 * half] + add, d[4 * j + 2 * half + 1] + add);
        int token = 8 * j + 2 * (t & 3);
        if (column < n && token < tokens) y[(u64)token * n + column] = (u16)both;
        if (column < n && token + 1 < tokens) y[(u64)(token + 1) * n + column] = (u16)(both >> 16);
      }
    }
  }
  if (ranks > 1) cluster_sync(); /* nobody's memory goes while another reads it */
}
