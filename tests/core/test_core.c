/* The core against loops in double that say what it means, in every instruction set this CPU has: CI runs it under ASan
 * and UBSan, and for AArch64 in an emulator.
 *
 * Shapes cross every tile and every block of the kernels. Inputs are allocated to size; gaps between elements and a border
 * around outputs hold NaNs, and nothing but the elements of an output may change. What an output is off is held against the
 * roundings of the terms it sums. Prints what failed; exit status 1 if anything did.
 */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/core/moelora.h"

enum { ROUNDINGS = 8, ROUNDINGS_OF_EQUAL_TERMS = 128, MAX_PRINTED = 20 };

static int failures, checks;
static int roundings = ROUNDINGS;
static bool as_in_models;    /* bfloat16 and layouts as models have them, which has kernels of its own */
static bool rounds_factors;  /* H and Q to bfloat16, before they are multiplied */
static double largest_error; /* of all but those stored as bf16, as a share of what is allowed */
static char about[256];      /* what is being checked */

#define EXPECT(condition, ...)                          \
  do {                                                  \
    checks++;                                           \
    if (!(condition) && ++failures <= MAX_PRINTED) {    \
      printf("%s:%d: %s: ", __FILE__, __LINE__, about); \
      printf(__VA_ARGS__);                              \
      printf("\n");                                     \
    }                                                   \
  } while (0)

/* What is computed in: float for ML_BF16. */
static ml_dtype wide(ml_dtype t) { return t == ML_BF16 ? ML_F32 : t; }
static double epsilon(ml_dtype t) { return wide(t) == ML_F32 ? FLT_EPSILON : DBL_EPSILON; }
static const char *name_of(ml_dtype t) { return t == ML_F32 ? "f32" : t == ML_F64 ? "f64" : "bf16"; }

/* `got` is `exact` up to roundings of a sum whose terms are together as large as `magnitude`, and up to half a unit in the
 * last of the 8 bits of a bf16 that it was stored as. */
static void expect_rounded(ml_dtype t, const char *what, int64_t i, int64_t j, double got, double exact,
                           double magnitude) {
  double error = fabs(got - exact), allowed = roundings * epsilon(t) * magnitude;
  if (t == ML_BF16 && rounds_factors) allowed += magnitude / 256;
  if (t == ML_BF16)
    allowed += (fabs(exact) + allowed) / 256;
  else if (error > largest_error * allowed && error <= allowed)
    largest_error = error / allowed;
  EXPECT(error <= allowed, "%s[%d, %d]: got %.17g, wanted %.17g +- %.2g", what, (int)i, (int)j, got, exact, allowed);
}

/* ---- the same numbers each time ---- */

static uint64_t state = 1;
static uint32_t random_bits(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state >> 32);
}
static double noise(void) { return (int32_t)random_bits() / 2147483648.0; }
static int pick(int n) { return (int)(random_bits() % (uint32_t)n); }

/* Numbers below n in random order, each as often as every other. */
typedef struct {
  int n, left, order[32];
} deck;
static int draw(deck *d) {
  if (d->left == 0)
    for (; d->left < d->n; d->left++) { /* shuffled while it is filled */
      int other = pick(d->left + 1);
      d->order[d->left] = d->order[other];
      d->order[other] = d->left;
    }
  return d->order[--d->left];
}

/* ---- arrays of any dtype with any strides ---- */

static size_t size_of(ml_dtype t) { return t == ML_F32 ? sizeof(float) : t == ML_F64 ? sizeof(double) : 2; }
static char *at(ml_dtype t, void *data, int64_t i) { return (char *)data + i * (int64_t)size_of(t); }
static double get(ml_dtype t, const void *data, int64_t i) {
  if (t == ML_F64) return ((const double *)data)[i];
  if (t == ML_F32) return (double)((const float *)data)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
  float v;
  memcpy(&v, &bits, sizeof v);
  return (double)v;
}
/* Cut off, for bf16: what is read back is what counts. */
static void set(ml_dtype t, void *data, int64_t i, double v) {
  float single = (float)v;
  uint32_t bits;
  memcpy(&bits, &single, sizeof bits);
  if (t == ML_F64)
    ((double *)data)[i] = v;
  else if (t == ML_F32)
    ((float *)data)[i] = single;
  else
    ((uint16_t *)data)[i] = (uint16_t)(bits >> 16);
}
static double stored(ml_dtype t, double v) {
  double memory;
  set(t, &memory, 0, v);
  return get(t, &memory, 0);
}
static double tget(ml_dtype t, ml_tokens v, int64_t b, int64_t s, int64_t j) {
  return get(t, v.data, b * v.batch + s * v.seq + j * v.col);
}
static void tset(ml_dtype t, ml_tokens v, int64_t b, int64_t s, int64_t j, double value) {
  set(t, v.data, b * v.batch + s * v.seq + j * v.col, value);
}
static double mget(ml_dtype t, ml_matrix m, int64_t i, int64_t j) { return get(t, m.data, i * m.row + j * m.col); }

#if defined(__SANITIZE_ADDRESS__)
enum { BORDER = 0 }; /* the sanitizer has its own */
#else
enum { BORDER = 40 }; /* elements: more than any vector */
#endif

enum { MAX_ARRAYS = 96, MAX_EXPERTS = 9 };
typedef struct {
  ml_dtype dtype;
  int64_t n;
  char *data, *before; /* the second: a copy from before the call */
  uint8_t *may_change; /* of each element; NULL: none may, as it is an input */
} array;
static array arrays[MAX_ARRAYS];
static int n_arrays;

