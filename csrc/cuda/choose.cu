//options: ML_F16
/* The pairs of a token and one of its top k experts, in the order of the experts: a counting sort, in which nothing depends on
 * who comes first.
 *
 *   ml_experts   the table of those experts that do not travel in the arguments of ml_choose
 *   ml_choose    the table of the others; which experts a token has; how many tokens of a chunk each expert has
 *   ml_arrange   where each pair comes, from the counts of all chunks
 *
 * Launch: ml_choose and ml_arrange a block for each chunk, of 1024 and 256 threads; that is also how many experts there are at
 * most.
 */
#include "elements.cuh"

enum {
  CHOOSERS = 1024,
  THREADS = 256,
  OF_LANE = ML_MAX_EXPERTS / 32,
  NONE = ML_MAX_EXPERTS,
  STRETCH = 8192 /* pairs that are looked through at a time */
};
static_assert(ML_MAX_EXPERTS <= THREADS, "a thread has an expert");

extern "C" __global__ void ml_experts(const __grid_constant__ ml_adapters table, ml_adapter *to, int n) {
  let_successor_start();
  wait_for_predecessor();
  if (threadIdx.x < n) to[threadIdx.x] = table.of[threadIdx.x];
}

/* A number that is above 0 and orders weights as is_kept does: NaN, whichever, above all. */
DEVICE u32 rank_of(float weight) {
  u32 bits = __float_as_uint(weight + 0.f); /* -0 becomes 0 */
  if (weight != weight) return ~0u;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* table: of the first experts. grad_w [T, N], where not NULL: zeros, of which pairs will have theirs. */
extern "C" __global__ void __launch_bounds__(CHOOSERS)
    ml_choose(const __grid_constant__ ml_adapters table, const ml_pairs pairs, const ml_weights weights, void *grad_w) {
  __shared__ int counts[ML_MAX_EXPERTS];
  let_successor_start();
  wait_for_predecessor();
  int n = pairs.n_experts, k = pairs.top_k, lane = threadIdx.x % 32;
  int first = blockIdx.x * pairs.chunk, end = min(first + pairs.chunk, pairs.tokens);
  if (blockIdx.x == 0 && threadIdx.x < min(n, (int)ML_TABLE_EXPERTS)) pairs.experts[threadIdx.x] = table.of[threadIdx.x];
  if (threadIdx.x < ML_MAX_EXPERTS) counts[threadIdx.x] = 0;
  __syncthreads();
  for (int t = first + threadIdx.x / 32; t < end; t += CHOOSERS / 32) {
    u32 left[OF_LANE]; /* of experts lane + 32 i; 0: none, or chosen */
#pragma unroll
    for (int i = 0; i < OF_LANE; i++) {
      int e = lane + 32 * i;
      left[i] = e < n ? rank_of(weight_at(weights, t, e)) : 0u;
      if (grad_w && e < n) put_grad(weights.dtype, grad_w, (u64)t * n + e, 0.f);
    }
    for (int slot = 0; slot < k; slot++) {
      u32 largest = 0;
#pragma unroll
      for (int i = 0; i < OF_LANE; i++) largest = max(largest, left[i]);
      largest = __reduce_max_sync(~0u, largest);
      u32 lowest = NONE;
#pragma unroll
      for (int i = OF_LANE - 1; i >= 0; i--) lowest = left[i] == largest ? lane + 32 * i : lowest;
      int e = (int)__reduce_min_sync(~0u, lowest);
#pragma unroll
      for (int i = 0; i < OF_LANE; i++) left[i] = e == lane + 32 * i ? 0u : left[i];
      if (lane == 0) {
        u64 pair = (u64)t * k + slot;
        pairs.chosen[pair] = (unsigned char)e;
        float scaling = e < ML_TABLE_EXPERTS ? table.of[e].scaling : pairs.experts[e].scaling;
        pairs.factors[pair] = factor_of(scaling, weight_at(weights, t, e));
        atomicAdd(&counts[e], 1);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < n) pairs.counts[blockIdx.x * n + threadIdx.x] = counts[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(THREADS) ml_arrange(const ml_pairs pairs) {
  __shared__ u32 chosen[STRETCH / 4];
  __shared__ int sums[THREADS / 32];
  let_successor_start();
  wait_for_predecessor();
  int n = pairs.n_experts, e = threadIdx.x, lane = e % 32, before = 0, total = 0;
  if (e < n) {
#pragma unroll 8
    for (int c = 0; c < gridDim.x; c++) {
      int count = pairs.counts[c * n + e];
      before += c < blockIdx.x ? count : 0;
      total += count;
    }
  }
  /* The tiles of all experts before this one. */
  int tiles = (total + ML_TILE_PAIRS - 1) / ML_TILE_PAIRS, up_to = tiles;
  for (int by = 1; by < 32; by *= 2) {
    int other = __shfl_up_sync(~0u, up_to, by);
    up_to += lane >= by ? other : 0;
  }
  if (lane == 31) sums[e / 32] = up_to;
  __syncthreads();
  int all = 0;
  for (int w = 0; w < THREADS / 32; w++) {
    up_to += w < e / 32 ? sums[w] : 0;
    all += sums[w];
  }
  int tile = up_to - tiles, at = tile * ML_TILE_PAIRS + before;
  if (blockIdx.x == 0) {
    if (e < n) pairs.first[e] = tile * ML_TILE_PAIRS, pairs.total[e] = total;
    for (int i = 0; i < tiles; i++) pairs.tile_expert[tile + i] = e;
    for (int i = tile * ML_TILE_PAIRS + total; i < up_to * ML_TILE_PAIRS; i++) pairs.order[i] = -1;
    for (int i = all + e; i < pairs.tiles; i += THREADS) pairs.tile_expert[i] = -1;
  }
  int first = blockIdx.x * pairs.chunk, end = min(first + pairs.chunk, pairs.tokens);
  u64 pair = (u64)first * pairs.top_k, last = (u64)end * pairs.top_k;
  for (; pair < last; pair += STRETCH) {
    int here = (int)min((u64)STRETCH, last - pair);
    __syncthreads();
    for (int i = e; i < here; i += THREADS) ((unsigned char *)chosen)[i] = pairs.chosen[pair + i];
    __syncthreads();
    for (int i = 0; i < here && e < n; i += 4) {
      u32 own = __vcmpeq4(chosen[i / 4], (u32)e * 0x01010101u);
      if (own == 0) continue;
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (own >> 8 * j & 1 && i + j < here) pairs.order[at++] = (int)pair + i + j;
    }
  }
}
