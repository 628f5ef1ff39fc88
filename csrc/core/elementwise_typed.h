/* The functions of elementwise.h for one dtype; elementwise.c includes this twice, with REAL and NAME(op) defined. */

static void NAME(factors)(int64_t first, int64_t last, int64_t seq, int64_t n_experts, ml_tokens weights,
                          const ml_expert *experts, int64_t top_k, void *factors_, uint8_t *keep) {
  REAL *factors = factors_;
  for (int64_t t = first; t < last; t++) {
    const REAL *w = (const REAL *)weights.data + t / seq * weights.batch + t % seq * weights.seq;
    REAL *f = factors + t * n_experts;
    for (int64_t e = 0; e < n_experts; e++) f[e] = (REAL)experts[e].scaling * w[e * weights.col];
    if (top_k == 0) continue;
    uint8_t *k = keep + t * n_experts;
    memset(k, 0, (size_t)n_experts);
    for (int64_t n = 0; n < top_k; n++) {
      int64_t best = -1;
      for (int64_t e = 0; e < n_experts; e++) {
        if (k[e]) continue;
        REAL v = w[e * weights.col];
        if (best < 0 || v > w[best * weights.col] || (ML_ISNAN(v) && !ML_ISNAN(w[best * weights.col]))) best = e;
      }
      k[best] = 1;
    }
    for (int64_t e = 0; e < n_experts; e++)
      if (!k[e]) f[e] = 0;
  }
}

static uint64_t NAME(unused)(int64_t batch, int64_t seq, int64_t n_experts, ml_tokens weights) {
  uint64_t unused = UINT64_MAX >> (64 - n_experts);
  for (int64_t b = 0; b < batch; b++)
    for (int64_t s = 0; s < seq; s++) {
      const REAL *w = (const REAL *)weights.data + b * weights.batch + s * weights.seq;
      for (int64_t e = 0; e < n_experts; e++)
        if (w[e * weights.col] != 0) unused &= ~(UINT64_C(1) << e);
    }
  return unused;
}

static void NAME(drop)(int64_t first, int64_t last, int64_t n_experts, const int64_t *offsets, const uint8_t *keep,
                       void *h_) {
  int64_t R = offsets[n_experts];
  for (int64_t t = first; t < last; t++)
    for (int64_t e = 0; e < n_experts; e++)
      if (!keep[t * n_experts + e])
        memset((REAL *)h_ + t * R + offsets[e], 0, (size_t)(offsets[e + 1] - offsets[e]) * sizeof(REAL));
}

static void NAME(weigh)(int64_t first, int64_t last, int64_t n_experts, const int64_t *offsets, const void *factors,
                        const void *h_, void *out_) {
  int64_t R = offsets[n_experts];
  for (int64_t t = first; t < last; t++) {
    const REAL *f = (const REAL *)factors + t * n_experts, *h = (const REAL *)h_ + t * R;
    REAL *out = (REAL *)out_ + t * R;
    for (int64_t e = 0; e < n_experts; e++)
      for (int64_t j = offsets[e]; j < offsets[e + 1]; j++) out[j] = f[e] * h[j];
  }
}

static void NAME(weight_grads)(int64_t first, int64_t last, int64_t n_experts, const int64_t *offsets,
                               const ml_expert *experts, const uint8_t *keep, const void *p_, const void *h_,
                               void *grads_) {
  int64_t R = offsets[n_experts];
  for (int64_t t = first; t < last; t++) {
    const REAL *p = (const REAL *)p_ + t * R, *h = (const REAL *)h_ + t * R;
    REAL *grads = (REAL *)grads_ + t * n_experts;
    for (int64_t e = 0; e < n_experts; e++) {
      REAL sum = 0;
      for (int64_t j = offsets[e]; j < offsets[e + 1]; j++) sum += p[j] * h[j];
      grads[e] = keep && !keep[t * n_experts + e] ? 0 : (REAL)experts[e].scaling * sum;
    }
  }
}

/* The numbers of token t. */
static inline REAL *NAME(token)(ml_tokens v, int64_t seq, int64_t t) {
  return (REAL *)v.data + t / seq * v.batch + t % seq * v.seq;
}

/* Whether v goes before the smallest of those that are kept, all of which have lower indices. */
static inline bool NAME(is_larger)(REAL v, REAL smallest) {
  return v > smallest || (ML_ISNAN(v) && !ML_ISNAN(smallest));
}

static void NAME(pick)(int64_t first, int64_t last, int64_t seq, int64_t n_experts, ml_tokens weights, int64_t top_k,
                       int64_t *chosen, void *largest) {
  for (int64_t t = first; t < last; t++) {
    const REAL *w = NAME(token)(weights, seq, t);
    int64_t *best = chosen + t * top_k, n = 0;
    REAL *kept = (REAL *)largest + t * top_k;
    for (int64_t e = 0; e < n_experts; e++) {
      REAL v = w[e * weights.col];
      if (n == top_k && !NAME(is_larger)(v, kept[n - 1])) continue;
      int64_t i = n < top_k ? n++ : n - 1;
      for (; i > 0 && NAME(is_larger)(v, kept[i - 1]); i--) {
        kept[i] = kept[i - 1];
        best[i] = best[i - 1];
      }
      kept[i] = v;
      best[i] = e;
    }
  }
}