/* How many allocations succeed before memory runs out; negative: it does not. Linked with --wrap=malloc. */
static int mallocs_left = -1;
void *__real_malloc(size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_malloc(size_t n) {
  if (mallocs_left == 0) return NULL;
  mallocs_left -= mallocs_left > 0;
  return __real_malloc(n);
}

static void *checked(void *memory) {
  if (!memory) abort();
  return memory;
}
static void *block(ml_dtype t, int64_t n, bool output) {
  if (n_arrays == MAX_ARRAYS) abort();
  int64_t border = output ? BORDER : 0, all = n + 2 * border;
  array *a = &arrays[n_arrays++];
  *a = (array){t, all, checked(malloc((size_t)all * size_of(t) + (all == 0))), NULL, NULL};
  memset(a->data, 0xFF, (size_t)all * size_of(t)); /* NaNs */
  if (output) a->may_change = checked(calloc((size_t)all + 1, 1));
  return at(t, a->data, border);
}
static void free_arrays(int first) {
  while (n_arrays > first) {
    array *a = &arrays[--n_arrays];
    free(a->data), free(a->before), free(a->may_change);
  }
}
/* Just before a call, and just after it. */
static void remember_arrays(void) {
  for (array *a = arrays; a < arrays + n_arrays; a++) {
    if (!a->before) a->before = checked(malloc((size_t)a->n * size_of(a->dtype) + 1));
    memcpy(a->before, a->data, (size_t)a->n * size_of(a->dtype));
  }
}
static void expect_untouched(void) {
  for (array *a = arrays; a < arrays + n_arrays; a++) {
    if (memcmp(a->data, a->before, (size_t)a->n * size_of(a->dtype)) == 0) continue;
    for (int64_t i = 0; i < a->n; i++)
      if (!a->may_change || !a->may_change[i])
        EXPECT(memcmp(at(a->dtype, a->data, i), at(a->dtype, a->before, i), size_of(a->dtype)) == 0,
               "%s: element %d of %d was overwritten", a->may_change ? "an output's border" : "an input", (int)i,
               (int)a->n);
  }
}

/* REPEATED, the same row for all tokens, is for inputs alone. */
typedef enum {
  DENSE,
  TRANSPOSED,
  REVERSED,
  PADDED,
  SPACED,
  SWAPPED,
  OUT_LAYOUTS,
  REPEATED = OUT_LAYOUTS,
  LAYOUTS
} layout;
static deck in_layouts = {.n = LAYOUTS}, out_layouts = {.n = OUT_LAYOUTS};

/* What an output that is added to holds before. */
static double start(int64_t i, int64_t j) { return (double)((i * 5 + j * 3) % 17 - 8) / 8; }

typedef enum { INPUT, OUTPUT, OUTPUT_ADDED_TO } role;

/* [B, S, d]: noise, NaNs or starting values. */
static ml_tokens tokens(ml_dtype t, int64_t B, int64_t S, int64_t d, layout l, role r) {
  int64_t n = B * S * d, first = 0;
  ml_tokens v = {NULL, S * d, d, 1};
  switch (l) {
    case DENSE: break;
    case TRANSPOSED: v = (ml_tokens){NULL, 1, B, B * S}; break;
    case REVERSED: v = (ml_tokens){NULL, -S * d, -d, -1}, first = n - 1; break;
    case PADDED: v = (ml_tokens){NULL, S * (d + 3), d + 3, 1}, n = B * S * (d + 3) - 3; break;
    case SPACED: v = (ml_tokens){NULL, 2 * S * d, 2 * d, 2}, n = 2 * n - 1; break;
    case SWAPPED: v = (ml_tokens){NULL, d, B * d, 1}; break;
    case REPEATED: v = (ml_tokens){NULL, 0, 0, 1}, n = d; break;
    default: abort();
  }
  if (B * S == 0) n = first = 0;
  v.data = at(t, block(t, n, r != INPUT), first);
  const array *a = &arrays[n_arrays - 1];
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < S; s++)
      for (int64_t j = 0; j < d; j++) {
        if (r != OUTPUT) tset(t, v, b, s, j, r == INPUT ? noise() : start(b * S + s, j));
        if (r != INPUT) a->may_change[BORDER + first + b * v.batch + s * v.seq + j * v.col] = 1;
      }
  return v;
}
static ml_matrix matrix(ml_dtype t, int64_t rows, int64_t cols, layout l, role r) {
  ml_tokens v = tokens(t, 1, rows, cols, l, r);
  return (ml_matrix){v.data, v.seq, v.col};
}
static layout some_layout(role r) {
  return as_in_models ? (pick(2) ? DENSE : PADDED) : (layout)draw(r == INPUT ? &in_layouts : &out_layouts);
}
static ml_tokens some_tokens(ml_dtype t, int64_t B, int64_t S, int64_t d, role r) {
  return tokens(t, B, S, d, some_layout(r), r);
}
static ml_matrix some_matrix(ml_dtype t, int64_t rows, int64_t cols, role r) {
  return matrix(t, rows, cols, some_layout(r), r);
}

/* ---- the twin: everything dense and in double ---- */

static double *reals[64];
static int n_reals;
static double *zeros(int64_t n) {
  if (n_reals == 64) abort();
  return reals[n_reals++] = checked(calloc((size_t)n + 1, sizeof(double)));
}
static void free_reals(void) {
  while (n_reals) free(reals[--n_reals]);
}
static double *dense(ml_dtype t, ml_tokens v, int64_t B, int64_t S, int64_t d) {
  double *out = zeros(B * S * d), *next = out;
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < S; s++)
      for (int64_t j = 0; j < d; j++) *next++ = tget(t, v, b, s, j);
  return out;
}
static double *dense_rows(ml_dtype t, ml_matrix m, int64_t rows, int64_t cols) {
  return dense(t, (ml_tokens){m.data, 0, m.row, m.col}, 1, rows, cols);
}
static double *absolute(const double *v, int64_t n) {
  double *out = v ? zeros(n) : NULL;
  for (int64_t i = 0; i < n && v; i++) out[i] = fabs(v[i]);
  return out;
}

/* Names as in moelora.h; B is transposed. */
typedef struct {
  int64_t T, d_in, d_out, N, R;
  int64_t offsets[MAX_EXPERTS + 1];
  double scaling[MAX_EXPERTS];
  double *x, *g, *w, *a, *b; /* [T, d_in], [T, d_out], [T, N], [R, d_in], [R, d_out] */
  double *kept;              /* [T, N]: 1, or 0 where top_k drops the expert */
  double *drop;              /* [N, T, d_in]: what dropout multiplies x by; NULL: none */
  double *weight, *init;     /* [d_out, d_in], [T, d_out]: W, and bias or base; NULL: none */
  double *h;                 /* [T, R]: the hidden that the backward is given */

  double *hidden, *y;                        /* [T, R], [T, d_out] */
  double *grad_x, *grad_a, *grad_b, *grad_w; /* [T, d_in], [R, d_in], [R, d_out], [T, N] */
} twin;

static double sum_of_products(int64_t n, const double *a, const double *b) {
  double total = 0;
  for (int64_t i = 0; i < n; i++) total += a[i] * b[i];
  return total;
}
static void add_multiple(int64_t n, double *to, double factor, const double *v) {
  for (int64_t i = 0; i < n; i++) to[i] += factor * v[i];
}
/* to = D_e v */
static void drop_some(const twin *q, int64_t t, int64_t e, const double *v, double *to) {
  for (int64_t k = 0; k < q->d_in; k++) to[k] = q->drop ? q->drop[(e * q->T + t) * q->d_in + k] * v[k] : v[k];
}

static void twin_forward(twin *q) {
  q->hidden = zeros(q->T * q->R);
  q->y = zeros(q->T * q->d_out);
  double *seen = zeros(q->d_in);
  for (int64_t t = 0; t < q->T; t++) {
    const double *x = q->x + t * q->d_in;
    double *y = q->y + t * q->d_out;
    if (q->init) memcpy(y, q->init + t * q->d_out, (size_t)q->d_out * sizeof *y);
    for (int64_t o = 0; o < q->d_out && q->weight; o++) y[o] += sum_of_products(q->d_in, x, q->weight + o * q->d_in);
    for (int64_t e = 0; e < q->N; e++) {
      drop_some(q, t, e, x, seen);
      for (int64_t r = q->offsets[e]; r < q->offsets[e + 1] && q->kept[t * q->N + e] != 0; r++) {
        double h = q->hidden[t * q->R + r] = sum_of_products(q->d_in, seen, q->a + r * q->d_in);
        add_multiple(q->d_out, y, q->scaling[e] * q->w[t * q->N + e] * h, q->b + r * q->d_out);
      }
    }
  }
}

