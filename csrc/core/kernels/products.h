/* The skinny products for one dtype and one vector width, in the compiler's vector types: included by each
 * instruction set's file, once per dtype, with
 *
 *   REAL             float or double
 *   REAL_BYTES       4 or 8
 *   NAME(op)         ml_<op>_<dtype>_<isa>
 *   VECTOR_BYTES     bytes in a vector register
 *   REGISTERS        vector registers: 16, or 32
 *   TILE_ROWS        rows of a register tile, at most 6
 *   TILE_VECTORS     vectors in a row of a tile, at most 4
 *   LOAD_SOME(p, n)  the first n < lanes elements at p, and zeros; optional, as is LOAD_SOME_NARROW for uint16_t
 *   CONVERT(v, to)   a vector of uint16_t to one of uint32_t, the type `to`; optional: gcc 12 makes four instructions of one
 *   MULTIPLY_LOW     see dropout.h
 *
 * TILE_ROWS * TILE_VECTORS accumulators, TILE_VECTORS panel vectors and a broadcast must fit in the registers.
 */
#define LANES (VECTOR_BYTES / REAL_BYTES)

typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
/* The same at any address. */
typedef REAL NAME(unaligned) __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(REAL)), may_alias));

ML_INLINE NAME(vector) NAME(load)(const REAL *p) { return *(const NAME(unaligned) *)p; }
ML_INLINE void NAME(store)(REAL *p, NAME(vector) v) { *(NAME(unaligned) *)p = v; }

/* ---- product: a register tile of outputs, left broadcast against panel rows ---- */

/* The last columns of a row end inside a vector. */
ML_NOINLINE void NAME(finish_ragged)(int rows, int64_t cols, const REAL *whole, int64_t whole_row, REAL *out,
                                     int64_t out_row, const REAL *init, int64_t init_row) {
  for (int i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) {
      REAL v = whole[i * whole_row + j];
      out[i * out_row + j] = init ? init[i * init_row + j] + v : v;
    }
}

ML_INLINE void NAME(tile)(const int rows, const int vectors, int64_t cols, int64_t depth, const REAL *left,
                          int64_t left_row, int64_t left_step, const REAL *panel, int64_t width, REAL *out,
                          int64_t out_row, const REAL *init, int64_t init_row) {
  NAME(vector) sum[TILE_ROWS][TILE_VECTORS];
  ML_UNROLL for (int i = 0; i < rows; i++) ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = (NAME(vector)){0};
  for (int64_t k = 0; k < depth; k++) {
    NAME(vector) p[TILE_VECTORS];
    ML_UNROLL for (int j = 0; j < vectors; j++) p[j] = NAME(load)(panel + k * width + j * LANES);
    ML_UNROLL for (int i = 0; i < rows; i++) {
      REAL l = left[i * left_row + k * left_step];
      ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += l * p[j];
    }
  }
  if (cols == vectors * LANES) {
    /* All that is read first: stores would hold up reads of the same place in another page, as rows often have it. */
    if (init) ML_UNROLL for (int i = 0; i < rows; i++, init += init_row) {
        ML_OPAQUE(init); /* else the compiler keeps the places of all vectors, in memory */
        ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += NAME(load)(init + j * LANES);
      }
    ML_UNROLL for (int i = 0; i < rows; i++, out += out_row) {
      ML_OPAQUE(out);
      ML_UNROLL for (int j = 0; j < vectors; j++) NAME(store)(out + j * LANES, sum[i][j]);
    }
    return;
  }
  REAL whole[TILE_ROWS * TILE_VECTORS * LANES];
  ML_UNROLL for (int i = 0; i < rows; i++) ML_UNROLL for (int j = 0; j < vectors; j++)
      NAME(store)(whole + (i * vectors + j) * LANES, sum[i][j]);
  NAME(finish_ragged)(rows, cols, whole, vectors * LANES, out, out_row, init, init_row);
}

/* All rows at a fixed number of vectors: the tile's shape is known when compiling. */
#define ML_ROWS(rows_, vectors)                                                                                   \
  for (; rows - i >= (rows_); i += (rows_))                                                                       \
  NAME(tile)((rows_), (vectors), cols, depth, left + i * left_row, left_row, left_step, panel, width,             \
             out + i * out_row, out_row, init ? init + i * init_row : NULL, init_row)