static void NAME(order_picks)(int64_t first, int64_t last, int64_t seq, ml_tokens weights, const ml_expert *experts,
                              int64_t top_k, int64_t *chosen, void *factors_) {
  for (int64_t t = first; t < last; t++) {
    const REAL *w = NAME(token)(weights, seq, t);
    int64_t *best = chosen + t * top_k;
    REAL *factors = (REAL *)factors_ + t * top_k;
    for (int64_t j = 1; j < top_k; j++) {
      int64_t e = best[j], i = j;
      for (; i > 0 && best[i - 1] > e; i--) best[i] = best[i - 1];
      best[i] = e;
    }
    for (int64_t i = 0; i < top_k; i++) factors[i] = (REAL)experts[best[i]].scaling * w[best[i] * weights.col];
  }
}

static void NAME(clear)(int64_t first, int64_t last, int64_t seq, int64_t width, ml_tokens to) {
  for (int64_t t = first; t < last; t++) {
    REAL *row = NAME(token)(to, seq, t);
    if (to.col == 1)
      memset(row, 0, (size_t)width * sizeof(REAL));
    else
      for (int64_t j = 0; j < width; j++) row[j * to.col] = 0;
  }
}

static void NAME(put_rows)(int64_t n, int64_t rank, const void *h_, const int64_t *tokens, int64_t seq, ml_tokens to) {
  const REAL *h = h_;
  for (int64_t i = 0; i < n; i++) {
    REAL *row = NAME(token)(to, seq, tokens[i]);
    for (int64_t j = 0; j < rank; j++) row[j * to.col] = h[i * rank + j];
  }
}

static void NAME(take_rows)(int64_t n, int64_t rank, void *h_, const int64_t *tokens, int64_t seq, ml_tokens from) {
  REAL *h = h_;
  for (int64_t i = 0; i < n; i++) {
    const REAL *row = NAME(token)(from, seq, tokens[i]);
    for (int64_t j = 0; j < rank; j++) h[i * rank + j] = row[j * from.col];
  }
}

static void NAME(weigh_rows)(int64_t n, int64_t rank, const void *factors, const int64_t *pair, void *h_) {
  REAL *h = h_;
  for (int64_t i = 0; i < n; i++) {
    REAL f = ((const REAL *)factors)[pair[i]];
    for (int64_t j = 0; j < rank; j++) h[i * rank + j] *= f;
  }
}

static void NAME(pair_grads)(int64_t n, int64_t rank, double scaling, const void *p_, const void *h_,
                             const int64_t *pair, void *grads) {
  const REAL *p = p_, *h = h_;
  for (int64_t i = 0; i < n; i++) {
    REAL sum = 0;
    for (int64_t j = i * rank; j < (i + 1) * rank; j++) sum += p[j] * h[j];
    ((REAL *)grads)[pair[i]] = (REAL)scaling * sum;
  }
}

static void NAME(place)(int64_t first, int64_t last, int64_t seq, int64_t top_k, const int64_t *chosen,
                        const void *grads_, ml_tokens to) {
  const REAL *grads = grads_;
  for (int64_t t = first; t < last; t++) {
    REAL *row = NAME(token)(to, seq, t);
    for (int64_t i = t * top_k; i < (t + 1) * top_k; i++) row[chosen[i] * to.col] += grads[i];
  }
}

static void NAME(sum_weight_grads)(int64_t batch, int64_t seq, int64_t n_experts, const void *grads_, ml_tokens to,
                                   bool add) {
  const REAL *grads = grads_;
  bool sum_batch = to.batch == 0, sum_seq = to.seq == 0;
  /* The axes that stay, then those that are summed; an empty sum is zero. */
  for (int64_t b = 0; b < (sum_batch ? 1 : batch); b++)
    for (int64_t s = 0; s < (sum_seq ? 1 : seq); s++)
      for (int64_t e = 0; e < n_experts; e++) {
        double sum = 0;
        for (int64_t i = b; i < (sum_batch ? batch : b + 1); i++)
          for (int64_t j = s; j < (sum_seq ? seq : s + 1); j++) sum += (double)grads[(i * seq + j) * n_experts + e];
        REAL *out = (REAL *)to.data + b * to.batch + s * to.seq + e * to.col;
        *out = add ? *out + (REAL)sum : (REAL)sum;
      }
}

static void NAME(copy)(int64_t rows, int64_t cols, const void *from_, int64_t from_row, int64_t from_col, void *to_,
                       int64_t to_row, int64_t to_col, bool add) {
  const REAL *from = from_;
  REAL *to = to_;
  /* Writes run along the axis of the smaller stride. */
  if ((to_row < 0 ? -to_row : to_row) < (to_col < 0 ? -to_col : to_col)) {
    NAME(copy)(cols, rows, from, from_col, from_row, to, to_col, to_row, add);
    return;
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < cols; j++) {
      REAL v = from ? from[i * from_row + j * from_col] : 0;
      REAL *o = to + i * to_row + j * to_col;
      *o = add ? *o + v : v;
    }
}
