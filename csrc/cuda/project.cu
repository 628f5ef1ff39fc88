//options: ML_F16 ML_BACKWARD ML_COLS
/* The shrink, forward and backward: out [T, C] = x [T, K] times a narrow factor, and what finish_shrink makes of it.
 *
 *   forward   H = x A^T: factor A [C, K], boxes [ML_COLS, 64], which run along the sum
 *   backward  P = g B:   x is g, factor B [K, C], boxes [64, 64], which run along the columns
 *
 * A cluster of 1 to 8 blocks computes tiles of 128 rows and ML_COLS (64, 128 or 256) columns; each of its blocks sums over
 * its part of K, and then they add the parts, each block for some of the rows. The tiles of the same rows are shared out
 * among `sharers` clusters, each of which computes its own one after the other. Backward, with grad_w, no expert's columns
 * may lie in tiles of two clusters.
 *
 * Boxes of x: [128, 64]. Launch: cluster * sharers * ceil(T / 128) blocks of 384 threads, two warpgroups that multiply and
 * one of which a thread has the copy engine read for them; RING + 2048 bytes of shared memory.
 */
#include "hopper.cuh"

enum {
  ROWS = 128,
  DEPTH = 64,       /* of a step */
  RING = 192 << 10, /* bytes of loads in flight */
  BOX = 64 * DEPTH * 2,
  X_BYTES = ROWS * DEPTH * 2,
  STAGE = X_BYTES + ML_COLS * DEPTH * 2,
  STAGES = RING / STAGE,
  CONSUMERS = 256
};
static_assert(ROWS * ML_COLS * 4 <= RING, "the parts of a sum are kept where the ring was");

DEVICE void prefetch(const void *p) { asm volatile("prefetch.global.L1 [%0];" ::"l"(p)); }
/* What finish_shrink will read of rows `row` and `row + 8` and columns [first, end), while there is nothing else to do. */
DEVICE void prefetch_rows(const ml_narrow &n, int row, int first, int end) {
  int lane = threadIdx.x % 32;
  for (int i = first / 8 + 32 * lane; i < end / 8; i += 32 * 32) prefetch(n.experts + i);
  for (int t = row; t < row + 16 && t < n.tokens; t += 8) {
    for (int i = lane % 4 * 32; i < n.n_experts; i += 128) prefetch(n.factors + (u64)t * n.n_experts + i);
#if ML_BACKWARD
    for (int i = first + lane % 4 * 64; n.hidden && i < end; i += 256)
      prefetch((const u16 *)n.hidden + (u64)t * n.columns + i);
#endif
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    ml_project(const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map factor,
               const __grid_constant__ ml_narrow side, int depth, int sharers) {
  extern __shared__ char memory[];
  let_successor_start();
  u32 ring = (shared_address(memory) + 1023) & ~1023u, full = ring + RING, empty = full + 8 * STAGES;
  int rank = cluster_rank(), blocks = cluster_size(), warp = threadIdx.x / 32;
  int cluster = blockIdx.x / blocks, share = cluster % sharers, first_row = cluster / sharers * ROWS;
  int all_tiles = (side.columns + ML_COLS - 1) / ML_COLS, first_tile = all_tiles * share / sharers;
  int tiles = all_tiles * (share + 1) / sharers - first_tile, first_column = first_tile * ML_COLS;
  int all = (depth + DEPTH - 1) / DEPTH, begin = all * rank / blocks, steps = all * (rank + 1) / blocks - begin;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2);
    }
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x >= CONSUMERS) {
    registers_give<40>();
    auto load_x = [&](int i, int step) {
      u32 to = ring + i % STAGES * STAGE, barrier = full + 8 * (i % STAGES);
      barrier_expect(barrier, STAGE);
      load_box(to, &x, barrier, (begin + step) * DEPTH, first_row);
    };
    auto load_factor = [&](int i, int step, int column) {
      u32 to = ring + i % STAGES * STAGE + X_BYTES, barrier = full + 8 * (i % STAGES);
#if ML_BACKWARD
#pragma unroll
      for (int j = 0; j < ML_COLS / 64; j++)
        load_box(to + j * BOX, &factor, barrier, column + 64 * j, (begin + step) * DEPTH);
#else
      load_box(to, &factor, barrier, (begin + step) * DEPTH, column);
#endif
    };
    int early = steps < STAGES ? steps : STAGES; /* x is older than the kernel before, which writes the factor */
    if (threadIdx.x == CONSUMERS) {
      for (int i = 0; i < early; i++) load_x(i, i);
      wait_for_predecessor();
      fence_all();
      for (int i = 0; i < early; i++) load_factor(i, i, first_column);
    }
    for (int tile = 0; tile < tiles; tile++) {
      if (threadIdx.x == CONSUMERS)
        for (int step = tile ? 0 : early; step < steps; step++) {
          int i = tile * steps + step;
          if (i >= STAGES) barrier_wait(empty + 8 * (i % STAGES), (i / STAGES + 1) & 1);
          load_x(i, step);
          load_factor(i, step, first_column + tile * ML_COLS);
        }
      __syncwarp();
      if (blocks > 1) {
        cluster_sync();
        cluster_sync();
      }
    }
    return;
  }

  registers_stay<232>();
  wait_for_predecessor();
  /* A warp has 16 rows of the sum, and this block finishes eighths [own of its first warp, end) of the rows. */
  int own = 8 * rank / blocks + warp, end = 8 * (rank + 1) / blocks, lane = threadIdx.x % 32;
  bool finishes = own < end;
  int row = first_row + 16 * own + lane / 4;
  if (finishes) {
    int end_column = first_column + tiles * ML_COLS;
    prefetch_rows(side, row, first_column, end_column < side.columns ? end_column : side.columns);
  }
  for (int tile = 0; tile < tiles; tile++) {
    float d[ML_COLS / 2];
#pragma unroll
    for (int i = 0; i < ML_COLS / 2; i++) d[i] = 0;
    for (int step = 0; step < steps; step++) {
      int i = tile * steps + step;
      u32 stage = ring + i % STAGES * STAGE;
      barrier_wait(full + 8 * (i % STAGES), i / STAGES & 1);
      u64 a = operand_k(stage + warp / 4 * BOX);
      u64 b = ML_BACKWARD ? operand_mn(stage + X_BYTES, BOX) : operand_k(stage + X_BYTES);
      products_begin();
#pragma unroll
      for (int k = 0; k < DEPTH / 16; k++)
        multiply<0, ML_BACKWARD>(d, a + k * DEPTH_STEP_K, b + k * (ML_BACKWARD ? DEPTH_STEP_MN : DEPTH_STEP_K), 1);
      products_commit();
      products_wait<1>();
      if (step > 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * ((i - 1) % STAGES));
    }
    products_wait<0>();
    if (steps > 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * ((tile * steps + steps - 1) % STAGES));
    settle(d);
    if (blocks > 1) {
      warpgroups_sync(); /* both have read all stages */
      keep_part(ring + 16 * threadIdx.x, d);
      cluster_sync();
      if (finishes) sum_parts(d, ring + 512 * own + 16 * lane, blocks);
      fence_shared(); /* the ring's next loads */
      cluster_sync(); /* no block may go on while others read its part */
    }
    if (finishes) finish_shrink(d, side, row, first_column + tile * ML_COLS);
  }
}