static void twin_backward(twin *q) {
  q->grad_x = zeros(q->T * q->d_in);
  q->grad_a = zeros(q->R * q->d_in);
  q->grad_b = zeros(q->R * q->d_out);
  q->grad_w = zeros(q->T * q->N);
  double *seen = zeros(q->d_in), *grad_seen = zeros(q->d_in);
  for (int64_t t = 0; t < q->T; t++) {
    const double *g = q->g + t * q->d_out;
    double *grad_x = q->grad_x + t * q->d_in;
    for (int64_t o = 0; o < q->d_out && q->weight; o++) add_multiple(q->d_in, grad_x, g[o], q->weight + o * q->d_in);
    for (int64_t e = 0; e < q->N; e++) {
      double factor = q->scaling[e] * q->w[t * q->N + e];
      drop_some(q, t, e, q->x + t * q->d_in, seen);
      memset(grad_seen, 0, (size_t)q->d_in * sizeof *grad_seen);
      for (int64_t r = q->offsets[e]; r < q->offsets[e + 1] && q->kept[t * q->N + e] != 0; r++) {
        double p = sum_of_products(q->d_out, g, q->b + r * q->d_out), h = q->h[t * q->R + r];
        q->grad_w[t * q->N + e] += q->scaling[e] * p * h;
        add_multiple(q->d_in, q->grad_a + r * q->d_in, factor * p, seen);
        add_multiple(q->d_out, q->grad_b + r * q->d_out, factor * h, g);
        add_multiple(q->d_in, grad_seen, factor * p, q->a + r * q->d_in);
      }
      drop_some(q, t, e, grad_seen, grad_seen);
      add_multiple(q->d_in, grad_x, 1, grad_seen);
    }
  }
}

/* Everything positive: what it computes bounds the terms that are summed in q. */
static twin magnitude_of(const twin *q) {
  twin m = *q;
  m.x = absolute(q->x, q->T * q->d_in);
  m.g = absolute(q->g, q->T * q->d_out);
  m.w = absolute(q->w, q->T * q->N);
  m.a = absolute(q->a, q->R * q->d_in);
  m.b = absolute(q->b, q->R * q->d_out);
  m.weight = absolute(q->weight, q->d_out * q->d_in);
  m.init = absolute(q->init, q->T * q->d_out);
  m.h = absolute(q->h, q->T * q->R);
  for (int64_t e = 0; e < q->N; e++) m.scaling[e] = fabs(q->scaling[e]);
  return m;
}

/* Philox4x32 with 7 rounds, as its authors write it. */
static void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    uint64_t p0 = (uint64_t)0xD2511F53 * c[0], p1 = (uint64_t)0xCD9E8D57 * c[2];
    uint32_t next[4] = {(uint32_t)(p1 >> 32) ^ c[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c[3] ^ k1, (uint32_t)p0};
    memcpy(c, next, sizeof next);
  }
}
static double *drop_factors(const ml_routed_lora *p, int64_t T) {
  double *out = zeros(p->n_experts * T * p->d_in), *next = out;
  for (int64_t e = 0; e < p->n_experts; e++)
    for (int64_t t = 0; t < T; t++) {
      double drops = round(p->experts[e].dropout * 65536);
      for (int64_t k = 0; k < p->d_in; k++, next++) {
        uint32_t c[4] = {(uint32_t)(k / 128 * 16 + k % 16), (uint32_t)t, (uint32_t)(t >> 32), (uint32_t)e};
        philox(c, (uint32_t)p->dropout_seed, (uint32_t)(p->dropout_seed >> 32));
        uint32_t drawn = c[k % 128 / 32] >> (k % 32 < 16 ? 0 : 16) & 0xffff;
        *next = drawn >= drops ? 65536 / (65536 - drops) : 0;
      }
    }
  return out;
}

static double *kept_experts(const twin *q, int64_t top_k) {
  double *out = zeros(q->T * q->N);
  for (int64_t t = 0; t < q->T; t++)
    for (int64_t e = 0; e < q->N; e++) {
      const double *w = q->w + t * q->N;
      int64_t before = 0;
      for (int64_t i = 0; i < q->N; i++) before += w[i] > w[e] || (w[i] == w[e] && i < e);
      out[t * q->N + e] = top_k == 0 || before < top_k;
    }
  return out;
}

/* ---- one mixture, in every instruction set ---- */

typedef struct {
  int64_t batch, seq, d_in, d_out, n_experts, ranks[MAX_EXPERTS];
} shape;

typedef enum { MIXTURE_ALONE, BASE, BASE_IN_PLACE, WEIGHT, WEIGHT_AND_BIAS, BASES } base_kind;
typedef enum { PER_CALL, PER_SEQUENCE, PER_TOKEN, PERS } per_kind;
typedef enum { ANY_WEIGHTS, TIED_WEIGHTS, AN_UNUSED_EXPERT, WEIGHT_KINDS } weight_kind;

typedef struct {
  ml_routed_lora p;
  ml_expert experts[MAX_EXPERTS];
  ml_tokens grad_y, base;
  base_kind base_kind;
  per_kind per;
  void *bias;
  int64_t bias_stride;
  twin exact, magnitude;
} problem;

/* [B, S, N], [B, N] or [N], with zero strides for what is left out. */
static ml_tokens per_row(const problem *q, ml_tokens v) {
  if (q->per != PER_TOKEN) v.seq = 0;
  if (q->per == PER_CALL) v.batch = 0;
  return v;
}
/* The dtypes of what is not tokens. */
static ml_dtype of_adapters(const ml_routed_lora *p) { return p->bf16_adapters ? p->dtype : wide(p->dtype); }
static ml_dtype of_weights(const ml_routed_lora *p) { return p->bf16_weights ? p->dtype : wide(p->dtype); }

static ml_tokens some_hidden(const ml_routed_lora *p, int64_t R, role r) {
  layout l = p->dtype == ML_BF16 ? DENSE : (layout)draw(&out_layouts);
  return tokens(wide(p->dtype), p->batch, p->seq, R, l, r);
}
static int64_t weight_batches(const problem *q) { return q->per == PER_CALL ? 1 : q->p.batch; }
static int64_t weight_seqs(const problem *q) { return q->per == PER_TOKEN ? q->p.seq : 1; }

static void expect_all(ml_dtype t, const char *what, ml_tokens got, int64_t B, int64_t S, int64_t d,
                       const double *exact, const double *magnitude, bool added) {
  for (int64_t i = 0; i < B * S; i++)
    for (int64_t j = 0; j < d; j++) {
      double before = added ? start(i, j) : 0;
      expect_rounded(t, what, i, j, tget(t, got, i / S, i % S, j), exact[i * d + j] + before,
                     magnitude[i * d + j] + fabs(before));
    }
}

