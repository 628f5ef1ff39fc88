/* Arrays in bfloat16. Tokens are widened a block at a time, computed with in float32, and rounded once when they are
 * stored; what is widened stays in the cache for the products that read it. A and B are widened by the kernels. Where pairs
 * of bfloat16 are multiplied (bf16_pairs.c), and where top_k leaves out most of the work (grouped.c), the products read and
 * write the rows themselves. */
#include <stdlib.h>

#include "grouped.h"

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

/* On this thread alone, one expert being a task. */
static void narrow_matrix(const float *wide, int64_t rows, int64_t width, ml_matrix narrow, bool add) {
  ml_tokens to = {narrow.data, 0, narrow.row, narrow.col};
  convert(1, (conversion){.narrow = to,
                          .init = add ? to : (ml_tokens){0},
                          .wide = (float *)(uintptr_t)wide,
                          .seq = rows,
                          .rows = rows,
                          .width = width});
}

/* ---- calls in float32, one for each block of tokens ---- */

/* p with its kernels: another thread may choose others between the blocks, which were to share what the first needs. */
static ml_routed_lora with_kernels(const ml_routed_lora *p) {
  ml_routed_lora fixed = *p;
  fixed.kernels = ml_active_kernels();
  return fixed;
}

typedef struct {
  const ml_routed_lora *p;
  call own;            /* the arrays below */
  call lent;           /* the workspace that the calls have in turn */
  ml_routed_lora wide; /* the call on a block */
  ml_expert *experts;  /* [N] of it */
  float *weights;      /* [T, N] */
  float *x, *y;        /* [block, d_in], [block, d_out]: of the forward, or their gradients */
  int64_t T, R, block;
  bool whole;          /* there is one block, of x, y and their gradients themselves */
  unsigned accumulate; /* of the call */
} blocks;

/* The gradients of all A and B in float32. */
static void reserve_grads(const blocks *b, budget *need) {
  ml_reserve(need, b->R, b->p->d_in, sizeof(float));
  ml_reserve(need, b->R, b->p->d_out, sizeof(float));
  for (int64_t e = 0; e < 2 * b->p->n_experts; e++) ml_reserve(need, 0, 1, 1); /* each is aligned */
}

/* Whether x, y and their gradients are read and written as they stand. */
static bool takes_rows(const ml_routed_lora *p, ml_tokens a, ml_tokens b, bool forward) {
  return ml_takes_pairs(p, a, b, forward) || ml_groups_narrow_rows(p, a, b);
}

static ml_status begin(blocks *b, const ml_routed_lora *p, ml_tokens hidden, bool with_x, bool whole, budget *need) {
  *b = (blocks){.p = p, .whole = whole};
  ml_status status = ml_check(p, &b->T, &b->R);
  if (status != ML_OK) return status;
  if (p->weight.data || (hidden.data && !is_dense(hidden, p->seq, b->T, b->R))) return ML_ERR_VALUE;
  b->block = whole ? b->T : min_(b->T, BLOCK_TOKENS);
  ml_reserve(need, p->n_experts, 1, sizeof *b->experts);
  ml_reserve(need, b->T, p->n_experts, sizeof(float));
  if (whole) return ML_OK;
  ml_reserve(need, b->block, p->d_out, sizeof(float));
  if (with_x) ml_reserve(need, b->block, p->d_in, sizeof(float));
  return ML_OK;
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
  return (ml_matrix){ml_take(&b->own, rows, width, sizeof(float)), width, 1};
}

static void widen_weights(blocks *b) {
  const ml_routed_lora *p = b->p;
  ml_tokens w = p->routing_weights;
  int64_t N = p->n_experts;
  if (p->bf16_weights)
    widen_tokens(p, w, 0, b->T, N, b->weights);
  else
    for (int64_t t = 0; t < b->T; t++)
      for (int64_t e = 0; e < N; e++)
        b->weights[t * N + e] = ((const float *)w.data)[t / p->seq * w.batch + t % p->seq * w.seq + e * w.col];
}

static ml_status allocate(blocks *b, bool with_x, budget need) {
  const ml_routed_lora *p = b->p;
  ml_status status = ml_allocate(&b->own, need);
  if (status != ML_OK) return status;
  int64_t N = p->n_experts;
  b->experts = ml_take(&b->own, N, 1, sizeof *b->experts);
  b->weights = ml_take(&b->own, b->T, N, sizeof(float));
  if (!b->whole) b->y = ml_take(&b->own, b->block, p->d_out, sizeof(float));
  if (!b->whole && with_x) b->x = ml_take(&b->own, b->block, p->d_in, sizeof(float));
  memcpy(b->experts, p->experts, (size_t)N * sizeof *b->experts);
  widen_weights(b);
  b->wide = *p;
  if (!b->whole) b->wide.dtype = ML_F32;
  b->wide.bf16_weights = false;
  b->wide.batch = 1;
  b->wide.experts = b->experts;
  return ML_OK;
}

