/* The products that read an expert's own A or B, for one dtype of those: included by products.h, with
 *
 *   ELEMENT      REAL, or uint16_t for bfloat16, which is widened in registers
 *   NARROW       1 for bfloat16, else 0
 *   READING(op)  NAME(op), or NAME(op_bf16)
 */
#if NARROW
#define READ_ONE(p) NAME(widen_one)(p)
#define READ_LANES(w, p) NAME(widen_##w)(p)
#define READ(p) NAME(widen)(p)
#define READ_SOME(p, n) NAME(widen_some)(p, n)
#else
#define READ_ONE(p) (*(p))
#define READ_LANES(w, p) (*(const NAME(lanes_##w) *)(p))
#define READ(p) NAME(load)(p)
#define READ_SOME(p, n) NAME(load_some)(p, n)
#endif

/* ---- pack ---- */

/* One square of panel [depth, cols], from (k, j) on. */
#define ML_PACK_SQUARE(w, k, j)                                                                                      \
  do {                                                                                                               \
    NAME(lanes_##w) square[w];                                                                                       \
    ML_UNROLL for (int i = 0; i < (w); i++) square[i] = READ_LANES(w, (const ELEMENT *)rows[(j) + i] + first + (k)); \
    NAME(transpose_##w)(square);                                                                                     \
    ML_UNROLL for (int i = 0; i < (w); i++) * (NAME(lanes_##w) *)(panel + ((k) + i) * width + (j)) = square[i];      \
  } while (0)

/* Squares as wide as there is room for; what is left of the columns in narrow ones, then element by element. */
static void READING(pack_rows)(void *panel_, int64_t width, int64_t depth, int64_t cols, const void *const *rows,
                               int64_t first) {
  REAL *panel = panel_;
  int64_t k = 0;
#define ML_PACK_ROWS(w)                                                                                            \
  for (; k + (w) <= depth; k += (w)) {                                                                             \
    int64_t j = 0;                                                                                                 \
    for (; j + (w) <= cols; j += (w)) ML_PACK_SQUARE(w, k, j);                                                     \
    for (; j + 4 <= cols; j += 4)                                                                                  \
      for (int64_t l = k; l < k + (w); l += 4) ML_PACK_SQUARE(4, l, j);                                            \
    for (; j < cols; j++)                                                                                          \
      for (int64_t l = k; l < k + (w); l++) panel[l * width + j] = READ_ONE((const ELEMENT *)rows[j] + first + l); \
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
    for (int64_t j = 0; j < cols; j++) panel[k * width + j] = READ_ONE((const ELEMENT *)rows[j] + first + k);
}
#undef ML_PACK_SQUARE

/* All of a few columns, as an expert's ranks are: a row is one vector. */
#define ML_PACK_NARROW(w)                                                                 \
  if (col_stride == 1 && cols == (w)) {                                                   \
    for (int64_t k = 0; k < depth; k++)                                                   \
      *(NAME(lanes_##w) *)(panel + k * width) = READ_LANES(w, source + k * depth_stride); \
    return;                                                                               \
  }
#define ML_PACK_COLUMNS(w)          \
  for (; j + (w) <= cols; j += (w)) \
    *(NAME(lanes_##w) *)(panel + k * width + j) = READ_LANES(w, source + k * depth_stride + j);

static void READING(pack)(void *panel_, int64_t width, int64_t depth, int64_t cols, const void *source_,
                          int64_t depth_stride, int64_t col_stride) {
  REAL *panel = panel_;
  const ELEMENT *source = source_;
  if (col_stride != 1 && depth_stride == 1) {
    for (int64_t j = 0; j < cols; j += 16) {
      const void *rows[16];
      int64_t n = cols - j < 16 ? cols - j : 16;
      for (int64_t i = 0; i < n; i++) rows[i] = source + (j + i) * col_stride;
      READING(pack_rows)(panel + j, width, depth, n, rows, 0);
    }
    return;
  }
#if LANES > 8
  ML_PACK_NARROW(16)
#endif
#if LANES > 4
  ML_PACK_NARROW(8)
#endif
  ML_PACK_NARROW(4)
  for (int64_t k = 0; k < depth; k++) {
    int64_t j = 0;
    if (col_stride == 1) { /* all of a row, of which the next lines are on their way by then */
#if LANES > 8
      ML_PACK_COLUMNS(16)
#endif
#if LANES > 4
      ML_PACK_COLUMNS(8)
#endif
      ML_PACK_COLUMNS(4)
    }
    for (; j < cols; j++) panel[k * width + j] = READ_ONE(source + k * depth_stride + j * col_stride);
  }
}
#undef ML_PACK_COLUMNS
#undef ML_PACK_NARROW

/* ---- dots: lanes over depth ---- */

enum { READING(dots_depth) = 1024 }; /* a tile of x and of the rows stays in the first cache */

/* Rows beyond the last are the last once more, and their sums are thrown away. */
#define ML_DOTS(m, wide)                                                                                            \
  ML_NOINLINE void READING(dots_##m##x##wide)(int64_t n, int64_t depth, const REAL *x, int64_t x_row,               \
                                              const void *const *rows, int64_t first, REAL *out, int64_t out_row,   \
                                              const REAL *init, int64_t init_row) {                                 \
    for (int64_t j = 0; j < n; j += (wide)) {                                                                       \
      const ELEMENT *row[wide];                                                                                     \
      ML_UNROLL for (int i = 0; i < (wide); i++) row[i] = (const ELEMENT *)rows[j + i < n ? j + i : n - 1] + first; \
      NAME(vector) sum[m][wide];                                                                                    \
      ML_UNROLL for (int t = 0; t < (m); t++) ML_UNROLL for (int i = 0; i < (wide); i++) sum[t][i] =                \
          (NAME(vector)){0};                                                                                        \
      int64_t k = 0;                                                                                                \
      for (; k + LANES <= depth; k += LANES) {                                                                      \
        NAME(vector) a[wide];                                                                                       \
        ML_UNROLL for (int i = 0; i < (wide); i++) a[i] = READ(row[i] + k);                                         \
        ML_UNROLL for (int t = 0; t < (m); t++) {                                                                   \
          NAME(vector) v = NAME(load)(x + t * x_row + k);                                                           \
          ML_UNROLL for (int i = 0; i < (wide); i++) sum[t][i] += v * a[i];                                         \
        }                                                                                                           \
      }                                                                                                             \
      if (k < depth) {                                                                                              \
        NAME(vector) a[wide];                                                                                       \
        ML_UNROLL for (int i = 0; i < (wide); i++) a[i] = READ_SOME(row[i] + k, depth - k);                         \
        ML_UNROLL for (int t = 0; t < (m); t++) {                                                                   \
          NAME(vector) v = NAME(load_some)(x + t * x_row + k, depth - k);                                           \
          ML_UNROLL for (int i = 0; i < (wide); i++) sum[t][i] += v * a[i];                                         \
        }                                                                                                           \
      }                                                                                                             \
      ML_UNROLL for (int t = 0; t < (m); t++) ML_UNROLL for (int i = 0; i < (wide); i += 4) {                       \
        NAME(lanes_4) sums;                                                                                         \
        NAME(reduce_4)(&sum[t][i], &sums);                                                                          \
        NAME(put_4)(n - j - i, &sums, out + t * out_row + j + i, init ? init + t * init_row + j + i : NULL);        \
      }                                                                                                             \
    }                                                                                                               \
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

static void READING(dots)(int64_t tokens, int64_t n, int64_t depth, const void *x_, int64_t x_row,
                          const void *const *rows, void *out_, int64_t out_row, const void *init_, int64_t init_row) {
  REAL *out = out_;
  const REAL *init = init_;
  for (int64_t k0 = 0; k0 < depth; k0 += READING(dots_depth)) {
    int64_t part = depth - k0 < READING(dots_depth) ? depth - k0 : READING(dots_depth), t = 0;
    const REAL *x = (const REAL *)x_ + k0;
#define ML_TOKENS(m, wide)                                                                          \
  for (; tokens - t >= (m); t += (m))                                                               \
    READING(dots_##m##x##wide)(n, part, x + t * x_row, x_row, rows, k0, out + t * out_row, out_row, \
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
ML_INLINE void READING(add_rows)(const int wide, int64_t depth, const ELEMENT *rows, const int64_t stride,
                                 const REAL *h, NAME(vector) * sum) {
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    NAME(vector) v = NAME(load)(h + k);
  ML_UNROLL for (int i = 0; i < wide; i++) sum[i] += v * READ(rows + i * stride + k);
  }
  if (k < depth) {
    NAME(vector) v = NAME(load_some)(h + k, depth - k);
    ML_UNROLL for (int i = 0; i < wide; i++) sum[i] += v * READ_SOME(rows + i * stride + k, depth - k);
  }
}

/* `wide` columns of one token. */
ML_INLINE void READING(spread_columns)(const int wide, int64_t n_blocks, const ml_block *blocks, int64_t first,
                                    const REAL *h, REAL *out, const REAL *init) {
  NAME(vector) sum[LANES > 4 ? LANES : 4];
  ML_UNROLL for (int i = 0; i < wide; i++) sum[i] = (NAME(vector)){0};
  for (int64_t e = 0; e < n_blocks; h += blocks[e++].depth) {
    const ELEMENT *rows = (const ELEMENT *)blocks[e].rows + first * blocks[e].row_stride;
    if (blocks[e].depth == LANES && blocks[e].row_stride == LANES)
      READING(add_rows)(wide, LANES, rows, LANES, h, sum);
    else
      READING(add_rows)(wide, blocks[e].depth, rows, blocks[e].row_stride, h, sum);
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
ML_INLINE void READING(spread_halves)(int64_t n_blocks, const ml_block *blocks, int64_t first, const REAL *h, REAL *out,
                                   const REAL *init) {
  enum { HALF = LANES / 2 };
  NAME(vector) sum[HALF];
  ML_UNROLL for (int i = 0; i < HALF; i++) sum[i] = (NAME(vector)){0};
  for (int64_t e = 0; e < n_blocks; e++, h += HALF) {
    const ELEMENT *rows = (const ELEMENT *)blocks[e].rows + first * HALF;
    NAME(lanes_8) half = *(const NAME(lanes_8) *)h;
    NAME(vector) v = __builtin_shufflevector(half, half, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
    ML_UNROLL for (int i = 0; i < HALF; i++) sum[i] += v * READ(rows + i * LANES);
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

static void READING(spread_rows)(int64_t tokens, int64_t first, int64_t n, int64_t n_blocks, const ml_block *blocks,
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
  if (halves) ML_SPREAD(LANES, READING(spread_halves)(n_blocks, blocks, first + j, h, out, init))
#endif
#if LANES > 4
  ML_SPREAD(LANES, READING(spread_columns)(LANES, n_blocks, blocks, first + j, h, out, init))
#endif
  ML_SPREAD(4, READING(spread_columns)(4, n_blocks, blocks, first + j, h, out, init))
  ML_SPREAD(1, READING(spread_columns)(1, n_blocks, blocks, first + j, h, out, init))
#undef ML_SPREAD
}

#undef ELEMENT
#undef NARROW
#undef READING
#undef READ_ONE
#undef READ_LANES
#undef READ
#undef READ_SOME
