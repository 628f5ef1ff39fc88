//options: ML_F16 ML_F32_ADAPTERS ML_BACKWARD ML_RANKS ML_DEEP
/* Layers of which each token has its top k experts alone: what becomes of the pairs of a token and an expert, expert by expert,
 * in tiles of ML_TILE_PAIRS that choose.cu has arranged. Ranks are up to ML_RANKS (16, 32, 64).
 *
 *   ml_pairs_shrink    H = x A^T of the pairs, or backward P = g B, and what becomes of it
 *   ml_pairs_spread    what each pair adds to its token: mixed B^T, or backward Q A, in a row of its own
 *   ml_pairs_collect   the experts' gradients, backward
 *
 * A and B are read as the experts have them. All products are warps' own (mma), and each sum has one order: the same input gives
 * the same bits. dual.cu adds what pairs add, k rows for each token, to the base product. For that, 64 columns of these rows are
 * in the order in which an accumulator's threads have them: thread q of four has 8j + 2q and the next of each j; the eight of
 * j = 0..3 are the q-th of the row, those of j = 4..7 the q-th of its second half, so that four threads move 64 bytes at a time.
 */
#include "warp.cuh"

#if ML_F32_ADAPTERS
typedef float adapter;
#else
typedef u16 adapter;
#endif

enum { SIZE = sizeof(adapter), COLS = ML_RANKS / 8 };

/* An element of an adapter as 16 bits. */
DEVICE u32 rounded(const adapter *p) {
#if ML_F32_ADAPTERS
  return narrow(*p, 0);
#else
  return *p;
#endif
}
/* Two, whether or not they lie side by side. */
DEVICE u32 two_rounded(const adapter *first, const adapter *second) {
#if ML_F32_ADAPTERS
  return narrow(*first, *second);
#else
  return *first | (u32)*second << 16;
#endif
}

/* ---- the shrink ----
 *
 * A block of WARPS warps computes a tile. A warp has every so many'th stretch of the sum, for which it has a ring of loads of its
 * own; in the end the parts are added. The rings fill half of the shared memory, or all: with ML_DEEP, for no more tiles than
 * multiprocessors, and where two stages do not fit into half.
 */

enum {
  WARPS = ML_RANKS < 64 ? 4 : 8,
  DEPTH = ML_RANKS * SIZE <= 64 ? 64 : ML_RANKS * SIZE < 256 ? 32 : 16, /* of a stretch */
  X_PITCH = DEPTH * 2 + 16,                                             /* bytes; rows of 16 meet in no bank */
#if ML_BACKWARD
  FACTOR_BYTES = DEPTH * (ML_RANKS * SIZE + 16),
#else
  FACTOR_PITCH = DEPTH * SIZE + (SIZE == 4 ? 32 : 16),
  FACTOR_BYTES = ML_RANKS * FACTOR_PITCH,
#endif
  STAGE = ML_TILE_PAIRS * X_PITCH + FACTOR_BYTES,
  HALF = (108 << 10) / (WARPS * STAGE),
  STAGES = ML_DEEP || HALF < 2 ? (216 << 10) / (WARPS * STAGE) : HALF,
  PARTS = DEPTH / 8,         /* 16s of a row of x, */
  ROWS_OF_LANE = 2 * PARTS,  /* of which a thread loads one of so many rows, */
#if ML_BACKWARD
  FACTOR_PARTS = ML_RANKS * SIZE / 16, /* of a row of B, where it has all ranks, */
  FACTORS_OF_LANE = DEPTH * FACTOR_PARTS / 32
#else
  FACTOR_PARTS = DEPTH * SIZE / 16, /* of a row of A */
  FACTORS_OF_LANE = ML_RANKS * FACTOR_PARTS / 32
#endif
};
static_assert(STAGES >= 2 && WARPS * ML_TILE_PAIRS * ML_RANKS * 4 <= WARPS * STAGES * STAGE, "the parts take the place of the ring");

