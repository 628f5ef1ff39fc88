//options: ML_F16 ML_F32_ADAPTERS
/* What a call makes of the adapters and the routing weights before anything else: A and B of all experts side by side,
 * rounded to the call's dtype; factors s_e w_te; tables; and zeros for the flags of the kernel that follows. */
#include "elements.cuh"

/* Elements [at, at + 8) of an adapter, of which the first `n` are there. */
DEVICE uint4 eight(const void *data, u64 at, int n, bool aligned) {
#if ML_F32_ADAPTERS
  const float *from = (const float *)data + at;
  float v[8];
  if (n >= 8 && aligned) {
    float4 low = ((const float4 *)from)[0], high = ((const float4 *)from)[1];
    return {narrow(low.x, low.y), narrow(low.z, low.w), narrow(high.x, high.y), narrow(high.z, high.w)};
  }
  for (int i = 0; i < 8; i++) v[i] = i < n ? from[i] : 0.f;
  return {narrow(v[0], v[1]), narrow(v[2], v[3]), narrow(v[4], v[5]), narrow(v[6], v[7])};
#else
  const u16 *from = (const u16 *)data + at;
  if (n >= 8 && aligned) return *(const uint4 *)from;
  u32 v[8];
  for (int i = 0; i < 8; i++) v[i] = i < n ? from[i] : 0u;
  return {v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16};
#endif
}

extern "C" __global__ void ml_prepare(const __grid_constant__ ml_adapters adapters, const ml_prepared out, const ml_weights weights) {
  let_successor_start();
  u64 thread = (u64)blockIdx.x * blockDim.x + threadIdx.x, threads = (u64)gridDim.x * blockDim.x;
  u32 wide = out.d_in / 8, blocks = out.columns / 8;
  u64 of_a = (u64)out.columns * wide, of_b = (u64)out.d_out * blocks;
  for (u64 i = thread; i < of_a + of_b; i += threads) {
    uint4 v = {0, 0, 0, 0};
    if (i < of_a) {
      int c = (int)(i / wide), k = (int)(i % wide) * 8;
      const ml_adapter &adapter = adapters.of[adapters.expert_of[c / 8]];
      int r = c - adapter.column;
      if (r < adapter.rank) v = eight(adapter.a, (u64)r * out.d_in + k, 8, true);
      ((uint4 *)out.a)[i] = v;
    } else {
      u64 j = i - of_a;
      int row = (int)(j / blocks), block = (int)(j % blocks);
      const ml_adapter &adapter = adapters.of[adapters.expert_of[block]];
      int r = block * 8 - adapter.column;
      if (r < adapter.rank) v = eight(adapter.b, (u64)row * adapter.rank + r, adapter.rank - r, adapter.rank % 8 == 0);
      ((uint4 *)out.b)[j] = v;
    }
  }
  for (u64 i = thread; i < (u64)out.tokens * out.n_experts; i += threads) {
    int t = (int)(i / out.n_experts), e = (int)(i % out.n_experts);
    out.factors[i] = is_kept(weights, t, e) ? factor_of(adapters.of[e].scaling, weight_at(weights, t, e)) : DROPPED;
  }
  if (thread < blocks) out.experts[thread] = adapters.expert_of[thread];
  if (thread < out.n_experts) out.scalings[thread] = adapters.of[thread].scaling;
  for (u64 i = thread; i < out.n_flags; i += threads) out.flags[i] = 0;
}
