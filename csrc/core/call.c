/* One call: its checks, its workspace, tokens with any strides. */
#include "call.h"

#include <stdlib.h>

#include "grouped.h"
#include "kernels/philox.h"

enum {
  ALIGNMENT = 64,
  LEFT_OUT_TOKENS = 9 /* below, time goes into reading A and B */
};

void ml_reserve(budget *b, int64_t rows_, int64_t cols, int64_t size) {
  int64_t n;
  size_t total;
  if (ML_MUL_OVERFLOWS(rows_, cols, &n) || ML_MUL_OVERFLOWS(n, size, &n) || ML_ADD_OVERFLOWS(n, ALIGNMENT, &n) ||
      ML_ADD_OVERFLOWS(b->bytes, (size_t)n, &total))
    b->overflow = true;
  else
    b->bytes = total;
}

void ml_reserve_phase(budget *b, budget phase) {
  b->overflow |= phase.overflow || ML_ADD_OVERFLOWS(phase.bytes, phase.phase, &phase.bytes);
  if (phase.bytes > b->phase) b->phase = phase.bytes;
}

void ml_reserve_apart(budget *b, budget phase) {
  b->overflow |= phase.overflow || ML_ADD_OVERFLOWS(b->bytes, phase.bytes, &b->bytes) ||
                 ML_ADD_OVERFLOWS(b->bytes, phase.phase, &b->bytes);
}

void *ml_take(call *c, int64_t rows_, int64_t cols, int64_t size) {
  void *taken = c->workspace + c->used;
  c->used += (size_t)round_up(rows_ * cols * size, ALIGNMENT);
  return taken;
}

int ml_threads_for(const call *c, int64_t multiply_adds) { return multiply_adds < SMALL_WORK ? 1 : c->p->n_threads; }

int ml_threads_for_factors(const call *c, int64_t elements) {
  return ml_threads_for(c, (c->T < READING_WORK ? READING_WORK : c->T) * elements);
}

ml_mask ml_mask_of(const ml_routed_lora *p, int64_t e) {
  uint32_t threshold = philox_threshold(p->experts[e].dropout);
  return (ml_mask){p->dropout_seed, (uint32_t)e, threshold, philox_scale(threshold)};
}

static int64_t rank_of(const call *c, int64_t e) { return e < 64 && c->unused >> e & 1 ? 0 : c->p->experts[e].rank; }

/* The experts whose weights are zero for every token, of the first 64; none where that would be all, nor where a B is
 * packed: without some of the experts another kernel might run, and its sums have other bits. */
static uint64_t unused_experts(const call *c) {
  int64_t N = c->p->n_experts, n = min_(N, 64);
  for (int64_t e = 0; e < N; e++)
    if (c->p->experts[e].b.col != 1 && c->p->experts[e].rank > 1) return 0;
  uint64_t unused = c->elementwise->unused(c->p->batch, c->p->seq, n, c->p->routing_weights);
  return N == n && unused == UINT64_MAX >> (64 - n) ? 0 : unused;
}

ml_status ml_check(const ml_routed_lora *p, int64_t *T, int64_t *R) {
  *R = 0;
  if (p->dtype != ML_F32 && p->dtype != ML_F64 && p->dtype != ML_BF16) return ML_ERR_DTYPE;
  if (p->dtype == ML_F64 && p->bf16_adapters) return ML_ERR_DTYPE;
  if (p->batch < 0 || p->seq < 0 || p->d_in <= 0 || p->d_out <= 0 || p->n_experts <= 0) return ML_ERR_SHAPE;
  if (p->top_k < 0 || p->top_k > p->n_experts) return ML_ERR_TOP_K;
  if (!p->experts) return ML_ERR_NULL;
  if (ML_MUL_OVERFLOWS(p->batch, p->seq, T)) return ML_ERR_OVERFLOW;
  for (int64_t e = 0; e < p->n_experts; e++) {
    const ml_expert *expert = &p->experts[e];
    if (expert->rank <= 0) return ML_ERR_SHAPE;
    if (!ML_ISFINITE(expert->scaling) || !(expert->dropout >= 0 && expert->dropout <= 1)) return ML_ERR_VALUE;
    if (!expert->a.data || !expert->b.data) return ML_ERR_NULL;
    if (ML_ADD_OVERFLOWS(*R, expert->rank, R)) return ML_ERR_OVERFLOW;
  }
  if (*T > 0 && !p->routing_weights.data) return ML_ERR_NULL;
  return ML_OK;
}

