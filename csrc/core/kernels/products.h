/* The skinny products for one dtype and one vector width, in the compiler's vector types: included by each
 * instruction set's file, once per dtype, with
 *
 *   REAL             float or double
 *   NAME(op)         ml_<op>_<dtype>_<isa>
 *   VECTOR_BYTES     bytes in a vector register
 *   TILE_ROWS        rows of a register tile, at most 6
 *   TILE_VECTORS     vectors in a row of a tile, at most 4
 *   MULTIPLY_LOW     see dropout.h
 *
 * TILE_ROWS * TILE_VECTORS accumulators, TILE_VECTORS panel vectors and a broadcast must fit in the registers.
 */
enum { NAME(lanes) = (int)(VECTOR_BYTES / sizeof(REAL)) };

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
    ML_UNROLL for (int j = 0; j < vectors; j++) p[j] = NAME(load)(panel + k * width + j * NAME(lanes));
    ML_UNROLL for (int i = 0; i < rows; i++) {
      REAL l = left[i * left_row + k * left_step];
      ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] += l * p[j];
    }
  }
  if (cols == vectors * NAME(lanes)) {
    ML_UNROLL for (int i = 0; i < rows; i++) ML_UNROLL for (int j = 0; j < vectors; j++) {
      REAL *o = out + i * out_row + j * NAME(lanes);
      NAME(store)(o, init ? NAME(load)(init + i * init_row + j * NAME(lanes)) + sum[i][j] : sum[i][j]);
    }
    return;
  }
  REAL whole[TILE_ROWS * TILE_VECTORS * NAME(lanes)];
  ML_UNROLL for (int i = 0; i < rows; i++) ML_UNROLL for (int j = 0; j < vectors; j++)
      NAME(store)(whole + (i * vectors + j) * NAME(lanes), sum[i][j]);
  NAME(finish_ragged)(rows, cols, whole, vectors * NAME(lanes), out, out_row, init, init_row);
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
  switch ((cols + NAME(lanes) - 1) / NAME(lanes)) {
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

/* Four elements at any address, and four of them transposed: element by element, packing would cost as much as the
 * product that it feeds. */
typedef REAL NAME(quad) __attribute__((vector_size(4 * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));

ML_INLINE void NAME(transpose_4x4)(const NAME(quad) in[4], NAME(quad) out[4]) {
  NAME(quad) low = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5);
  NAME(quad) high = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7);
  NAME(quad) low2 = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  NAME(quad) high2 = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  out[0] = __builtin_shufflevector(low, low2, 0, 1, 4, 5);
  out[1] = __builtin_shufflevector(low, low2, 2, 3, 6, 7);
  out[2] = __builtin_shufflevector(high, high2, 0, 1, 4, 5);
  out[3] = __builtin_shufflevector(high, high2, 2, 3, 6, 7);
}

static void NAME(pack)(void *panel_, int64_t width, int64_t depth, int64_t cols, const void *source_,
                       int64_t depth_stride, int64_t col_stride) {
  REAL *panel = panel_;
  const REAL *source = source_;
  if (col_stride == 1) {
    for (int64_t k = 0; k < depth; k++)
      __builtin_memcpy(panel + k * width, source + k * depth_stride, (size_t)cols * sizeof(REAL));
    return;
  }
  int64_t j = 0;
  if (depth_stride == 1) {
    for (; j + 4 <= cols; j += 4) {
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4) {
        NAME(quad) in[4], out[4];
        ML_UNROLL for (int i = 0; i < 4; i++) in[i] = *(const NAME(quad) *)(source + k + (j + i) * col_stride);
        NAME(transpose_4x4)(in, out);
        ML_UNROLL for (int i = 0; i < 4; i++) *(NAME(quad) *)(panel + (k + i) * width + j) = out[i];
      }
      for (; k < depth; k++)
        for (int64_t i = j; i < j + 4; i++) panel[k * width + i] = source[k + i * col_stride];
    }
  }
  for (int64_t k = 0; k < depth; k++)
    for (int64_t i = j; i < cols; i++) panel[k * width + i] = source[k * depth_stride + i * col_stride];
}

/* ---- dots: lanes over depth, reduced at the end in a fixed tree ---- */

ML_INLINE REAL NAME(reduce)(NAME(vector) v) {
  REAL lane[NAME(lanes)];
  NAME(store)(lane, v);
  ML_UNROLL for (int half = NAME(lanes) / 2; half > 0; half /= 2) ML_UNROLL for (int i = 0; i < half; i++)
      lane[i] += lane[i + half];
  return lane[0];
}

/* The first n < lanes elements, and zeros. A loop over what a depth leaves over would be compiled in one tile with fused
 * multiply-adds and in another without, and a row's sum must not depend on the tile that it falls into. */
ML_INLINE NAME(vector) NAME(load_some)(const REAL *from, int64_t n) {
  REAL lane[NAME(lanes)] = {0};
  __builtin_memcpy(lane, from, (size_t)n * sizeof(REAL));
  return NAME(load)(lane);
}