static void check_forward(const problem *q) {
  const ml_routed_lora *p = &q->p;
  const ml_tokens none = {NULL, 0, 0, 0};
  int first = n_arrays;
  ml_tokens y[2], hidden = some_hidden(p, q->exact.R, OUTPUT);
  for (int wants_hidden = 0; wants_hidden <= 1; wants_hidden++) {
    ml_tokens base = q->base, out = some_tokens(p->dtype, p->batch, p->seq, p->d_out, OUTPUT);
    if (q->base_kind == BASE_IN_PLACE) {
      base = out;
      for (int64_t i = 0; i < q->exact.T; i++)
        for (int64_t j = 0; j < p->d_out; j++)
          tset(p->dtype, out, i / p->seq, i % p->seq, j, q->exact.init[i * p->d_out + j]);
    }
    remember_arrays();
    ml_status status = ml_routed_lora_forward(p, out, wants_hidden ? hidden : none, base, q->bias, q->bias_stride);
    EXPECT(status == ML_OK, "forward: %s", ml_status_message(status));
    expect_untouched();
    expect_all(p->dtype, "y", out, p->batch, p->seq, p->d_out, q->exact.y, q->magnitude.y, false);
    y[wants_hidden] = out;
  }
  expect_all(wide(p->dtype), "hidden", hidden, p->batch, p->seq, q->exact.R, q->exact.hidden, q->magnitude.hidden,
             false);
  for (int64_t i = 0; i < q->exact.T; i++)
    for (int64_t j = 0; j < p->d_out; j++)
      EXPECT(tget(p->dtype, y[0], i / p->seq, i % p->seq, j) == tget(p->dtype, y[1], i / p->seq, i % p->seq, j),
             "y[%d, %d] depends on whether hidden is wanted", (int)i, (int)j);
  free_arrays(first);
}

/* Gradients of what has its bit in `wanted`: x 1, A 2, B 4, w 8; with 16 every other expert's A and B alone. */
static void check_backward(problem *q, unsigned wanted, unsigned accumulate) {
  ml_routed_lora p = q->p;
  ml_expert experts[MAX_EXPERTS];
  ml_dtype t = p.dtype, of_a = of_adapters(&p), of_w = of_weights(&p);
  const twin *exact = &q->exact, *magnitude = &q->magnitude;
  const ml_tokens none = {NULL, 0, 0, 0};
  ml_tokens hidden = none, grad_x = none, grad_w = none;
  int first = n_arrays;
  bool adds_x = accumulate & ML_ACCUMULATE_X, adds_a = accumulate & ML_ACCUMULATE_A;
  bool adds_b = accumulate & ML_ACCUMULATE_B, adds_w = accumulate & ML_ACCUMULATE_W;
  if (wanted & (4 | 8)) { /* what nothing needs may be missing */
    hidden = some_hidden(&p, exact->R, OUTPUT);
    for (int64_t i = 0; i < exact->T; i++)
      for (int64_t r = 0; r < exact->R; r++) tset(wide(t), hidden, i / p.seq, i % p.seq, r, exact->h[i * exact->R + r]);
    memset(arrays[n_arrays - 1].may_change, 0, (size_t)arrays[n_arrays - 1].n); /* an input after all */
  }
  if (!(wanted & 2)) p.x = none;
  if (wanted & 1) grad_x = some_tokens(t, p.batch, p.seq, p.d_in, adds_x ? OUTPUT_ADDED_TO : OUTPUT);
  if (wanted & 8)
    grad_w = some_tokens(of_w, weight_batches(q), weight_seqs(q), p.n_experts, adds_w ? OUTPUT_ADDED_TO : OUTPUT);
  bool dense_grads = pick(2) == 0; /* all of them, as adapters have them */
  for (int64_t e = 0; e < p.n_experts; e++) {
    ml_expert *x = &experts[e];
    bool skip = (wanted & 16) && e % 2 == 0;
    layout a = dense_grads ? DENSE : some_layout(OUTPUT), b = dense_grads ? DENSE : some_layout(OUTPUT);
    *x = p.experts[e];
    if ((wanted & 2) && !skip) x->grad_a = matrix(of_a, x->rank, p.d_in, a, adds_a ? OUTPUT_ADDED_TO : OUTPUT);
    if ((wanted & 4) && !skip) x->grad_b = matrix(of_a, p.d_out, x->rank, b, adds_b ? OUTPUT_ADDED_TO : OUTPUT);
  }
  p.experts = experts;
  remember_arrays();
  ml_status status =
      ml_routed_lora_backward(&p, q->grad_y, hidden, grad_x, wanted & 8 ? per_row(q, grad_w) : none, accumulate);
  EXPECT(status == ML_OK, "backward: %s", ml_status_message(status));
  expect_untouched();

  if (wanted & 1) expect_all(t, "grad_x", grad_x, p.batch, p.seq, p.d_in, exact->grad_x, magnitude->grad_x, adds_x);
  for (int64_t e = 0; e < p.n_experts; e++) {
    int64_t r0 = exact->offsets[e];
    ml_matrix a = experts[e].grad_a, b = experts[e].grad_b;
    for (int64_t r = 0; r < experts[e].rank && a.data; r++)
      for (int64_t k = 0; k < p.d_in; k++) {
        int64_t i = (r0 + r) * p.d_in + k;
        double before = adds_a ? start(r, k) : 0;
        expect_rounded(of_a, "grad_a", r, k, mget(of_a, a, r, k), exact->grad_a[i] + before,
                       magnitude->grad_a[i] + fabs(before));
      }
    for (int64_t r = 0; r < experts[e].rank && b.data; r++)
      for (int64_t o = 0; o < p.d_out; o++) {
        int64_t i = (r0 + r) * p.d_out + o;
        double before = adds_b ? start(o, r) : 0;
        expect_rounded(of_a, "grad_b", o, r, mget(of_a, b, o, r), exact->grad_b[i] + before,
                       magnitude->grad_b[i] + fabs(before));
      }
  }
  if (wanted & 8) {
    int64_t B = weight_batches(q), S = weight_seqs(q), N = p.n_experts;
    double *sums = zeros(B * S * N), *sizes = zeros(B * S * N);
    for (int64_t i = 0; i < exact->T; i++)
      for (int64_t e = 0; e < N; e++) {
        int64_t row = i / p.seq % B * S + i % p.seq % S;
        sums[row * N + e] += exact->grad_w[i * N + e];
        sizes[row * N + e] += magnitude->grad_w[i * N + e];
      }
    expect_all(of_w, "grad_w", grad_w, B, S, N, sums, sizes, adds_w);
    free(reals[--n_reals]), free(reals[--n_reals]);
  }
  free_arrays(first);
}