/* Columns [16 i, 16 i + 16) of the factor at 16 of the sum, as two right fragments. */
DEVICE void load_right(u32 (&b)[4], const char *factor, int k, int i, int rank, int pitch) {
  int lane = threadIdx.x % 32;
#if ML_BACKWARD
  /* Rows along the sum, `pitch` bytes each. */
  if (SIZE == 2 && rank % 8 == 0) {
    load_matrices<true>(b, shared_address(factor) + (k + lane % 16) * pitch + (2 * i + lane / 16) * 16);
    if (16 * i >= rank) b[0] = b[1] = 0;
    if (16 * i + 8 >= rank) b[2] = b[3] = 0;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; j++) {
    int column = 16 * i + 8 * (j / 2) + lane / 4, row = k + 8 * (j % 2) + lane % 4 * 2;
    const char *from = factor + row * pitch + column * SIZE;
    b[j] = column < rank ? two_rounded((const adapter *)from, (const adapter *)(from + pitch)) : 0u;
  }
#elif ML_F32_ADAPTERS
#pragma unroll
  for (int j = 0; j < 4; j++) {
    float2 v = *(const float2 *)(factor + (16 * i + 8 * (j / 2) + lane / 4) * FACTOR_PITCH + (k + 8 * (j % 2) + lane % 4 * 2) * 4);
    b[j] = narrow(v.x, v.y);
  }
#else
  u32 at = shared_address(factor) + (16 * i + lane % 8 + lane / 16 * 8) * FACTOR_PITCH + (k + lane / 8 % 2 * 8) * 2;
  load_matrices<false>(b, at);
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    ml_pairs_shrink(const ml_pairs pairs, const ml_cuda_rows x, const ml_pair_side side) {
  extern __shared__ __align__(16) char memory[];
  __shared__ int order[ML_TILE_PAIRS], token_of[ML_TILE_PAIRS];
  let_successor_start();
  wait_for_predecessor();
  int tile = blockIdx.x, e = pairs.tile_expert[tile], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e < 0) return;
  if (threadIdx.x < ML_TILE_PAIRS) {
    order[threadIdx.x] = pairs.order[tile * ML_TILE_PAIRS + threadIdx.x];
    token_of[threadIdx.x] = pairs.token_of[tile * ML_TILE_PAIRS + threadIdx.x];
  }
  const ml_adapter expert = pairs.experts[e];
  int rank = expert.rank, depth = x.cols;
  __syncthreads();

  /* What lies where there is no pair, or no rank, becomes rows and columns of d that nobody reads. */
  const u16 *x_from[ROWS_OF_LANE];
  bool is_pair[ROWS_OF_LANE];
#pragma unroll
  for (int i = 0; i < ROWS_OF_LANE; i++) {
    int row = lane / PARTS + 32 / PARTS * i;
    is_pair[i] = order[row] >= 0;
    x_from[i] = (const u16 *)x.data + token_of[row] * x.row + lane % PARTS * 8;
  }
#if ML_BACKWARD
  const adapter *b = (const adapter *)expert.b;
  bool whole = rank == ML_RANKS;
  int of_row = rank * SIZE % 16 == 0 ? rank * SIZE / 16 : 0; /* 0: rows have no gaps, and begin anywhere */
  int pitch = rank * SIZE + (of_row ? 16 : 0);
#else
  const adapter *a_from[FACTORS_OF_LANE];
#pragma unroll
  for (int i = 0; i < FACTORS_OF_LANE; i++)
    a_from[i] = (const adapter *)expert.a + (u64)min(lane / FACTOR_PARTS + 32 / FACTOR_PARTS * i, rank - 1) * depth +
                lane % FACTOR_PARTS * (16 / SIZE);
  int pitch = 0;
#endif
  char *ring = memory + warp * STAGES * STAGE;
  u32 x_to = shared_address(ring) + lane / PARTS * X_PITCH + lane % PARTS * 16;
  u32 factor_to = shared_address(ring) + ML_TILE_PAIRS * X_PITCH;
  int steps = ((depth + DEPTH - 1) / DEPTH - warp + WARPS - 1) / WARPS, filled = 0;
  auto load = [&](int i) {
    int from = (warp + WARPS * i) * DEPTH;
    u32 stage = filled * STAGE;
    bool inside = from + DEPTH <= depth, real = from + lane % PARTS * 8 < depth;
    filled = filled + 1 < STAGES ? filled + 1 : 0;
    if (inside) {
#pragma unroll
      for (int j = 0; j < ROWS_OF_LANE; j++)
        if (is_pair[j]) copy(x_to + stage + 32 / PARTS * j * X_PITCH, x_from[j] + from);
    } else {
#pragma unroll
      for (int j = 0; j < ROWS_OF_LANE; j++)
        copy(x_to + stage + 32 / PARTS * j * X_PITCH, real ? x_from[j] + from : x.data, real && is_pair[j]);
    }
    u32 to = factor_to + stage;
#if ML_BACKWARD
    if (inside && whole) {
      to += lane / FACTOR_PARTS * (ML_RANKS * SIZE + 16) + lane % FACTOR_PARTS * 16;
      const adapter *first = b + (u64)from * ML_RANKS + lane * (16 / SIZE);
#pragma unroll
      for (int j = 0; j < FACTORS_OF_LANE; j++)
        copy(to + 32 / FACTOR_PARTS * j * (ML_RANKS * SIZE + 16), first + 32 * (16 / SIZE) * j);
      return;
    }
    u64 first = (u64)from * rank * SIZE, end = (u64)depth * rank * SIZE;
    for (int j = lane; j < DEPTH * rank * SIZE / 16; j += 32) {
      u64 at = first + 16 * j;
      u32 place = of_row ? j / of_row * pitch + j % of_row * 16 : 16 * j;
      copy(to + place, at < end ? (const char *)b + at : (const char *)b, at < end);
    }
#else
    to += lane / FACTOR_PARTS * FACTOR_PITCH + lane % FACTOR_PARTS * 16;
    real = from + lane % FACTOR_PARTS * (16 / SIZE) < depth;
    if (inside) {
#pragma unroll
      for (int j = 0; j < FACTORS_OF_LANE; j++) copy(to + 32 / FACTOR_PARTS * j * FACTOR_PITCH, a_from[j] + from);
    } else {
#pragma unroll
      for (int j = 0; j < FACTORS_OF_LANE; j++)
        copy(to + 32 / FACTOR_PARTS * j * FACTOR_PITCH, real ? a_from[j] + from : expert.a, real);
    }
#endif
  };

  float d[4][COLS][4];
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int c = 0; c < COLS; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) d[m][c][i] = 0;
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < steps) load(i);
    copies_commit();
  }
  const char *stage = ring;
  u32 left = shared_address(ring) + lane % 16 * X_PITCH + lane / 16 * 16;
  for (int i = 0; i < steps; i++) {
    if (i + STAGES - 1 < steps) load(i + STAGES - 1);
    copies_commit();
    copies_wait<STAGES - 1>();
    __syncwarp();
#pragma unroll
    for (int step = 0; step < DEPTH; step += 16) {
      u32 right[COLS / 2][4], a[4][4];
#pragma unroll
      for (int m = 0; m < 4; m++) load_matrices<false>(a[m], left + (u32)(stage - ring) + 16 * m * X_PITCH + step * 2);
#pragma unroll
      for (int c = 0; c < COLS / 2; c++) load_right(right[c], stage + ML_TILE_PAIRS * X_PITCH, step, c, rank, pitch);
#pragma unroll
      for (int c = 0; c < COLS; c++)
#pragma unroll
        for (int m = 0; m < 4; m++)
          multiply(d[m][c], a[m][0], a[m][1], a[m][2], a[m][3], right[c / 2][c % 2 * 2], right[c / 2][c % 2 * 2 + 1]);
    }
    stage = stage + STAGE < ring + STAGES * STAGE ? stage + STAGE : ring;
    __syncwarp();
  }
  copies_wait<0>();
  __syncthreads(); /* nobody reads or fills a ring any more */

  float *parts = (float *)memory;
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int c = 0; c < COLS; c++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *(float2 *)(parts + (warp * ML_TILE_PAIRS + 16 * m + lane / 4 + 8 * half) * ML_RANKS + 8 * c + lane % 4 * 2) =
            float2{d[m][c][2 * half], d[m][c][2 * half + 1]};
  __syncthreads();

  /* 8 columns of a pair a thread; those of a pair are in threads side by side. */
  for (int i = threadIdx.x; i < ML_TILE_PAIRS * COLS; i += 32 * WARPS) {
    int block = i % COLS, pair = order[i / COLS];
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      const float4 *part = (const float4 *)(parts + (w * ML_TILE_PAIRS + i / COLS) * ML_RANKS + 8 * block);
      float4 low = part[0], high = part[1];
      v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
      v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = 8 * block + j < rank ? v[j] : 0.f;
    bool real = pair >= 0, has = real && 8 * block < rank;
    float f = real ? pairs.factors[pair] : 0.f;
    int t = token_of[i / COLS];
    uint4 *hidden = (uint4 *)((u16 *)side.hidden + (u64)t * side.columns + expert.column) + block;
    u64 at = (u64)pair * COLS + block;
#if ML_BACKWARD
    uint4 kept = has && side.hidden ? *hidden : uint4{0, 0, 0, 0};
    u32 h[4] = {kept.x, kept.y, kept.z, kept.w};
    float dot = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) dot += v[2 * j] * low_of(h[j]) + v[2 * j + 1] * high_of(h[j]);
