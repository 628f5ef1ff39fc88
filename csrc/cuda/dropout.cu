//options: ML_F16 ML_TILES
/* The three products that see x as each expert does, with its own dropout. D_e x is x where expert e keeps it, times
 * scale_e, else 0:
 *
 *   ml_drop_project  H_e = (D_e x) A_e^T       in parts, which ml_drop_mix adds
 *   ml_drop_collect  dA_e = Q_e^T (D_e x)      in parts, which ml_drop_store adds
 *   ml_drop_spread   grad_x (+)= sum_e D_e (Q_e A_e)
 *
 * No mask is ever in memory: they are drawn in registers, just where an element is, and a draw costs more than
 * anything else here. One draw is for a token and 8 columns, 16 apart (core/kernels/philox.h), which are the same
 * place of 8 fragments of a product: a warp takes 128 columns at a time. So all products are warps' own (mma), of any
 * GPU from 8.0 on, and a warp has one slot: up to 8 * ML_TILES (1, 2, 4) columns of one expert. Scales are applied to
 * sums, in float32.
 *
 * A fragment of the left factor, [16, 16] in four registers: thread t of a warp has row t / 4 at columns 2 (t % 4)
 * and the next in the first, row t / 4 + 8 in the second, and the same 8 columns further in the third and fourth.
 */
#include "warp.cuh"

enum {
  SPAN = 128,                   /* columns of x that are drawn for at a time */
  LANES = 16,                   /* draws for them */
  SLOT = 8 * ML_TILES,          /* columns of a slot at most */
  WAYS = ML_TILES == 4 ? 2 : 4, /* slots that share what a block reads, at most */
  PROJECT_ROWS = 64,
  COLLECT_ROWS = 32,
  SPREAD_ROWS = 128,
  ALL = 1 << 16 /* drops of an expert that sees nothing */
};

/* ---- masks ---- */

/* The first rounds treat lanes and tokens apart: what they leave of either. */
struct of_lane {
  u32 a, b, c, d;
};
struct of_token {
  u32 high, low;
};

DEVICE u64 product_0(u32 word) { return (u64)0xD2511F53u * word; }
DEVICE u64 product_1(u32 word) { return (u64)0xCD9E8D57u * word; }
DEVICE u32 high(u64 product) { return (u32)(product >> 32); }

DEVICE of_lane lane_part(const ml_dropout &m, u32 lane, u32 expert) {
  u64 first = product_0(lane);
  u64 second = product_1(high(first) ^ expert ^ m.keys[0][1]);
  u64 third = product_0(high(second) ^ m.keys[1][0]);
  return {(u32)first ^ m.keys[1][1], (u32)second ^ m.keys[2][0], high(third) ^ m.keys[2][1], (u32)third};
}

DEVICE of_token token_part(const ml_dropout &m, u32 token) {
  u64 first = product_0(token ^ m.keys[0][0]);
  return {high(first), (u32)first};
}

/* 8 numbers of 16 bits: for the columns lane % 16 + 16 i, the low half of word i / 2 where i is even, else the high
 * one. */
struct drawn {
  u32 words[4];
};
DEVICE drawn draw(const ml_dropout &m, of_token t, of_lane l) {
  u64 p1 = product_1(t.high ^ l.a), p0;
  u32 c0 = high(p1) ^ l.b, c1 = (u32)p1, c2 = t.low ^ l.c, c3 = l.d;
#pragma unroll
  for (int round = 3; round < 7; round++) {
    p0 = product_0(c0), p1 = product_1(c2);
    c0 = high(p1) ^ c1 ^ m.keys[round][0], c1 = (u32)p1;
    c2 = high(p0) ^ c3 ^ m.keys[round][1], c3 = (u32)p0;
  }
  return {{c0, c1, c2, c3}};
}

/* Number i of those minus drops: its high half is all ones where the element is dropped, else zero. By the multiplier
 * (the sum of two 16-bit products and a word), since the other units have enough to do with the draws: on an H200 a
 * tenth faster. */
