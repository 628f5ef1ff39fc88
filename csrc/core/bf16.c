/* Arrays in bfloat16: widened a block of tokens at a time, computed in float32, rounded once when they are stored. What
 * is widened stays in the cache for the products that read it. */
#include <stdlib.h>

#include "call.h"

enum { BLOCK_TOKENS = 512, TASK_ELEMENTS = 1 << 15 };

/* One array [rows, width] on its way from bf16 or to it. */
typedef struct {
  const ml_bf16 *kernels;
  ml_tokens narrow; /* bf16, token t at (t / seq, t % seq) */
  ml_tokens init;   /* bf16, added before rounding; data == NULL: nothing */
  float *wide;      /* [rows, width] */
  int64_t seq, first, rows, width, rows_per_task;
  bool widen;
} conversion;

static uint16_t *row_of(ml_tokens v, int64_t seq, int64_t t) {
  return (uint16_t *)v.data + t / seq * v.batch + t % seq * v.seq;
}

/* Whether rows of unit column stride follow each other without a gap. */
static bool is_dense(ml_tokens v, int64_t seq, int64_t rows, int64_t width) {
  return v.col == 1 &&
         (rows == 1 || (v.seq == width && (rows <= seq || v.batch == seq * width)) || (seq == 1 && v.batch == width));
}

static void convert_elements(const conversion *v, int64_t n, uint16_t *narrow, const uint16_t *init, float *wide) {
  if (v->widen)
    v->kernels->widen(n, narrow, wide);
  else if (init)
    v->kernels->narrow_sum(n, wide, init, narrow);
  else
    v->kernels->narrow(n, wide, narrow);
}

static void convert_task(void *context, int64_t task, int thread) {
  (void)thread;
  const conversion *v = context;
  int64_t first = task * v->rows_per_task, last = min_(first + v->rows_per_task, v->rows), width = v->width;
  bool init = v->init.data != NULL;
  bool dense = is_dense(v->narrow, v->seq, v->rows, width) && (!init || is_dense(v->init, v->seq, v->rows, width));
  int64_t rows = dense ? last - first : 1; /* that are one to convert_elements */
  int64_t step = v->narrow.col == 1 && (!init || v->init.col == 1) ? rows * width : 1;
  for (int64_t t = first; t < last; t += rows) {
    uint16_t *narrow = row_of(v->narrow, v->seq, v->first + t);
    const uint16_t *add = init ? row_of(v->init, v->seq, v->first + t) : NULL;
    for (int64_t j = 0; j < rows * width; j += step)
      convert_elements(v, step, narrow + j * v->narrow.col, init ? add + j * v->init.col : NULL,
                       v->wide + t * width + j);
  }
}

static void convert(int n_threads, conversion v) {
  v.kernels = ml_active_kernels()->bf16;
  v.rows_per_task = TASK_ELEMENTS / v.width + 1;
  int64_t tasks = ceil_div(v.rows, v.rows_per_task);
  if (tasks > 0) ml_parallel_for(tasks > 1 ? n_threads : 1, tasks, convert_task, &v);
}

static void widen_tokens(const ml_routed_lora *p, ml_tokens narrow, int64_t first, int64_t n, int64_t width,
                         float *wide) {
  convert(p->n_threads,
          (conversion){
              .narrow = narrow, .wide = wide, .seq = p->seq, .first = first, .rows = n, .width = width, .widen = true});
}

static void narrow_tokens(const ml_routed_lora *p, const float *wide, int64_t first, int64_t n, int64_t width,
                          ml_tokens init, ml_tokens narrow) {
  convert(p->n_threads, (conversion){.narrow = narrow,
                                     .init = init,
                                     .wide = (float *)(uintptr_t)wide,
                                     .seq = p->seq,
                                     .first = first,
                                     .rows = n,
                                     .width = width});
}

static ml_tokens as_tokens(ml_matrix m) { return (ml_tokens){m.data, 0, m.row, m.col}; }

/* Matrices: on this thread alone, one expert being a task. */

static void widen_matrix(ml_matrix narrow, int64_t rows, int64_t width, float *wide) {
  convert(1, (conversion){
                 .narrow = as_tokens(narrow), .wide = wide, .seq = rows, .rows = rows, .width = width, .widen = true});
}

static void narrow_matrix(const float *wide, int64_t rows, int64_t width, ml_matrix narrow, bool add) {
  ml_tokens to = as_tokens(narrow);
  convert(1, (conversion){.narrow = to,
                          .init = add ? to : (ml_tokens){0},
                          .wide = (float *)(uintptr_t)wide,
                          .seq = rows,
                          .rows = rows,
                          .width = width});
}

/* ---- one call in float32, on a block of tokens ---- */

