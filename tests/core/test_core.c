/* The core against loops that say what it means, in every instruction set this CPU has: run under ASan and UBSan by CI.
 *
 * Shapes cross every block boundary of the kernels; arrays are allocated to size, so that a read or a write past an end
 * is an error, and their strides are dense, transposed, negative or zero. Prints what failed; exit status 1 if any did.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../csrc/core/moelora.h"

static int failures, checks;

#define EXPECT(condition, ...)               \
  do {                                       \
    checks++;                                \
    if (!(condition)) {                      \
      failures++;                            \
      printf("%s:%d: ", __FILE__, __LINE__); \
      printf(__VA_ARGS__);                   \
      printf("\n");                          \
    }                                        \
  } while (0)

/* ---- arrays of either dtype with any strides ---- */

static uint64_t state = 1;
static double noise(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(int32_t)(state >> 32) / 2147483648.0;
}

static size_t size_of(ml_dtype t) { return t == ML_F32 ? sizeof(float) : sizeof(double); }
static double get(ml_dtype t, const void *data, int64_t i) {
  return t == ML_F32 ? (double)((const float *)data)[i] : ((const double *)data)[i];
}
static void set(ml_dtype t, void *data, int64_t i, double v) {
  if (t == ML_F32)
    ((float *)data)[i] = (float)v;
  else
    ((double *)data)[i] = v;
}

enum { MAX_BLOCKS = 256 };
static void *blocks[MAX_BLOCKS];
static int n_blocks;
static void *block(ml_dtype t, int64_t n) {
  void *data = malloc((size_t)(n > 0 ? n : 1) * size_of(t));
  if (!data || n_blocks == MAX_BLOCKS) abort();
  for (int64_t i = 0; i < n; i++) set(t, data, i, noise());
  return blocks[n_blocks++] = data;
}
static void free_blocks(void) {
  while (n_blocks) free(blocks[--n_blocks]);
}

typedef enum { DENSE, TRANSPOSED, REVERSED, LAYOUTS } layout;

static ml_matrix matrix(ml_dtype t, int64_t rows, int64_t cols, layout l) {
  char *data = block(t, rows * cols);
  if (l == TRANSPOSED) return (ml_matrix){data, 1, rows};
  if (l == REVERSED) return (ml_matrix){data + (size_t)(rows * cols - 1) * size_of(t), -cols, -1};
  return (ml_matrix){data, cols, 1};
}
static ml_tokens tokens(ml_dtype t, int64_t B, int64_t S, int64_t d, layout l) {
  char *data = block(t, B * S * d);
  if (l == TRANSPOSED) return (ml_tokens){data, 1, B, B * S};
  if (l == REVERSED && B * S > 0) return (ml_tokens){data + (size_t)(B * S * d - 1) * size_of(t), -S * d, -d, -1};
  return (ml_tokens){data, S * d, d, 1};
}
static double mget(ml_dtype t, ml_matrix m, int64_t i, int64_t j) { return get(t, m.data, i * m.row + j * m.col); }
static double tget(ml_dtype t, ml_tokens v, int64_t b, int64_t s, int64_t j) {
  return get(t, v.data, b * v.batch + s * v.seq + j * v.col);
}

/* ---- the twin ---- */

typedef struct {
  ml_routed_lora p;
  ml_expert experts[8];
  ml_tokens base, grad_y;
  void *bias;
  int64_t R;
  double *factors;            /* [T, N, d_in]: what dropout multiplies x by */
  double *hidden, *projected; /* [T, R]: the twin's H and P */
} problem;

/* Philox4x32 with 7 rounds, as its authors write it. */
static void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; round++, k0 += 0x9E3779B9, k1 += 0xBB67AE85) {
    uint64_t p0 = (uint64_t)0xD2511F53 * c[0], p1 = (uint64_t)0xCD9E8D57 * c[2];
    uint32_t next[4] = {(uint32_t)(p1 >> 32) ^ c[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c[3] ^ k1, (uint32_t)p0};
    memcpy(c, next, sizeof next);
  }
}

