//options: ML_F16 ML_F32_ADAPTERS ML_TOKENS ML_ROWS ML_BIAS ML_SHARE
/* A layer for a few tokens, on Hopper: y = x W^T + mixed B^T (+ bias), when all time goes into reading W.
 *
 * The product is turned, y^T [n, T] = W x^T, so that W's rows fill the tiles: ML_ROWS of them (a multiple of 16, up to
 * 256) in a block, with up to ML_TOKENS (8, 16, 32, 64, 128) tokens. A product has 64 rows: where the tile has fewer, it
 * multiplies what lies behind them, too, which is left. The blocks of a cluster share x, each with rows of its own
 * (ML_SHARE of them), or share the sum over W and add what they have in the order of their ranks; then the first of them
 * adds the narrow side.
 *
 * That is B as the experts have it, rounded into shared memory by warps of its own, and `mixed`, when the kernel before
 * has made it. So much of W is on its way that whatever else is read waits for microseconds: B is asked for before most
 * of it.
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
  LOADERS = 96,            /* threads that round B */
  EARLY = SHARE > 1 ? 0 : 2 /* steps that are asked for before B is; fewer than stages */
};

DEVICE void consumers_sync() {
  if (GROUPS == 1) warpgroup_sync(1);
  else warpgroups_sync();
}

/* A block's part of a box of x, to the same place of every block that shares it; it counts at the barrier of each. */
DEVICE void load_x(u32 to, const tensor_map *map, u32 barrier, int col, int row) {
  if (SHARE == 1) return load_box(to, map, barrier, col, row);
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
               "l"((u64)map), "r"(barrier), "r"(col), "r"(row), "h"((u16)((1 << SHARE) - 1))
               : "memory");
}
/* At the barrier in the same place of all of them. */
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
    for (int k = 0; k < 4; k++)
      multiply<0, 0>(d[tile], a + DEPTH_STEP_K * k, b + DEPTH_STEP_K * k, !(first && k == 0));
  }
}

/* A loader's part of B's rows, 8 of a box's 64 columns of every twelfth: first as they are, then rounded, in the
 * 128-byte swizzle. */
struct rows_of_b {
  enum { STEP = LOADERS / 8, TOGETHER = 5, ROWS = TOGETHER * STEP, WORDS = ML_F32_ADAPTERS ? 8 : 4 };
  u32 v[TOGETHER][WORDS];

  DEVICE void ask(const ml_adapters &adapters, int box, int first, int row, int n, int thread) {
    int block = box * 8 + thread % 8;
    const ml_adapter &adapter = adapters.of[adapters.expert_of[block]];
    int rank = adapter.rank, r = block * 8 - adapter.column;
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      int line = first + thread / 8 + j * STEP;
      bool real = line < ML_ROWS && row + line < n && r < rank;
      u64 at = (u64)(row + line) * rank + r;
#pragma unroll
      for (int i = 0; i < WORDS; i++) v[j][i] = 0;
      if (!real) continue;
#if ML_F32_ADAPTERS
      const u32 *from = (const u32 *)adapter.b + at;
      if (rank % 8 == 0) {
        *(uint4 *)v[j] = *(const uint4 *)from;
        *(uint4 *)(v[j] + 4) = *(const uint4 *)(from + 4);
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[j][i] = r + i < rank ? from[i] : 0;
      }
#else
      const u16 *from = (const u16 *)adapter.b + at;
      if (rank % 8 == 0) {
        *(uint4 *)v[j] = *(const uint4 *)from;
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[j][i / 2] |= (u32)(r + i < rank ? from[i] : 0) << 16 * (i % 2);
      }
#endif
    }
  }
  DEVICE void keep(u32 to, int first, int thread) const {
#pragma unroll
    for (int j = 0; j < TOGETHER; j++) {
      int line = first + thread / 8 + j * STEP;
      u32 e[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
#if ML_F32_ADAPTERS
        e[i] = narrow(__uint_as_float(v[j][2 * i]), __uint_as_float(v[j][2 * i + 1]));
#else
        e[i] = v[j][i];
#endif
      u32 at = to + line * 128 + ((thread % 8 ^ (line & 7)) << 4);
      if (line < ML_ROWS)
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(e[0]), "r"(e[1]), "r"(e[2]), "r"(e[3])
                     : "memory");
    }
  }
};

extern "C" __global__ __launch_bounds__(CONSUMERS + 128, 1) void ml_decode(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ ml_adapters adapters, u16 *y, const u16 *bias, int tokens, int n, int depth, int columns,
    int stages) {
  extern __shared__ char memory[];
  let_successor_start();
  int t = threadIdx.x;
  u32 base = (shared_address(memory) + 1023) & ~1023u, of_b = base + stages * STAGE_BYTES;
  u32 full = of_b + columns / 64 * (W_BOX + X_BOX), empty = full + 8 * stages, narrow_side = empty + 8 * stages;
  int peer = SHARE > 1 ? (int)cluster_rank() : 0; /* of those that share x; `rank`, of those that share the sum */
  int rank = SHARE > 1 ? 0 : (int)cluster_rank(), ranks = SHARE > 1 ? 1 : (int)cluster_size();
  int row = blockIdx.x / ranks * ML_ROWS;
  int all = (depth + 64 * PARTS - 1) / (64 * PARTS);
  int begin = all * rank / ranks, steps = all * (rank + 1) / ranks - begin;
  int boxes = rank == 0 ? columns / 64 : 0;
  int own = t - (CONSUMERS + 32), asked = 0;
  /* With few tokens each block begins elsewhere in its sum. With more that was slower: all read x at other places. */
  int turn = ML_TOKENS <= 16 && steps > 0 ? (int)(blockIdx.x / ranks * 5 % steps) : 0;
  auto ask = [&](int step, int s) {
    step += turn;
    if (step >= steps) step -= steps;
    barrier_expect(full + 8 * s, STAGE_BYTES);
    for (int p = 0; p < PARTS; p++) {
      u32 to = base + s * STAGE_BYTES + p * (W_BOX + X_BOX);
      int column = ((begin + step) * PARTS + p) * 64;
      load_box(to, &w, full + 8 * s, column, row);
      load_x(to + W_BOX + peer * (X_BOX / SHARE), &x, full + 8 * s, column, peer * (ML_TOKENS / SHARE));
    }
  };
  if (t == CONSUMERS) {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS * SHARE);
    }
    barrier_init(narrow_side, LOADERS);
    barrier_init_done();
    fence_shared();
    for (; asked < EARLY && asked < steps; asked++) ask(asked, asked);
  }
  rows_of_b b;
  if (own >= 0 && boxes > 0) b.ask(adapters, 0, 0, row, n, own);
  if (SHARE > 1) cluster_sync();
  else __syncthreads();

  if (t >= CONSUMERS) {
    if (t == CONSUMERS) {
      for (int i = asked, s = asked, phase = 1; i < steps; i++) {
        barrier_wait(empty + 8 * s, phase);
        ask(i, s);
        if (++s == stages) s = 0, phase ^= 1;
      }
    } else if (own >= 0 && boxes > 0) {
      for (int i = 0; i < boxes; i++) {
        for (int first = 0; first < ML_ROWS; first += rows_of_b::ROWS) {
          if (i + first > 0) b.ask(adapters, i, first, row, n, own);
          b.keep(of_b + i * (W_BOX + X_BOX), first, own);
        }
      }
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
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                         lines + (8 * j + (lane & 7)) * 32 + (lane >> 3 & 1) * 16),
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