/* What a shape leaves open comes from decks, so that every choice meets many shapes. */
static void check_shape(const shape *s, ml_dtype t) {
  static deck bases = {.n = BASES}, bf16_bases = {.n = WEIGHT}, pers = {.n = PERS}, weight_kinds = {.n = WEIGHT_KINDS},
              dropouts = {.n = 3};
  static deck probabilities = {.n = 4}, wanted = {.n = 31}, accumulated = {.n = 16}, top_ks[MAX_EXPERTS + 1];
  problem q = {.p = {.dtype = t, .batch = s->batch, .seq = s->seq, .d_in = s->d_in, .d_out = s->d_out}};
  ml_routed_lora *p = &q.p;
  p->bf16_adapters = t == ML_BF16 && (as_in_models || pick(2) == 0);
  p->bf16_weights = t == ML_BF16 && pick(2) == 0;
  ml_dtype of_a = of_adapters(p), of_w = of_weights(p);
  twin *v = &q.exact;
  int64_t T = s->batch * s->seq, N = s->n_experts;
  bool drops = !as_in_models && draw(&dropouts) == 0,
       dense_factors = as_in_models || pick(2) == 0; /* as adapters have them: read in place */
  p->n_experts = N;
  top_ks[N].n = (int)N + 1;
  p->top_k = draw(&top_ks[N]);
  p->experts = q.experts;
  p->n_threads = 1 + pick(3);
  p->dropout_seed = (uint64_t)random_bits() << 32 | random_bits();
  q.per = (per_kind)draw(&pers);
  q.base_kind = (base_kind)draw(t == ML_BF16 ? &bf16_bases : &bases);
  *v = (twin){.T = T, .d_in = s->d_in, .d_out = s->d_out, .N = N};
  for (int64_t e = 0; e < N; e++) {
    static const double choices[] = {0, 0.1, 0.5, 1};
    layout a = dense_factors ? DENSE : some_layout(INPUT), b = dense_factors ? DENSE : some_layout(INPUT);
    q.experts[e] = (ml_expert){.a = matrix(of_a, s->ranks[e], s->d_in, a, INPUT),
                               .b = matrix(of_a, s->d_out, s->ranks[e], b, INPUT),
                               .rank = s->ranks[e],
                               .scaling = v->scaling[e] = 2 * noise(),
                               .dropout = drops ? choices[draw(&probabilities)] : 0};
    v->offsets[e + 1] = v->R += s->ranks[e];
  }
  layout of_x = some_layout(INPUT), of_grad_y = some_layout(INPUT);
  p->x = tokens(t, s->batch, s->seq, s->d_in, of_x, INPUT);
  q.grad_y = tokens(t, s->batch, s->seq, s->d_out, of_grad_y, INPUT);
  /* A chain of up to 256 sums of the same term rounds to the same side, so that nothing cancels. */
  roundings = of_x == REPEATED && of_grad_y == REPEATED ? ROUNDINGS_OF_EQUAL_TERMS : ROUNDINGS;
  ml_tokens w = some_tokens(of_w, weight_batches(&q), weight_seqs(&q), N, INPUT);
  weight_kind weights = (weight_kind)draw(&weight_kinds);
  int64_t unused = pick((int)N);
  for (int64_t i = 0; i < weight_batches(&q) * weight_seqs(&q); i++)
    for (int64_t e = 0; e < N; e++) {
      int64_t b = i / weight_seqs(&q), seq = i % weight_seqs(&q);
      if (weights == TIED_WEIGHTS) tset(of_w, w, b, seq, e, round(2 * tget(of_w, w, b, seq, e)) / 2);
      if (weights == AN_UNUSED_EXPERT && e == unused) tset(of_w, w, b, seq, e, 0);
    }
  p->routing_weights = per_row(&q, w);
  if (q.base_kind == BASE) q.base = some_tokens(t, s->batch, s->seq, s->d_out, INPUT);
  if (q.base_kind >= WEIGHT) p->weight = some_matrix(t, s->d_out, s->d_in, INPUT);
  if (q.base_kind == WEIGHT_AND_BIAS) {
    ml_matrix bias = some_matrix(t, 1, s->d_out, INPUT);
    q.bias = bias.data;
    q.bias_stride = bias.col;
  }

  v->x = dense(t, p->x, s->batch, s->seq, s->d_in);
  v->g = dense(t, q.grad_y, s->batch, s->seq, s->d_out);
  v->w = dense(of_w, p->routing_weights, s->batch, s->seq, N);
  v->a = zeros(v->R * s->d_in);
  v->b = zeros(v->R * s->d_out);
  for (int64_t e = 0; e < N; e++)
    for (int64_t r = 0; r < s->ranks[e]; r++) {
      int64_t i = v->offsets[e] + r;
      for (int64_t k = 0; k < s->d_in; k++) v->a[i * s->d_in + k] = mget(of_a, q.experts[e].a, r, k);
      for (int64_t o = 0; o < s->d_out; o++) v->b[i * s->d_out + o] = mget(of_a, q.experts[e].b, o, r);
    }
  v->kept = kept_experts(v, p->top_k);
  if (drops) v->drop = drop_factors(p, T);
  if (p->weight.data) v->weight = dense_rows(t, p->weight, s->d_out, s->d_in);
  if (q.base_kind == BASE)
    v->init = dense(t, q.base, s->batch, s->seq, s->d_out);
  else if (q.bias)
    v->init = dense(t, (ml_tokens){q.bias, 0, 0, q.bias_stride}, s->batch, s->seq, s->d_out);
  else if (q.base_kind == BASE_IN_PLACE) {
    v->init = zeros(T * s->d_out);
    for (int64_t i = 0; i < T * s->d_out; i++) v->init[i] = stored(wide(t) == t ? ML_F32 : t, noise());
  }
  twin_forward(v);
  v->h = zeros(T * v->R);
  for (int64_t i = 0; i < T * v->R; i++) v->h[i] = stored(wide(t), v->hidden[i]);
  q.magnitude = magnitude_of(v);
  twin_forward(&q.magnitude);
  twin_backward(v);
  twin_backward(&q.magnitude);

  unsigned some = 1 + (unsigned)draw(&wanted), flags = (unsigned)draw(&accumulated);
  for (const char *const *isa = ml_isa_available(); *isa; isa++) {
    EXPECT(ml_set_isa(*isa) == ML_OK && strcmp(ml_get_isa(), *isa) == 0, "%s can't be chosen", *isa);
    snprintf(about, sizeof about,
             "%s %s (adapters %s, weights %s), T=%dx%d d=%d,%d R=%d N=%d top_k=%d base=%d weights=%d per=%d drops=%d",
             *isa, name_of(t), name_of(of_a), name_of(of_w), (int)s->batch, (int)s->seq, (int)s->d_in, (int)s->d_out,
             (int)v->R, (int)N, (int)p->top_k, (int)q.base_kind, (int)weights, (int)q.per, drops);
    rounds_factors = strcmp(*isa, "avx512bf16") == 0 && p->bf16_adapters;
    check_forward(&q);
    check_backward(&q, 1 | 2 | 4 | 8, flags);
    if (some != 16) check_backward(&q, some, flags ^ 15u);
  }
  roundings = ROUNDINGS;
  rounds_factors = false;
  free_reals();
  free_arrays(0);
}