static double *twin_factors(const problem *q) {
  const ml_routed_lora *p = &q->p;
  double *out = malloc((size_t)(p->batch * p->seq * p->n_experts * p->d_in + 1) * sizeof *out), *next = out;
  for (int64_t t = 0; t < p->batch * p->seq; t++)
    for (int64_t e = 0; e < p->n_experts; e++) {
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
/* What expert e is multiplied with in column k of x, and what it sees there. */
static double factor(const problem *q, int64_t b, int64_t s, int64_t e, int64_t k) {
  return q->factors[((b * q->p.seq + s) * q->p.n_experts + e) * q->p.d_in + k];
}

static int64_t offset_of(const problem *q, int64_t e) {
  int64_t o = 0;
  for (int64_t i = 0; i < e; i++) o += q->experts[i].rank;
  return o;
}

static double routing_weight(const problem *q, int64_t b, int64_t s, int64_t e) {
  return tget(q->p.dtype, q->p.routing_weights, b, s, e);
}
static bool kept(const problem *q, int64_t b, int64_t s, int64_t e) {
  int64_t before = 0;
  for (int64_t i = 0; i < q->p.n_experts; i++) {
    double v = routing_weight(q, b, s, i), own = routing_weight(q, b, s, e);
    before += v > own || (v == own && i < e);
  }
  return q->p.top_k == 0 || before < q->p.top_k;
}
/* out [T, R] = v M^T for M the experts' A (row r) or their B transposed; 0 where the expert is dropped */
static double *twin_products(const problem *q, ml_tokens v, int64_t width, bool of_b) {
  const ml_routed_lora *p = &q->p;
  double *out = calloc((size_t)(p->batch * p->seq * q->R + 1), sizeof *out), *next = out;
  for (int64_t b = 0; b < p->batch; b++)
    for (int64_t s = 0; s < p->seq; s++)
      for (int64_t e = 0; e < p->n_experts; e++) {
        bool keep = kept(q, b, s, e);
        for (int64_t r = 0; r < q->experts[e].rank; r++, next++)
          for (int64_t k = 0; k < width && keep; k++)
            *next +=
                tget(p->dtype, v, b, s, k) * (of_b ? mget(p->dtype, q->experts[e].b, k, r)
                                                   : factor(q, b, s, e, k) * mget(p->dtype, q->experts[e].a, r, k));
      }
  return out;
}
static double twin_hidden(const problem *q, int64_t b, int64_t s, int64_t e, int64_t r) {
  return q->hidden[(b * q->p.seq + s) * q->R + offset_of(q, e) + r];
}
static double twin_projected(const problem *q, int64_t b, int64_t s, int64_t e, int64_t r) {
  return q->projected[(b * q->p.seq + s) * q->R + offset_of(q, e) + r];
}

static void expect_close(const problem *q, const char *what, double got, double wanted) {
  double scale = 1 + fabs(wanted);
  double tolerance =
      q->p.dtype == ML_F32 ? 2e-5 * sqrt((double)(q->p.d_in + q->p.d_out + q->p.batch * q->p.seq)) : 1e-11;
  EXPECT(fabs(got - wanted) <= tolerance * scale, "%s: got %.9g, wanted %.9g (%s, T=%dx%d d=%d,%d N=%d top_k=%d)", what,
         got, wanted, ml_get_isa(), (int)q->p.batch, (int)q->p.seq, (int)q->p.d_in, (int)q->p.d_out,
         (int)q->p.n_experts, (int)q->p.top_k);
}

static void check_forward(const problem *q, layout l) {
  const ml_routed_lora *p = &q->p;
  ml_dtype t = p->dtype;
  ml_tokens y = tokens(t, p->batch, p->seq, p->d_out, l), hidden = tokens(t, p->batch, p->seq, q->R, l);
  ml_status status = ml_routed_lora_forward(p, y, hidden, q->base, q->bias, 1);
  EXPECT(status == ML_OK, "forward: %s", ml_status_message(status));
  for (int64_t b = 0; b < p->batch; b++)
    for (int64_t s = 0; s < p->seq; s++) {
      double *h = malloc((size_t)q->R * sizeof *h);
      for (int64_t e = 0; e < p->n_experts; e++)
        for (int64_t r = 0; r < q->experts[e].rank; r++) {
          int64_t j = offset_of(q, e) + r;
          double wanted = twin_hidden(q, b, s, e, r);
          expect_close(q, "hidden", tget(t, hidden, b, s, j), wanted);
          h[j] = wanted * q->experts[e].scaling * routing_weight(q, b, s, e);
        }
      for (int64_t o = 0; o < p->d_out; o++) {
        double wanted = q->base.data ? tget(t, q->base, b, s, o) : q->bias ? get(t, q->bias, o) : 0;
        if (p->weight.data)
          for (int64_t k = 0; k < p->d_in; k++) wanted += tget(t, p->x, b, s, k) * mget(t, p->weight, o, k);
        for (int64_t e = 0; e < p->n_experts; e++)
          for (int64_t r = 0; r < q->experts[e].rank; r++)
            wanted += h[offset_of(q, e) + r] * mget(t, q->experts[e].b, o, r);
        expect_close(q, "y", tget(t, y, b, s, o), wanted);
      }
      free(h);
    }
}

/* Gradients of every kind, or of those whose bit is set in `wanted`: x 1, A 2, B 4, w 8, only every other expert 16. */
static void check_backward(problem *q, layout l, unsigned wanted, bool add, bool per_token) {
  ml_routed_lora *p = &q->p;
  ml_dtype t = p->dtype;
  double start = add ? 1 : 0;
  ml_tokens none = {NULL, 0, 0, 0}, hidden = tokens(t, p->batch, p->seq, q->R, l), grad_x = none, grad_w = none;
  for (int64_t b = 0; b < p->batch; b++)
    for (int64_t s = 0; s < p->seq; s++)
      for (int64_t e = 0; e < p->n_experts; e++)
        for (int64_t r = 0; r < q->experts[e].rank; r++)
          set(t, hidden.data, b * hidden.batch + s * hidden.seq + (offset_of(q, e) + r) * hidden.col,
              twin_hidden(q, b, s, e, r));
  if (wanted & 1) {
    grad_x = tokens(t, p->batch, p->seq, p->d_in, l);
    for (int64_t b = 0; b < p->batch; b++)
      for (int64_t s = 0; s < p->seq; s++)
        for (int64_t k = 0; k < p->d_in; k++)
          set(t, grad_x.data, b * grad_x.batch + s * grad_x.seq + k * grad_x.col, 1);
  }
  if (wanted & 8) {
    int64_t rows = per_token ? p->batch * p->seq : 1;
    void *data = block(t, rows * p->n_experts);
    for (int64_t i = 0; i < rows * p->n_experts; i++) set(t, data, i, 1);
    grad_w = per_token ? (ml_tokens){data, p->seq * p->n_experts, p->n_experts, 1} : (ml_tokens){data, 0, 0, 1};
  }
  for (int64_t e = 0; e < p->n_experts; e++) {
    ml_expert *x = &q->experts[e];
    bool skip = (wanted & 16) && e % 2 == 0;
    x->grad_a = x->grad_b = (ml_matrix){NULL, 0, 0};
    if ((wanted & 2) && !skip) {
      x->grad_a = matrix(t, x->rank, p->d_in, l);
      for (int64_t r = 0; r < x->rank; r++)
        for (int64_t k = 0; k < p->d_in; k++) set(t, x->grad_a.data, r * x->grad_a.row + k * x->grad_a.col, 1);
    }
    if ((wanted & 4) && !skip) {
      x->grad_b = matrix(t, p->d_out, x->rank, l);
      for (int64_t o = 0; o < p->d_out; o++)
        for (int64_t r = 0; r < x->rank; r++) set(t, x->grad_b.data, o * x->grad_b.row + r * x->grad_b.col, 1);
    }
  }
  ml_status status = ml_routed_lora_backward(p, q->grad_y, hidden, grad_x, grad_w, add ? 15u : 0u);
  EXPECT(status == ML_OK, "backward: %s", ml_status_message(status));

  for (int64_t e = 0; e < p->n_experts; e++) {
    double total = 0; /* of this expert's weight over all tokens */
    const ml_expert *x = &q->experts[e];
    double *grad_a = calloc((size_t)(x->rank * p->d_in), sizeof *grad_a);
    double *grad_b = calloc((size_t)(x->rank * p->d_out), sizeof *grad_b);
    for (int64_t b = 0; b < p->batch; b++)
      for (int64_t s = 0; s < p->seq; s++) {
        double f = x->scaling * routing_weight(q, b, s, e), grad = 0;
        for (int64_t r = 0; r < x->rank; r++) {
          double projected = twin_projected(q, b, s, e, r), h = twin_hidden(q, b, s, e, r);
          grad += x->scaling * projected * h;
          for (int64_t k = 0; k < p->d_in; k++)
            grad_a[r * p->d_in + k] += f * projected * factor(q, b, s, e, k) * tget(t, p->x, b, s, k);
          for (int64_t o = 0; o < p->d_out; o++) grad_b[o * x->rank + r] += f * h * tget(t, q->grad_y, b, s, o);
        }
        if (grad_w.data && per_token) expect_close(q, "grad_w", tget(t, grad_w, b, s, e), start + grad);
        total += grad;
      }
    if (grad_w.data && !per_token) expect_close(q, "static grad_w", get(t, grad_w.data, e), start + total);
    for (int64_t r = 0; r < x->rank && x->grad_a.data; r++)
      for (int64_t k = 0; k < p->d_in; k++)
        expect_close(q, "grad_a", mget(t, x->grad_a, r, k), start + grad_a[r * p->d_in + k]);
    for (int64_t o = 0; o < p->d_out && x->grad_b.data; o++)
      for (int64_t r = 0; r < x->rank; r++)
        expect_close(q, "grad_b", mget(t, x->grad_b, o, r), start + grad_b[o * x->rank + r]);
    free(grad_a);
    free(grad_b);
  }
  for (int64_t b = 0; b < p->batch && grad_x.data; b++)
    for (int64_t s = 0; s < p->seq; s++)
      for (int64_t k = 0; k < p->d_in; k++) {
        double v = start;
        if (p->weight.data)
          for (int64_t o = 0; o < p->d_out; o++) v += tget(t, q->grad_y, b, s, o) * mget(t, p->weight, o, k);
        for (int64_t e = 0; e < p->n_experts; e++)
          for (int64_t r = 0; r < q->experts[e].rank; r++)
            v += q->experts[e].scaling * routing_weight(q, b, s, e) * twin_projected(q, b, s, e, r) *
                 factor(q, b, s, e, k) * mget(t, q->experts[e].a, r, k);
        expect_close(q, "grad_x", tget(t, grad_x, b, s, k), v);
      }
}

typedef struct {
  int64_t batch, seq, d_in, d_out, n_experts, ranks[4], top_k;
} shape;

static const shape shapes[] = {
    {1, 1, 1, 1, 1, {1}, 0},
    {1, 1, 7, 130, 2, {3, 1}, 0},
    {1, 5, 64, 64, 4, {8, 8, 8, 8}, 0},
    {2, 3, 17, 5, 3, {20, 1, 12}, 2},
    {3, 0, 8, 8, 2, {2, 2}, 1},
    {0, 4, 8, 8, 2, {2, 2}, 0},
    {1, 47, 70, 33, 4, {4, 4, 4, 4}, 1},
    {1, 48, 33, 70, 4, {16, 1, 2, 5}, 3},
    {2, 50, 270, 21, 2, {9, 30}, 2},
    {1, 520, 9, 67, 2, {3, 17}, 1},
    {1, 2, 130, 520, 1, {260}, 0},
};

/* With dropout, every other expert has it. */
static void check_shape(const shape *s, ml_dtype t, layout l, bool per_token, bool dropout) {
  problem q = {.p = {.dtype = t, .batch = s->batch, .seq = s->seq, .d_in = s->d_in, .d_out = s->d_out}};
  q.p.n_experts = s->n_experts;
  q.p.top_k = s->top_k;
  q.p.experts = q.experts;
  q.p.n_threads = 2;
  for (int64_t e = 0; e < s->n_experts; e++) {
    q.experts[e] = (ml_expert){.a = matrix(t, s->ranks[e], s->d_in, l), .b = matrix(t, s->d_out, s->ranks[e], l)};
    q.experts[e].rank = s->ranks[e];
    q.experts[e].scaling = 0.5 + (double)e;
    q.experts[e].dropout = dropout && e % 2 == 0 ? 1 / (2 + (double)e) : 0;
    q.R += s->ranks[e];
  }
  q.p.x = tokens(t, s->batch, s->seq, s->d_in, l);
  q.grad_y = tokens(t, s->batch, s->seq, s->d_out, l);
  q.p.routing_weights =
      per_token ? tokens(t, s->batch, s->seq, s->n_experts, l) : (ml_tokens){block(t, s->n_experts), 0, 0, 1};
  q.p.dropout_seed = 0x9876543210ABCDEF;
  q.factors = twin_factors(&q);
  q.hidden = twin_products(&q, q.p.x, s->d_in, false);
  q.projected = twin_products(&q, q.grad_y, s->d_out, true);
  check_forward(&q, l);
  check_backward(&q, l, 15, false, per_token);
  check_backward(&q, l, 15, true, per_token);
  for (unsigned one = 1; one <= 8; one *= 2) check_backward(&q, l, one, false, per_token);
  check_backward(&q, l, 2 | 4 | 16, true, per_token);
  q.base = tokens(t, s->batch, s->seq, s->d_out, l);
  check_forward(&q, DENSE);
  q.base.data = NULL;
  q.p.weight = matrix(t, s->d_out, s->d_in, l);
  check_forward(&q, l);
  check_backward(&q, l, 1, true, per_token);
  q.bias = block(t, s->d_out);
  check_forward(&q, l);
  free(q.factors);
  free(q.hidden);
  free(q.projected);
  free_blocks();
}

/* ---- bits, statuses, base in place ---- */

static void check_threads_leave_the_bits_alone(ml_dtype t, bool dropout) {
  enum { T = 300, D = 200, R = 24, N = 3 };
  problem q = {.p = {.dtype = t, .batch = 1, .seq = T, .d_in = D, .d_out = D, .n_experts = N}, .R = R};
  for (int e = 0; e < N; e++)
    q.experts[e] = (ml_expert){
        matrix(t, 8, D, DENSE),    matrix(t, D, 8, DENSE), matrix(t, 8, D, DENSE), matrix(t, D, 8, DENSE), 8, 2.0,
        dropout && e > 0 ? 0.5 : 0};
  q.p.experts = q.experts;
  q.p.x = tokens(t, 1, T, D, DENSE);
  q.p.routing_weights = tokens(t, 1, T, N, DENSE);
  q.p.weight = matrix(t, D, D, DENSE);
  ml_tokens y = tokens(t, 1, T, D, DENSE), hidden = tokens(t, 1, T, R, DENSE), none = {NULL, 0, 0, 0};
  ml_tokens grad_x = tokens(t, 1, T, D, DENSE), grad_w = tokens(t, 1, T, N, DENSE);
  size_t bytes = T * D * size_of(t);
  void *first_y = malloc(bytes), *first_x = malloc(bytes), *first_b = malloc(D * 8 * size_of(t));
  void *first_a = malloc(D * 8 * size_of(t));
  for (int n = 1; n <= 5; n++) {
    q.p.n_threads = n;
    EXPECT(ml_routed_lora_forward(&q.p, y, hidden, none, NULL, 0) == ML_OK, "forward on %d threads", n);
    EXPECT(ml_routed_lora_backward(&q.p, y, hidden, grad_x, grad_w, 0) == ML_OK, "backward on %d threads", n);
    if (n == 1) {
      memcpy(first_y, y.data, bytes);
      memcpy(first_x, grad_x.data, bytes);
      memcpy(first_a, q.experts[1].grad_a.data, D * 8 * size_of(t));
      memcpy(first_b, q.experts[1].grad_b.data, D * 8 * size_of(t));
    }
    EXPECT(memcmp(first_y, y.data, bytes) == 0, "y differs on %d threads", n);
    EXPECT(memcmp(first_x, grad_x.data, bytes) == 0, "grad_x differs on %d threads", n);
    EXPECT(memcmp(first_a, q.experts[1].grad_a.data, D * 8 * size_of(t)) == 0, "grad_a differs on %d threads", n);
    EXPECT(memcmp(first_b, q.experts[1].grad_b.data, D * 8 * size_of(t)) == 0, "grad_b differs on %d threads", n);
  }
  free(first_y);
  free(first_x);
  free(first_a);
  free(first_b);
  free_blocks();
}

static void check_base_in_place(void) {
  problem q = {.p = {.dtype = ML_F64, .batch = 1, .seq = 9, .d_in = 5, .d_out = 11, .n_experts = 1}, .R = 2};
  q.experts[0] =
      (ml_expert){.a = matrix(ML_F64, 2, 5, DENSE), .b = matrix(ML_F64, 11, 2, DENSE), .rank = 2, .scaling = 1};
  q.p.experts = q.experts;
  q.p.x = tokens(ML_F64, 1, 9, 5, DENSE);
  q.p.routing_weights = (ml_tokens){block(ML_F64, 1), 0, 0, 1};
  ml_tokens base = tokens(ML_F64, 1, 9, 11, TRANSPOSED), y = tokens(ML_F64, 1, 9, 11, DENSE), none = {NULL, 0, 0, 0};
  EXPECT(ml_routed_lora_forward(&q.p, y, none, base, NULL, 0) == ML_OK, "base apart");
  EXPECT(ml_routed_lora_forward(&q.p, base, none, base, NULL, 0) == ML_OK, "base in place");
  for (int64_t s = 0; s < 9; s++)
    for (int64_t o = 0; o < 11; o++)
      EXPECT(tget(ML_F64, y, 0, s, o) == tget(ML_F64, base, 0, s, o), "in place differs at %d, %d", (int)s, (int)o);
  free_blocks();
}

static void check_statuses_leave_outputs_untouched(void) {
  problem q = {.p = {.dtype = ML_F32, .batch = 1, .seq = 1, .d_in = 2, .d_out = 2, .n_experts = 1}, .R = 1};
  q.experts[0] =
      (ml_expert){.a = matrix(ML_F32, 1, 2, DENSE), .b = matrix(ML_F32, 2, 1, DENSE), .rank = 1, .scaling = 1};
  q.p.experts = q.experts;
  q.p.x = tokens(ML_F32, 1, 1, 2, DENSE);
  q.p.routing_weights = (ml_tokens){block(ML_F32, 1), 0, 0, 1};
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
  EXPECT(ml_set_isa("vax") == ML_ERR_ISA, "an unknown instruction set was taken");
  free_blocks();
}

/* ---- routing ---- */

/* p = softmax(logits / temperature), the k largest of it with ties to the lower index, renormalised. */
static void check_route(ml_dtype t, int64_t T, int64_t N, int64_t k, bool renormalize, layout l, bool masked) {
  ml_matrix logits = matrix(t, T, N, l), grad_weights = matrix(t, T, N, l);
  if (T > 1 && N > 1)
    for (int64_t e = 0; e < N; e++) set(t, logits.data, logits.row + e * logits.col, (double)(e / 2)); /* ties */
  uint8_t *mask = malloc((size_t)T + 1);
  for (int64_t i = 0; i < T; i++) mask[i] = i % 3 != 0;
  void *weights = block(t, T * N), *prob_sums = block(t, N), *grad_logits = block(t, T * N), *grad_sums = block(t, N);
  int64_t *indices = malloc((size_t)(T * k + 1) * sizeof *indices), *counts = malloc((size_t)N * sizeof *counts);
  double *p = malloc((size_t)N * sizeof *p), *grad_p = malloc((size_t)N * sizeof *grad_p);
  double *sums = calloc((size_t)N, sizeof *sums);
  int64_t *seen = calloc((size_t)N, sizeof *seen);
  ml_route_params q = {t, T, N, k, logits, masked ? mask : NULL, 1, 0.7, renormalize, 2};
  problem about = {.p = {.dtype = t, .batch = 1, .seq = T, .d_in = N, .d_out = N, .n_experts = N, .top_k = k}};
  EXPECT(ml_route(&q, weights, k ? indices : NULL, counts, prob_sums) == ML_OK, "route");
  EXPECT(ml_route_backward(&q, grad_logits, grad_weights, k ? indices : NULL, grad_sums) == ML_OK, "route backward");
  for (int64_t i = 0; i < T; i++) {
    double largest = -INFINITY, total = 0, kept_sum = 0, dot = 0, mean = 0;
    bool counted = !masked || mask[i];
    for (int64_t e = 0; e < N; e++) largest = fmax(largest, mget(t, logits, i, e));
    for (int64_t e = 0; e < N; e++) total += p[e] = exp((mget(t, logits, i, e) - largest) / 0.7);
    for (int64_t e = 0; e < N; e++) sums[e] += counted ? p[e] /= total : 0 * (p[e] /= total);
    for (int64_t e = 0; e < N; e++) {
      int64_t before = 0;
      for (int64_t f = 0; f < N; f++) before += p[f] > p[e] || (p[f] == p[e] && f < e);
      bool keep = k == 0 || before < k;
      if (keep && k) EXPECT(indices[i * k + before] == e, "index of place %d in row %d", (int)before, (int)i);
      if (keep && counted) seen[e]++;
      grad_p[e] = keep ? mget(t, grad_weights, i, e) : 0;
      kept_sum += keep ? p[e] : 0;
      if (!keep) EXPECT(get(t, weights, i * N + e) == 0, "a dropped weight is not zero");
    }
    if (!renormalize) kept_sum = 1;
    for (int64_t e = 0; e < N; e++) {
      bool keep = get(t, weights, i * N + e) != 0;
      if (keep) expect_close(&about, "weight", get(t, weights, i * N + e), p[e] / kept_sum);
      dot += keep ? grad_p[e] * p[e] / kept_sum : 0;
    }
    for (int64_t e = 0; e < N; e++) { /* through the division, then through prob_sums, then through softmax */
      bool keep = get(t, weights, i * N + e) != 0;
      grad_p[e] = keep ? (grad_p[e] - (renormalize ? dot : 0)) / kept_sum : 0;
      grad_p[e] += counted ? get(t, grad_sums, e) : 0;
      mean += grad_p[e] * p[e];
    }
    for (int64_t e = 0; e < N; e++)
      expect_close(&about, "grad_logits", get(t, grad_logits, i * N + e), p[e] * (grad_p[e] - mean) / 0.7);
  }
  for (int64_t e = 0; e < N; e++) {
    EXPECT(counts[e] == seen[e], "counts[%d]: got %d, wanted %d", (int)e, (int)counts[e], (int)seen[e]);
    expect_close(&about, "prob_sums", get(t, prob_sums, e), sums[e]);
  }
  free(mask), free(indices), free(counts), free(p), free(grad_p), free(sums), free(seen);
  free_blocks();
}

static void check_routes(void) {
  static const int64_t few_and_many[] = {0, 1, 2, 5, 17, 33, 700}, widths[] = {1, 3, 4, 9, 16, 27, 65, 257};
  for (int t = ML_F32; t <= ML_F64; t++)
    for (int l = DENSE; l < LAYOUTS; l++)
      for (int i = 0; i < 7; i++)
        for (int j = 0; j < 8; j++)
          for (int64_t T = few_and_many[i], N = widths[j], k = 0; k <= N && T * N < 20000; k = k * 3 + 1) {
            check_route((ml_dtype)t, T, N, k, true, (layout)l, false);
            check_route((ml_dtype)t, T, N, k, false, (layout)l, true);
          }
}

int main(void) {
  printf("BLAS: %s\n", ml_blas_config());
  for (const char *const *isa = ml_isa_available(); *isa; isa++) {
    EXPECT(ml_set_isa(*isa) == ML_OK && strcmp(ml_get_isa(), *isa) == 0, "%s can't be chosen", *isa);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      for (int t = ML_F32; t <= ML_F64; t++)
        for (int l = DENSE; l < LAYOUTS; l++)
          for (int per_token = 0; per_token <= 1; per_token++)
            for (int dropout = 0; dropout <= per_token; dropout++)
              check_shape(&shapes[i], (ml_dtype)t, (layout)l, per_token != 0, dropout != 0);
    for (int dropout = 0; dropout <= 1; dropout++) {
      check_threads_leave_the_bits_alone(ML_F32, dropout != 0);
      check_threads_leave_the_bits_alone(ML_F64, dropout != 0);
    }
    check_routes();
  }
  EXPECT(ml_set_isa(NULL) == ML_OK, "the default can't be restored");
  check_base_in_place();
  check_statuses_leave_outputs_untouched();
  printf("%d checks, %d failures, threads: %s\n", checks, failures, ml_threading_layer());
  return failures ? 1 : 0;
}
