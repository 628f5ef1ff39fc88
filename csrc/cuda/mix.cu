//options: ML_F16
/* The narrow side where torch's own products make it: the same as finish_shrink of hopper.cuh, from [T, C] in memory. And
 * gradients of routing weights, in their dtype and shape. */
#include "elements.cuh"

/* mixed = s w H, from H in narrow.hidden; both 8 columns a thread. */
extern "C" __global__ void ml_mix(const ml_narrow n) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, blocks = n.columns / 8;
  if (i >= n.tokens * blocks) return;
  float f = n.factors[i / blocks * n.n_experts + n.experts[i % blocks]];
  uint4 h = ((const uint4 *)n.hidden)[i];
  u32 v[4] = {h.x, h.y, h.z, h.w};
  for (int j = 0; j < 4; j++) v[j] = narrow(times(f, low_of(v[j])), times(f, high_of(v[j])));
  ((uint4 *)n.mixed)[i] = {v[0], v[1], v[2], v[3]};
}

/* From P in narrow.mixed, which becomes Q = s w P, and H; one expert of one token a thread. */
extern "C" __global__ void ml_mix_backward(const __grid_constant__ ml_adapters adapters, const ml_narrow n) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u64)n.tokens * n.n_experts) return;
  int e = (int)(i % n.n_experts), first = adapters.of[e].column;
  int end = e + 1 < n.n_experts ? adapters.of[e + 1].column : n.columns;
  float f = n.factors[i], dot = 0;
  u64 row = i / n.n_experts * n.columns;
  for (int c = first; c < end; c += 2) {
    u64 at = (row + c) / 2;
    u32 p = ((const u32 *)n.mixed)[at], h = n.hidden ? ((const u32 *)n.hidden)[at] : 0u;
    dot += low_of(p) * low_of(h) + high_of(p) * high_of(h);
    ((u32 *)n.mixed)[at] = narrow(times(f, low_of(p)), times(f, high_of(p)));
    if (n.weighted) ((u32 *)n.weighted)[at] = narrow(times(f, low_of(h)), times(f, high_of(h)));
  }
  if (n.grad_w) n.grad_w[i] = n.scalings[e] * dot;
}

/* The gradient of weights [T, N] that are every token's own: 0 for what top_k drops. One number a thread. */
extern "C" __global__ void ml_grad_own_weights(const ml_weights w, const float *per_token, void *grad, int tokens) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= (u64)tokens * w.n_experts) return;
  bool kept = is_kept(w, (int)(i / w.n_experts), (int)(i % w.n_experts));
  put_grad(w.dtype, grad, i, kept ? per_token[i] : 0.f);
}

/* The same, summed over the `share` tokens that have weights in common, in the same order always; to [T / share, N]. One block of
 * 256 threads a number. */
extern "C" __global__ void ml_grad_weights(const ml_weights w, const float *per_token, void *grad, int share) {
  __shared__ float sums[256];
  int n = w.n_experts, e = blockIdx.x % n, first = blockIdx.x / n * share;
  float sum = 0;
  for (int t = first + threadIdx.x; t < first + share; t += 256) sum += is_kept(w, t, e) ? per_token[(u64)t * n + e] : 0.f;
  sums[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) put_grad(w.dtype, grad, blockIdx.x, sums[0]);
}