typedef struct {
  const ml_routed_lora *p;
  call workspace;
  ml_routed_lora wide; /* the call on a block */
  ml_expert *experts;  /* [N] of it */
  float *weights;      /* [T, N] */
  float *x, *y;        /* [block, d_in], [block, d_out]: of the forward, or their gradients */
  int64_t T, R, block;
  unsigned accumulate; /* of the call */
} blocks;

/* All A and B, or their gradients, in float32. */
static void reserve_adapters(const blocks *b, budget *need) {
  ml_reserve(need, b->R, b->p->d_in, sizeof(float));
  ml_reserve(need, b->R, b->p->d_out, sizeof(float));
  for (int64_t e = 0; e < 2 * b->p->n_experts; e++) ml_reserve(need, 0, 1, 1); /* each is aligned */
}

static ml_status begin(blocks *b, const ml_routed_lora *p, bool with_x, budget *need) {
  *b = (blocks){.p = p};
  ml_status status = ml_check(p, &b->T, &b->R);
  if (status != ML_OK) return status;
  if (p->weight.data) return ML_ERR_VALUE;
  b->block = min_(b->T, BLOCK_TOKENS);
  ml_reserve(need, p->n_experts, 1, sizeof *b->experts);
  ml_reserve(need, b->T, p->n_experts, sizeof(float));
  ml_reserve(need, b->block, p->d_out, sizeof(float));
  if (with_x) ml_reserve(need, b->block, p->d_in, sizeof(float));
  if (p->bf16_adapters) reserve_adapters(b, need);
  return ML_OK;
}

/* Copies of all A and B in float32, one expert a task. */
static void widen_adapters(void *context, int64_t e, int thread) {
  (void)thread;
  const blocks *b = context;
  const ml_expert *from = &b->p->experts[e], *to = &b->experts[e];
  widen_matrix(from->a, from->rank, b->p->d_in, to->a.data);
  widen_matrix(from->b, b->p->d_out, from->rank, to->b.data);
}

/* The gradients of all A and B, from float32. */
static void narrow_grads(void *context, int64_t e, int thread) {
  (void)thread;
  const blocks *b = context;
  const ml_expert *to = &b->p->experts[e], *from = &b->experts[e];
  if (to->grad_a.data)
    narrow_matrix(from->grad_a.data, to->rank, b->p->d_in, to->grad_a, b->accumulate & ML_ACCUMULATE_A);
  if (to->grad_b.data)
    narrow_matrix(from->grad_b.data, b->p->d_out, to->rank, to->grad_b, b->accumulate & ML_ACCUMULATE_B);
}

static ml_matrix take_matrix(blocks *b, int64_t rows, int64_t width) {
  return (ml_matrix){ml_take(&b->workspace, rows, width, sizeof(float)), width, 1};
}

static ml_status allocate(blocks *b, bool with_x, budget need) {
  const ml_routed_lora *p = b->p;
  ml_status status = ml_allocate_bytes(&b->workspace, need);
  if (status != ML_OK) return status;
  int64_t N = p->n_experts;
  b->experts = ml_take(&b->workspace, N, 1, sizeof *b->experts);
  b->weights = ml_take(&b->workspace, b->T, N, sizeof(float));
  b->y = ml_take(&b->workspace, b->block, p->d_out, sizeof(float));
  if (with_x) b->x = ml_take(&b->workspace, b->block, p->d_in, sizeof(float));
  for (int64_t e = 0; e < N; e++) {
    ml_expert *expert = &b->experts[e];
    *expert = p->experts[e];
    if (!p->bf16_adapters) continue;
    expert->a = take_matrix(b, expert->rank, p->d_in);
    expert->b = take_matrix(b, p->d_out, expert->rank);
  }
  if (p->bf16_adapters)
    ml_parallel_for(b->R * (p->d_in + p->d_out) < TASK_ELEMENTS ? 1 : p->n_threads, N, widen_adapters, b);
  ml_tokens w = p->routing_weights;
  for (int64_t t = 0; t < b->T; t++)
    for (int64_t e = 0; e < N; e++)
      b->weights[t * N + e] = ((const float *)w.data)[t / p->seq * w.batch + t % p->seq * w.seq + e * w.col];
  b->wide = *p;
  b->wide.dtype = ML_F32;
  b->wide.batch = 1;
  b->wide.experts = b->experts;
  return ML_OK;
}

static ml_tokens rows_of(float *data, int64_t width) { return (ml_tokens){data, 0, width, 1}; }

/* Tokens t .. of a dense array, or nothing. */
static ml_tokens rows_from(ml_tokens dense, int64_t t, int64_t width) {
  return dense.data ? rows_of((float *)dense.data + t * width, width) : (ml_tokens){0};
}

