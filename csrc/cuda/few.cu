//options: ML_F16 ML_F32_ADAPTERS
/* The shrink of a few tokens, straight from the experts' own A: H = x A^T and s w H. A block of 256 threads computes one of the C
 * columns for 8 tokens: it holds a stretch of A's row in registers and meets each token's x with it. */
#include "elements.cuh"

enum { THREADS = 256, STRETCH = 8, TOKENS = 8 };

/* Eight elements of x, or of A. */
DEVICE void widen_eight(float (&to)[STRETCH], uint4 from) {
  u32 v[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    to[2 * i] = low_of(v[i]);
    to[2 * i + 1] = high_of(v[i]);
  }
}
DEVICE void load_a(float (&to)[STRETCH], const void *row, int k) {
#if ML_F32_ADAPTERS
  const float4 *from = (const float4 *)((const float *)row + k);
  float4 low = from[0], high = from[1];
  /* Rounded, as everywhere. */
  widen_eight(to, {narrow(low.x, low.y), narrow(low.z, low.w), narrow(high.x, high.y), narrow(high.z, high.w)});
#else
  widen_eight(to, *(const uint4 *)((const u16 *)row + k));
#endif
}

extern "C" __global__ __launch_bounds__(THREADS) void ml_few(const __grid_constant__ ml_adapters adapters, const ml_weights weights,
                                                             const u16 *x, long long x_row, u16 *mixed, u16 *hidden, int tokens,
                                                             int depth, int columns) {
  __shared__ float parts[TOKENS][THREADS / 32];
  let_successor_start();
  int c = blockIdx.x % columns, first = blockIdx.x / columns * TOKENS;
  int e = adapters.expert_of[c / 8], r = c - adapters.of[e].column;
  int t = threadIdx.x, lane = t % 32, warp = t / 32;
  bool real = r < adapters.of[e].rank;
  if (real) {
    const char *row = (const char *)adapters.of[e].a + (u64)r * depth * (ML_F32_ADAPTERS ? 4 : 2);
    float sums[TOKENS] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (int k = t * STRETCH; k < depth; k += THREADS * STRETCH) {
      float a[STRETCH];
      uint4 rows[TOKENS];
#pragma unroll
      for (int i = 0; i < TOKENS; i++)
        rows[i] = first + i < tokens ? *(const uint4 *)(x + (first + i) * x_row + k) : uint4{0, 0, 0, 0};
      load_a(a, row, k);
#pragma unroll
      for (int i = 0; i < TOKENS; i++) {
        float v[STRETCH];
        widen_eight(v, rows[i]);
#pragma unroll
        for (int j = 0; j < STRETCH; j++) sums[i] += a[j] * v[j];
      }
    }
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
#pragma unroll
      for (int half = 16; half > 0; half /= 2) sums[i] += __shfl_xor_sync(~0u, sums[i], half);
      if (lane == 0) parts[i][warp] = sums[i];
    }
  }
  __syncthreads();
  int token = first + t;
  if (t >= TOKENS || token >= tokens) return;
  float h = 0, f = 0;
  if (real) {
    for (int i = 0; i < THREADS / 32; i++) h += parts[t][i];
    f = is_kept(weights, token, e) ? factor_of(adapters.of[e].scaling, weight_at(weights, token, e)) : DROPPED;
  }
  u32 both = narrow(times(f, h), h);
  mixed[(u64)token * columns + c] = (u16)both;
  if (hidden) hidden[(u64)token * columns + c] = (u16)(both >> 16);
}