#if TILE_ROWS > 4
#define ML_TALL_ROWS(vectors) ML_ROWS(TILE_ROWS, vectors);
#else
#define ML_TALL_ROWS(vectors)
#endif
#define ML_COLUMNS(vectors)                                                                                       \
  ML_NOINLINE void NAME(columns_##vectors)(int64_t rows, int64_t cols, int64_t depth, const REAL *left,           \
                                           int64_t left_row, int64_t left_step, const REAL *panel, int64_t width, \
                                           REAL *out, int64_t out_row, const REAL *init, int64_t init_row) {      \
    int64_t i = 0;                                                                                                \
    ML_TALL_ROWS(vectors)                                                                                         \
    ML_ROWS(4, vectors);                                                                                          \
    ML_ROWS(2, vectors);                                                                                          \
    ML_ROWS(1, vectors);                                                                                          \
  }
ML_COLUMNS(1)
ML_COLUMNS(2)
#if TILE_VECTORS > 2
ML_COLUMNS(3)
ML_COLUMNS(4)
#endif
#undef ML_COLUMNS
#undef ML_TALL_ROWS
#undef ML_ROWS

static void NAME(product)(int64_t rows, int64_t cols, int64_t depth, const void *left, int64_t left_row,
                          int64_t left_step, const void *panel, int64_t width, void *out, int64_t out_row,
                          const void *init, int64_t init_row) {
  switch ((cols + LANES - 1) / LANES) {
#define ML_VECTORS(vectors)                                                                                       \
  case vectors:                                                                                                   \
    NAME(columns_##vectors)(rows, cols, depth, left, left_row, left_step, panel, width, out, out_row, init,       \
                            init_row);                                                                            \
    break
    ML_VECTORS(1);
    ML_VECTORS(2);
#if TILE_VECTORS > 2
    ML_VECTORS(3);
    ML_VECTORS(4);
#endif
#undef ML_VECTORS
  }
}

/* ---- squares, transposed ---- */

#define WIDTH 4
#include "transpose.h"
#if LANES > 4
#define WIDTH 8
#include "transpose.h"
#endif
#if LANES > 8
#define WIDTH 16
#include "transpose.h"
#endif
#if LANES == 2
#define WIDTH 2
#include "transpose.h"
#endif
ML_INLINE void NAME(transpose)(NAME(vector) v[LANES]) {
#if LANES == 2
  NAME(transpose_2)(v);
#elif LANES == 4
  NAME(transpose_4)(v);
#elif LANES == 8
  NAME(transpose_8)(v);
#else
  NAME(transpose_16)(v);
#endif
}

/* ---- sums over the lanes, in a fixed tree ---- */

/* The first n < lanes elements, and zeros. A loop over what a depth leaves over would be compiled in one tile with fused
 * multiply-adds and in another without, and a row's sum must not depend on the tile that it falls into. */
#ifdef LOAD_SOME
ML_INLINE NAME(vector) NAME(load_some)(const REAL *from, int64_t n) { return LOAD_SOME(from, n); }
#else
ML_INLINE NAME(vector) NAME(load_some)(const REAL *from, int64_t n) {
  REAL lane[LANES] = {0};
  for (int64_t i = 0; i < n; i++) lane[i] = from[i];
  return NAME(load)(lane);
}
#endif

/* Of four vectors the sums of every fourth lane: lane 4 * q + i sums the lanes 4 * q .. 4 * q + 3 of v[i]. */
#if LANES == 4
#define ML_LIST(of) of(0), of(1), of(2), of(3)
#elif LANES == 8
#define ML_LIST(of) of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)
#elif LANES == 16
#define ML_LIST(of) \
  of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7), of(8), of(9), of(10), of(11), of(12), of(13), of(14), of(15)