ML_INLINE void NAME(dots_tile)(const int tokens, const int n, int64_t depth, const REAL *x, int64_t x_row,
                               const void *const *rows, REAL *out, int64_t out_row) {
  NAME(vector) sum[4][8];
  ML_UNROLL for (int t = 0; t < tokens; t++) ML_UNROLL for (int j = 0; j < n; j++) sum[t][j] = (NAME(vector)){0};
  int64_t k = 0;
  for (; k + NAME(lanes) <= depth; k += NAME(lanes)) {
    NAME(vector) a[8];
    ML_UNROLL for (int j = 0; j < n; j++) a[j] = NAME(load)((const REAL *)rows[j] + k);
    ML_UNROLL for (int t = 0; t < tokens; t++) {
      NAME(vector) v = NAME(load)(x + t * x_row + k);
      ML_UNROLL for (int j = 0; j < n; j++) sum[t][j] += v * a[j];
    }
  }
  if (k < depth) {
    NAME(vector) a[8];
    ML_UNROLL for (int j = 0; j < n; j++) a[j] = NAME(load_some)((const REAL *)rows[j] + k, depth - k);
    ML_UNROLL for (int t = 0; t < tokens; t++) {
      NAME(vector) v = NAME(load_some)(x + t * x_row + k, depth - k);
      ML_UNROLL for (int j = 0; j < n; j++) sum[t][j] += v * a[j];
    }
  }
  ML_UNROLL for (int t = 0; t < tokens; t++) ML_UNROLL for (int j = 0; j < n; j++)
      out[t * out_row + j] = NAME(reduce)(sum[t][j]);
}

static void NAME(dots)(int64_t tokens, int64_t n, int64_t depth, const void *x_, int64_t x_row,
                       const void *const *rows, void *out_, int64_t out_row) {
  const REAL *x = x_;
  REAL *out = out_;
  int64_t t = 0;
#define ML_TOKENS(m, wide)                                                                                       \
  for (; tokens - t >= (m); t += (m)) {                                                                          \
    int64_t j = 0;                                                                                               \
    for (; n - j >= (wide); j += (wide))                                                                         \
      NAME(dots_tile)((m), (wide), depth, x + t * x_row, x_row, rows + j, out + t * out_row + j, out_row);       \
    for (; j < n; j++) NAME(dots_tile)((m), 1, depth, x + t * x_row, x_row, rows + j, out + t * out_row + j, out_row); \
  }
  ML_TOKENS(4, 4)
  ML_TOKENS(2, 4)
  ML_TOKENS(1, 8)
#undef ML_TOKENS
}

static void NAME(short_dots)(int64_t tokens, int64_t n, int64_t depth, const void *h_, int64_t h_row,
                             const void *rows_, int64_t row_stride, void *out_, int64_t out_row) {
  for (int64_t t = 0; t < tokens; t++) {
    const REAL *h = (const REAL *)h_ + t * h_row, *rows = rows_;
    REAL *out = (REAL *)out_ + t * out_row;
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
      NAME(quad) sum[4] = {{0}}, turned[4];
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4) {
        NAME(quad) v = *(const NAME(quad) *)(h + k);
        ML_UNROLL for (int i = 0; i < 4; i++) sum[i] += v * *(const NAME(quad) *)(rows + (j + i) * row_stride + k);
      }
      NAME(transpose_4x4)(sum, turned);
      NAME(quad) total = (turned[0] + turned[1]) + (turned[2] + turned[3]);
      for (; k < depth; k++) ML_UNROLL for (int i = 0; i < 4; i++) total[i] += h[k] * rows[(j + i) * row_stride + k];
      *(NAME(quad) *)(out + j) += total;
    }
    for (; j < n; j++) {
      REAL total = 0;
      for (int64_t k = 0; k < depth; k++) total += h[k] * rows[j * row_stride + k];
      out[j] += total;
    }
  }
}

/* Four chains of sums at a time, and two rows: enough to hide the latency of an addition. */
ML_INLINE void NAME(short_sums_quads)(const int quads, int64_t depth, const REAL *x, const REAL *rows,
                                      int64_t row_stride, REAL *out) {
  NAME(quad) even[4] = {{0}}, odd[4] = {{0}};
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2) ML_UNROLL for (int i = 0; i < quads; i++) {
      even[i] += x[k] * *(const NAME(quad) *)(rows + k * row_stride + 4 * i);
      odd[i] += x[k + 1] * *(const NAME(quad) *)(rows + (k + 1) * row_stride + 4 * i);
    }
  if (k < depth) ML_UNROLL for (int i = 0; i < quads; i++)
      even[i] += x[k] * *(const NAME(quad) *)(rows + k * row_stride + 4 * i);
  ML_UNROLL for (int i = 0; i < quads; i++) *(NAME(quad) *)(out + 4 * i) = even[i] + odd[i];
}

static void NAME(short_sums)(int64_t tokens, int64_t n, int64_t depth, const void *x_, int64_t x_row,
                             const void *rows_, int64_t row_stride, void *out_, int64_t out_row) {
  const REAL *rows = rows_;
  for (int64_t t = 0; t < tokens; t++) {
    const REAL *x = (const REAL *)x_ + t * x_row;
    REAL *out = (REAL *)out_ + t * out_row;
    int64_t j = 0;
    for (; n - j >= 16; j += 16) NAME(short_sums_quads)(4, depth, x, rows + j, row_stride, out + j);
    for (; n - j >= 8; j += 8) NAME(short_sums_quads)(2, depth, x, rows + j, row_stride, out + j);
    for (; n - j >= 4; j += 4) NAME(short_sums_quads)(1, depth, x, rows + j, row_stride, out + j);
    for (; j < n; j++) {
      REAL total = 0;
      for (int64_t k = 0; k < depth; k++) total += x[k] * rows[k * row_stride + j];
      out[j] = total;
    }
  }
}

#include "dropout.h"

static const ml_products NAME(table) = {
    .lanes = NAME(lanes),
    .panel_width = TILE_VECTORS * NAME(lanes),
    .product = NAME(product),
    .pack = NAME(pack),
    .dots = NAME(dots),
    .short_dots = NAME(short_dots),
    .short_sums = NAME(short_sums),
    .keep = NAME(keep),
};

#include "routing.h"

#undef REAL
#undef NAME