DEVICE u32 beyond(const drawn &d, int i, u32 drops) {
  u32 difference;
  asm("dp2a.lo.u32.u32 %0, %1, %2, %3;"
      : "=r"(difference)
      : "r"(d.words[i / 2]), "r"(i % 2 ? 0x0100u : 0x0001u), "r"(0u - drops));
  return difference;
}

/* Register `of` of 8 fragments, whose low halves `first` is for, and whose high halves `second`. */
DEVICE void drop(u32 (&fragments)[8][4], int of, const drawn &first, const drawn &second, u32 drops) {
#pragma unroll
  for (int i = 0; i < 8; i++)
    fragments[i][of] &= ~__byte_perm(beyond(first, i, drops), beyond(second, i, drops), 0x7632);
}

/* ---- shared memory: rows of 256 or 128 bytes, their 16s in such an order that 8 rows never meet in a bank ---- */

DEVICE u32 in_wide(u32 memory, int row, int chunk) { return memory + row * 256 + ((chunk ^ (row & 7)) << 4); }
DEVICE u32 in_narrow(u32 memory, int row, int chunk) { return memory + row * 128 + ((chunk ^ (row & 7)) << 4); }

/* use(i) for n steps, each of what load(i) copies, to one of two places in turn, while the step before is used. */
template <typename Load, typename Use>
DEVICE void in_steps(int n, Load load, Use use) {
  load(0);
  copies_commit();
  for (int i = 0; i < n; i++) {
    if (i + 1 < n) load(i + 1);
    copies_commit();
    copies_wait<1>();
    __syncthreads();
    use(i);
    __syncthreads();
  }
}

/* d [16, 8] += a [16, 8] b [8, 8]. */
DEVICE void multiply(float *d, u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE
               ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}

DEVICE const u16 *element(const ml_cuda_rows &m, int row, int col) { return (const u16 *)m.data + row * m.row + col; }

/* Rows [row, row + n) of a matrix at the SPAN columns from `col` on. */
DEVICE void load_span(u32 to, const ml_cuda_rows &m, int row, int col, int n) {
  for (int i = threadIdx.x; i < n * (SPAN / 8); i += blockDim.x) {
    int r = i / (SPAN / 8), chunk = i % (SPAN / 8);
    bool real = row + r < m.rows && col + 8 * chunk < m.cols;
    copy(in_wide(to, r, chunk), element(m, real ? row + r : 0, real ? col + 8 * chunk : 0), real);
  }
}

/* The same rows at the columns of the slots from `first` on, SLOT for each of `ways`. */
DEVICE void load_slots(u32 to, const ml_cuda_rows &m, const ml_slots &slots, int first, int ways, int row, int n) {
  for (int i = threadIdx.x; i < n * 8; i += blockDim.x) {
    int r = i / 8, chunk = i % 8, way = chunk / ML_TILES, tile = chunk % ML_TILES;
    if (way >= ways) continue;
    ml_slot slot = slots.of[first + way];
    bool real = first + way < slots.n && tile < slot.tiles && row + r < m.rows;
    copy(in_narrow(to, r, chunk), element(m, real ? row + r : 0, real ? 8 * (slot.block + tile) : 0), real);
  }
}

/* ---- forward ---- */

/* Parts [splits, T, C] of H, each of some of x's columns. A block of 64 * ways threads has 64 tokens and `ways`
 * slots, a warp 32 tokens and one slot; blocks: groups of slots, then splits, then tokens. Shared memory: 2 * 64 *
 * 256 + 2 * ways * SLOT * 256 bytes. */