static void release(blocks *b) {
  free(b->lent.workspace);
  free(b->own.workspace);
}

static ml_tokens rows_of(float *data, int64_t width) { return (ml_tokens){data, 0, width, 1}; }

/* Tokens t .. of a dense array, or nothing. */
static ml_tokens rows_from(ml_tokens dense, int64_t t, int64_t width) {
  return dense.data ? rows_of((float *)dense.data + t * width, width) : (ml_tokens){0};
}

/* Tokens that are rows, as the one sequence of a block. */
static ml_tokens joined(const ml_routed_lora *p, ml_tokens v) {
  ml_tokens rows = {v.data, 0, 0, 1};
  ml_one_stride(p, v, &rows.seq);
  return rows;
}

/* Makes b->wide the call on the block that starts at token t. */
static void place(blocks *b, int64_t t) {
  const ml_routed_lora *p = b->p;
  b->wide.seq = min_(b->block, b->T - t);
  b->wide.first_token = p->first_token + t;
  b->wide.routing_weights = rows_of(b->weights + t * p->n_experts, p->n_experts);
  b->wide.x = b->whole ? joined(p, p->x) : rows_of(b->x, p->d_in);
}

/* The last block is shorter than the others, and those are like the first one: together they say what calls need. */
static int64_t last_block(const blocks *b) { return b->T > 0 ? (b->T - 1) / b->block * b->block : 0; }

static void lend(const blocks *b, call *c) {
  c->workspace = b->lent.workspace;
  c->used = b->lent.used;
}

/* ---- forward ---- */

static ml_status begin_forward(blocks *b, forward *f, int64_t t, ml_tokens y, ml_tokens hidden, ml_tokens base,
                               budget *most) {
  const ml_routed_lora *p = b->p;
  place(b, t);
  ml_status status = ml_begin_forward(f, &b->wide, b->whole ? joined(p, y) : rows_of(b->y, p->d_out),
                                      rows_from(hidden, t, b->R), b->whole ? joined(p, base) : (ml_tokens){0}, NULL, 0);
  ml_reserve_phase(most, f->need);
  return status;
}

ml_status ml_bf16_forward(const ml_routed_lora *given, ml_tokens y, ml_tokens hidden, ml_tokens base) {
  const ml_routed_lora fixed = with_kernels(given), *p = &fixed;
  blocks b;
  forward f;
  budget need = {0}, most = {0};
  ml_status status = begin(&b, p, hidden, true, takes_rows(p, y, base, true), &need);
  if (status != ML_OK) return status;
  if (b.T > 0 && (!p->x.data || !y.data)) return ML_ERR_NULL;
  status = allocate(&b, true, need);
  if (status == ML_OK) status = begin_forward(&b, &f, last_block(&b), y, hidden, base, &most);
  if (status == ML_OK) status = begin_forward(&b, &f, 0, y, hidden, base, &most);
  if (status == ML_OK) status = ml_allocate(&b.lent, most);
  for (int64_t t = 0; status == ML_OK && t < b.T; t += b.block) {
    begin_forward(&b, &f, t, y, hidden, base, &most); /* which fails for all blocks or for none */
    lend(&b, &f.c);
    if (!b.whole) widen_tokens(p, p->x, t, b.wide.seq, p->d_in, b.x);
    ml_run_forward(&f);
    if (!b.whole) narrow_tokens(p, b.y, t, b.wide.seq, p->d_out, base, y);
  }
  release(&b);
  return status;
}

/* ---- backward ---- */

/* What the calls on blocks write. */
typedef struct {
  ml_tokens grad_y, hidden; /* which they read */
  ml_tokens grad_x;         /* of a block, or of all tokens where b->whole */
  float *grad_w;            /* [T, N]; NULL: not wanted */
  unsigned accumulate;
} wide_grads;

static ml_status begin_backward(blocks *b, backward *f, int64_t t, const wide_grads *to, budget *most) {
  const ml_routed_lora *p = b->p;
  place(b, t);
  ml_status status = ml_begin_backward(
      f, &b->wide, to->grad_y, rows_from(to->hidden, t, b->R), to->grad_x,
      to->grad_w ? rows_of(to->grad_w + t * p->n_experts, p->n_experts) : (ml_tokens){0}, to->accumulate);
  ml_reserve_phase(most, f->need);
  return status;
}

/* Rows of the gradient of the routing weights, one for each token unless tokens share them. */
static int64_t weight_rows(const ml_routed_lora *p, ml_tokens grad_w) {
  return (grad_w.batch ? p->batch : 1) * (grad_w.seq ? p->seq : 1);
}

