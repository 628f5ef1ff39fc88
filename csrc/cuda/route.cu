//options: ML_LOGITS ML_WIDTH ML_TOP
/* Routing: logits [T, N] to mixture weights [T, N], and back. What is computed is said at core/route.c.
 *
 * A token's row lies in the registers of LANES lanes of one warp: expert i * LANES + l is item i of lane l. Loads and
 * stores of an item are those of neighbours in memory, whatever N is. Lanes without an expert hold -inf.
 *
 * ML_LOGITS is the logits' dtype (ML_CUDA_F32 ...), ML_WIDTH the least power of 2 that holds N, ML_TOP whether there is
 * a top-k.
 */
#include "elements.cuh"

enum {
  WIDTH = ML_WIDTH,
  LANES = WIDTH < 32 ? WIDTH : 32,
  ITEMS = WIDTH / LANES,
  THREADS = 256, /* of a block: all experts, and no fewer */
  GROUPS = THREADS / LANES,
  SUM_THREADS = 1024,
};

/* ---- dtypes ---- */

template <int DTYPE>
struct dtype;

template <>
struct dtype<ML_CUDA_F32> {
  typedef float real, stored;
  static DEVICE float widen(float x) { return x; }
  static DEVICE float narrow(float x) { return x; }
};
template <>
struct dtype<ML_CUDA_F64> {
  typedef double real, stored;
  static DEVICE double widen(double x) { return x; }
  static DEVICE double narrow(double x) { return x; }
};
template <>
struct dtype<ML_CUDA_BF16> {
  typedef float real;
  typedef u16 stored;
  static DEVICE float widen(u16 x) { return widen_bf16(x); }
  static DEVICE u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
  }
};
template <>
struct dtype<ML_CUDA_F16> {
  typedef float real;
  typedef u16 stored;
  static DEVICE float widen(u16 x) { return widen_f16(x); }
  static DEVICE u16 narrow(float x) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
  }
};

typedef dtype<ML_LOGITS> logit;
typedef logit::real real;
typedef dtype<sizeof(real) == 8 ? ML_CUDA_F64 : ML_CUDA_F32> computed;

DEVICE real infinity() { return (real)__int_as_float(0x7f800000); }