extern "C" __global__ void __launch_bounds__(64 * WAYS, 2)
    ml_drop_project(const __grid_constant__ ml_cuda_rows x, const u16 *a, float *parts, int columns, int splits,
                    const __grid_constant__ ml_slots slots, const __grid_constant__ ml_dropout dropout) {
  extern __shared__ __align__(256) char memory[];
  int ways = blockDim.x / 64, groups = (slots.n + ways - 1) / ways;
  int first_slot = blockIdx.x % groups * ways, split = blockIdx.x / groups % splits;
  int first = blockIdx.x / groups / splits * PROJECT_ROWS;
  int all = (x.cols + SPAN - 1) / SPAN, begin = all * split / splits, spans = all * (split + 1) / splits - begin;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, way = warp % ways, row = 32 * (warp / ways);
  u32 of_x = shared_address(memory), of_a = of_x + 2 * PROJECT_ROWS * 256;

  auto load = [&](int i) {
    load_span(of_x + i % 2 * PROJECT_ROWS * 256, x, first, (begin + i) * SPAN, PROJECT_ROWS);
    for (int j = 0; j < ways; j++) {
      ml_slot slot = slots.of[first_slot + j];
      ml_cuda_rows rows = {a + (u64)slot.block * 8 * x.cols, x.cols, first_slot + j < slots.n ? 8 * slot.tiles : 0,
                           x.cols};
      load_span(of_a + (i % 2 * ways + j) * SLOT * 256, rows, 0, (begin + i) * SPAN, SLOT);
    }
  };

  ml_slot slot = slots.of[first_slot + way];
  bool mine = first_slot + way < slots.n;
  u32 drops = dropout.drops[slot.expert];
  of_token tokens[4];
#pragma unroll
  for (int i = 0; i < 4; i++) tokens[i] = token_part(dropout, first + row + lane / 4 + 8 * i);
  float sum[2][ML_TILES][4] = {};
  in_steps(spans, load, [&](int i) {
    if (!mine) return;
    u32 here_x = of_x + i % 2 * PROJECT_ROWS * 256, here_a = of_a + (i % 2 * ways + way) * SLOT * 256;
    of_lane lanes[4]; /* of the thread's columns in a fragment */
#pragma unroll
    for (int j = 0; j < 4; j++)
      lanes[j] = lane_part(dropout, (begin + i) * LANES + 2 * (lane % 4) + j % 2 + 8 * (j / 2), slot.expert);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 f[8][4];
#pragma unroll
      for (int k = 0; k < 8; k++)
        load_matrices<false>(f[k], in_wide(here_x, row + 16 * half + lane % 16, 2 * k + lane / 16));
      if (drops > 0) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          of_token token = tokens[2 * half + j % 2];
          drop(f, j, draw(dropout, token, lanes[j / 2 * 2]), draw(dropout, token, lanes[j / 2 * 2 + 1]), drops);
        }
      }
#pragma unroll
      for (int k = 0; k < 8; k += 2)
#pragma unroll
        for (int j = 0; j < ML_TILES; j++) {
          u32 b[4];
          load_matrices<false>(b, in_wide(here_a, 8 * j + lane % 8, 2 * k + lane / 8));
          multiply(sum[half][j], f[k][0], f[k][1], f[k][2], f[k][3], b[0], b[1]);
          multiply(sum[half][j], f[k + 1][0], f[k + 1][1], f[k + 1][2], f[k + 1][3], b[2], b[3]);
        }
    }
  });
  if (!mine) return;
  float scale = dropout.scale[slot.expert];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int t = first + row + lane / 4 + 8 * i;
    if (t >= x.rows) continue;
    float *to = parts + ((u64)split * x.rows + t) * columns + 8 * slot.block + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < ML_TILES; j++)
      if (j < slot.tiles) {
        const float *v = sum[i / 2][j] + i % 2 * 2;
        *(float2 *)(to + 8 * j) = float2{scale * v[0], scale * v[1]};
      }
  }
}

/* hidden = H, mixed = s w H, from H's parts; 8 columns a thread, of which the first `blocks` of a token belong to
 * experts. */
