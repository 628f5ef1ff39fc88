//options: ML_F16 ML_F32_ADAPTERS ML_TOKENS ML_ROWS ML_BIAS ML_SHARE
/* A layer for a few tokens, on Hopper: y = x W^T + mixed B^T (+ bias), when all time goes into reading W.
 *
 * The product is turned, y^T [n, T] = W x^T, so that W's rows fill the tiles: ML_ROWS of them (a multiple of 16, up to 256) in a
 * block, with up to ML_TOKENS (8, 16, 32, 64, 128) tokens. A product has 64 rows: where the tile has fewer, it multiplies what lies
 * behind them, too, which is left. The blocks of a cluster share the sum over W and add what they have in the order of their ranks.
 * The first of them also adds the narrow side: B as the experts have it, rounded into shared memory by warps of its own, and
 * `mixed`, when the kernel before has made it. So many bytes of W are on their way that whatever else is read waits for microseconds:
 * B is asked for at once.
 */
#include "hopper.cuh"

enum {
  GROUPS = ML_ROWS > 64 ? 2 : 1,                       /* warpgroups that multiply */
  TILES = (ML_ROWS + 64 * GROUPS - 1) / (64 * GROUPS), /* products of each, one below the other */
  PARTS = ML_ROWS > 32 ? 1 : 2,                        /* boxes of 64 elements of the sum in a step */
  W_BOX = ML_ROWS * 128,
  X_BOX = ML_TOKENS * 128,
  STAGE_BYTES = PARTS * (W_BOX + X_BOX),
  SHARE = ML_SHARE > 1 ? ML_SHARE : 1, /* blocks of a cluster that share x, each with rows of its own */
  CONSUMERS = GROUPS * 128,
  LOADERS = 96 /* threads that round B */
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

/* A block's part of a box of x, to the same place of every block that shares it; it counts at the barrier of each. */
DEVICE void load_x(u32 to, const tensor_map *map, u32 barrier, int col, int row) {
  if (SHARE == 1) return load_box(to, map, barrier, col, row);
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
               "[%2], %5;" ::"r"(to),
               "l"((u64)map), "r"(barrier), "r"(col), "r"(row), "h"((u16)((1 << SHARE) - 1))
               : "memory");
}
DEVICE void arrive_at_all(u32 barrier) {
#pragma unroll
  for (int i = 0; i < SHARE; i++) {
    if (SHARE == 1) barrier_arrive(barrier);
    else asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_in(i, barrier)) : "memory");
  }
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

/* B's box [ML_ROWS, 64] from `row` on, rounded, in the 128-byte swizzle. A thread takes 8 columns of every so many rows. */
DEVICE void round_box(u32 to, const ml_adapters &adapters, int box, int row, int n, int thread) {
  enum { STEP = LOADERS / 8, TOGETHER = 6 };
  int block = thread % 8;
  const ml_adapter &adapter = adapters.of[adapters.expert_of[box * 8 + block]];
  int rank = adapter.rank, r = (box * 8 + block) * 8 - adapter.column;
  for (int first = thread / 8; first < ML_ROWS; first += TOGETHER * STEP) {
    uint4 v[TOGETHER];
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      int line = first + j * STEP;
      v[j] = line < ML_ROWS && row + line < n && r < rank
                 ? eight_of_b(adapter.b, (u64)(row + line) * rank + r, rank - r, rank % 8 == 0)
                 : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      int line = first + j * STEP;
      if (line < ML_ROWS)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to + line * 128 + ((block ^ (line & 7)) << 4)), "r"(v[j].x),
                     "r"(v[j].y), "r"(v[j].z), "r"(v[j].w)
                     : "memory");
    }
  }
}

extern "C" __global__ __launch_bounds__(CONSUMERS + 128, 1) void ml_decode(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ ml_adapters adapters, u16 *y, const u16 *bias, int tokens, int n, int depth, int columns, int stages) {
  extern __shared__ char memory[];
  let_successor_start();
  int t = threadIdx.x;
  u32 base = (shared_address(memory) + 1023) & ~1023u, of_b = base + stages * STAGE_BYTES;
  u32 full = of_b + columns / 64 * (W_BOX + X_BOX), empty = full + 8 * stages, narrow_side = empty + 8 * stages;
  int peer = SHARE > 1 ? (int)cluster_rank() : 0;
  int rank = SHARE > 1 ? 0 : (int)cluster_rank(), ranks = SHARE > 1 ? 1 : (int)cluster_size(), row = blockIdx.x / ranks * ML_ROWS;
  int all = (depth + 64 * PARTS - 1) / (64 * PARTS), begin = all * rank / ranks, steps = all * (rank + 1) / ranks - begin;
  int boxes = rank == 0 ? columns / 64 : 0;
  if (t == 0) {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS * SHARE);
    }
    barrier_init(narrow_side, LOADERS);
    barrier_init_done();
  }
  if (SHARE > 1) cluster_sync();
  else __syncthreads();

  if (t >= CONSUMERS) {
    int own = t - (CONSUMERS + 32);
    if (t == CONSUMERS) {
      for (int i = 0, s = 0, phase = 1; i < steps; i++) {
        barrier_wait(empty + 8 * s, phase);
        barrier_expect(full + 8 * s, STAGE_BYTES);
        for (int p = 0; p < PARTS; p++) {
          u32 to = base + s * STAGE_BYTES + p * (W_BOX + X_BOX);
          load_box(to, &w, full + 8 * s, ((begin + i) * PARTS + p) * 64, row);
          load_x(to + W_BOX + peer * (X_BOX / SHARE), &x, full + 8 * s, ((begin + i) * PARTS + p) * 64, peer * (ML_TOKENS / SHARE));
        }
        if (++s == stages) s = 0, phase ^= 1;
      }
    } else if (own >= 0 && boxes > 0) {
      for (int i = 0; i < boxes; i++) round_box(of_b + i * (W_BOX + X_BOX), adapters, i, row, n, own);
      fence_shared();
      if (own > 0) {
        barrier_arrive(narrow_side);
      } else {
        wait_for_predecessor();
        fence_all();
        barrier_expect(narrow_side, boxes * X_BOX);
        for (int i = 0; i < boxes; i++) load_box(of_b + i * (W_BOX + X_BOX) + W_BOX, &mixed, narrow_side, i * 64, 0);
      }
    }
    if (ranks > 1) cluster_sync(); /* as below */
    if (ranks > 1 || SHARE > 1) cluster_sync();
    return;
  }

  float d[TILES][ML_TOKENS / 2];
  int group = t >> 7, before = 0;
  bool tells = (t & 127) == 0;
  for (int i = 0, s = 0, phase = 0; i < steps; i++) {
    barrier_wait(full + 8 * s, phase);
    products_begin();
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      u32 at = base + s * STAGE_BYTES + p * (W_BOX + X_BOX);
      multiply_boxes(d, at + group * 8192, at + W_BOX, i == 0 && p == 0);
    }
    products_commit();
    products_wait<1>();
    if (i > 0 && tells) arrive_at_all(empty + 8 * before);
    before = s;
    if (++s == stages) s = 0, phase ^= 1;
  }
  if (boxes > 0) barrier_wait(narrow_side, 0);
  for (int i = 0; i < boxes; i++) {
    u32 at = of_b + i * (W_BOX + X_BOX);
    products_begin();
    multiply_boxes(d, at + group * 8192, at + W_BOX, steps + i == 0);
    products_commit();
    products_wait<1>();
  }
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
  if (ranks > 1 || SHARE > 1) cluster_sync(); /* nobody's memory goes while another reads it */
}