/* It, from that of each token [T, N]; sums [weight_rows, N] for the workspace where it is rounded. */
static void finish_weight_grads(const ml_routed_lora *p, const float *tokens, float *sums, ml_tokens grad_w, bool add) {
  int64_t N = p->n_experts, seq = grad_w.seq ? p->seq : 1;
  ml_tokens to = p->bf16_weights ? (ml_tokens){sums, grad_w.batch ? seq * N : 0, grad_w.seq ? N : 0, 1} : grad_w;
  ml_elementwise_table[ML_F32].sum_weight_grads(p->batch, p->seq, N, tokens, to, add && !p->bf16_weights);
  if (!p->bf16_weights) return;
  convert(1, (conversion){.narrow = grad_w,
                          .init = add ? grad_w : (ml_tokens){0},
                          .wide = sums,
                          .seq = seq,
                          .rows = weight_rows(p, grad_w),
                          .width = N});
}

ml_status ml_bf16_backward(const ml_routed_lora *given, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                           ml_tokens grad_w, unsigned accumulate) {
  const ml_routed_lora fixed = with_kernels(given), *p = &fixed;
  blocks b;
  backward f;
  budget need = {0}, most = {0};
  bool any_a = false;
  for (int64_t e = 0; p->experts && e < p->n_experts; e++) any_a |= p->experts[e].grad_a.data != NULL;
  bool whole = takes_rows(p, grad_y, grad_x, false);
  ml_status status = begin(&b, p, hidden, any_a, whole, &need);
  if (status != ML_OK) return status;
  if (b.T > 0 && (!grad_y.data || (any_a && !p->x.data))) return ML_ERR_NULL;
  if (grad_x.data && !whole) ml_reserve(&need, b.block, p->d_in, sizeof(float));
  if (grad_w.data) {
    ml_reserve(&need, b.T, p->n_experts, sizeof(float));
    ml_reserve(&need, weight_rows(p, grad_w), p->n_experts, sizeof(float));
  }
  bool wide_grads_ab = p->bf16_adapters && !whole;
  if (wide_grads_ab) reserve_grads(&b, &need);
  status = allocate(&b, any_a, need);
  if (status != ML_OK) goto done;
  wide_grads to = {.hidden = hidden, .grad_y = whole ? joined(p, grad_y) : rows_of(b.y, p->d_out)};
  float *weight_sums = NULL;
  if (whole)
    to.grad_x = joined(p, grad_x);
  else if (grad_x.data)
    to.grad_x = rows_of(ml_take(&b.own, b.block, p->d_in, sizeof(float)), p->d_in);
  if (grad_w.data) {
    to.grad_w = ml_take(&b.own, b.T, p->n_experts, sizeof(float));
    weight_sums = ml_take(&b.own, weight_rows(p, grad_w), p->n_experts, sizeof(float));
  }
  for (int64_t e = 0; wide_grads_ab && e < p->n_experts; e++) {
    ml_expert *expert = &b.experts[e];
    if (expert->grad_a.data) expert->grad_a = take_matrix(&b, expert->rank, p->d_in);
    if (expert->grad_b.data) expert->grad_b = take_matrix(&b, p->d_out, expert->rank);
  }
  b.accumulate = accumulate;
  status = begin_backward(&b, &f, last_block(&b), &to, &most);
  if (status == ML_OK) status = begin_backward(&b, &f, 0, &to, &most);
  if (status == ML_OK) status = ml_allocate(&b.lent, most);
  if (status != ML_OK) goto done;

  if (!wide_grads_ab) to.accumulate = accumulate & (ML_ACCUMULATE_A | ML_ACCUMULATE_B);
  if (whole) to.accumulate |= accumulate & ML_ACCUMULATE_X;
  int64_t t = 0;
  do { /* once without tokens too: then the gradients are zero */
    begin_backward(&b, &f, t, &to, &most);
    lend(&b, &f.c);
    if (!whole) widen_tokens(p, grad_y, t, b.wide.seq, p->d_out, b.y);
    if (any_a && !whole) widen_tokens(p, p->x, t, b.wide.seq, p->d_in, b.x);
    ml_run_backward(&f);
    if (grad_x.data && !whole)
      narrow_tokens(p, to.grad_x.data, t, b.wide.seq, p->d_in, accumulate & ML_ACCUMULATE_X ? grad_x : (ml_tokens){0},
                    grad_x);
    to.accumulate = ML_ACCUMULATE_A | ML_ACCUMULATE_B;
    t += b.wide.seq;
  } while (t < b.T);

  if (wide_grads_ab) ml_parallel_for(p->n_threads, p->n_experts, narrow_grads, &b);
  if (grad_w.data) finish_weight_grads(p, to.grad_w, weight_sums, grad_w, accumulate & ML_ACCUMULATE_W);
done:
  release(&b);
  return status;
}