extern "C" __global__ void ml_drop_mix(const ml_narrow n, const float *parts, int splits, int blocks) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x, all = n.columns / 8;
  if (i >= n.tokens * all) return;
  float v[8] = {};
  if (i % all < blocks)
    for (int split = 0; split < splits; split++) {
      const float4 *part = (const float4 *)(parts + ((u64)split * n.tokens * all + i) * 8);
      float4 low = part[0], high = part[1];
      v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
      v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
    }
  float f = n.factors[i / all * n.n_experts + n.experts[i % all]];
  if (n.hidden)
    ((uint4 *)n.hidden)[i] = {narrow(v[0], v[1]), narrow(v[2], v[3]), narrow(v[4], v[5]), narrow(v[6], v[7])};
  ((uint4 *)n.mixed)[i] = {narrow(times(f, v[0]), times(f, v[1])), narrow(times(f, v[2]), times(f, v[3])),
                           narrow(times(f, v[4]), times(f, v[5])), narrow(times(f, v[6]), times(f, v[7]))};
}

/* ---- backward ---- */

/* Parts [splits, C, d_in] of dA, each of some tokens: x^T Q in fact. A warp has 128 columns of x and one slot, a
 * block `ways` such warps; blocks: groups of slots, then columns of x, then splits. */
extern "C" __global__ void __launch_bounds__(32 * WAYS)
    ml_drop_collect(const __grid_constant__ ml_cuda_rows x, const u16 *q, float *parts, int columns, int splits,
                    const __grid_constant__ ml_slots slots, const __grid_constant__ ml_dropout dropout) {
  __shared__ __align__(256) char memory[2 * COLLECT_ROWS * (256 + 128)];
  int ways = blockDim.x / 32, groups = (slots.n + ways - 1) / ways, all_spans = (x.cols + SPAN - 1) / SPAN;
  int first_slot = blockIdx.x % groups * ways, span = blockIdx.x / groups % all_spans;
  int split = blockIdx.x / groups / all_spans, all = (x.rows + COLLECT_ROWS - 1) / COLLECT_ROWS;
  int begin = all * split / splits, steps = all * (split + 1) / splits - begin;
  int way = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 of_x = shared_address(memory), of_q = of_x + 2 * COLLECT_ROWS * 256;
  const ml_cuda_rows narrow_side = {q, columns, x.rows, columns};

  auto load = [&](int i) {
    int row = (begin + i) * COLLECT_ROWS;
    load_span(of_x + i % 2 * COLLECT_ROWS * 256, x, row, span * SPAN, COLLECT_ROWS);
    load_slots(of_q + i % 2 * COLLECT_ROWS * 128, narrow_side, slots, first_slot, ways, row, COLLECT_ROWS);
  };

  ml_slot slot = slots.of[first_slot + way];
  bool mine = first_slot + way < slots.n;
  u32 drops = dropout.drops[slot.expert];
  of_lane lanes[2];
#pragma unroll
  for (int i = 0; i < 2; i++) lanes[i] = lane_part(dropout, span * LANES + lane / 4 + 8 * i, slot.expert);
  float sum[8][ML_TILES][4] = {};
  in_steps(steps, load, [&](int i) {
    if (!mine) return;
    u32 here_x = of_x + i % 2 * COLLECT_ROWS * 256, here_q = of_q + i % 2 * COLLECT_ROWS * 128;
    u32 b[ML_TILES][4];
#pragma unroll
    for (int j = 0; j < ML_TILES; j++) load_matrices<true>(b[j], in_narrow(here_q, lane, way * ML_TILES + j));
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 f[8][4];
#pragma unroll
      for (int k = 0; k < 8; k++)
        load_matrices<true>(f[k], in_wide(here_x, 16 * half + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      if (drops > 0) {
        int t = (begin + i) * COLLECT_ROWS + 16 * half + 2 * (lane % 4);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
          of_token first = token_part(dropout, t + 4 * j), second = token_part(dropout, t + 4 * j + 1);
#pragma unroll
          for (int k = 0; k < 2; k++)
            drop(f, j + k, draw(dropout, first, lanes[k]), draw(dropout, second, lanes[k]), drops);
        }
      }
#pragma unroll
      for (int k = 0; k < 8; k++)
#pragma unroll
        for (int j = 0; j < ML_TILES; j++)
          multiply(sum[k][j], f[k][0], f[k][1], f[k][2], f[k][3], b[j][2 * half], b[j][2 * half + 1]);
    }
  });
  if (!mine) return;
  float scale = dropout.scale[slot.expert];
#pragma unroll
  for (int j = 0; j < ML_TILES; j++) {
    if (j >= slot.tiles) break;
    float *to = parts + ((u64)split * columns + 8 * (slot.block + j) + 2 * (lane % 4)) * x.cols;
#pragma unroll
    for (int k = 0; k < 8; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int col = span * SPAN + 16 * k + lane / 4 + i / 2 * 8;
        if (col < x.cols) to[(u64)(i % 2) * x.cols + col] = scale * sum[k][j][i];
      }
  }
}