/* Every number of tokens with every width of x; the other dimensions from decks. */
static void check_grid(void) {
  static const int64_t Ts[] = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 33, 47, 48, 49, 63, 64, 65, 130};
  static const int64_t widths[] = {1, 3, 7, 16, 33, 64, 65, 100, 257}, ranks[] = {1, 2, 4, 7, 8, 12, 16, 20};
  deck d_outs = {.n = sizeof widths / sizeof *widths}, some_ranks = {.n = sizeof ranks / sizeof *ranks};
  deck counts = {.n = MAX_EXPERTS};
  for (size_t i = 0; i < sizeof Ts / sizeof *Ts; i++)
    for (size_t j = 0; j < sizeof widths / sizeof *widths; j++)
      for (int t = ML_F32; t <= ML_BF16; t++) {
        shape s = {1, Ts[i], widths[j], widths[draw(&d_outs)], 1 + draw(&counts), {0}};
        for (int64_t e = 0; e < s.n_experts; e++) s.ranks[e] = ranks[draw(&some_ranks)];
        int64_t batch = 1 + pick((int)s.seq);
        if (s.seq % batch == 0) s.batch = batch, s.seq /= batch;
        check_shape(&s, (ml_dtype)t);
      }
}

/* Few tokens and the ranks that adapters have: kernels of their own. */
static void check_equal_ranks(void) {
  static const int64_t Ts[] = {1, 2, 3, 4, 6, 8, 12, 17, 40, 90}, widths[] = {5, 32, 63, 64, 71, 130},
                       ranks[] = {4, 8, 16, 32};
  deck d_ins = {.n = sizeof widths / sizeof *widths}, d_outs = d_ins, counts = {.n = MAX_EXPERTS};
  for (size_t i = 0; i < sizeof Ts / sizeof *Ts; i++)
    for (size_t j = 0; j < sizeof ranks / sizeof *ranks; j++)
      for (int t = ML_F32; t <= ML_BF16; t++)
        for (int again = 0; again < 2; again++) {
          shape s = {1, Ts[i], widths[draw(&d_ins)], widths[draw(&d_outs)], 1 + draw(&counts), {0}};
          for (int64_t e = 0; e < s.n_experts; e++) s.ranks[e] = ranks[j];
          check_shape(&s, (ml_dtype)t);
        }
}

/* No tokens, and what crosses the blocks of columns, depths, tokens and ranks that tasks and workspaces are cut into. */
static void check_large_blocks(void) {
  static const shape shapes[] = {
      {3, 0, 8, 8, 2, {2, 2}},       {0, 4, 8, 8, 2, {2, 2}},
      {2, 50, 270, 21, 2, {9, 30}},  {1, 520, 9, 67, 2, {3, 17}},
      {2, 260, 67, 9, 3, {8, 2, 5}}, {1, 2, 130, 520, 1, {260}},
      {5, 10, 140, 33, 2, {261, 1}}, {1, 12, 2100, 1100, 2, {4, 1}},
      {1, 70, 600, 2070, 1, {7}},    {1, 2070, 20, 300, 6, {3, 2, 1, 3, 2, 2}},
  };
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int t = ML_F32; t <= ML_BF16; t++)
      for (int again = 0; again < 3; again++) check_shape(&shapes[i], (ml_dtype)t);
}

/* What multiplies pairs of bfloat16: even ranks and widths, rows of unit column stride. */
static void check_pairs(void) {
  static const int64_t Ts[] = {1, 2, 3, 5, 6, 17, 47, 48, 50, 97, 130, 257, 530}, ranks[] = {2, 4, 6, 8, 16, 20};
  static const int64_t widths[] = {2, 6, 16, 30, 64, 66, 130, 516, 1030};
  deck d_ins = {.n = sizeof widths / sizeof *widths}, d_outs = d_ins, some_ranks = {.n = sizeof ranks / sizeof *ranks};
  deck counts = {.n = MAX_EXPERTS};
  as_in_models = true;
  for (size_t i = 0; i < sizeof Ts / sizeof *Ts; i++)
    for (int again = 0; again < 8; again++) {
      shape s = {1, Ts[i], widths[draw(&d_ins)], widths[draw(&d_outs)], 1 + draw(&counts), {0}};
      for (int64_t e = 0; e < s.n_experts; e++) s.ranks[e] = ranks[draw(&some_ranks)];
      if (again % 2 && s.seq % 2 == 0) s.batch = 2, s.seq /= 2;
      check_shape(&s, ML_BF16);
    }
  as_in_models = false;
}

/* ---- bits and statuses ---- */

static void make_problem(problem *q, ml_dtype t, int64_t T, int64_t d, per_kind per, bool dropout) {
  *q = (problem){.p = {.dtype = t, .batch = 1, .seq = T, .d_in = d, .d_out = d + 10, .n_experts = 3}, .per = per};
  q->p.bf16_adapters = q->p.bf16_weights = t == ML_BF16;
  for (int e = 0; e < 3; e++) {
    ml_matrix a = matrix(t, 12, d, DENSE, INPUT), b = matrix(t, d + 10, 12, DENSE, INPUT);
    q->experts[e] = (ml_expert){.a = a, .b = b, .rank = 12, .scaling = 2, .dropout = dropout && e > 0 ? 0.5 : 0};
  }
  q->p.experts = q->experts;
  q->p.x = tokens(t, 1, T, d, DENSE, INPUT);
  q->grad_y = tokens(t, 1, T, d + 10, DENSE, INPUT);
  q->p.routing_weights = per_row(q, tokens(t, 1, weight_seqs(q), 3, DENSE, INPUT));
  if (t != ML_BF16) q->p.weight = matrix(t, d + 10, d, DENSE, INPUT);
}

/* Everything that forward and backward write. */
typedef struct {
  ml_tokens y, hidden, grad_x, grad_w;
} outputs;

static outputs make_outputs(problem *q) {
  const ml_routed_lora *p = &q->p;
  ml_dtype t = p->dtype;
  outputs o = {.y = tokens(t, 1, p->seq, p->d_out, DENSE, OUTPUT),
               .hidden = tokens(wide(t), 1, p->seq, 3 * 12, DENSE, OUTPUT),
               .grad_x = tokens(t, 1, p->seq, p->d_in, DENSE, OUTPUT),
               .grad_w = per_row(q, tokens(t, 1, weight_seqs(q), 3, DENSE, OUTPUT))};
  for (int e = 0; e < 3; e++) {
    q->experts[e].grad_a = matrix(t, 12, p->d_in, DENSE, OUTPUT);
    q->experts[e].grad_b = matrix(t, p->d_out, 12, DENSE, OUTPUT);
  }
  return o;
}

static ml_status run(const problem *q, const outputs *o, bool forward) {
  const ml_tokens none = {NULL, 0, 0, 0};
  return forward ? ml_routed_lora_forward(&q->p, o->y, o->hidden, none, NULL, 0)
                 : ml_routed_lora_backward(&q->p, q->grad_y, o->hidden, o->grad_x, o->grad_w, 0);
}

/* All of it, one after the other. */
static void *all_results(problem *q, int n_threads, size_t *bytes) {
  int first = n_arrays;
  outputs o = make_outputs(q);
  q->p.n_threads = n_threads;
  EXPECT(run(q, &o, true) == ML_OK, "forward on %d threads", n_threads);
  EXPECT(run(q, &o, false) == ML_OK, "backward on %d threads", n_threads);
  *bytes = 0;
  for (const array *a = arrays + first; a < arrays + n_arrays; a++) *bytes += (size_t)a->n * size_of(a->dtype);
  char *all = checked(malloc(*bytes)), *next = all;
  for (const array *a = arrays + first; a < arrays + n_arrays; a++) {
    memcpy(next, a->data, (size_t)a->n * size_of(a->dtype));
    next += (size_t)a->n * size_of(a->dtype);
  }
  free_arrays(first);
  return all;
}

