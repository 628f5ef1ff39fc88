//options: ML_F16 ML_F32_GRADS ML_CHUNKS
/* The adapters' gradients, a sum over the tokens:
 *
 *   dA   [C, d_in]  = Q^T x    to dA_e [rank, d_in]
 *   dB^T [C, d_out] = Hs^T g   to dB_e [d_out, rank]
 *
 * A cluster of 1 to 8 blocks computes 64 ML_CHUNKS (1 or 2) of the C columns times 256 of those of x or of g; each of
 * its blocks sums over its part of the tokens, and then they add the parts, each block for some of the columns. Cluster
 * i has columns i % groups of C, groups = ceil(C / (64 ML_CHUNKS)), so that those that read the same part of x run side
 * by side, and tile i / groups: the first a_tiles = ceil(d_in / 256), or none, of x, then those of g.
 *
 * All boxes: [64, 64]. Launch: cluster * groups * tiles blocks of 384 threads, two warpgroups that multiply and one of
 * which a thread has the copy engine read for them; RING + 2048 bytes of shared memory. Gradients are 16-bit elements
 * or, with ML_F32_GRADS, float32; those of A are aligned to a pair of elements.
 */
#include "hopper.cuh"

enum {
  WIDTH = 256,
  DEPTH = 64,       /* of a step */
  RING = 192 << 10, /* bytes of loads in flight */
  BOX = 64 * DEPTH * 2,
  STAGE = (ML_CHUNKS + WIDTH / 64) * BOX,
  STAGES = RING / STAGE,
  CONSUMERS = 256,
  SUMS = 64 * ML_CHUNKS * WIDTH / CONSUMERS /* of a thread */
};

DEVICE void put(void *to, u64 at, float value) {
#if ML_F32_GRADS
  ((float *)to)[at] = value;
#else
  ((u16 *)to)[at] = (u16)narrow(value, 0);
#endif
}
DEVICE void put_pair(void *to, u64 at, float first, float second) {
#if ML_F32_GRADS
  ((float2 *)to)[at / 2] = float2{first, second};
#else
  ((u32 *)to)[at / 2] = narrow(first, second);
#endif
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + 128, 1)
    ml_collect(const __grid_constant__ tensor_map q, const __grid_constant__ tensor_map x,
               const __grid_constant__ tensor_map hs, const __grid_constant__ tensor_map g,
               const __grid_constant__ ml_adapters grads, const int *experts, int tokens, int d_in, int d_out,
               int columns, int a_tiles) {
  extern __shared__ char memory[];
  let_successor_start();
  u32 ring = (shared_address(memory) + 1023) & ~1023u, full = ring + RING, empty = full + 8 * STAGES;
  int rank = cluster_rank(), blocks = cluster_size();
  int groups = (columns + 64 * ML_CHUNKS - 1) / (64 * ML_CHUNKS), cluster = blockIdx.x / blocks;
  int first_column = cluster % groups * 64 * ML_CHUNKS, tile = cluster / groups;
  bool of_a = tile < a_tiles;
  int first = (of_a ? tile : tile - a_tiles) * WIDTH, width = of_a ? d_in : d_out;
  int all = (tokens + DEPTH - 1) / DEPTH, begin = all * rank / blocks, steps = all * (rank + 1) / blocks - begin;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 2);
    }
    barrier_init_done();
  }
  __syncthreads();
  wait_for_predecessor();

  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) {
      const tensor_map *thin = of_a ? &q : &hs, *wide = of_a ? &x : &g;
      fence_all(); /* the kernel before wrote Q and Hs by ordinary stores */
      for (int i = 0; i < steps; i++) {
        u32 to = ring + i % STAGES * STAGE, barrier = full + 8 * (i % STAGES);
        if (i >= STAGES) barrier_wait(empty + 8 * (i % STAGES), (i / STAGES + 1) & 1);
        barrier_expect(barrier, STAGE);
#pragma unroll
        for (int j = 0; j < WIDTH / 64; j++)
          load_box(to + (ML_CHUNKS + j) * BOX, wide, barrier, first + 64 * j, (begin + i) * DEPTH);
#pragma unroll
        for (int j = 0; j < ML_CHUNKS; j++)
          load_box(to + j * BOX, thin, barrier, first_column + 64 * j, (begin + i) * DEPTH);
      }
    }
    if (blocks > 1) { /* as below */
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  /* With one chunk the warpgroups share the columns of x, with two each has a chunk. */
  int group = threadIdx.x / 128, chunk = ML_CHUNKS == 2 ? group : 0, side = ML_CHUNKS == 2 ? 0 : group;
  float d[SUMS];
#pragma unroll
  for (int i = 0; i < SUMS; i++) d[i] = 0;
  for (int i = 0; i < steps; i++) {
    u32 stage = ring + i % STAGES * STAGE;
    barrier_wait(full + 8 * (i % STAGES), i / STAGES & 1);
    u64 a = operand_mn(stage + chunk * BOX, BOX), b = operand_mn(stage + (ML_CHUNKS + 2 * side) * BOX, BOX);
    products_begin();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) multiply<1, 1>(d, a + k * DEPTH_STEP_MN, b + k * DEPTH_STEP_MN, 1);
    products_commit();
    products_wait<1>();
    if (i > 0 && threadIdx.x % 128 == 0) barrier_arrive(empty + 8 * ((i - 1) % STAGES));
  }
  products_wait<0>();
  settle(d);

  warpgroups_sync(); /* both have read all stages */
  u32 part = ring + 16 * threadIdx.x;
  keep_part(part, d);
  if (blocks > 1) cluster_sync();
  int c = first_column + 64 * chunk + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
  void *to[2];
  int r[2], ranks[2];
#pragma unroll
  for (int half = 0; half < 2; half++) { /* columns c and c + 8 */
    to[half] = nullptr;
    if (c + 8 * half < columns) {
      const ml_adapter &of = grads.of[experts[c / 8 + half]];
      r[half] = c + 8 * half - of.column, ranks[half] = of.rank;
      if (r[half] < of.rank) to[half] = of_a ? of.a : of.b;
    }
  }
  for (int i = SUMS / 8 * rank / blocks; i < SUMS / 8 * (rank + 1) / blocks; i++) {
    float sum[8];
    sum_parts(sum, part + 2 * i * PART_STEP, blocks);
#pragma unroll
    for (int j = 0; j < 2; j++) {
      int column = first + 128 * side + 8 * (2 * i + j) + 2 * (threadIdx.x % 4);
      if (column >= width) continue;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        if (!to[half]) continue;
        float v0 = sum[4 * j + 2 * half], v1 = sum[4 * j + 2 * half + 1];
        if (of_a) {
          put_pair(to[half], (u64)r[half] * width + column, v0, v1);
        } else {
          put(to[half], (u64)column * ranks[half] + r[half], v0);
          put(to[half], (u64)(column + 1) * ranks[half] + r[half], v1);
        }
      }
    }
  }
  if (blocks > 1) cluster_sync(); /* no block may end while others read its shared memory */
}