/* The gradients of A, in their arrays, from dA's parts; 4 columns of x a thread. */
extern "C" __global__ void ml_drop_store(const __grid_constant__ ml_adapters grads, const int *experts,
                                         const float *parts, int columns, int splits, int width, int f32) {
  u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x;
  u32 wide = width / 4;
  int c = (int)(i / wide), at = (int)(i % wide);
  if (c >= columns) return;
  const ml_adapter &of = grads.of[experts[c / 8]];
  int r = c - of.column;
  if (r >= of.rank || !of.a) return;
  float4 sum = {0, 0, 0, 0};
  for (int split = 0; split < splits; split++) {
    float4 v = ((const float4 *)parts)[(u64)split * columns * wide + i];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  u64 to = (u64)r * wide + at;
  if (f32) {
    ((float4 *)of.a)[to] = sum;
  } else {
    ((uint2 *)of.a)[to] = {narrow(sum.x, sum.y), narrow(sum.z, sum.w)};
  }
}

/* grad_x [T, d_in], without gaps, = or += the experts' part: a block of 256 threads has 128 tokens and 128 columns, a
 * warp 16 tokens; blocks: columns, then tokens. Of every 16 columns a thread has four neighbours, so that it reads
 * and writes 8 bytes at once: A's columns lie in shared memory in that order. */
extern "C" __global__ void __launch_bounds__(256, 2)
    ml_drop_spread(const u16 *q, const u16 *a, u16 *grad_x, int add, int tokens, int width, int columns,
                   const __grid_constant__ ml_slots slots, const __grid_constant__ ml_dropout dropout) {
  enum { GROUP = 8 / ML_TILES };
  __shared__ __align__(256) char memory[SPREAD_ROWS * 128 + 64 * 256];
  __shared__ of_lane lanes[GROUP * LANES];
  int spans = (width + SPAN - 1) / SPAN, span = blockIdx.x % spans, first = blockIdx.x / spans * SPREAD_ROWS;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 of_q = shared_address(memory), of_a = of_q + SPREAD_ROWS * 128;
  const ml_cuda_rows narrow_side = {q, columns, tokens, columns};
  of_token token[2];
#pragma unroll
  for (int i = 0; i < 2; i++) token[i] = token_part(dropout, first + 16 * warp + lane / 4 + 8 * i);
  float sum[8][2][4]; /* from what is there: loads at the end could not overlap, since stores are between them */
#pragma unroll
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int t = first + 16 * warp + lane / 4 + 8 * i, col = span * SPAN + 16 * k + 4 * (lane % 4);
      uint2 before = {0, 0};
      if (add && t < tokens && col < width) before = *(const uint2 *)(grad_x + (u64)t * width + col);
      sum[k][0][2 * i] = low_of(before.x), sum[k][0][2 * i + 1] = high_of(before.x);
      sum[k][1][2 * i] = low_of(before.y), sum[k][1][2 * i + 1] = high_of(before.y);
    }

  for (int group = 0; group < slots.n; group += GROUP) {
    if (group > 0) __syncthreads();
    load_slots(of_q, narrow_side, slots, group, GROUP, first, SPREAD_ROWS);
    copies_commit();
    for (int i = threadIdx.x; i < 64 * 8; i += blockDim.x) { /* 16 columns of one row of A */
      int r = i / 8, col = span * SPAN + 16 * (i % 8), at = group + r / SLOT;
      uint4 low = {0, 0, 0, 0}, high = low;
      if (at < slots.n && r % SLOT < 8 * slots.of[at].tiles) {
        const u16 *from = a + (u64)(8 * slots.of[at].block + r % SLOT) * width + col;
        if (col < width) low = *(const uint4 *)from;
        if (col + 8 < width) high = *(const uint4 *)(from + 8);
      }
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(in_wide(of_a, r, i % 8 * 2)), "r"(low.x),
                   "r"(low.z), "r"(high.x), "r"(high.z)
                   : "memory");
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(in_wide(of_a, r, i % 8 * 2 + 1)), "r"(low.y),
                   "r"(low.w), "r"(high.y), "r"(high.w)
                   : "memory");
    }
    if (threadIdx.x < GROUP * LANES)
      lanes[threadIdx.x] =
          lane_part(dropout, span * LANES + threadIdx.x % LANES, slots.of[group + threadIdx.x / LANES].expert);
    copies_wait<0>();
    __syncthreads();

    for (int way = 0; way < GROUP && group + way < slots.n; way++) {
      u32 expert = slots.of[group + way].expert, drops = dropout.drops[expert];
      if (drops == ALL) continue;
      float scale = dropout.scale[expert];
      u32 f[(ML_TILES + 1) / 2][4]; /* with one tile its second half is not used */
#pragma unroll
      for (int j = 0; j < (ML_TILES + 1) / 2; j++) {
        int tile = ML_TILES == 1 ? way : way * ML_TILES + 2 * j + lane / 16;
        load_matrices<false>(f[j], in_narrow(of_q, 16 * warp + lane % 16, tile));
      }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        drawn numbers[2][2]; /* of rows, of columns */
#pragma unroll
        for (int i = 0; i < 2; i++) {
          of_lane l = lanes[way * LANES + 4 * (lane % 4) + 2 * h + i];
#pragma unroll
          for (int j = 0; j < 2; j++) numbers[j][i] = draw(dropout, token[j], l);
        }
#pragma unroll
        for (int k = 0; k < 8; k += 4 / ML_TILES) {
          u32 b[4];
          int box = lane / 8;
          load_matrices<true>(
              b, in_wide(of_a, way * SLOT + 8 * (box % ML_TILES) + lane % 8, 2 * (k + box / ML_TILES) + h));
#pragma unroll
          for (int n = 0; n < 4 / ML_TILES; n++) {
            float z[4] = {0, 0, 0, 0};
#if ML_TILES == 1
            multiply(z, f[0][0], f[0][1], b[n]);
#else
#pragma unroll
            for (int j = 0; j < ML_TILES / 2; j++)
              multiply(z, f[j][0], f[j][1], f[j][2], f[j][3], b[n * ML_TILES + 2 * j], b[n * ML_TILES + 2 * j + 1]);
#endif
#pragma unroll
            for (int i = 0; i < 4; i++) {
              u32 word = numbers[i / 2][i % 2].words[(k + n) / 2];
              if (((k + n) % 2 ? word : word << 16) >= drops << 16) sum[k + n][h][i] += scale * z[i];
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int k = 0; k < 8; k++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      int t = first + 16 * warp + lane / 4 + 8 * i, col = span * SPAN + 16 * k + 4 * (lane % 4);
      const float *v0 = sum[k][0] + 2 * i, *v1 = sum[k][1] + 2 * i;
      if (t < tokens && col < width)
        *(uint2 *)(grad_x + (u64)t * width + col) = {narrow(v0[0], v0[1]), narrow(v1[0], v1[1])};
    }
}
