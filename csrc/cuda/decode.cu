//options: ML_F16 ML_F32_ADAPTERS ML_TOKENS ML_ROWS ML_BIAS
/* A layer for a few tokens, on Hopper: y = x W^T + mixed B^T (+ bias), when all time goes into reading W.
 *
 * The product is turned, y^T [n, T] = W x^T, so that W's rows fill the tiles: ML_ROWS of them (a multiple of 16, up to 256) in a
 * block, with up to ML_TOKENS (8, 16, 32, 64, 128) tokens. A product has 64 rows: where the tile has fewer, it multiplies what lies
 * behind them, too, which is left. The blocks of a cluster share the sum over W and add what they have in the order of their ranks.
 * The first of them also adds the narrow side, as the last steps of its sum: B as the experts have it, rounded into shared memory by
 * warps that have nothing else to do, and `mixed`, when the kernel before has made it.
 */
#include "hopper.cuh"

enum {
  GROUPS = ML_ROWS > 64 ? 2 : 1,                       /* warpgroups that multiply */
  TILES = (ML_ROWS + 64 * GROUPS - 1) / (64 * GROUPS), /* products of each, one below the other */
  PARTS = ML_ROWS > 32 ? 1 : 2,                        /* boxes of 64 elements of the sum in a step */
  W_BOX = ML_ROWS * 128,
  X_BOX = ML_TOKENS * 128,
  STAGE_BYTES = PARTS * (W_BOX + X_BOX),
  CONSUMERS = GROUPS * 128,
  LOADERS = 128 /* threads that load, and round B */
};

/* Eight elements of a row of B, of which n are there, from element `at` on; aligned: that is a multiple of 8. */
DEVICE uint4 eight_of_b(const void *b, u64 at, int n, bool aligned) {
  float v[8];
  if (aligned) {
#if ML_F32_ADAPTERS
    float4 low = *(const float4 *)((const float *)b + at), high = *(const float4 *)((const float *)b + at + 4);
    return {narrow(low.x, low.y), narrow(low.z, low.w), narrow(high.x, high.y), narrow(high.z, high.w)};
#else
    return *(const uint4 *)((const u16 *)b + at);
#endif
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
#if ML_F32_ADAPTERS
    v[i] = i < n ? ((const float *)b)[at + i] : 0.f;
#else
    v[i] = i < n ? widen(((const u16 *)b)[at + i]) : 0.f;
#endif
  }
  return {narrow(v[0], v[1]), narrow(v[2], v[3]), narrow(v[4], v[5]), narrow(v[6], v[7])};
}

DEVICE void consumers_sync() {
  if (GROUPS == 1) warpgroup_sync(1);
  else warpgroups_sync();
}

/* d (+)= W's boxes [64, 64] times that of x, or B's times that of mixed. */
DEVICE void multiply_boxes(float (&d)[TILES][ML_TOKENS / 2], u32 left, u32 right, bool first) {
  u64 b = operand_k(right);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    u64 a = operand_k(left + tile * GROUPS * 8192);
#pragma unroll
    for (int k = 0; k < 4; k++) multiply<0, 0>(d[tile], a + DEPTH_STEP_K * k, b + DEPTH_STEP_K * k, !(first && k == 0));
  }
}

/* d (+)= what the ring's next steps hold in so many boxes each. first: there is nothing yet that d is added to. */
struct ring {
  u32 base, full, empty;
  int stages, stage, phase, before; /* before: the stage that may still be read; -1: none */
};
template <int BOXES>
DEVICE void sum_boxes(float (&d)[TILES][ML_TOKENS / 2], ring &r, int steps, int group, bool first) {
  for (int i = 0; i < steps; i++) {
    u32 at = r.base + r.stage * STAGE_BYTES;
    barrier_wait(r.full + 8 * r.stage, r.phase);
    products_begin();
#pragma unroll
    for (int p = 0; p < BOXES; p++, at += W_BOX + X_BOX) multiply_boxes(d, at + group * 8192, at + W_BOX, first && i == 0 && p == 0);
    products_commit();
    products_wait<1>();
    if (r.before >= 0 && (threadIdx.x & 127) == 0) barrier_arrive(r.empty + 8 * r.before);
    r.before = r.stage;
    if (++r.stage == r.stages) r.stage = 0, r.phase ^= 1;
  }
}

/* A box of B, [ML_ROWS, 64] from `row` on: a thread of `threads` takes 8 columns of every so many rows. */
struct box_of_b {
  const void *b;
  int rank, r, line, block;

  DEVICE box_of_b(const ml_adapters &adapters, int box, int thread) : line(thread / 8), block(thread % 8) {
    const ml_adapter &adapter = adapters.of[adapters.expert_of[box * 8 + block]];
    b = adapter.b;
    rank = adapter.rank;
    r = (box * 8 + block) * 8 - adapter.column;
  }
  DEVICE bool has(int row, int n) const { return row < n && r < rank; }
  DEVICE u64 at(int row) const { return (u64)row * rank + r; }

