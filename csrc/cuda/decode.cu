//options: ML_F16 ML_F32_ADAPTERS ML_TOKENS ML_ROWS ML_BIAS
/* A layer for a few tokens, on Hopper: y = x W^T + mixed B^T (+ bias), when all time goes into reading W.
 *
 * The product is turned, y^T [n, T] = W x^T, so that W's rows fill the tiles: ML_ROWS (16, 32, 64, 128) of them in a block, with
 * up to ML_TOKENS (8, 32, 64, 128) tokens. A product has 64 rows: where the tile has fewer, it multiplies what lies behind them,
 * too, which is left. The blocks of a
 * cluster share the sum over W and add what they have in the order of their ranks. The first of them also adds the narrow
 * side, with B as the experts have it: its rows are rounded into shared memory while W streams in, and so is `mixed` when the
 * kernel before has made it.
 */
#include "hopper.cuh"

enum {
  GROUPS = ML_ROWS > 64 ? 2 : 1, /* warpgroups that multiply */
  PARTS = ML_ROWS > 32 ? 1 : 2,  /* boxes of 64 elements of the sum in a step */
  W_BOX = ML_ROWS * 128,
  X_BOX = ML_TOKENS * 128,
  STAGE_BYTES = PARTS * (W_BOX + X_BOX),
  CONSUMERS = GROUPS * 128
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

/* d (+)= W's box [64, 64] times that of x or of mixed. */
DEVICE void multiply_box(float (&d)[ML_TOKENS / 2], u32 left, u32 right, bool first) {
  u64 a = operand_k(left), b = operand_k(right);
#pragma unroll
  for (int k = 0; k < 4; k++) multiply<0, 0>(d, a + DEPTH_STEP_K * k, b + DEPTH_STEP_K * k, !(first && k == 0));
}

extern "C" __global__ __launch_bounds__(CONSUMERS + 128, 1) void ml_decode(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ ml_adapters adapters, u16 *y, const u16 *bias, int tokens, int n, int depth, int columns, int stages) {
  extern __shared__ char memory[];
  int boxes = columns / 64, t = threadIdx.x;
  u32 base = (shared_address(memory) + 1023) & ~1023u, of_b = base + stages * STAGE_BYTES, of_mixed = of_b + boxes * W_BOX;
  u32 full = of_mixed + boxes * X_BOX, empty = full + 8 * stages, narrow_side = empty + 8 * stages;
  int rank = (int)cluster_rank(), ranks = (int)cluster_size(), row = blockIdx.x / ranks * ML_ROWS;
  int all = (depth + 64 * PARTS - 1) / (64 * PARTS), begin = all * rank / ranks, steps = all * (rank + 1) / ranks - begin;
  if (t == 0) {
    for (int s = 0; s < stages; s++) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, GROUPS);
    }
    barrier_init(narrow_side, 1);
    barrier_init_done();
  }
  __syncthreads();

  if (t >= CONSUMERS) {
    if (GROUPS == 2) registers_give<40>();
    if (t == CONSUMERS) {
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
      if (rank == 0) {
        wait_for_predecessor();
        fence_all();
        barrier_expect(narrow_side, boxes * X_BOX);
        for (int i = 0; i < boxes; i++) load_box(of_mixed + i * X_BOX, &mixed, narrow_side, i * 64, 0);
      }
    }
    if (ranks > 1) { /* as below */
      cluster_sync();
      cluster_sync();
    }
    return;
  }

  if (GROUPS == 2) registers_stay<232>();
  if (rank == 0) { /* B's rows, in the 128-byte swizzle */
    for (int i = t; i < ML_ROWS * columns / 8; i += CONSUMERS) {
      int line = i / (columns / 8), block = i % (columns / 8);
      const ml_adapter &adapter = adapters.of[adapters.expert_of[block]];
      int r = block * 8 - adapter.column;
      uint4 v = {0, 0, 0, 0};
      if (row + line < n && r < adapter.rank)
        v = eight_of_b(adapter.b, (u64)(row + line) * adapter.rank + r, adapter.rank - r, adapter.rank % 8 == 0);
      u32 to = of_b + block / 8 * W_BOX + line * 128 + ((block % 8 ^ (line & 7)) << 4);
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
    }
    fence_shared();
    consumers_sync();
  }
  float d[ML_TOKENS / 2];
  int group = t >> 7, before = 0;
  bool tells = (t & 127) == 0;
  for (int i = 0, s = 0, phase = 0; i < steps; i++) {
    barrier_wait(full + 8 * s, phase);
    products_begin();
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      u32 at = base + s * STAGE_BYTES + p * (W_BOX + X_BOX);
      multiply_box(d, at + group * 8192, at + W_BOX, i == 0 && p == 0);
    }
    products_commit();
    products_wait<1>();
    if (i > 0 && tells) barrier_arrive(empty + 8 * before);
    before = s;
    if (++s == stages) s = 0, phase ^= 1;
  }
  if (rank == 0) {
    barrier_wait(narrow_side, 0);
    products_begin();
    for (int i = 0; i < boxes; i++) multiply_box(d, of_b + i * W_BOX + group * 8192, of_mixed + i * X_BOX, steps + i == 0);
    products_commit();
  }
  products_wait<0>();
  settle(d);
  if (ranks > 1) {
    if (steps == 0 && rank > 0) {
#pragma unroll
      for (int i = 0; i < ML_TOKENS / 2; i++) d[i] = 0;
    }
    consumers_sync(); /* everything has been loaded and read: parts of sums take its place */
    keep_part(base + t * 16, d);
    cluster_sync();
  }
  if ((t >> 5) * ranks / (GROUPS * 4) == rank) { /* each block finishes the rows of some warps */
    if (ranks > 1) sum_parts(d, base + t * 16, ranks);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int line = (t >> 5) * 16 + ((t & 31) >> 2) + 8 * half, column = row + line;
      bool real = line < ML_ROWS && column < n;
      float add = 0;
#if ML_BIAS
      add = real ? widen(bias[column]) : 0.f;
#endif
#pragma unroll
      for (int j = 0; j < ML_TOKENS / 8; j++) {
        u32 both = narrow(d[4 * j + 2 * half] + add, d[4 * j + 2 * half + 1] + add);
        int token = 8 * j + 2 * (t & 3);
        if (real && token < tokens) y[(u64)token * n + column] = (u16)both;
        if (real && token + 1 < tokens) y[(u64)(token + 1) * n + column] = (u16)(both >> 16);
      }
    }
  }
  if (ranks > 1) cluster_sync(); /* nobody's memory goes while another reads it */
}
