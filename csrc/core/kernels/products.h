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
 *   LOAD_SOME(p, n)  the first n < lanes elements at p, and zeros; optional
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

/* ---- pack ---- */

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

/* One square of panel [depth, cols], from (k, j) on. */
#define ML_PACK_SQUARE(w, k, j)                                                                              \
  do {                                                                                                       \
    NAME(lanes_##w) square[w];                                                                               \
    ML_UNROLL for (int i = 0; i < (w); i++) square[i] =                                                      \
        *(const NAME(lanes_##w) *)((const REAL *)rows[(j) + i] + first + (k));                               \
    NAME(transpose_##w)(square);                                                                             \
    ML_UNROLL for (int i = 0; i < (w); i++) *(NAME(lanes_##w) *)(panel + ((k) + i) * width + (j)) = square[i]; \
  } while (0)

/* Squares as wide as there is room for; what is left of the columns in narrow ones, then element by element. */
static void NAME(pack_rows)(void *panel_, int64_t width, int64_t depth, int64_t cols, const void *const *rows,
                            int64_t first) {
  REAL *panel = panel_;
  int64_t k = 0;
#define ML_PACK_ROWS(w)                                                              \
  for (; k + (w) <= depth; k += (w)) {                                               \
    int64_t j = 0;                                                                   \
    for (; j + (w) <= cols; j += (w)) ML_PACK_SQUARE(w, k, j);                       \
    for (; j + 4 <= cols; j += 4)                                                    \
      for (int64_t l = k; l < k + (w); l += 4) ML_PACK_SQUARE(4, l, j);              \
    for (; j < cols; j++)                                                            \
      for (int64_t l = k; l < k + (w); l++) panel[l * width + j] = ((const REAL *)rows[j])[first + l]; \
  }
#if LANES > 8
  ML_PACK_ROWS(16)
#endif
#if LANES > 4
  ML_PACK_ROWS(8)
#endif
  ML_PACK_ROWS(4)
#undef ML_PACK_ROWS
  for (; k < depth; k++)
    for (int64_t j = 0; j < cols; j++) panel[k * width + j] = ((const REAL *)rows[j])[first + k];
}
#undef ML_PACK_SQUARE

#define ML_PACK_COLUMNS(w)                                                                       \
  for (; j + (w) <= cols; j += (w))                                                              \
    for (int64_t k = 0; k < depth; k++)                                                          \
      *(NAME(lanes_##w) *)(panel + k * width + j) = *(const NAME(lanes_##w) *)(source + k * depth_stride + j);

static void NAME(pack)(void *panel_, int64_t width, int64_t depth, int64_t cols, const void *source_,
                       int64_t depth_stride, int64_t col_stride) {
  REAL *panel = panel_;
  const REAL *source = source_;
  int64_t j = 0;
  if (col_stride == 1) {
#if LANES > 8
    ML_PACK_COLUMNS(16)
#endif
#if LANES > 4
    ML_PACK_COLUMNS(8)
#endif
    ML_PACK_COLUMNS(4)
  } else if (depth_stride == 1) {
    for (; j < cols; j += 16) {
      const void *rows[16];
      int64_t n = cols - j < 16 ? cols - j : 16;
      for (int64_t i = 0; i < n; i++) rows[i] = source + (j + i) * col_stride;
      NAME(pack_rows)(panel + j, width, depth, n, rows, 0);
    }
  }
  for (int64_t k = 0; k < depth; k++)
    for (int64_t i = j; i < cols; i++) panel[k * width + i] = source[k * depth_stride + i * col_stride];
}
#undef ML_PACK_COLUMNS

/* ---- dots: lanes over depth, reduced at the end in a fixed tree ---- */

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

enum { NAME(dots_depth) = 1024 }; /* a tile of x and of the rows stays in the first cache */

/* Rows beyond the last are the last once more, and their sums are thrown away. */
#define ML_DOTS(m, wide)                                                                                          \
  ML_NOINLINE void NAME(dots_##m##x##wide)(int64_t n, int64_t depth, const REAL *x, int64_t x_row,                \
                                           const void *const *rows, int64_t first, REAL *out, int64_t out_row,    \
                                           const REAL *init, int64_t init_row) {                                  \
    for (int64_t j = 0; j < n; j += (wide)) {                                                                     \
      const REAL *row[wide];                                                                                      \
      ML_UNROLL for (int i = 0; i < (wide); i++) row[i] = (const REAL *)rows[j + i < n ? j + i : n - 1] + first;  \
      NAME(vector) sum[m][wide];                                                                                  \
      ML_UNROLL for (int t = 0; t < (m); t++) ML_UNROLL for (int i = 0; i < (wide); i++)                          \
          sum[t][i] = (NAME(vector)){0};                                                                          \
      int64_t k = 0;                                                                                              \
      for (; k + LANES <= depth; k += LANES) {                                                                    \
        NAME(vector) a[wide];                                                                                     \
        ML_UNROLL for (int i = 0; i < (wide); i++) a[i] = NAME(load)(row[i] + k);                                 \
        ML_UNROLL for (int t = 0; t < (m); t++) {                                                                 \
          NAME(vector) v = NAME(load)(x + t * x_row + k);                                                         \
          ML_UNROLL for (int i = 0; i < (wide); i++) sum[t][i] += v * a[i];                                       \
        }                                                                                                         \
      }                                                                                                           \
      if (k < depth) {                                                                                            \
        NAME(vector) a[wide];                                                                                     \
        ML_UNROLL for (int i = 0; i < (wide); i++) a[i] = NAME(load_some)(row[i] + k, depth - k);                 \
        ML_UNROLL for (int t = 0; t < (m); t++) {                                                                 \
          NAME(vector) v = NAME(load_some)(x + t * x_row + k, depth - k);                                         \
          ML_UNROLL for (int i = 0; i < (wide); i++) sum[t][i] += v * a[i];                                       \
        }                                                                                                         \
      }                                                                                                           \
      ML_UNROLL for (int t = 0; t < (m); t++) ML_UNROLL for (int i = 0; i < (wide); i += 4) {                     \
        NAME(lanes_4) sums;                                                                                       \
        NAME(reduce_4)(&sum[t][i], &sums);                                                                        \
        NAME(put_4)(n - j - i, &sums, out + t * out_row + j + i, init ? init + t * init_row + j + i : NULL);       \
      }                                                                                                           \
    }                                                                                                             \
  }
#if REGISTERS > 16
ML_DOTS(6, 4)
ML_DOTS(4, 4)
ML_DOTS(2, 8)
#else
ML_DOTS(3, 4)
ML_DOTS(2, 4)
#endif
ML_DOTS(1, 8)
#undef ML_DOTS

static void NAME(dots)(int64_t tokens, int64_t n, int64_t depth, const void *x_, int64_t x_row,
                       const void *const *rows, void *out_, int64_t out_row, const void *init_, int64_t init_row) {
  REAL *out = out_;
  const REAL *init = init_;
  for (int64_t k0 = 0; k0 < depth; k0 += NAME(dots_depth)) {
    int64_t part = depth - k0 < NAME(dots_depth) ? depth - k0 : NAME(dots_depth), t = 0;
    const REAL *x = (const REAL *)x_ + k0;
#define ML_TOKENS(m, wide)                                                                                        \
  for (; tokens - t >= (m); t += (m))                                                                             \
    NAME(dots_##m##x##wide)(n, part, x + t * x_row, x_row, rows, k0, out + t * out_row, out_row,                  \
                            init ? init + t * init_row : NULL, init_row);
#if REGISTERS > 16
    ML_TOKENS(6, 4)
    ML_TOKENS(4, 4)
    ML_TOKENS(2, 8)
#else
    ML_TOKENS(3, 4)
    ML_TOKENS(2, 4)
#endif
    ML_TOKENS(1, 8)
#undef ML_TOKENS
    init = out;
    init_row = out_row;
  }
}

/* ---- spread_rows: lanes over the ranks, so that no element of B has to move ---- */

/* sum[i] += row i * h, for a row after the other; `stride` is a constant where the compiler may use that. */
ML_INLINE void NAME(add_rows)(const int wide, int64_t depth, const REAL *rows, const int64_t stride, const REAL *h,
                              NAME(vector) * sum) {
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    NAME(vector) v = NAME(load)(h + k);
    ML_UNROLL for (int i = 0; i < wide; i++) sum[i] += v * NAME(load)(rows + i * stride + k);
  }
  if (k < depth) {
    NAME(vector) v = NAME(load_some)(h + k, depth - k);
    ML_UNROLL for (int i = 0; i < wide; i++) sum[i] += v * NAME(load_some)(rows + i * stride + k, depth - k);
  }
}

/* `wide` columns of one token. */
ML_INLINE void NAME(spread_columns)(const int wide, int64_t n_blocks, const ml_block *blocks, int64_t first,
                                    const REAL *h, REAL *out, const REAL *init) {
  NAME(vector) sum[LANES > 4 ? LANES : 4];
  ML_UNROLL for (int i = 0; i < wide; i++) sum[i] = (NAME(vector)){0};
  for (int64_t e = 0; e < n_blocks; h += blocks[e++].depth) {
    const REAL *rows = (const REAL *)blocks[e].rows + first * blocks[e].row_stride;
    if (blocks[e].depth == LANES && blocks[e].row_stride == LANES)
      NAME(add_rows)(wide, LANES, rows, LANES, h, sum);
    else
      NAME(add_rows)(wide, blocks[e].depth, rows, blocks[e].row_stride, h, sum);
  }
  if (wide < 4) {
    ML_UNROLL for (int i = wide; i < 4; i++) sum[i] = (NAME(vector)){0};
  }
  ML_UNROLL for (int i = 0; i < wide; i += 4) {
    NAME(lanes_4) sums;
    NAME(reduce_4)(&sum[i], &sums);
    NAME(put_4)(wide - i, &sums, out + i, init ? init + i : NULL);
  }
}

#if LANES == 16
/* The same for ranks of half a vector and dense rows, all experts alike: two rows in one vector. */
ML_INLINE void NAME(spread_halves)(int64_t n_blocks, const ml_block *blocks, int64_t first, const REAL *h, REAL *out,
                                   const REAL *init) {
  enum { HALF = LANES / 2 };
  NAME(vector) sum[HALF];
  ML_UNROLL for (int i = 0; i < HALF; i++) sum[i] = (NAME(vector)){0};
  for (int64_t e = 0; e < n_blocks; e++, h += HALF) {
    const REAL *rows = (const REAL *)blocks[e].rows + first * HALF;
    NAME(lanes_8) half = *(const NAME(lanes_8) *)h;
    NAME(vector) v = __builtin_shufflevector(half, half, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    ML_UNROLL for (int i = 0; i < HALF; i++) sum[i] += v * NAME(load)(rows + i * LANES);
  }
  ML_UNROLL for (int i = 0; i < HALF; i += 4) {
    NAME(vector) all;
    NAME(sum_quarters)(&sum[i], &all); /* two quarters of the even rows, two of the odd ones */
    NAME(lanes_8) sums = __builtin_shufflevector(all, all, 0, 8, 1, 9, 2, 10, 3, 11) +
                         __builtin_shufflevector(all, all, 4, 12, 5, 13, 6, 14, 7, 15);
    REAL *to = out + 2 * i;
    if (init) sums += *(const NAME(lanes_8) *)(init + 2 * i);
    *(NAME(lanes_8) *)to = sums;
  }
}
#endif

static void NAME(spread_rows)(int64_t tokens, int64_t first, int64_t n, int64_t n_blocks, const ml_block *blocks,
                              const void *h_, int64_t h_row, void *out_, int64_t out_row, const void *init_,
                              int64_t init_row) {
  int64_t j = 0;
#define ML_SPREAD(columns, spread)                                                               \
  for (; j + (columns) <= n; j += (columns))                                                     \
    for (int64_t t = 0; t < tokens; t++) {                                                       \
      const REAL *h = (const REAL *)h_ + t * h_row;                                              \
      REAL *out = (REAL *)out_ + t * out_row + j;                                                \
      const REAL *init = init_ ? (const REAL *)init_ + t * init_row + j : NULL;                  \
      spread;                                                                                    \
    }
#if LANES == 16
  bool halves = true;
  for (int64_t e = 0; e < n_blocks; e++) halves &= blocks[e].depth == LANES / 2 && blocks[e].row_stride == LANES / 2;
  if (halves) ML_SPREAD(LANES, NAME(spread_halves)(n_blocks, blocks, first + j, h, out, init))
#endif
#if LANES > 4
  ML_SPREAD(LANES, NAME(spread_columns)(LANES, n_blocks, blocks, first + j, h, out, init))
#endif
  ML_SPREAD(4, NAME(spread_columns)(4, n_blocks, blocks, first + j, h, out, init))
  ML_SPREAD(1, NAME(spread_columns)(1, n_blocks, blocks, first + j, h, out, init))
#undef ML_SPREAD
}

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
#undef ML_ROWS
#undef ML_ROWS_4
#undef ML_ROW
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

#include "dropout.h"
#include "grouped.h"

static const ml_products NAME(table) = {
    .lanes = LANES,
    .panel_width = TILE_VECTORS * LANES,
    .product = NAME(product),
    .pack = NAME(pack),
    .pack_rows = NAME(pack_rows),
    .dots = NAME(dots),
    .spread_rows = NAME(spread_rows),
    .spread_lanes = NAME(spread_lanes),
    .short_sums = NAME(short_sums),
    .keep = NAME(keep),
    .grouped_dots = NAME(grouped_dots),
    .grouped_sums = NAME(grouped_sums),
};

#include "routing.h"

#undef REAL
#undef REAL_BYTES
#undef LANES
#undef LOAD_SOME
#undef NAME