DEVICE float power_of_e(float x) { return expf(x); }
DEVICE double power_of_e(double x) { return exp(x); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE double larger(double a, double b) { return fmax(a, b); }

/* Integers in the order of the numbers they stand for, -0 as 0. Those of numbers other than NaN are larger than 1. */
DEVICE u32 key_of(float x) {
  u32 bits = __float_as_uint(x + 0.f);
  return bits ^ ((int)bits < 0 ? ~0u : 1u << 31);
}
DEVICE u64 key_of(double x) {
  u64 bits = (u64)__double_as_longlong(x + 0.);
  return bits ^ ((long long)bits < 0 ? ~0ull : 1ull << 63);
}
typedef decltype(key_of(real())) key;

/* ---- a token's lanes ---- */

DEVICE int lane() { return threadIdx.x % LANES; }
DEVICE int expert(int item) { return item * LANES + lane(); }

template <class T>
DEVICE T sum_of(T x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

DEVICE real largest_of(real x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x = larger(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

/* Whole warps have an instruction for this. */
DEVICE u32 largest_key(u32 x) { return __reduce_max_sync(~0u, x); }
DEVICE u64 largest_key(u64 x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    u64 other = __shfl_xor_sync(~0u, x, step);
    x = x > other ? x : other;
  }
  return x;
}

/* x becomes softmax(x * rate). Returns false for a bad row, all of which is NaN then. */
DEVICE bool softmax(real (&x)[ITEMS], real rate, int experts) {
  real largest = -infinity(), total = 0;
#pragma unroll
  for (int i = 0; i < ITEMS; i++) largest = larger(largest, x[i]);
  largest = largest_of(largest);
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    x[i] = expert(i) < experts ? power_of_e((x[i] - largest) * rate) : (real)0;
    total += x[i];
  }
  total = sum_of(total);
  const real inverse = (real)1 / total;
#pragma unroll
  for (int i = 0; i < ITEMS; i++) x[i] *= inverse;
  return total == total;
}

/* Which items have one of the k largest keys, ties to the lower expert, as bits. indices [k], where not NULL, gets their
 * experts in order. Two ways, which find the same: one expert after the other, or the rank of each, whose cost is the
 * same for every k. Keys of lanes without an expert are 0. */
DEVICE u32 select(key (&keys)[ITEMS], int k, long long *indices) {
  u32 kept = 0;
  if (ITEMS > 1 && k * 4 <= WIDTH) {
    for (int s = 0; s < k; s++) {
      key best = 0;
      u32 at = WIDTH;
#pragma unroll
      for (int i = 0; i < ITEMS; i++) {
        if (keys[i] > best) {
          best = keys[i];
          at = expert(i);
        }
      }
      at = __reduce_min_sync(~0u, best == largest_key(best) ? at : WIDTH);
#pragma unroll
      for (int i = 0; i < ITEMS; i++) {
        if (at == expert(i)) {
          keys[i] = 0;
          kept |= 1u << i;
        }
      }
      if (indices && lane() == s % LANES) indices[s] = at;
    }
    return kept;
  }
  int rank[ITEMS] = {};
#pragma unroll 4
  for (int l = 0; l < LANES; l++) {
#pragma unroll
    for (int j = 0; j < ITEMS; j++) {
      const key other = __shfl_sync(~0u, keys[j], l, LANES);
#pragma unroll
      for (int i = 0; i < ITEMS; i++) {
        const bool before = j < i || (j == i && l < lane());
        rank[i] += other + before > keys[i]; /* no key is the largest integer */
      }
    }
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++) {
    if (rank[i] < k) {
      kept |= 1u << i;
      if (indices) indices[rank[i]] = expert(i);
    }
  }
  return kept;
}

/* ---- sums over tokens ---- */

struct total {
  double sum;
  int count;
};

/* Of a block whose threads hold ITEMS_ of LANES_ experts each; expert e's total is what thread e gets. The order
 * is fixed. */
template <int LANES_, int ITEMS_, int WARPS, class T>
DEVICE total add_up(T (&sums)[ITEMS_], int (&counts)[ITEMS_]) {
  __shared__ double all_sums[WARPS][LANES_ * ITEMS_];
  __shared__ int all_counts[WARPS][LANES_ * ITEMS_];
#pragma unroll
  for (int i = 0; i < ITEMS_; i++) {
    total of = {sums[i], counts[i]};
#pragma unroll
    for (int step = LANES_; step < 32; step *= 2) {
      of.sum += __shfl_xor_sync(~0u, of.sum, step);
      of.count += __shfl_xor_sync(~0u, of.count, step);
    }
    if (threadIdx.x % 32 < LANES_) {
      all_sums[threadIdx.x / 32][i * LANES_ + threadIdx.x % 32] = of.sum;
      all_counts[threadIdx.x / 32][i * LANES_ + threadIdx.x % 32] = of.count;
    }
  }
  __syncthreads();
  total all = {};
  if (threadIdx.x < LANES_ * ITEMS_) {
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      all.sum += all_sums[w][threadIdx.x];
      all.count += all_counts[w][threadIdx.x];
    }
  }
  return all;
}

DEVICE void finish(const ml_route_forward &a, int e, total all) {
  ((real *)a.prob_sums)[e] = (real)all.sum;
  a.counts[e] = all.count;
}

/* ---- forward ---- */

DEVICE bool counts_in_sums(const ml_routed_rows &in, int t) {
  return t < in.tokens && (!in.mask || in.mask[t * in.mask_stride]);
}

/* Row t; `fill` where there is no such expert or token. */
template <class D>
DEVICE void load(const void *rows, long long row, const ml_routed_rows &in, int t, real (&x)[ITEMS], real fill) {
  const typename D::stored *own = (const typename D::stored *)rows + t * row + lane();
#pragma unroll
  for (int i = 0; i < ITEMS; i++) x[i] = t < in.tokens && expert(i) < in.experts ? D::widen(own[i * LANES]) : fill;
}

extern "C" __global__ void __launch_bounds__(THREADS) ml_route(const ml_route_forward a) {
  const ml_routed_rows &in = a.in;
  const real rate = (real)in.rate;
  let_successor_start();
  real sums[ITEMS] = {}; /* of few tokens: the host sees to it that the chains of additions stay short */
  int counts[ITEMS] = {}, all_counts = 0;

  const int stride = gridDim.x * GROUPS;
  real next[ITEMS]; /* on their way while others are computed */
  load<logit>(in.rows, in.row, in, blockIdx.x * GROUPS + threadIdx.x / LANES, next, -infinity());
  for (int first = blockIdx.x * GROUPS; first < in.tokens; first += stride) {
    const int t = first + threadIdx.x / LANES; /* whole warps go on together, past the last token too */
    const bool there = t < in.tokens, counted = counts_in_sums(in, t);
    real x[ITEMS];
    key keys[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      x[i] = next[i];
      keys[i] = expert(i) < in.experts ? key_of(x[i]) : (key)0;
    }
    load<logit>(in.rows, in.row, in, t + stride, next, -infinity());
    const bool good = softmax(x, rate, in.experts);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) sums[i] += counted ? x[i] : (real)0;

    if (ML_TOP) {
#pragma unroll
      for (int i = 0; i < ITEMS; i++)
        if (!good && keys[i]) keys[i] = 1; /* all alike */
      const u32 kept = select(keys, in.top_k, there ? a.indices + (u64)t * in.top_k : 0);
      real norm = 0;
#pragma unroll
      for (int i = 0; i < ITEMS; i++) {
        x[i] = kept >> i & 1 ? x[i] : (real)0;
        norm += x[i];
        counts[i] += counted && kept >> i & 1;
      }
      if (in.renormalize) {
        norm = sum_of(norm);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) x[i] = kept >> i & 1 ? x[i] / norm : (real)0;
      }
    }
    real *own = (real *)a.weights + (u64)t * in.experts + lane();
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
      if (there && expert(i) < in.experts) own[i * LANES] = x[i];
    all_counts += counted;
  }
