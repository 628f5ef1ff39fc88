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