#endif
#if LANES > 2
ML_INLINE void NAME(sum_quarters)(const NAME(vector) v[4], NAME(vector) * sums) {
#define ML_EVEN(j) ((j) & 1 ? LANES + (j)-1 : (j))
#define ML_ODD(j) ((j) & 1 ? LANES + (j) : (j) + 1)
#define ML_FIRST(j) ((j) & 2 ? LANES + (j)-2 : (j))
#define ML_SECOND(j) ((j) & 2 ? LANES + (j) : (j) + 2)
  NAME(vector) low = __builtin_shufflevector(v[0], v[1], ML_LIST(ML_EVEN)) +
                     __builtin_shufflevector(v[0], v[1], ML_LIST(ML_ODD));
  NAME(vector) high = __builtin_shufflevector(v[2], v[3], ML_LIST(ML_EVEN)) +
                      __builtin_shufflevector(v[2], v[3], ML_LIST(ML_ODD));
  *sums = __builtin_shufflevector(low, high, ML_LIST(ML_FIRST)) + __builtin_shufflevector(low, high, ML_LIST(ML_SECOND));
#undef ML_EVEN
#undef ML_ODD
#undef ML_FIRST
#undef ML_SECOND
}
#endif
#undef ML_LIST

/* The sums of the lanes of four vectors. */
ML_INLINE void NAME(reduce_4)(const NAME(vector) v[4], NAME(lanes_4) * sums) {
#if LANES == 2
  NAME(vector) low = __builtin_shufflevector(v[0], v[1], 0, 2) + __builtin_shufflevector(v[0], v[1], 1, 3);
  NAME(vector) high = __builtin_shufflevector(v[2], v[3], 0, 2) + __builtin_shufflevector(v[2], v[3], 1, 3);
  *sums = (NAME(lanes_4)){low[0], low[1], high[0], high[1]};
#else
  NAME(vector) all;
  NAME(sum_quarters)(v, &all);
#if LANES == 4
  *sums = all;
#elif LANES == 8
  *sums = __builtin_shufflevector(all, all, 0, 1, 2, 3) + __builtin_shufflevector(all, all, 4, 5, 6, 7);
#else
  NAME(lanes_8) half = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
  *sums = __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#endif
#endif
}

/* out[0 .. n - 1] = init + sums, n at most 4 */
ML_INLINE void NAME(put_4)(int64_t n, const NAME(lanes_4) * sums, REAL *out, const REAL *init) {
  NAME(lanes_4) total = *sums;
  if (n >= 4) {
    if (init) total += *(const NAME(lanes_4) *)init;
    *(NAME(lanes_4) *)out = total;
    return;
  }
  for (int64_t i = 0; i < n; i++) out[i] = init ? init[i] + total[i] : total[i];
}

/* ---- factors in REAL, and for float in bfloat16 too ---- */

#define ELEMENT REAL
#define NARROW 0
#define READING(op) NAME(op)
#include "factors.h"