#pragma unroll
  for (int i = 0; i < ITEMS; i++)
    if (!ML_TOP) counts[i] = all_counts;

  const total all = add_up<LANES, ITEMS, THREADS / 32>(sums, counts);
  const int e = threadIdx.x;
  if (e >= in.experts) return;
  if (gridDim.x == 1) return finish(a, e, all);
  a.block_sums[(u64)blockIdx.x * in.experts + e] = all.sum;
  a.block_counts[(u64)blockIdx.x * in.experts + e] = all.count;
}

/* counts and prob_sums from what the blocks of ml_route left. LANES experts a block. */
extern "C" __global__ void __launch_bounds__(SUM_THREADS) ml_route_sums(const ml_route_forward a) {
  wait_for_predecessor();
  const int first = blockIdx.x * LANES, e = first + threadIdx.x % LANES;
  double sums[1] = {};
  int counts[1] = {};
  if (e < a.in.experts) {
#pragma unroll 4
    for (int b = threadIdx.x / LANES; b < a.blocks; b += SUM_THREADS / LANES) {
      sums[0] += a.block_sums[(u64)b * a.in.experts + e];
      counts[0] += a.block_counts[(u64)b * a.in.experts + e];
    }
  }
  const total all = add_up<LANES, 1, SUM_THREADS / 32>(sums, counts);
  if (threadIdx.x < LANES && e < a.in.experts) finish(a, e, all);
}

/* ---- backward ---- */

extern "C" __global__ void __launch_bounds__(THREADS) ml_route_backward(const ml_route_gradient a) {
  const ml_routed_rows &in = a.in;
  const real rate = (real)in.rate;
  real grad_sums[ITEMS];
#pragma unroll
  for (int i = 0; i < ITEMS; i++)
    grad_sums[i] =
        a.grad_sums && expert(i) < in.experts ? ((const real *)a.grad_sums)[expert(i) * a.grad_sums_stride] : (real)0;

  for (int first = blockIdx.x * GROUPS; first < in.tokens; first += gridDim.x * GROUPS) {
    const int t = first + threadIdx.x / LANES;
    const bool there = t < in.tokens, counted = counts_in_sums(in, t);
    real p[ITEMS], g[ITEMS] = {};
    if (a.grad_weights) load<computed>(a.grad_weights, a.grad_row, in, t, g, (real)0);
    if (ML_TOP) {
      load<logit>(in.rows, in.row, in, t, p, -infinity());
      softmax(p, rate, in.experts);
      const long long *indices = a.indices + (u64)t * in.top_k;
      u32 kept = 0;
      for (int s = 0; there && s < in.top_k; s++) {
        const u32 e = (u32)indices[s];
        kept |= e % LANES == lane() ? 1u << e / LANES % 32 : 0;
      }
      real norm = 0, mean = 0;
#pragma unroll
      for (int i = 0; i < ITEMS; i++) {
        g[i] = kept >> i & 1 ? g[i] : (real)0;
        norm += kept >> i & 1 ? p[i] : (real)0;
        mean += g[i] * p[i];
      }
      if (in.renormalize) {
        norm = sum_of(norm);
        mean = sum_of(mean) / norm;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) g[i] = kept >> i & 1 ? (g[i] - mean) / norm : (real)0;
      }
    } else {
      load<computed>(in.rows, in.row, in, t, p, (real)0);
    }
    real dot = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
      g[i] += counted ? grad_sums[i] : (real)0;
      dot += g[i] * p[i];
    }
    dot = sum_of(dot);
    logit::stored *own = (logit::stored *)a.grad_logits + (u64)t * in.experts + lane();
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
      if (there && expert(i) < in.experts) own[i * LANES] = logit::narrow(p[i] * (g[i] - dot) * rate);
  }
}