ml_status ml_begin(call *c, const ml_routed_lora *p, bool leave_out) {
  *c = (call){.p = p};
  ml_status status = ml_check(p, &c->T, &c->R);
  if (status != ML_OK) return status;
  const ml_kernels *kernels = p->kernels ? p->kernels : ml_active_kernels();
  ml_dtype wide = p->dtype == ML_BF16 ? ML_F32 : p->dtype, of_factors = p->bf16_adapters ? ML_BF16 : wide;
  c->products = kernels->products[wide];
  c->routing = kernels->routing[wide];
  if (p->dtype == ML_BF16) c->narrow = kernels->bf16, c->pairs = kernels->pairs;
  c->readers = kernels->products[of_factors];
  c->regime = ml_regime_of(kernels->isa, of_factors);
  c->elementwise = &ml_elementwise_table[wide];
  c->size = (int64_t)c->elementwise->size;
  c->row_size = c->narrow ? (int64_t)sizeof(uint16_t) : c->size;
  c->factor_size = p->bf16_adapters ? (int64_t)sizeof(uint16_t) : c->size;
  for (int64_t e = 0; e < p->n_experts; e++) c->drops |= ml_mask_of(p, e).threshold > 0;
  c->grouped = ml_is_grouped(c);
  if (leave_out && !c->grouped && c->T > 0 && c->T < LEFT_OUT_TOKENS) {
    c->unused = unused_experts(c);
    for (int64_t e = 0; e < p->n_experts; e++) c->R -= p->experts[e].rank - rank_of(c, e);
  }
  return ML_OK;
}

void ml_reserve_common(const call *c, budget *b) {
  int64_t N = c->p->n_experts;
  ml_reserve(b, N + 1, 1, sizeof *c->offsets);
  ml_reserve(b, N, 1, sizeof *c->a);
  ml_reserve(b, N, 1, sizeof *c->b);
  ml_reserve(b, N, 1, sizeof *c->grad_a);
  ml_reserve(b, N, 1, sizeof *c->grad_b);
  if (c->grouped) return;
  ml_reserve(b, c->T, N, c->size);
  if (c->p->top_k) ml_reserve(b, c->T, N, 1);
}

ml_status ml_allocate(call *c, budget b) {
  if (b.overflow || ML_ADD_OVERFLOWS(b.bytes, b.phase, &b.bytes) ||
      ML_ADD_OVERFLOWS(b.bytes, (size_t)ALIGNMENT, &b.bytes))
    return ML_ERR_OVERFLOW;
  c->workspace = malloc(b.bytes);
  if (!c->workspace) return ML_ERR_NO_MEMORY;
  c->used = (size_t)(-(intptr_t)c->workspace & (ALIGNMENT - 1));
  return ML_OK;
}

/* Of a part of M: any will do for a single row, so its column is dense, whether the expert takes part or not. */
static int64_t row_stride(const ml_expert *expert, int64_t stride) { return expert->rank > 1 ? stride : 1; }

void ml_take_common(call *c) {
  const ml_routed_lora *p = c->p;
  c->offsets = ml_take(c, p->n_experts + 1, 1, sizeof *c->offsets);
  c->a = ml_take(c, p->n_experts, 1, sizeof *c->a);
  c->b = ml_take(c, p->n_experts, 1, sizeof *c->b);
  c->grad_a = ml_take(c, p->n_experts, 1, sizeof *c->grad_a);
  c->grad_b = ml_take(c, p->n_experts, 1, sizeof *c->grad_b);
  if (!c->grouped) {
    c->factors = ml_take(c, c->T, p->n_experts, c->size);
    if (p->top_k) c->keep = ml_take(c, c->T, p->n_experts, 1);
  }
  c->offsets[0] = 0;
  for (int64_t e = 0; e < p->n_experts; e++) {
    const ml_expert *expert = &p->experts[e];
    c->offsets[e + 1] = c->offsets[e] + rank_of(c, e);
    c->a[e] = (ml_matrix){expert->a.data, row_stride(expert, expert->a.row), expert->a.col};
    c->b[e] = (ml_matrix){expert->b.data, row_stride(expert, expert->b.col), expert->b.row};
    c->grad_a[e] = expert->grad_a;
    c->grad_b[e] = (ml_matrix){expert->grad_b.data, expert->grad_b.col, expert->grad_b.row};
  }
}