  /* Into the GPU's cache. */
  DEVICE void fetch(int row, int n, int threads) const {
    for (int i = line; i < ML_ROWS; i += threads / 8)
      if (has(row + i, n))
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char *)b + at(row + i) * (ML_F32_ADAPTERS ? 4 : 2)));
  }
  /* Rounded into shared memory, in the 128-byte swizzle. */
  DEVICE void store(u32 to, int row, int n, int threads) const {
    enum { TOGETHER = 4 };
    for (int first = line; first < ML_ROWS; first += TOGETHER * threads / 8) {
      uint4 v[TOGETHER];
#pragma unroll
      for (int j = 0; j < TOGETHER; j++) {
        int i = first + j * threads / 8;
        v[j] = i < ML_ROWS && has(row + i, n) ? eight_of_b(b, at(row + i), rank - r, rank % 8 == 0) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int j = 0; j < TOGETHER; j++) {
        int i = first + j * threads / 8;
        if (i < ML_ROWS)
          asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + i * 128 + ((block ^ (i & 7)) << 4)), "r"(v[j].x),
                       "r"(v[j].y), "r"(v[j].z), "r"(v[j].w)
                       : "memory");
      }
    }
  }
};

extern "C" __global__ __launch_bounds__(CONSUMERS + LOADERS, 1) void ml_decode(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ ml_adapters adapters, u16 *y, const u16 *bias, int tokens, int n, int depth, int columns, int stages) {
  extern __shared__ char memory[];
  let_successor_start();
  int t = threadIdx.x;
  u32 base = (shared_address(memory) + 1023) & ~1023u, full = base + stages * STAGE_BYTES, empty = full + 8 * stages;
  int rank = (int)cluster_rank(), ranks = (int)cluster_size(), row = blockIdx.x / ranks * ML_ROWS;
  int all = (depth + 64 * PARTS - 1) / (64 * PARTS), begin = all * rank / ranks, steps = all * (rank + 1) / ranks - begin;
  int boxes = rank == 0 ? columns / 64 : 0;
  if (t == 0) {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS);
    }
    barrier_init_done();
  }
  __syncthreads();

  if (t >= CONSUMERS) {
    int own = t - CONSUMERS;
    if (own >= 32) {
      for (int i = 0; i < boxes; i++) box_of_b(adapters, i, own - 32).fetch(row, n, LOADERS - 32);
    }
    if (own == 0) {
      for (int i = 0, s = 0, phase = 1; i < steps; i++) {
        barrier_wait(empty + 8 * s, phase);
        barrier_expect(full + 8 * s, STAGE_BYTES);
        for (int p = 0; p < PARTS; p++) {
          u32 to = base + s * STAGE_BYTES + p * (W_BOX + X_BOX);
          load_box(to, &w, full + 8 * s, ((begin + i) * PARTS + p) * 64, row);
          load_box(to + W_BOX, &x, full + 8 * s, ((begin + i) * PARTS + p) * 64, 0);
        }
        if (++s == stages) s = 0, phase ^= 1;
      }
    }
    for (int i = 0; i < boxes; i++) {
      int step = steps + i, s = step % stages;
      u32 to = base + s * STAGE_BYTES;
      if (own == 0) barrier_wait(empty + 8 * s, (step / stages & 1) ^ 1);
      warpgroup_sync(4);
      box_of_b(adapters, i, own).store(to, row, n, LOADERS);
      fence_shared();
      warpgroup_sync(4);
      if (own == 0) {
        if (i == 0) {
          wait_for_predecessor();
          fence_all();
        }
        barrier_expect(full + 8 * s, X_BOX);
        load_box(to + W_BOX, &mixed, full + 8 * s, i * 64, 0);
      }
    }
    if (ranks > 1) { /* as below */
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  float d[TILES][ML_TOKENS / 2];
  int group = t >> 7;
  ring r = {base, full, empty, stages, 0, 0, -1};
  sum_boxes<PARTS>(d, r, steps, group, true);
  sum_boxes<1>(d, r, boxes, group, steps == 0);
  products_wait<0>();
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) settle(d[tile]);
  consumers_sync(); /* everything has been loaded and read: parts of sums, and results, take its place */
  enum { PART = ML_TOKENS / 8 * PART_STEP };
  if (ranks > 1) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
      for (int i = 0; i < ML_TOKENS / 2; i++) d[tile][i] = steps + boxes > 0 ? d[tile][i] : 0.f;
      keep_part(base + tile * PART + t * 16, d[tile]);
    }
    cluster_sync();
  }
  int warp = t >> 5, lane = t & 31;
  if (warp * ranks / (GROUPS * 4) == rank) { /* each block finishes the rows of some warps */
    u32 lines = base + (ranks > 1 ? TILES * PART : 0) + warp * ML_TOKENS * 32; /* [ML_TOKENS, 16] */
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      int line = (group + tile * GROUPS) * 64 + (warp & 3) * 16;
      if (line >= ML_ROWS) break;
      if (ranks > 1) sum_parts(d[tile], base + tile * PART + t * 16, ranks);
      float add[2] = {0, 0};
#if ML_BIAS
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int column = row + line + (lane >> 2) + 8 * half;
        add[half] = column < n ? widen(bias[column]) : 0.f;
      }
#endif
      __syncwarp();
#pragma unroll
      for (int j = 0; j < ML_TOKENS / 8; j++)
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(lines + (8 * j + (lane & 7)) * 32 +
                                                                                             (lane >> 3 & 1) * 16),
                     "r"(narrow(d[tile][4 * j] + add[0], d[tile][4 * j + 1] + add[0])),
                     "r"(narrow(d[tile][4 * j + 2] + add[1], d[tile][4 * j + 3] + add[1]))
                     : "memory");
      __syncwarp();
      for (int i = lane; i < 2 * tokens; i += 32) {
        int column = row + line + i % 2 * 8;
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(lines + i * 16)
                     : "memory");
        if (column < n) *(uint4 *)(y + (u64)(i / 2) * n + column) = v;
      }
    }
  }
  if (ranks > 1) cluster_sync(); /* nobody's memory goes while another reads it */
}