#pragma unroll
    for (int by = 1; by < COLS; by *= 2) dot += __shfl_xor_sync(~0u, dot, by);
    if (real && block == 0 && side.grad_w)
      put_grad(side.weights_dtype, side.grad_w, (u64)t * pairs.n_experts + e, expert.scaling * dot);
    if (real && side.weighted)
      ((uint4 *)side.weighted)[at] =
          uint4{narrow(f * low_of(h[0]), f * high_of(h[0])), narrow(f * low_of(h[1]), f * high_of(h[1])),
                narrow(f * low_of(h[2]), f * high_of(h[2])), narrow(f * low_of(h[3]), f * high_of(h[3]))};
#else
    if (has && side.hidden) {
      *hidden = uint4{narrow(v[0], v[1]), narrow(v[2], v[3]), narrow(v[4], v[5]), narrow(v[6], v[7])};
      /* The columns past the last rank are the last expert's, and nobody else's to write. */
      int end = e == pairs.n_experts - 1 && block == (rank - 1) / 8 ? (side.columns - expert.column) / 8 : 0;
      for (int j = 1; block + j < end; j++) hidden[j] = uint4{0, 0, 0, 0};
    }
#endif
    if (real)
      ((uint4 *)side.mixed)[at] = uint4{narrow(f * v[0], f * v[1]), narrow(f * v[2], f * v[3]), narrow(f * v[4], f * v[5]),
                                        narrow(f * v[6], f * v[7])};
  }
}

