//options: ML_F16 ML_F32_ADAPTERS ML_TOKENS
/* The shrink of a few tokens, straight from the experts' own A, on Hopper: H = x A^T and s w H.
 *
 * A block computes 8 columns, which are one expert's, for ML_TOKENS (16, 32) tokens; the blocks of a cluster share the
 * sum, and so do the warps of a block: little is read twice, and most of it is on its way at once. Blocks are small, so
 * that those of decode.cu find room beside them; and since W keeps the memory busy from then on, all is asked for before.
 */
#include "hopper.cuh"
#include "warp.cuh"

enum { THREADS = 256, WARPS = THREADS / 32, TILES = ML_TOKENS / 16, SUMS = ML_TOKENS * 8 };

/* Eight elements of A's row, rounded, as everywhere. */
DEVICE uint4 eight_of_a(const void *row, int k) {
#if ML_F32_ADAPTERS
  float4 low = *(const float4 *)((const float *)row + k), high = *(const float4 *)((const float *)row + k + 4);
  return {narrow(low.x, low.y), narrow(low.z, low.w), narrow(high.x, high.y), narrow(high.z, high.w)};
#else
  return *(const uint4 *)((const u16 *)row + k);
#endif
}

extern "C" __global__ __launch_bounds__(THREADS, 4) void ml_few(const __grid_constant__ ml_adapters adapters,
                                                                const ml_weights weights, const u16 *x, long long x_row,
                                                                u16 *mixed, u16 *hidden, int tokens, int depth,
                                                                int columns) {
  __shared__ float parts[WARPS][SUMS], sums[SUMS];
  wait_for_predecessor();
  let_successor_start(); /* not before: decode.cu reads at once what kernels before this one have made */
  int rank = (int)cluster_rank(), ranks = (int)cluster_size(), task = blockIdx.x / ranks;
  int block = task % (columns / 8), first = task / (columns / 8) * ML_TOKENS;
  int e = adapters.expert_of[block], r = block * 8 - adapters.of[e].column, left = adapters.of[e].rank - r;
  int t = threadIdx.x, lane = t % 32, warp = t / 32, line = lane / 4;
  /* The sum that a thread finishes in the end: each block has its share. */
  static_assert(SUMS <= THREADS, "one");
  int own = SUMS * rank / ranks + t, token = first + own / 8, column = own % 8;
  bool finishes = own < SUMS * (rank + 1) / ranks && token < tokens;
  float f = 0;
  if (finishes && column < left)
    f = is_kept(weights, token, e) ? factor_of(adapters.of[e].scaling, weight_at(weights, token, e)) : DROPPED;
  if (left > 0) {
    /* A lane takes the same 8 of 32 elements of the sum from every row: in which order they are added is free. */
    const char *row = (const char *)adapters.of[e].a + (u64)(r + line) * depth * (ML_F32_ADAPTERS ? 4 : 2);
    int steps = (depth + 31) / 32, end = steps * (rank + 1) / ranks;
    float d[TILES][4] = {};
#pragma unroll 1
    for (int step = steps * rank / ranks + warp; step < end; step += WARPS) {
      int k = step * 32 + lane % 4 * 8;
      uint4 a = {0, 0, 0, 0}, rows[TILES][2];
      if (line < left && k < depth) a = eight_of_a(row, k);
#pragma unroll
      for (int i = 0; i < 2 * TILES; i++) {
        int token = first + 8 * i + line;
        rows[i / 2][i % 2] = token < tokens && k < depth ? *(const uint4 *)(x + token * x_row + k) : uint4{0, 0, 0, 0};
      }
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        multiply(d[i], rows[i][0].x, rows[i][1].x, rows[i][0].y, rows[i][1].y, a.x, a.y);
        multiply(d[i], rows[i][0].z, rows[i][1].z, rows[i][0].w, rows[i][1].w, a.z, a.w);
      }
    }
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      float *to = &parts[warp][(16 * i + line) * 8 + lane % 4 * 2];
      *(float2 *)to = {d[i][0], d[i][1]};
      *(float2 *)(to + 64) = {d[i][2], d[i][3]};
    }
  }
  __syncthreads();
  if (t < SUMS && left > 0) {
    float sum = 0;
    for (int from = 0; from < WARPS; from++) sum += parts[from][t];
    sums[t] = sum;
  }
  cluster_sync();
  if (finishes) {
    float h = 0;
    for (int from = 0; from < ranks && column < left; from++) {
      float part;
      asm volatile("ld.shared::cluster.f32 %0, [%1];"
                   : "=f"(part)
                   : "r"(address_in(from, shared_address(&sums[own])))
                   : "memory");
      h += part;
    }
    u32 both = narrow(times(f, h), h);
    u64 to = (u64)token * columns + block * 8 + column;
    mixed[to] = (u16)both;
    if (hidden) hidden[to] = (u16)(both >> 16);
  }
  cluster_sync(); /* nobody's memory goes while another reads it */
}