factor ml_factor_a(const call *c) { return (factor){c->p->d_in, c->p->n_experts, c->offsets, c->a}; }
factor ml_factor_b(const call *c) { return (factor){c->p->d_out, c->p->n_experts, c->offsets, c->b}; }
factor ml_factor_grad_a(const call *c) { return (factor){c->p->d_in, c->p->n_experts, c->offsets, c->grad_a}; }
factor ml_factor_grad_b(const call *c) { return (factor){c->p->d_out, c->p->n_experts, c->offsets, c->grad_b}; }

/* ---- tokens with any strides ---- */

bool ml_one_stride(const ml_routed_lora *p, ml_tokens v, int64_t *stride) {
  *stride = p->seq > 1 ? v.seq : v.batch;
  return p->batch <= 1 || p->seq <= 1 || v.batch == p->seq * v.seq;
}

bool ml_is_rows(const ml_routed_lora *p, ml_tokens v) {
  int64_t unused;
  return !v.data || (v.col == 1 && ml_one_stride(p, v, &unused));
}

bool ml_as_rows(const call *c, ml_tokens v, int64_t width, rows *out) {
  if (v.col != 1 && width > 1) return false;
  out->data = v.data;
  return ml_one_stride(c->p, v, &out->row);
}

void ml_copy_tokens(const call *c, ml_tokens from, ml_tokens to, int64_t width) {
  if (c->T == 0) return;
  for (int64_t b = 0; b < c->p->batch; b++)
    c->elementwise->copy(c->p->seq, width, at(c, from.data, b * from.batch), from.seq, from.col,
                         at(c, to.data, b * to.batch), to.seq, to.col, false);
}

ml_tokens ml_dense(const call *c, void *data, int64_t width) { return (ml_tokens){data, c->p->seq * width, width, 1}; }

void ml_reserve_rows(const call *c, budget *b, ml_tokens v, int64_t width) {
  rows unused;
  if (!ml_as_rows(c, v, width, &unused)) ml_reserve(b, c->T, width, c->size);
}

rows ml_input_rows(call *c, ml_tokens v, int64_t width) {
  rows r;
  if (ml_as_rows(c, v, width, &r)) return r;
  ml_tokens copy = ml_dense(c, ml_take(c, c->T, width, c->size), width);
  ml_copy_tokens(c, v, copy, width);
  return (rows){copy.data, width};
}

/* Memory that glibc maps afresh for each allocation, which it does from this size on, gets its pages when it is first
 * written. Threads that write columns of the same rows would wait for each other's; here each has rows of its own. */
enum { FRESH_BYTES = 32 << 20, PAGE_BYTES = 4096, TOUCHED_PAGES = 512 };

static void touch_pages(void *context, int64_t task, int thread) {
  (void)thread;
  char *page = (char *)context + task * TOUCHED_PAGES * PAGE_BYTES;
  /* A write that changes nothing, since it may be what is added to. */
  for (int i = 0; i < TOUCHED_PAGES; i++, page += PAGE_BYTES) __atomic_fetch_or(page, 0, __ATOMIC_RELAXED);
}

static void touch(const call *c, char *data, int64_t bytes) {
  if (bytes >= FRESH_BYTES) ml_parallel_for(c->p->n_threads, bytes / (TOUCHED_PAGES * PAGE_BYTES), touch_pages, data);
}

rows ml_output_rows(call *c, ml_tokens v, int64_t width) {
  rows r;
  if (!ml_as_rows(c, v, width, &r)) return (rows){ml_take(c, c->T, width, c->size), width};
  if (r.row == width) touch(c, r.data, c->T * width * c->row_size);
  return r;
}

void ml_finish_rows(const call *c, rows r, ml_tokens v, int64_t width) {
  if (r.data != v.data) ml_copy_tokens(c, ml_dense(c, r.data, width), v, width);
}

bool ml_is_dense_hidden(const call *c, ml_tokens v) {
  rows r;
  return v.data && ml_as_rows(c, v, c->R, &r) && (r.row == c->R || c->T <= 1);
}

bool ml_has_dense_rows(factor m) {
  for (int64_t e = 0; e < m.n_parts; e++)
    if (m.parts[e].data && m.parts[e].col != 1 && m.d > 1) return false;
  return true;
}

bool ml_has_dense_columns(factor m) {
  for (int64_t e = 0; e < m.n_parts; e++)
    if (m.parts[e].data && m.parts[e].row != 1) return false;
  return true;
}