/* ---- the spread ----
 *
 * A block computes a tile's rows at SPREAD columns, a warp at 32 of them at a time; what a thread multiplies it reads itself.
 * rows [T, k, width] are those of the result.
 */

enum { SPREAD = 1024, SPREADERS = 8 };

#if ML_F32_ADAPTERS
typedef float2 two;
DEVICE u32 rounded(two v) { return narrow(v.x, v.y); }
#else
typedef ushort2 two;
DEVICE u32 rounded(two v) { return v.x | (u32)v.y << 16; }
#endif

/* An adapter's elements for the right fragments of 32 columns, of which thread q of a column has the ranks 8k + 2q and the next. All
 * are on their way before one is used. */
DEVICE void load_factor(two (&v)[4][COLS], const ml_adapter &expert, int column, int cols) {
  int lane = threadIdx.x % 32, rank = expert.rank;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int k = 0; k < COLS; k++) {
      int c = column + 8 * j + lane / 4, r = 8 * k + lane % 4 * 2, n = c < cols ? rank - r : 0;
#if ML_BACKWARD
      const adapter *at = (const adapter *)expert.a + (u64)r * cols + c;
      v[j][k] = two{n > 0 ? __ldg(at) : (adapter)0, n > 1 ? __ldg(at + cols) : (adapter)0};
#else
      const adapter *at = (const adapter *)expert.b + (u64)c * rank + r;
      v[j][k] = two{n > 0 ? __ldg(at) : (adapter)0, n > 1 ? __ldg(at + 1) : (adapter)0};
#endif
    }
}
#if !ML_BACKWARD
/* The same of an even rank. */
DEVICE void load_even_factor(two (&v)[4][COLS], const ml_adapter &expert, int column, int cols) {
  int lane = threadIdx.x % 32, rank = expert.rank;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int k = 0; k < COLS; k++) {
      int c = column + 8 * j + lane / 4, r = 8 * k + lane % 4 * 2;
      v[j][k] = c < cols && r < rank ? __ldg((const two *)((const adapter *)expert.b + (u64)c * rank + r)) : two{0, 0};
    }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * SPREADERS, ML_RANKS == 16 ? 3 : 1)
    ml_pairs_spread(const ml_pairs pairs, const u16 *mixed, u16 *rows, int cols, int width) {
  let_successor_start();
  wait_for_predecessor();
  int groups = (cols + SPREAD - 1) / SPREAD, tile = blockIdx.x / groups, begin = blockIdx.x % groups * SPREAD;
  int e = pairs.tile_expert[tile], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e < 0) return;
  const ml_adapter expert = pairs.experts[e];
  int at[4][2]; /* pairs of this thread's rows */
  u32 a[4][COLS / 2][4];
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int pair = at[m][half] = pairs.order[tile * ML_TILE_PAIRS + 16 * m + 8 * half + lane / 4];
      const u32 *row = (const u32 *)(mixed + (u64)pair * ML_RANKS) + lane % 4;