#if REAL_BYTES == 4
#define ML_WIDEN(w, convert)                                                                      \
  typedef uint16_t NAME(narrow_##w) __attribute__((vector_size(2 * (w)), aligned(2), may_alias)); \
  typedef uint32_t NAME(wide_bits_##w) __attribute__((vector_size(4 * (w))));                     \
  ML_INLINE NAME(lanes_##w) NAME(widen_##w)(const uint16_t *from) {                               \
    return (NAME(lanes_##w))(convert(*(const NAME(narrow_##w) *)from, NAME(wide_bits_##w)) << 16);  \
  }
#ifndef CONVERT
#define CONVERT __builtin_convertvector
#endif
#if LANES == 4
ML_WIDEN(4, CONVERT)
#else
ML_WIDEN(4, __builtin_convertvector)
#endif
#if LANES == 8
ML_WIDEN(8, CONVERT)
#elif LANES == 16
ML_WIDEN(8, __builtin_convertvector)
ML_WIDEN(16, CONVERT)
#endif
#undef ML_WIDEN

ML_INLINE REAL NAME(widen_one)(const uint16_t *from) {
  uint32_t bits = (uint32_t)*from << 16;
  REAL to;
  __builtin_memcpy(&to, &bits, sizeof to);
  return to;
}
ML_INLINE NAME(vector) NAME(widen)(const uint16_t *from) {
#if LANES == 4
  return NAME(widen_4)(from);
#elif LANES == 8
  return NAME(widen_8)(from);
#else
  return NAME(widen_16)(from);
#endif
}
/* The first n < lanes elements, and zeros. */
ML_INLINE NAME(vector) NAME(widen_some)(const uint16_t *from, int64_t n) {
#ifdef LOAD_SOME_NARROW
  return (NAME(vector))(CONVERT(LOAD_SOME_NARROW(from, n), NAME(wide_bits_16)) << 16);
#else
  uint16_t lane[LANES] = {0};
  for (int64_t i = 0; i < n; i++) lane[i] = from[i];
  return NAME(widen)(lane);
#endif
}

#define ELEMENT uint16_t
#define NARROW 1
#define READING(op) NAME(op##_bf16)
#include "factors.h"
#endif

/* ---- spread_lanes: lanes over the tokens, B's elements broadcast from where they stand ---- */

ML_INLINE void NAME(spread_square)(const int wide, int64_t tokens, int64_t n_blocks, const ml_block *blocks,
                                   int64_t first, const REAL *panel, int64_t width, REAL *out, int64_t out_row,
                                   const REAL *init, int64_t init_row) {
  NAME(vector) sum[LANES];
  ML_UNROLL for (int i = 0; i < LANES; i++) sum[i] = (NAME(vector)){0};
  for (int64_t e = 0; e < n_blocks; e++) {
    int64_t stride = blocks[e].row_stride;
    const REAL *low = (const REAL *)blocks[e].rows + first * stride, *high = low + 8 * stride;
    ML_OPAQUE(high); /* one pointer and fifteen strides would be more than there are registers */
    for (int64_t k = 0; k < blocks[e].depth; k++, panel += width) {
      NAME(vector) v = NAME(load)(panel);
      ML_UNROLL for (int i = 0; i < wide; i++) sum[i] += (i < 8 ? low + i * stride : high + (i - 8) * stride)[k] * v;
    }
  }
  NAME(transpose)(sum);
  if (wide < LANES) { /* one column of each token */
    for (int64_t t = 0; t < tokens; t++) out[t * out_row] = init ? init[t * init_row] + sum[t][0] : sum[t][0];
    return;
  }
  if (tokens == LANES) {
    ML_UNROLL for (int t = 0; t < LANES; t++)
        NAME(store)(out + t * out_row, init ? NAME(load)(init + t * init_row) + sum[t] : sum[t]);
    return;
  }
  for (int64_t t = 0; t < tokens; t++)
    NAME(store)(out + t * out_row, init ? NAME(load)(init + t * init_row) + sum[t] : sum[t]);
}

static void NAME(spread_lanes)(int64_t tokens, int64_t first, int64_t n, int64_t n_blocks, const ml_block *blocks,
                               const void *panel, int64_t width, void *out_, int64_t out_row, const void *init_,
                               int64_t init_row) {
  int64_t j = 0;
#define ML_SPREAD(wide)                                                                                              \
  for (; j + (wide) <= n; j += (wide))                                                                               \
    for (int64_t t = 0; t < tokens; t += LANES)                                                                      \
      NAME(spread_square)((wide), tokens - t < LANES ? tokens - t : LANES, n_blocks, blocks, first + j,              \
                          (const REAL *)panel + t, width, (REAL *)out_ + t * out_row + j, out_row,                   \
                          init_ ? (const REAL *)init_ + t * init_row + j : NULL, init_row);
  ML_SPREAD(LANES)
  ML_SPREAD(1)
#undef ML_SPREAD
}

/* ---- short_sums: lanes over the columns, a few tokens for each row ---- */

/* Sums that run side by side hide the latency of an addition. As many for any number of tokens, so that a token's sums do
 * not depend on those beside it. */
enum { NAME(chains) = REGISTERS > 16 ? 4 : 2 };

ML_INLINE NAME(vector) NAME(sum_chains)(const NAME(vector) sum[NAME(chains)]) {
#if REGISTERS > 16
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
#else
  return sum[0] + sum[1];
#endif
}

/* The columns of one or two vectors, or the first n < lanes. */
ML_INLINE void NAME(sum_columns)(const int tokens, const int vectors, const bool whole, int64_t n, int64_t depth,
                                 const REAL *x, int64_t x_row, const REAL *rows, int64_t row_stride, REAL *out,
                                 int64_t out_row) {
  NAME(vector) sum[4][2][NAME(chains)];
  ML_UNROLL for (int t = 0; t < tokens; t++) ML_UNROLL for (int v = 0; v < vectors; v++)
      ML_UNROLL for (int i = 0; i < NAME(chains); i++) sum[t][v][i] = (NAME(vector)){0};
  for (int64_t k = 0; k < depth; k += NAME(chains)) ML_UNROLL for (int i = 0; i < NAME(chains); i++) {
      if (k + i == depth) break;
      ML_UNROLL for (int v = 0; v < vectors; v++) {
        const REAL *place = rows + (k + i) * row_stride + v * LANES;
        NAME(vector) row = whole ? NAME(load)(place) : NAME(load_some)(place, n);
        ML_UNROLL for (int t = 0; t < tokens; t++) sum[t][v][i] += x[t * x_row + k + i] * row;
      }
    }
  ML_UNROLL for (int t = 0; t < tokens; t++, out += out_row) ML_UNROLL for (int v = 0; v < vectors; v++) {
      NAME(vector) total = NAME(sum_chains)(sum[t][v]);
      if (whole)
        NAME(store)(out + v * LANES, total);
      else
        for (int64_t j = 0; j < n; j++) out[j] = total[j];
    }
}

#if LANES > 4
/* Rows of n columns without gaps, LANES / n of them in a vector: lane j of the i-th vector has row (i * LANES + j) / n. */
#define ML_ROW(n, i, j) ((i) * LANES + (j)) / (n)
#define ML_ROWS_4(n, i, j) ML_ROW(n, i, j), ML_ROW(n, i, (j) + 1), ML_ROW(n, i, (j) + 2), ML_ROW(n, i, (j) + 3)
#if LANES == 8
#define ML_ROWS(n, i) ML_ROWS_4(n, i, 0), ML_ROWS_4(n, i, 4)
#else
#define ML_ROWS(n, i) ML_ROWS_4(n, i, 0), ML_ROWS_4(n, i, 4), ML_ROWS_4(n, i, 8), ML_ROWS_4(n, i, 12)
#endif
#define ML_ADD_VECTOR(n, i)                                                         \
  do {                                                                              \
    NAME(vector) row = NAME(load)(rows + k * (n) + (i) * LANES);                      \
    ML_UNROLL for (int t = 0; t < tokens; t++) sum[t][(i) % NAME(chains)] +=          \
        __builtin_shufflevector(v[t], v[t], ML_ROWS(n, i)) * row;                   \
  } while (0)

ML_INLINE void NAME(sum_dense)(const int tokens, const int n, int64_t depth, const REAL *x, int64_t x_row,
                               const REAL *rows, REAL *out, int64_t out_row) {
  NAME(vector) sum[4][NAME(chains)], v[4];
  ML_UNROLL for (int t = 0; t < tokens; t++) ML_UNROLL for (int i = 0; i < NAME(chains); i++)
      sum[t][i] = (NAME(vector)){0};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    ML_UNROLL for (int t = 0; t < tokens; t++) v[t] = NAME(load)(x + t * x_row + k);
    if (n == 4) {
      ML_ADD_VECTOR(4, 0);
      ML_ADD_VECTOR(4, 1);
      ML_ADD_VECTOR(4, 2);
      ML_ADD_VECTOR(4, 3);
    }
#if LANES == 16
    if (n == 8) {
      ML_ADD_VECTOR(8, 0);
      ML_ADD_VECTOR(8, 1);
      ML_ADD_VECTOR(8, 2);
      ML_ADD_VECTOR(8, 3);
      ML_ADD_VECTOR(8, 4);
      ML_ADD_VECTOR(8, 5);
      ML_ADD_VECTOR(8, 6);
      ML_ADD_VECTOR(8, 7);
    }
#endif
  }
  for (; k < depth; k++) {
    NAME(vector) row = NAME(load_some)(rows + k * n, n);
    ML_UNROLL for (int t = 0; t < tokens; t++) sum[t][0] += x[t * x_row + k] * row;
  }
  ML_UNROLL for (int t = 0; t < tokens; t++, out += out_row) {
    REAL lane[LANES];
    NAME(store)(lane, NAME(sum_chains)(sum[t]));
    for (int half = LANES / 2; half >= n; half /= 2)
      for (int j = 0; j < half; j++) lane[j] += lane[half + j];
    for (int j = 0; j < n; j++) out[j] = lane[j];
  }
}
#undef ML_ADD_VECTOR
#endif

ML_INLINE void NAME(sum_rows)(const int tokens, int64_t n, int64_t depth, const REAL *x, int64_t x_row,
                              const REAL *rows, int64_t row_stride, REAL *out, int64_t out_row) {
#if LANES > 4
  if (n == 4 && row_stride == 4) {
    NAME(sum_dense)(tokens, 4, depth, x, x_row, rows, out, out_row);
    return;
  }
#endif
#if LANES > 8
  if (n == 8 && row_stride == 8) {
    NAME(sum_dense)(tokens, 8, depth, x, x_row, rows, out, out_row);
    return;
  }
#endif
  const int wide = tokens > 2 ? 1 : 2; /* enough chains, and no more than there are registers for */
  for (; n >= wide * LANES; n -= wide * LANES, rows += wide * LANES, out += wide * LANES)
    NAME(sum_columns)(tokens, wide, true, n, depth, x, x_row, rows, row_stride, out, out_row);
  for (; n >= LANES; n -= LANES, rows += LANES, out += LANES)
    NAME(sum_columns)(tokens, 1, true, n, depth, x, x_row, rows, row_stride, out, out_row);
  if (n > 0) NAME(sum_columns)(tokens, 1, false, n, depth, x, x_row, rows, row_stride, out, out_row);
}

static void NAME(short_sums)(int64_t tokens, int64_t n, int64_t depth, const void *x, int64_t x_row, const void *rows,
                             int64_t row_stride, void *out, int64_t out_row) {
  int64_t t = 0;
#define ML_TOKENS(m)                                                                                        \
  for (; tokens - t >= (m); t += (m))                                                                       \
    NAME(sum_rows)((m), n, depth, (const REAL *)x + t * x_row, x_row, rows, row_stride,                     \
                   (REAL *)out + t * out_row, out_row);
#if LANES > 4 /* else a broadcast costs as much as a row */
  ML_TOKENS(4)
#endif
  ML_TOKENS(2)
  ML_TOKENS(1)
#undef ML_TOKENS
}

/* ---- outer: lanes over the results, which stand one after the other ---- */

#if LANES > 4
/* Of LANES rows of x at most; several rows of n results in a vector. */
ML_INLINE void NAME(outer_vectors)(const int n, const bool whole, int64_t rows, int64_t tokens, const REAL *x,
                                   int64_t x_row, const REAL *h, int64_t h_row, REAL *out, const bool add) {
  NAME(vector) sum[LANES / 2];
  ML_UNROLL for (int i = 0; i < LANES / 2; i++) sum[i] = (NAME(vector)){0};
  for (int64_t t = 0; t < tokens; t++, x += x_row, h += h_row) {
    NAME(vector) v = whole ? NAME(load)(x) : NAME(load_some)(x, rows), of_token = NAME(load_some)(h, n);
#if LANES == 8
    of_token = __builtin_shufflevector(of_token, of_token, 0, 1, 2, 3, 0, 1, 2, 3);
#else
    if (n == 8)
      of_token = __builtin_shufflevector(of_token, of_token, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    else
      of_token = __builtin_shufflevector(of_token, of_token, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
#endif
#define ML_ADD_ROWS(n, i) sum[i] += __builtin_shufflevector(v, v, ML_ROWS(n, i)) * of_token
    if (n == 4) {
      ML_ADD_ROWS(4, 0);
      ML_ADD_ROWS(4, 1);
      ML_ADD_ROWS(4, 2);
      ML_ADD_ROWS(4, 3);
    }
#if LANES == 16
    if (n == 8) {
      ML_ADD_ROWS(8, 0);
      ML_ADD_ROWS(8, 1);
      ML_ADD_ROWS(8, 2);
      ML_ADD_ROWS(8, 3);
      ML_ADD_ROWS(8, 4);
      ML_ADD_ROWS(8, 5);
      ML_ADD_ROWS(8, 6);
      ML_ADD_ROWS(8, 7);
    }
#endif
#undef ML_ADD_ROWS
  }
  if (whole) {
    ML_UNROLL for (int i = 0; i < n; i++)
        NAME(store)(out + i * LANES, add ? NAME(load)(out + i * LANES) + sum[i] : sum[i]);
    return;
  }
  REAL results[LANES / 2 * LANES];
  ML_UNROLL for (int i = 0; i < LANES / 2; i++) NAME(store)(results + i * LANES, sum[i]);
  for (int64_t i = 0; i < rows * n; i++) out[i] = add ? out[i] + results[i] : results[i];
}

#define ML_OUTER(n, add)                                                                                           \
  ML_NOINLINE void NAME(outer_##n##_##add)(int64_t tokens, int64_t rows, const REAL *x, int64_t x_row,             \
                                           const REAL *h, int64_t h_row, REAL *out) {                              \
    int64_t i = 0;                                                                                                 \
    for (; i + LANES <= rows; i += LANES)                                                                          \
      NAME(outer_vectors)((n), true, LANES, tokens, x + i, x_row, h, h_row, out + i * (n), (add));                 \
    if (i < rows) NAME(outer_vectors)((n), false, rows - i, tokens, x + i, x_row, h, h_row, out + i * (n), (add)); \
  }
ML_OUTER(4, false)
ML_OUTER(4, true)
#if LANES > 8
ML_OUTER(8, false)
ML_OUTER(8, true)
#endif
#undef ML_OUTER
#undef ML_ROWS
#undef ML_ROWS_4
#undef ML_ROW
#endif

static void NAME(outer)(int64_t tokens, int64_t rows, int64_t n, const void *x, int64_t x_row, const void *h,
                        int64_t h_row, void *out_, bool add) {
  REAL *out = out_;
#if LANES > 4
  if (n == 4) {
    (add ? NAME(outer_4_true) : NAME(outer_4_false))(tokens, rows, x, x_row, h, h_row, out);
    return;
  }
#endif
#if LANES > 8
  if (n == 8) {
    (add ? NAME(outer_8_true) : NAME(outer_8_false))(tokens, rows, x, x_row, h, h_row, out);
    return;
  }
#endif
  for (int64_t j = 0; j < n; j += TILE_VECTORS * LANES, out += TILE_VECTORS * LANES)
    NAME(product)(rows, n - j < TILE_VECTORS * LANES ? n - j : TILE_VECTORS * LANES, tokens, x, 1, x_row,
                  (const REAL *)h + j, h_row, out, n, add ? out : NULL, n);
}

#include "dropout.h"
#include "grouped.h"

const ml_products NAME(table) = {
    .lanes = LANES,
    .panel_width = TILE_VECTORS * LANES,
    .product = NAME(product),
    .pack = NAME(pack),
    .pack_rows = NAME(pack_rows),
    .dots = NAME(dots),
    .spread_rows = NAME(spread_rows),
    .spread_lanes = NAME(spread_lanes),
    .short_sums = NAME(short_sums),
    .outer = NAME(outer),
    .keep = NAME(keep),
    .grouped_dots = NAME(grouped_dots),
    .grouped_sums = NAME(grouped_sums),
};

#if REAL_BYTES == 4
/* Of A and B in bfloat16. */
const ml_products NAME(table_bf16) = {
    .lanes = LANES,
    .panel_width = TILE_VECTORS * LANES,
    .pack = NAME(pack_bf16),
    .pack_rows = NAME(pack_rows_bf16),
    .dots = NAME(dots_bf16),
    .spread_rows = NAME(spread_rows_bf16),
};
#endif

#include "routing.h"

#undef REAL
#undef REAL_BYTES
#undef LANES
#undef LOAD_SOME
#undef LOAD_SOME_NARROW
#undef CONVERT
#undef NAME