static void check_threads_leave_the_bits_alone(ml_dtype t, int64_t T, int64_t d, per_kind per, bool dropout) {
  problem q;
  make_problem(&q, t, T, d, per, dropout);
  snprintf(about, sizeof about, "%s %s, bits on several threads", ml_get_isa(), name_of(t));
  size_t bytes;
  void *on_one = all_results(&q, 1, &bytes);
  for (int n = 2; n <= 5; n++) {
    void *on_several = all_results(&q, n, &bytes);
    EXPECT(memcmp(on_one, on_several, bytes) == 0, "results differ on %d threads", n);
    free(on_several);
  }
  free(on_one);
  free_arrays(0);
}

static void check_memory_that_runs_out(ml_dtype t, int64_t T) {
  problem q;
  make_problem(&q, t, T, 200, PER_TOKEN, false);
  outputs o = make_outputs(&q);
  for (int forward = 1; forward >= 0; forward--) {
    ml_status status = ML_ERR_NO_MEMORY;
    for (int n = 0; status == ML_ERR_NO_MEMORY; n++) {
      snprintf(about, sizeof about, "%s, %s, %d allocations", name_of(t), forward ? "forward" : "backward", n);
      remember_arrays();
      mallocs_left = n;
      status = run(&q, &o, forward);
      mallocs_left = -1;
      EXPECT(n > 0 || status == ML_ERR_NO_MEMORY, "%s", ml_status_message(status));
      for (const array *a = arrays; a < arrays + n_arrays && status != ML_OK; a++)
        EXPECT(memcmp(a->data, a->before, (size_t)a->n * size_of(a->dtype)) == 0, "array %d was written",
               (int)(a - arrays));
    }
    EXPECT(status == ML_OK, "%s", ml_status_message(status));
  }
  free_arrays(0);
}

