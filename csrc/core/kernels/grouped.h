/* Products of tokens that stand apart, for one dtype and one vector width; included by products.h, with its macros. */

/* Rows of tokens that stand apart come from afar: those of the next tile are sent for while this one is computed. */
ML_INLINE void NAME(grouped_tile)(const int tokens, const int n, const bool ahead, int64_t depth, const REAL *const *x,
                                  const REAL *const *next, const REAL *const *rows, REAL *out, int64_t out_row,
                                  bool add) {
  NAME(vector) sum[16];
  ML_UNROLL for (int i = 0; i < 16; i++) sum[i] = (NAME(vector)){0};
  int64_t k = 0;
  for (; k + LANES <= depth; k += LANES) {
    NAME(vector) a[4];
    ML_UNROLL for (int j = 0; j < n; j++) a[j] = NAME(load)(rows[j] + k);
    if (ahead) ML_UNROLL for (int t = 0; t < 4; t++) ML_PREFETCH(next[t] + k);
    ML_UNROLL for (int t = 0; t < tokens; t++) {
      NAME(vector) v = NAME(load)(x[t] + k);
      ML_UNROLL for (int j = 0; j < n; j++) sum[4 * t + j] += v * a[j];
    }
  }
  if (k < depth) {
    NAME(vector) a[4];
    ML_UNROLL for (int j = 0; j < n; j++) a[j] = NAME(load_some)(rows[j] + k, depth - k);
    ML_UNROLL for (int t = 0; t < tokens; t++) {
      NAME(vector) v = NAME(load_some)(x[t] + k, depth - k);
      ML_UNROLL for (int j = 0; j < n; j++) sum[4 * t + j] += v * a[j];
    }
  }
  ML_UNROLL for (int t = 0; t < tokens; t++) {
    NAME(lanes_4) sums;
    REAL *o = out + t * out_row;
    NAME(reduce_4)(sum + 4 * t, &sums);
    NAME(put_4)(n, &sums, o, add ? o : NULL);
  }
}

static void NAME(grouped_dots)(int64_t tokens, int64_t n, int64_t depth, const void *const *x, int64_t first,
                               const void *rows_, int64_t row, void *out_, int64_t out_row, bool add) {
  REAL *out = out_;
  int64_t t = 0;
#define ML_TOKENS(m)                                                                                               \
  for (; tokens - t >= (m); t += (m)) {                                                                            \
    const REAL *v[4], *next[4], *a[4];                                                                             \
    ML_UNROLL for (int i = 0; i < (m); i++) v[i] = (const REAL *)x[t + i] + first;                                 \
    ML_UNROLL for (int i = 0; i < 4; i++) next[i] = (const REAL *)x[t + (m) + i < tokens ? t + (m) + i : t] + first; \
    int64_t j = 0;                                                                                                 \
    for (; n - j >= 4; j += 4) {                                                                                   \
      ML_UNROLL for (int i = 0; i < 4; i++) a[i] = (const REAL *)rows_ + (j + i) * row + first;                    \
      if (j == 0)                                                                                                  \
        NAME(grouped_tile)((m), 4, true, depth, v, next, a, out + t * out_row + j, out_row, add);                  \
      else                                                                                                         \
        NAME(grouped_tile)((m), 4, false, depth, v, next, a, out + t * out_row + j, out_row, add);                 \
    }                                                                                                              \
    for (; j < n; j++) {                                                                                           \
      a[0] = (const REAL *)rows_ + j * row + first;                                                                \
      NAME(grouped_tile)((m), 1, false, depth, v, next, a, out + t * out_row + j, out_row, add);                   \
    }                                                                                                              \
  }
  ML_TOKENS(4)
  ML_TOKENS(1)
#undef ML_TOKENS
}

/* One token: its experts one after the other, `vectors` of columns at a time. */
ML_INLINE void NAME(sum_pairs)(const int vectors, int64_t k, int64_t cols, const REAL *h, const int64_t *element,
                               const int32_t *expert, const REAL *panels, const int64_t *offsets, int64_t width,
                               REAL *out, const REAL *init) {
  NAME(vector) sum[TILE_VECTORS];
  ML_UNROLL for (int j = 0; j < vectors; j++) sum[j] = (NAME(vector)){0};
  for (int64_t i = 0; i < k; i++) {
    const REAL *left = h + element[i], *row = panels + offsets[expert[i]] * width;
    int64_t rank = offsets[expert[i] + 1] - offsets[expert[i]];
    for (int64_t r = 0; r < rank; r++, row += width) {
      REAL l = left[r];
      ML_UNROLL for (int j = 0; j < vectors; j++) sum[j] += l * NAME(load)(row + j * LANES);
    }
  }
  if (cols == vectors * LANES) {
    ML_UNROLL for (int j = 0; j < vectors; j++) {
      REAL *o = out + j * LANES;
      NAME(store)(o, init ? NAME(load)(init + j * LANES) + sum[j] : sum[j]);
    }
    return;
  }
  REAL whole[TILE_VECTORS * LANES];
  ML_UNROLL for (int j = 0; j < vectors; j++) NAME(store)(whole + j * LANES, sum[j]);
  NAME(finish_ragged)(1, cols, whole, 0, out, 0, init, 0);
}

static void NAME(grouped_sums)(int64_t tokens, int64_t k, int64_t cols, const void *h, const int64_t *element,
                               const int32_t *expert, const void *panels, const int64_t *offsets, int64_t width,
                               void *out, int64_t out_row, const void *init, int64_t init_row) {
  switch ((cols + LANES - 1) / LANES) {
#define ML_VECTORS(vectors)                                                                                   \
  case vectors:                                                                                               \
    for (int64_t t = 0; t < tokens; t++)                                                                      \
      NAME(sum_pairs)(vectors, k, cols, h, element + t * k, expert + t * k, panels, offsets, width,           \
                      (REAL *)out + t * out_row, init ? (const REAL *)init + t * init_row : NULL);            \
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