#pragma unroll
      for (int k = 0; k < COLS; k++) a[m][k / 2][half + 2 * (k % 2)] = pair < 0 ? 0u : row[4 * k];
    }
  for (int column = begin + 32 * warp; column < min(begin + SPREAD, width); column += 32 * SPREADERS) {
    two v[4][COLS];
#if ML_BACKWARD
    load_factor(v, expert, column, cols);
#else
    if (expert.rank % 2 == 0) {
      load_even_factor(v, expert, column, cols);
    } else {
      load_factor(v, expert, column, cols);
    }
#endif
    u32 b[4][COLS];
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int k = 0; k < COLS; k++) b[j][k] = rounded(v[j][k]);
#pragma unroll
    for (int m = 0; m < 4; m++) {
      float d[4][4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) d[j][i] = 0;
#pragma unroll
        for (int k = 0; k < COLS / 2; k++)
          multiply(d[j], a[m][k][0], a[m][k][1], a[m][k][2], a[m][k][3], b[j][2 * k], b[j][2 * k + 1]);
      }
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int i = 2 * half;
        if (at[m][half] >= 0)
          ((uint4 *)(rows + (u64)at[m][half] * width + column))[lane % 4] = uint4{narrow(d[0][i], d[0][i + 1]),
                  narrow(d[1][i], d[1][i + 1]), narrow(d[2][i], d[2][i + 1]), narrow(d[3][i], d[3][i + 1])};
      }
    }
  }
}

/* ---- the experts' gradients ----
 *
 * A block sums over all pairs of an expert, for STRIPE columns of dA = Q^T x (the first a_stripes stripes) or rows of dB =
 * g^T (s w H); a warp has 32 of them.
 */

#if ML_BACKWARD
enum {
  STRIPE = 128,
  LINES = 32, /* pairs of a step */
  WIDE_PITCH = STRIPE * 2 + 16, /* bytes */
  MIXED_PITCH = ML_RANKS * 2 + 16,
  COLLECT_STAGE = LINES * (WIDE_PITCH + MIXED_PITCH),
  COLLECT_STAGES = 3
};

DEVICE void put(adapter *to, float value) {
#if ML_F32_ADAPTERS
  *to = value;
#else
  *to = (u16)narrow(value, 0);
#endif
}
DEVICE void put_two(adapter *to, float first, float second) { /* `to` is aligned to a pair of elements */
#if ML_F32_ADAPTERS
  *(float2 *)to = float2{first, second};
#else
  *(u32 *)to = narrow(first, second);
#endif
}

/* grads: those of experts [first, first + 96), or fewer. */
extern "C" __global__ void __launch_bounds__(128)
    ml_pairs_collect(const __grid_constant__ ml_adapters grads, int first_expert, const ml_pairs pairs, const ml_cuda_rows x,
                     const ml_cuda_rows g, const u16 *mixed, const u16 *weighted, int a_stripes, int b_stripes) {
  extern __shared__ __align__(16) char memory[];
  let_successor_start();
  wait_for_predecessor();
  int stripe = blockIdx.x % (a_stripes + b_stripes), of_table = blockIdx.x / (a_stripes + b_stripes);
  bool of_a = stripe < a_stripes;
  const ml_adapter &to = grads.of[of_table];
  adapter *grad = (adapter *)(of_a ? to.a : to.b);
  if (!grad) return;
  int e = first_expert + of_table, begin = pairs.first[e], n = pairs.total[e], steps = (n + LINES - 1) / LINES;
  int column = (of_a ? stripe : stripe - a_stripes) * STRIPE;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u16 *wide = (const u16 *)(of_a ? x.data : g.data), *thin = of_a ? mixed : weighted;
  long long row = of_a ? x.row : g.row;
  int cols = of_a ? x.cols : g.cols;
  u32 ring = shared_address(memory);

  /* The tokens, and the pairs, of the lines that this thread loads in the next step. */
  int next[4], next_thin[(LINES * COLS + 127) / 128];
  auto look = [&](int step) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int line = step * LINES + threadIdx.x / 16 + 8 * i;
      next[i] = line < n ? pairs.token_of[begin + line] : -1;
    }
#pragma unroll
    for (int i = 0; i < (LINES * COLS + 127) / 128; i++) {
      int line = (threadIdx.x + 128 * i) / COLS;
      next_thin[i] = line < LINES && step * LINES + line < n ? pairs.order[begin + step * LINES + line] : -1;
    }
  };
  auto load = [&](int step) {
    u32 stage = ring + step % COLLECT_STAGES * COLLECT_STAGE;
    int from = threadIdx.x % 16 * 8;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bool real = next[i] >= 0 && column + from < cols;
      copy(stage + (threadIdx.x / 16 + 8 * i) * WIDE_PITCH + from * 2, real ? wide + next[i] * row + column + from : wide, real);
    }