static void check_statuses_leave_outputs_untouched(void) {
  snprintf(about, sizeof about, "statuses");
  problem q = {.p = {.dtype = ML_F32, .batch = 1, .seq = 1, .d_in = 2, .d_out = 2, .n_experts = 1}};
  ml_matrix a = matrix(ML_F32, 1, 2, DENSE, INPUT), b = matrix(ML_F32, 2, 1, DENSE, INPUT);
  q.experts[0] = (ml_expert){.a = a, .b = b, .rank = 1, .scaling = 1};
  q.p.experts = q.experts;
  q.p.x = tokens(ML_F32, 1, 1, 2, DENSE, INPUT);
  q.p.routing_weights = tokens(ML_F32, 1, 1, 1, DENSE, INPUT);
  float out[2] = {7, 7};
  ml_tokens y = {out, 2, 2, 1}, none = {NULL, 0, 0, 0};
#define STATUS(wanted, change)                                                    \
  do {                                                                            \
    problem z = q;                                                                \
    z.p.experts = z.experts;                                                      \
    change;                                                                       \
    ml_status got = ml_routed_lora_forward(&z.p, y, none, none, NULL, 0);         \
    EXPECT(got == (wanted), "%s: %s", #change, ml_status_message(got));           \
    got = ml_routed_lora_backward(&z.p, y, none, none, none, 0);                  \
    EXPECT(got == (wanted), "backward, %s: %s", #change, ml_status_message(got)); \
    EXPECT(out[0] == 7 && out[1] == 7, "%s wrote the output", #change);           \
  } while (0)
  STATUS(ML_ERR_DTYPE, z.p.dtype = (ml_dtype)5);
  STATUS(ML_ERR_SHAPE, z.p.d_in = 0);
  STATUS(ML_ERR_SHAPE, z.p.d_out = -1);
  STATUS(ML_ERR_SHAPE, z.p.n_experts = 0);
  STATUS(ML_ERR_SHAPE, z.p.seq = -1);
  STATUS(ML_ERR_SHAPE, z.experts[0].rank = 0);
  STATUS(ML_ERR_TOP_K, z.p.top_k = 2);
  STATUS(ML_ERR_TOP_K, z.p.top_k = -1);
  STATUS(ML_ERR_VALUE, z.experts[0].scaling = (double)NAN);
  STATUS(ML_ERR_VALUE, z.experts[0].dropout = (double)NAN);
  STATUS(ML_ERR_VALUE, z.experts[0].dropout = -0.1);
  STATUS(ML_ERR_VALUE, z.experts[0].dropout = 1.1);
  STATUS(ML_ERR_NULL, z.experts[0].a.data = NULL);
  STATUS(ML_ERR_NULL, z.p.routing_weights.data = NULL);
  STATUS(ML_ERR_NULL, z.p.experts = NULL);
  STATUS(ML_ERR_OVERFLOW, (z.p.batch = INT64_MAX / 2, z.p.seq = 4));
  STATUS(ML_ERR_OVERFLOW, (z.p.seq = INT64_MAX / 2));
  STATUS(ML_ERR_OVERFLOW, (z.p.dtype = ML_BF16, z.p.seq = INT64_MAX / 2));
  STATUS(ML_ERR_VALUE, (z.p.dtype = ML_BF16, z.p.weight = a));
  STATUS(ML_ERR_NULL, (z.p.dtype = ML_BF16, z.p.bf16_adapters = true, z.experts[0].b.data = NULL));
  EXPECT(ml_set_isa("vax") == ML_ERR_ISA, "an unknown instruction set was taken");
  free_arrays(0);
}

/* ---- routing ---- */

/* p = softmax(logits / temperature), the k largest of it with ties to the lower index, renormalised. What exp is off
 * grows with its argument, so magnitudes do. */
static void check_route(ml_dtype t, int64_t T, int64_t N, int64_t k, bool renormalize, bool masked) {
  enum { KEPT_OUT = -7 }; /* around indices and counts */
  const double temperature = 0.7;
  ml_matrix logits = some_matrix(t, T, N, INPUT), grad_weights = some_matrix(t, T, N, INPUT);
  for (int64_t e = 0; e < N && T > 1; e++)
    set(t, logits.data, logits.row + e * logits.col, (double)(e / 2 % 32)); /* ties */
  ml_matrix weights = matrix(t, T, N, DENSE, OUTPUT), prob_sums = matrix(t, 1, N, DENSE, OUTPUT);
  ml_matrix grad_logits = matrix(t, T, N, DENSE, OUTPUT), grad_sums = matrix(t, 1, N, DENSE, INPUT);
  uint8_t *mask = checked(malloc((size_t)(2 * T) + 1));
  for (int64_t i = 0; i < 2 * T; i++) mask[i] = i % 2 ? 2 : i % 3 != 0;
  int64_t *indices = checked(malloc((size_t)(T * k + 2) * sizeof *indices)),
          *counts = checked(malloc((size_t)(N + 2) * 8));
  indices[0] = indices[T * k + 1] = counts[0] = counts[N + 1] = KEPT_OUT;
  double *wanted = zeros(T * N), *sizes = zeros(T * N), *grads = zeros(T * N), *grad_sizes = zeros(T * N);
  double *sums = zeros(N), *rests = zeros(N), *sum_sizes = zeros(N), *seen = zeros(N), *p = zeros(N);
  ml_route_params q = {.dtype = t,
                       .n_tokens = T,
                       .n_experts = N,
                       .top_k = k,
                       .logits = logits,
                       .mask = masked ? mask : NULL,
                       .mask_stride = 2,
                       .temperature = temperature,
                       .renormalize = renormalize,
                       .n_threads = 2};
  snprintf(about, sizeof about, "route %s, T=%d N=%d k=%d renormalize=%d masked=%d", name_of(t), (int)T, (int)N, (int)k,
           renormalize, masked);
  remember_arrays();
  EXPECT(ml_route(&q, weights.data, k ? indices + 1 : NULL, counts + 1, prob_sums.data) == ML_OK, "route");
  if (k == 0 && pick(2) == 0) q.probs = weights;
  EXPECT(ml_route_backward(&q, grad_logits.data, grad_weights, k ? indices + 1 : NULL, grad_sums.data) == ML_OK,
         "route backward");
  expect_untouched();
  EXPECT(indices[0] == KEPT_OUT && indices[T * k + 1] == KEPT_OUT, "written past indices");
  EXPECT(counts[0] == KEPT_OUT && counts[N + 1] == KEPT_OUT, "written past counts");
  for (int64_t i = 0; i < T; i++) {
    double largest = -INFINITY, least = INFINITY, total = 0, kept_sum = 0, dot = 0, dot_size = 0;
    bool counted = !masked || mask[2 * i];
    for (int64_t e = 0; e < N; e++) {
      largest = fmax(largest, mget(t, logits, i, e));
      least = fmin(least, mget(t, logits, i, e));
    }
    double size = 1 + (largest - least) / temperature;
    for (int64_t e = 0; e < N; e++) total += p[e] = exp((mget(t, logits, i, e) - largest) / temperature);
    for (int64_t e = 0; e < N; e++) p[e] /= total;
    for (int64_t e = 0; e < N; e++) {
      int64_t before = 0;
      double logit = mget(t, logits, i, e);
      for (int64_t f = 0; f < N; f++) {
        double other = mget(t, logits, i, f);
        before += other > logit || (other == logit && f < e);
      }
      bool keep = k == 0 || before < k;
      if (keep && k)
        EXPECT(indices[1 + i * k + before] == e, "indices[%d, %d]: got %d, wanted %d", (int)i, (int)before,
               (int)indices[1 + i * k + before], (int)e);
      if (counted) { /* with what each addition rounds away: of equal rows that would pile up on one side */
        double sum = sums[e] + p[e];
        rests[e] += p[e] - (sum - sums[e]);
        seen[e] += keep, sums[e] = sum, sum_sizes[e] += size * p[e];
      }
      wanted[i * N + e] = keep ? p[e] : 0;
      kept_sum += wanted[i * N + e];
    }
    if (!renormalize) kept_sum = 1;
    for (int64_t e = 0; e < N; e++) {
      double w = wanted[i * N + e] /= kept_sum, grad = mget(t, grad_weights, i, e);
      sizes[i * N + e] = size * w;
      dot += renormalize ? grad * w : 0;
      dot_size += renormalize ? fabs(grad) * w : 0;
    }
    double mean = 0, mean_size = 0; /* through the division, through prob_sums, through softmax */
    for (int64_t pass = 0; pass < 2; pass++)
      for (int64_t e = 0; e < N; e++) {
        double grad = counted ? mget(t, grad_sums, 0, e) : 0, grad_size = fabs(grad);
        if (wanted[i * N + e] != 0) {
          grad += (mget(t, grad_weights, i, e) - dot) / kept_sum;
          grad_size += (fabs(mget(t, grad_weights, i, e)) + dot_size) / kept_sum;
        }
        if (pass == 0) mean += grad * p[e], mean_size += grad_size * p[e];
        grads[i * N + e] = p[e] * (grad - mean) / temperature;
        grad_sizes[i * N + e] = size * p[e] * (grad_size + mean_size) / temperature;
      }
  }
  expect_all(t, "weights", (ml_tokens){weights.data, 0, N, 1}, 1, T, N, wanted, sizes, false);
  expect_all(t, "grad_logits", (ml_tokens){grad_logits.data, 0, N, 1}, 1, T, N, grads, grad_sizes, false);
  for (int64_t e = 0; e < N; e++) sums[e] += rests[e];
  expect_all(t, "prob_sums", (ml_tokens){prob_sums.data, 0, N, 1}, 1, 1, N, sums, sum_sizes, false);
  for (int64_t e = 0; e < N; e++)
    EXPECT((double)counts[1 + e] == seen[e], "counts[%d]: got %d, wanted %g", (int)e, (int)counts[1 + e], seen[e]);
  free(mask), free(indices), free(counts);
  free_reals();
  free_arrays(0);
}

static void check_routes(void) {
  static const int64_t Ts[] = {0, 1, 2, 5, 17, 133, 1500}, Ns[] = {1, 2, 3, 4, 9, 16, 27, 65, 257};
  for (size_t i = 0; i < sizeof Ts / sizeof *Ts; i++)
    for (size_t j = 0; j < sizeof Ns / sizeof *Ns && Ts[i] * Ns[j] < 50000; j++)
      for (int t = ML_F32; t <= ML_F64; t++)
        for (int64_t k = 0; k <= Ns[j]; k = k * 2 + 1) {
          check_route((ml_dtype)t, Ts[i], Ns[j], k, true, false);
          check_route((ml_dtype)t, Ts[i], Ns[j], k, false, true);
        }
}

int main(void) {
  printf("BLAS: %s\ninstruction sets:", ml_blas_config());
  for (const char *const *isa = ml_isa_available(); *isa; isa++) printf(" %s", *isa);
  printf("\n");
  check_grid();
  check_equal_ranks();
  check_large_blocks();
  check_pairs();
  for (const char *const *isa = ml_isa_available(); *isa; isa++) {
    EXPECT(ml_set_isa(*isa) == ML_OK, "%s can't be chosen", *isa);
    for (int t = ML_F32; t <= ML_BF16; t++)
      for (int dropout = 0; dropout <= 1; dropout++) {
        check_threads_leave_the_bits_alone((ml_dtype)t, 300, 200, PER_TOKEN, dropout != 0);
        check_threads_leave_the_bits_alone((ml_dtype)t, 41, 200, PER_CALL, dropout != 0);
        check_threads_leave_the_bits_alone((ml_dtype)t, 8, 940, PER_TOKEN, dropout != 0); /* enough to be shared out */
      }
    check_routes();
  }
  EXPECT(ml_set_isa(NULL) == ML_OK, "the default can't be restored");
  check_statuses_leave_outputs_untouched();
  for (int t = ML_F32; t <= ML_BF16; t++) check_memory_that_runs_out((ml_dtype)t, 1300);
  printf("%d checks, %d failures, largest error %.2f of what is allowed, threads: %s\n", checks, failures,
         largest_error, ml_threading_layer());
  return failures ? 1 : 0;
}
