/* Products of tokens that stand apart, for one dtype and one vector width; included by products.h, with its macros. */

/* sums[i] = lanes of sum[i], added up in a fixed tree, for 4 n vectors. */
ML_INLINE void NAME(reduce_all)(const int n, const NAME(vector) * sum, REAL *sums) {
  if (NAME(lanes) < 4) {
  ML_UNROLL for (int i = 0; i < n; i++) sums[i] = NAME(reduce)(sum[i]);
    return;
  }
  for (int i = 0; i < n; i += 4) {
    NAME(quad) part[4], turned[4];
    ML_UNROLL for (int j = 0; j < 4; j++) {
      REAL lane[NAME(lanes)];
      NAME(store)(lane, sum[i + j]);
      part[j] = *(const NAME(quad) *)lane;
      ML_UNROLL for (int l = 4; l < NAME(lanes); l += 4) part[j] += *(const NAME(quad) *)(lane + l);
    }
    NAME(transpose_4x4)(part, turned);
    *(NAME(quad) *)(sums + i) = (turned[0] + turned[1]) + (turned[2] + turned[3]);
  }
}

ML_INLINE void NAME(grouped_tile)(const int tokens, const int n, int64_t depth, const REAL *const *x,
                                  const REAL *const *rows, REAL *out, int64_t out_row, bool add) {
  NAME(vector) sum[16];
  ML_UNROLL for (int i = 0; i < 16; i++) sum[i] = (NAME(vector)){0};
  int64_t k = 0;
  for (; k + NAME(lanes) <= depth; k += NAME(lanes)) {
    NAME(vector) a[4];
    ML_UNROLL for (int j = 0; j < n; j++) a[j] = NAME(load)(rows[j] + k);
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
  REAL sums[16];
  NAME(reduce_all)(4 * tokens, sum, sums);
  ML_UNROLL for (int t = 0; t < tokens; t++) ML_UNROLL for (int j = 0; j < n; j++) {
    REAL *o = out + t * out_row + j;
    *o = add ? *o + sums[4 * t + j] : sums[4 * t + j];
  }
}

static void NAME(grouped_dots)(int64_t tokens, int64_t n, int64_t depth, const void *const *x, int64_t first,
                               const void *rows_, int64_t row, void *out_, int64_t out_row, bool add) {
  REAL *out = out_;
  int64_t t = 0;
#define ML_TOKENS(m)                                                                                               \
  for (; tokens - t >= (m); t += (m)) {                                                                            \
    const REAL *v[4], *a[4];                                                                                       \
    ML_UNROLL for (int i = 0; i < (m); i++) v[i] = (const REAL *)x[t + i] + first;                                 \
    int64_t j = 0;                                                                                                 \
    for (; n - j >= 4; j += 4) {                                                                                   \
      ML_UNROLL for (int i = 0; i < 4; i++) a[i] = (const REAL *)rows_ + (j + i) * row + first;                    \
      NAME(grouped_tile)((m), 4, depth, v, a, out + t * out_row + j, out_row, add);                                \
    }                                                                                                              \
    for (; j < n; j++) {                                                                                           \
      a[0] = (const REAL *)rows_ + j * row + first;                                                                \
      NAME(grouped_tile)((m), 1, depth, v, a, out + t * out_row + j, out_row, add);                                \
    }                                                                                                              \
  }
  ML_TOKENS(4)
  ML_TOKENS(1)
#undef ML_TOKENS
}

/* out[places[t], j] += in[t, j] */
static void NAME(scatter_add)(int64_t tokens, int64_t cols, const void *in_, int64_t in_row, void *out_, int64_t out_row,
                              const int64_t *places) {
  for (int64_t t = 0; t < tokens; t++) {
    const REAL *in = (const REAL *)in_ + t * in_row;
    REAL *out = (REAL *)out_ + places[t] * out_row;
    int64_t j = 0;
    for (; j + NAME(lanes) <= cols; j += NAME(lanes))
      NAME(store)(out + j, NAME(load)(out + j) + NAME(load)(in + j));
    for (; j < cols; j++) out[j] += in[j];
  }
}
