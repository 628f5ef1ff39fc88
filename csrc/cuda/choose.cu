//options: ML_F16
/* The pairs of a token and one of its top k experts, in the order of the experts: a counting sort, in which nothing depends on
 * who comes first.
 *
 *   ml_experts   the table of those experts that do not travel in the arguments of ml_choose
 *   ml_choose    the table of the others; which experts a token has; how many tokens of a chunk each expert has
 *   ml_arrange   where each pair comes, from the counts of all chunks
 *
 * Launch: ml_choose and ml_arrange a block of 1024 threads for each chunk.
 */
#include "elements.cuh"

enum {
  THREADS = 1024,
  OF_LANE = ML_MAX_EXPERTS / 32,
  NONE = ML_MAX_EXPERTS,
  WARPS = THREADS / 32,
  PARTS = THREADS / ML_MAX_EXPERTS /* of the chunks, whose counts are added side by side */
};

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
DEVICE float weight_of(u32 rank) { return __uint_as_float(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank); }

/* table: of the first experts. grad_w [T, N], where not NULL: zeros, of which pairs will have theirs. */
extern "C" __global__ void __launch_bounds__(THREADS)
    ml_choose(const __grid_constant__ ml_adapters table, const ml_pairs pairs, const ml_weights weights, void *grad_w) {
  __shared__ int counts[ML_MAX_EXPERTS];
  let_successor_start();
  wait_for_predecessor();
  int n = pairs.n_experts, k = pairs.top_k, lane = threadIdx.x % 32;
  int first = blockIdx.x * pairs.chunk, end = min(first + pairs.chunk, pairs.tokens);
  if (blockIdx.x == 0 && threadIdx.x < min(n, (int)ML_TABLE_EXPERTS)) pairs.experts[threadIdx.x] = table.of[threadIdx.x];
  if (threadIdx.x < ML_MAX_EXPERTS) counts[threadIdx.x] = 0;
  __syncthreads();
  u32 next[OF_LANE]; /* of experts lane + 32 i of the token that comes next; 0: none */
  auto read = [&](int t) {
#pragma unroll
    for (int i = 0; i < OF_LANE && 32 * i < n; i++) {
      int e = lane + 32 * i;
      next[i] = t < end && e < n ? rank_of(weight_at(weights, t, e)) : 0u;
      if (grad_w && t < end && e < n) put_grad(weights.dtype, grad_w, (u64)t * n + e, 0.f);
    }
  };
  read(first + threadIdx.x / 32);
  for (int t = first + threadIdx.x / 32; t < end; t += WARPS) {
    u32 left[OF_LANE]; /* those that are not chosen */
#pragma unroll
    for (int i = 0; i < OF_LANE && 32 * i < n; i++) left[i] = next[i];
    read(t + WARPS);
    for (int slot = 0; slot < k; slot++) {
      u32 largest = 0;
#pragma unroll
      for (int i = 0; i < OF_LANE && 32 * i < n; i++) largest = max(largest, left[i]);
      largest = __reduce_max_sync(~0u, largest);
      u32 lowest = NONE;
#pragma unroll
      for (int i = 0; i < OF_LANE && 32 * i < n; i++) lowest = left[i] == largest ? min(lowest, lane + 32 * i) : lowest;
      int e = (int)__reduce_min_sync(~0u, lowest);
#pragma unroll
      for (int i = 0; i < OF_LANE && 32 * i < n; i++) left[i] = e == lane + 32 * i ? 0u : left[i];
      if (lane == 0) {
        u64 pair = (u64)t * k + slot;
        pairs.chosen[pair] = (unsigned char)e;
        float scaling = e < ML_TABLE_EXPERTS ? table.of[e].scaling : pairs.experts[e].scaling;
        pairs.factors[pair] = factor_of(scaling, weight_of(largest));
        atomicAdd(&counts[e], 1);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x < n) pairs.counts[blockIdx.x * n + threadIdx.x] = counts[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(THREADS) ml_arrange(const ml_pairs pairs) {
  __shared__ int places[WARPS][ML_MAX_EXPERTS];
  __shared__ int sums[ML_MAX_EXPERTS / 32], before_in[PARTS][ML_MAX_EXPERTS], total_in[PARTS][ML_MAX_EXPERTS];
  let_successor_start();
  wait_for_predecessor();
  int n = pairs.n_experts, part = threadIdx.x / ML_MAX_EXPERTS, counted = threadIdx.x % ML_MAX_EXPERTS;
  int before = 0, total = 0; /* pairs of an expert: in the chunks before this one, and in all */
  if (counted < n) {
#pragma unroll 16
    for (int c = part; c < gridDim.x; c += PARTS) {
      int count = pairs.counts[c * n + counted];
      before += c < blockIdx.x ? count : 0;
      total += count;
    }
  }
  before_in[part][counted] = before;
  total_in[part][counted] = total;
  __syncthreads();
  int e = threadIdx.x, lane = e % 32;
  before = total = 0;
#pragma unroll
  for (int i = 0; i < PARTS && e < ML_MAX_EXPERTS; i++) {
    before += before_in[i][e];
    total += total_in[i][e];
  }
  /* The tiles of all experts before this one. */
  int tiles = (total + ML_TILE_PAIRS - 1) / ML_TILE_PAIRS, up_to = tiles;
  for (int by = 1; by < 32; by *= 2) {
    int other = __shfl_up_sync(~0u, up_to, by);
    up_to += lane >= by ? other : 0;
  }
  if (lane == 31 && e < ML_MAX_EXPERTS) sums[e / 32] = up_to;
  __syncthreads();
  int all = 0;
#pragma unroll
  for (int w = 0; w < ML_MAX_EXPERTS / 32; w++) {
    up_to += w < e / 32 ? sums[w] : 0;
    all += sums[w];
  }
  int tile = up_to - tiles, at = tile * ML_TILE_PAIRS + before;
  if (blockIdx.x == 0) {
    if (e < n) pairs.first[e] = tile * ML_TILE_PAIRS, pairs.total[e] = total;
    for (int i = all + e; i < pairs.tiles; i += THREADS) pairs.tile_expert[i] = -1;
  }
  /* Each block writes down some experts' tiles, and what is left of the last of them. */
  if (e < ML_MAX_EXPERTS) before_in[0][e] = tile, total_in[0][e] = total;
  __syncthreads();
  for (int i = blockIdx.x; i < n; i += gridDim.x) {
    int first = before_in[0][i], pairs_of = total_in[0][i], end = first + (pairs_of + ML_TILE_PAIRS - 1) / ML_TILE_PAIRS;
    for (int t = first + e; t < end; t += THREADS) pairs.tile_expert[t] = i;
    int empty = first * ML_TILE_PAIRS + pairs_of + e;
    if (empty < end * ML_TILE_PAIRS) pairs.order[empty] = -1, pairs.token_of[empty] = 0;
  }
  int first = blockIdx.x * pairs.chunk, end = min(first + pairs.chunk, pairs.tokens);
  u64 last = (u64)end * pairs.top_k;
  for (u64 from = (u64)first * pairs.top_k; from < last; from += THREADS) {
    u64 pair = from + threadIdx.x;
    int chosen = pair < last ? pairs.chosen[pair] : NONE;
    u32 alike = __match_any_sync(~0u, chosen), earlier = alike & ((1u << lane) - 1);
    __syncthreads();
    for (int w = 0; w < WARPS && e < ML_MAX_EXPERTS; w++) places[w][e] = 0;
    __syncthreads();
    if (chosen != NONE && earlier == 0) places[e / 32][chosen] = __popc(alike);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS && e < ML_MAX_EXPERTS; w++) { /* how many become where the warp's first comes */
      int count = places[w][e];
      places[w][e] = at;
      at += count;
    }
    __syncthreads();
    if (chosen != NONE) {
      int to = places[e / 32][chosen] + __popc(earlier);
      pairs.order[to] = (int)pair;
      pairs.token_of[to] = (int)pair / pairs.top_k;
    }
  }
}