static void place(blocks *b, int64_t t, int64_t n) {
  b->wide.seq = n;
  b->wide.first_token = b->p->first_token + t;
  b->wide.routing_weights = rows_of(b->weights + t * b->p->n_experts, b->p->n_experts);
}

ml_status ml_bf16_forward(const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base) {
  blocks b;
  budget need = {0};
  ml_status status = begin(&b, p, true, &need);
  if (status != ML_OK) return status;
  if (b.T > 0 && (!p->x.data || !y.data)) return ML_ERR_NULL;
  if (hidden.data && !is_dense(hidden, p->seq, b.T, b.R)) return ML_ERR_VALUE;
  status = allocate(&b, true, need);
  for (int64_t t = 0; status == ML_OK && t < b.T; t += b.block) {
    int64_t n = min_(b.block, b.T - t);
    place(&b, t, n);
    widen_tokens(p, p->x, t, n, p->d_in, b.x);
    b.wide.x = rows_of(b.x, p->d_in);
    status =
        ml_routed_lora_forward(&b.wide, rows_of(b.y, p->d_out), rows_from(hidden, t, b.R), (ml_tokens){0}, NULL, 0);
    if (status == ML_OK) narrow_tokens(p, b.y, t, n, p->d_out, base, y);
  }
  free(b.workspace.workspace);
  return status;
}

ml_status ml_bf16_backward(const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                           ml_tokens grad_w, unsigned accumulate) {
  blocks b;
  budget need = {0};
  bool any_a = false;
  for (int64_t e = 0; p->experts && e < p->n_experts; e++) any_a |= p->experts[e].grad_a.data != NULL;
  bool with_x = any_a || grad_x.data;
  ml_status status = begin(&b, p, with_x, &need);
  if (status != ML_OK) return status;
  if (b.T > 0 && (!grad_y.data || (any_a && !p->x.data))) return ML_ERR_NULL;
  if (hidden.data && !is_dense(hidden, p->seq, b.T, b.R)) return ML_ERR_VALUE;
  if (grad_w.data) ml_reserve(&need, b.T, p->n_experts, sizeof(float));
  if (grad_x.data) ml_reserve(&need, b.block, p->d_in, sizeof(float));
  if (p->bf16_adapters) reserve_adapters(&b, &need);
  status = allocate(&b, with_x, need);
  if (status != ML_OK) goto done;
  float *token_grads = grad_w.data ? ml_take(&b.workspace, b.T, p->n_experts, sizeof(float)) : NULL;
  float *wide_grad_x = grad_x.data ? ml_take(&b.workspace, b.block, p->d_in, sizeof(float)) : NULL;
  if (p->bf16_adapters)
    for (int64_t e = 0; e < p->n_experts; e++) {
      ml_expert *expert = &b.experts[e];
      if (expert->grad_a.data) expert->grad_a = take_matrix(&b, expert->rank, p->d_in);
      if (expert->grad_b.data) expert->grad_b = take_matrix(&b, p->d_out, expert->rank);
    }

  b.accumulate = accumulate;
  unsigned adding = p->bf16_adapters ? 0 : accumulate & (ML_ACCUMULATE_A | ML_ACCUMULATE_B);
  int64_t t = 0;
  do { /* once without tokens too: then the gradients are zero */
    int64_t n = min_(b.block, b.T - t);
    place(&b, t, n);
    widen_tokens(p, grad_y, t, n, p->d_out, b.y);
    if (any_a) widen_tokens(p, p->x, t, n, p->d_in, b.x);
    b.wide.x = rows_of(b.x, p->d_in);
    status = ml_routed_lora_backward(
        &b.wide, rows_of(b.y, p->d_out), rows_from(hidden, t, b.R),
        wide_grad_x ? rows_of(wide_grad_x, p->d_in) : (ml_tokens){0},
        token_grads ? rows_of(token_grads + t * p->n_experts, p->n_experts) : (ml_tokens){0}, adding);
    if (status != ML_OK) goto done;
    if (grad_x.data)
      narrow_tokens(p, wide_grad_x, t, n, p->d_in, accumulate & ML_ACCUMULATE_X ? grad_x : (ml_tokens){0}, grad_x);
    adding = ML_ACCUMULATE_A | ML_ACCUMULATE_B;
    t += n;
  } while (t < b.T);

  if (p->bf16_adapters) ml_parallel_for(p->n_threads, p->n_experts, narrow_grads, &b);
  if (grad_w.data)
    ml_elementwise_table[ML_F32].sum_weight_grads(p->batch, p->seq, p->n_experts, token_grads, grad_w,
                                                  (accumulate & ML_ACCUMULATE_W) != 0);
done:
  free(b.workspace.workspace);
  return status;
}