#pragma unroll
    for (int i = 0; i < (LINES * COLS + 127) / 128; i++) {
      int at = threadIdx.x + 128 * i;
      bool real = next_thin[i] >= 0;
      if (at < LINES * COLS)
        copy(stage + LINES * WIDE_PITCH + at / COLS * MIXED_PITCH + at % COLS * 16,
             real ? thin + ((u64)next_thin[i] * COLS + at % COLS) * 8 : thin, real);
    }
  };

  float d[ML_RANKS]; /* of dA [R / 16, 4 times 8 columns, 4], of dB [2 times 16 rows, R / 8, 4] */
#pragma unroll
  for (int i = 0; i < ML_RANKS; i++) d[i] = 0;
  look(0);
  for (int i = 0; i < COLLECT_STAGES - 1; i++) {
    if (i < steps) {
      load(i);
      look(i + 1);
    }
    copies_commit();
  }
  for (int i = 0; i < steps; i++) {
    if (i + COLLECT_STAGES - 1 < steps) {
      load(i + COLLECT_STAGES - 1);
      look(i + COLLECT_STAGES);
    }
    copies_commit();
    copies_wait<COLLECT_STAGES - 1>();
    __syncthreads();
    u32 of_wide = ring + i % COLLECT_STAGES * COLLECT_STAGE, of_thin = of_wide + LINES * WIDE_PITCH;
    /* Where a thread's row is: of a left factor, which is turned, and of a right one. */
    int left_line = lane % 8 + lane / 16 * 8, left_column = lane / 8 % 2 * 8, right_line = lane % 16, right_column = lane / 16 * 8;
#pragma unroll
    for (int line = 0; line < LINES; line += 16) {
      u32 a[4], b[4];
      if (of_a) {
        u32 right[2][4];
#pragma unroll
        for (int c = 0; c < 2; c++)
          load_matrices<true>(right[c], of_wide + (line + right_line) * WIDE_PITCH + (32 * warp + 16 * c + right_column) * 2);
#pragma unroll
        for (int m = 0; m < COLS / 2; m++) {
          load_matrices<true>(a, of_thin + (line + left_line) * MIXED_PITCH + (16 * m + left_column) * 2);
#pragma unroll
          for (int c = 0; c < 4; c++)
            multiply(d + 16 * m + 4 * c, a[0], a[1], a[2], a[3], right[c / 2][c % 2 * 2], right[c / 2][c % 2 * 2 + 1]);
        }
      } else {
#pragma unroll
        for (int m = 0; m < 2; m++) {
          load_matrices<true>(a, of_wide + (line + left_line) * WIDE_PITCH + (32 * warp + 16 * m + left_column) * 2);
#pragma unroll
          for (int c = 0; c < COLS / 2; c++) {
            load_matrices<true>(b, of_thin + (line + right_line) * MIXED_PITCH + (16 * c + right_column) * 2);
            multiply(d + ML_RANKS / 2 * m + 8 * c, a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply(d + ML_RANKS / 2 * m + 8 * c + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        }
      }
    }
    __syncthreads();
  }

  int line = lane / 4, pair = lane % 4 * 2, rank = to.rank;
  if (of_a) {
#pragma unroll
    for (int i = 0; i < ML_RANKS; i += 4) {
      int c = column + 32 * warp + 8 * (i / 4 % 4) + pair;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int r = 16 * (i / 16) + line + 8 * half;
        if (r < rank && c < cols) put_two(grad + (u64)r * cols + c, d[i + 2 * half], d[i + 2 * half + 1]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < ML_RANKS; i += 4) {
      int r = 8 * (i % (ML_RANKS / 2) / 4) + pair;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int c = column + 32 * warp + 16 * (i / (ML_RANKS / 2)) + line + 8 * half;
        if (c >= cols) continue;
        adapter *at = grad + (u64)c * rank + r;
        if (rank % 2 == 0 && r < rank) {
          put_two(at, d[i + 2 * half], d[i + 2 * half + 1]);
        } else {
          if (r < rank) put(at, d[i + 2 * half]);
          if (r + 1 < rank) put(at + 1, d[i + 2 * half + 1]);
        }
      }
    }
  }
}
#endif
