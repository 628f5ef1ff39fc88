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

static void NAME(grouped_dots)(int64_t tokens, int64_t n, int64_t depth, const void *const *x, const void *rows_,
                               int64_t row, void *out_, int64_t out_row, bool add) {
  REAL *out = out_;
  int64_t t = 0;
#define ML_TOKENS(m)                                                                                               \
  for (; tokens - t >= (m); t += (m)) {                                                                            \
    const REAL *v[4], *next[4], *a[4];                                                                             \
    ML_UNROLL for (int i = 0; i < (m); i++) v[i] = x[t + i];                                                       \
    ML_UNROLL for (int i = 0; i < 4; i++) next[i] = x[t + (m) + i < tokens ? t + (m) + i : t];             \
    int64_t j = 0;                                                                                                 \
    for (; n - j >= 4; j += 4) {                                                                                   \
      ML_UNROLL for (int i = 0; i < 4; i++) a[i] = (const REAL *)rows_ + (j + i) * row;                            \
      if (j == 0)                                                                                                  \
        NAME(grouped_tile)((m), 4, true, depth, v, next, a, out + t * out_row + j, out_row, add);                  \
      else                                                                                                         \
        NAME(grouped_tile)((m), 4, false, depth, v, next, a, out + t * out_row + j, out_row, add);                 \
    }                                                                                                              \
    for (; j < n; j++) {                                                                                           \
      a[0] = (const REAL *)rows_ + j * row;                                                                        \
      NAME(grouped_tile)((m), 1, false, depth, v, next, a, out + t * out_row + j, out_row, add);                   \
    }                                                                                                              \
  }
  ML_TOKENS(4)
  ML_TOKENS(1)
#undef ML_TOKENS
}

/* One token: its experts one after the other, `vectors` of columns at a time. */
ML_INLINE void NAME(sum_pairs)(const int vectors, int64_t k, int64_t cols, const REAL *h, const int64_t *element,
                               const int64_t *expert, const REAL *panels, const int64_t *offsets, int64_t width,
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
    /* All that is read first: see tile. */
    if (init) ML_UNROLL for (int j = 0; j < vectors; j++) sum[j] += NAME(load)(init + j * LANES);
    ML_UNROLL for (int j = 0; j < vectors; j++) NAME(store)(out + j * LANES, sum[j]);
    return;
  }
  REAL whole[TILE_VECTORS * LANES];
  ML_UNROLL for (int j = 0; j < vectors; j++) NAME(store)(whole + j * LANES, sum[j]);
  NAME(finish_ragged)(1, cols, whole, 0, out, 0, init, 0);
}

static void NAME(grouped_sums)(int64_t tokens, const int64_t *token, int64_t k, int64_t cols, const void *h, const int64_t *element_,
                               const int64_t *expert_, const void *panels, int64_t R, const int64_t *offsets,
                               void *out_, int64_t out_row, const void *init_, int64_t init_row) {
  enum { FULL = TILE_VECTORS * LANES, AHEAD = 1 };
  for (int64_t i = 0; i < tokens; i++) {
    int64_t t = token[i], ahead = token[i + AHEAD < tokens ? i + AHEAD : i] - t;
    const int64_t *element = element_ + t * k;
    const int64_t *expert = expert_ + t * k;
    REAL *out = (REAL *)out_ + t * out_row;
    const REAL *init = init_ ? (const REAL *)init_ + t * init_row : NULL, *panel = panels;
    for (int64_t j = 0; j < cols; j += FULL, panel += R * FULL) {
      int64_t n = cols - j < FULL ? cols - j : FULL, vectors = (n + LANES - 1) / LANES;
      for (int64_t i = j; i < j + n; i += 64 / (int64_t)sizeof(REAL)) {
        ML_PREFETCH_NEAR(out + ahead * out_row + i);
        if (init) ML_PREFETCH_NEAR(init + ahead * init_row + i);
      }
      switch (vectors) {
#define ML_VECTORS(vectors)                                                                                        \
  case vectors:                                                                                                    \
    NAME(sum_pairs)(vectors, k, n, h, element, expert, panel, offsets, vectors * LANES, out + j, init ? init + j : NULL); \
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
  }
}
