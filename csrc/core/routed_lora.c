/* Forward and backward of a mixture of LoRA experts over one linear layer; call.h has the three products. */
#include <stdlib.h>

#include "grouped.h"

/* ---- forward ---- */

typedef struct {
  const call *c;
  char *h;        /* [T, R]: H; dropped experts are zeroed */
  char *weighted; /* [T, R]: s w * H */
} weighing;

static void weigh(const void *context, int64_t first, int64_t last) {
  const weighing *w = context;
  const call *c = w->c;
  const ml_routed_lora *p = c->p;
  c->elementwise->factors(first, last, p->seq, p->n_experts, p->routing_weights, p->experts, p->top_k, c->factors,
                          c->keep);
  if (p->top_k) c->elementwise->drop(first, last, p->n_experts, c->offsets, c->keep, w->h);
  c->elementwise->weigh(first, last, p->n_experts, c->offsets, c->factors, w->h, w->weighted);
}

ml_status ml_begin_forward(forward *f, const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base,
                           const void *bias, int64_t bias_stride) {
  *f = (forward){.y = y, .hidden = hidden, .base = base, .bias = bias, .bias_stride = bias_stride};
  call *c = &f->c;
  budget *need = &f->need;
  ml_status status = ml_begin(c, p, !hidden.data);
  if (status != ML_OK) return status;
  if (c->T > 0 && (!p->x.data || !y.data)) return ML_ERR_NULL;
  if ((base.data && p->weight.data) || (bias && !p->weight.data)) return ML_ERR_VALUE;
  f->own_hidden = !c->grouped && !ml_is_dense_hidden(c, hidden);

  ml_reserve_common(c, need);
  ml_reserve_rows(c, need, p->x, p->d_in);
  ml_reserve_rows(c, need, y, p->d_out);
  if (bias) ml_reserve(need, 1, p->d_out, c->size);
  if (c->grouped) {
    ml_reserve_grouping(c, need);
    ml_reserve(need, c->T, ml_kept_width(c), c->size);
  } else {
    if (f->own_hidden) ml_reserve(need, c->T, c->R, c->size);
    if (hidden.data) ml_reserve(need, c->T, c->R, c->size);
    ml_reserve_projection(c, need, c->R, p->d_in, c->drops);
    ml_reserve_spreading(c, need, p->d_out);
  }
  if (p->weight.data) ml_reserve_base(c, need, p->d_out);
  return ML_OK;
}

void ml_run_forward(forward *f) {
  call *c = &f->c;
  const ml_routed_lora *p = c->p;
  if (c->T == 0) return;
  ml_take_common(c);

  rows x = ml_input_rows(c, p->x, p->d_in);
  rows out = ml_output_rows(c, f->y, p->d_out);
  rows init = {NULL, 0};
  if (f->bias) {
    init = (rows){ml_take(c, 1, p->d_out, c->size), 0};
    c->elementwise->copy(1, p->d_out, f->bias, 0, f->bias_stride, init.data, 0, 1, false);
  } else if (f->base.data && !ml_as_rows(c, f->base, p->d_out, &init)) {
    ml_copy_tokens(c, f->base, (ml_tokens){out.data, p->seq * out.row, out.row, 1}, p->d_out);
    init = out;
  }

  if (c->grouped) {
    grouping g;
    char *h = ml_take(c, c->T, ml_kept_width(c), c->size);
    ml_group(c, &g, f->hidden, true);
    ml_project_grouped(c, &g, x, h);
    ml_spread_grouped(c, &g, ml_factor_b(c), h, out, init);
  } else {
    char *h = f->own_hidden ? ml_take(c, c->T, c->R, c->size) : f->hidden.data;
    weighing w = {.c = c, .h = h, .weighted = f->hidden.data ? ml_take(c, c->T, c->R, c->size) : h};
    if (c->drops)
      ml_project_masked(c, ml_factor_a(c), x, (rows){h, c->R}, weigh, &w);
    else
      ml_project(c, ml_factor_a(c), x, (rows){h, c->R}, NULL, weigh, &w);
    ml_spread(c, ml_factor_b(c), w.weighted, out, init);
    if (f->own_hidden && f->hidden.data) ml_copy_tokens(c, ml_dense(c, h, c->R), f->hidden, c->R);
  }
  if (p->weight.data)
    ml_add_base(c, x, p->d_in, (ml_matrix){p->weight.data, p->weight.col, p->weight.row}, p->d_out, out);

  ml_finish_rows(c, out, f->y, p->d_out);
}

ml_status ml_routed_lora_forward(const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base,
                                 const void *bias, int64_t bias_stride) {
  if (p->dtype == ML_BF16) return bias ? ML_ERR_VALUE : ml_bf16_forward(p, y, hidden, base);
  forward f;
  ml_status status = ml_begin_forward(&f, p, y, hidden, base, bias, bias_stride);
  if (status != ML_OK) return status;
  status = ml_allocate(&f.c, f.need);
  if (status != ML_OK) return status;
  ml_run_forward(&f);
  free(f.c.workspace);
  return ML_OK;
}

/* ---- backward ---- */

typedef struct {
  const call *c;
  const char *h;     /* [T, R] */
  char *p;           /* [T, R]: P, turned into Q = s w * P; NULL: not needed */
  char *weighted;    /* [T, R]: s w * H; NULL: not needed */
  char *token_grads; /* [T, N]: gradient of each token's weights; NULL: not needed */
} gradient_weighing;

static void weigh_gradients(const void *context, int64_t first, int64_t last) {
  const gradient_weighing *w = context;
  const call *c = w->c;
  const ml_routed_lora *p = c->p;
  const ml_elementwise *f = c->elementwise;
  int64_t N = p->n_experts;
  f->factors(first, last, p->seq, N, p->routing_weights, p->experts, p->top_k, c->factors, c->keep);
  if (w->token_grads) f->weight_grads(first, last, N, c->offsets, p->experts, c->keep, w->p, w->h, w->token_grads);
  if (w->p) {
    if (p->top_k) f->drop(first, last, N, c->offsets, c->keep, w->p);
    f->weigh(first, last, N, c->offsets, c->factors, w->p, w->p);
  }
  if (w->weighted) f->weigh(first, last, N, c->offsets, c->factors, w->h, w->weighted);
}

/* Leaves the wanted gradients of A of the experts with dropout, or of those without; false: there are none. */
static bool place_grads_a(call *c, bool with_dropout) {
  bool any = false;
  for (int64_t e = 0; e < c->p->n_experts; e++) {
    bool here = (ml_mask_of(c->p, e).threshold > 0) == with_dropout;
    c->grad_a[e] = here ? c->p->experts[e].grad_a : (ml_matrix){0};
    any |= c->grad_a[e].data != NULL;
  }
  return any;
}

ml_status ml_begin_backward(backward *b, const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                            ml_tokens grad_w, unsigned accumulate) {
  *b = (backward){.grad_y = grad_y, .hidden = hidden, .grad_x = grad_x, .grad_w = grad_w, .accumulate = accumulate};
  call *c = &b->c;
  budget *need = &b->need;
  ml_status status = ml_begin(c, p, false);
  if (status != ML_OK) return status;
  for (int64_t e = 0; e < p->n_experts; e++) {
    b->any_a |= p->experts[e].grad_a.data != NULL;
    b->any_b |= p->experts[e].grad_b.data != NULL;
  }
  b->need_h = b->any_b || grad_w.data;
  b->need_p = grad_x.data || b->any_a || grad_w.data;
  if (c->T > 0 && (!grad_y.data || (b->need_h && !hidden.data) || (b->any_a && !p->x.data))) return ML_ERR_NULL;
  b->own_hidden = b->need_h && !c->grouped && !ml_is_dense_hidden(c, hidden);

  ml_reserve_common(c, need);
  ml_reserve_rows(c, need, grad_y, p->d_out);
  if (b->any_a) ml_reserve_rows(c, need, p->x, p->d_in);
  if (grad_x.data) ml_reserve_rows(c, need, grad_x, p->d_in);
  if (grad_x.data && p->weight.data) ml_reserve_base(c, need, p->d_in);
  if (c->grouped) {
    ml_reserve_grouping(c, need);
    if (b->need_p) ml_reserve(need, c->T, ml_kept_width(c), c->size);
    if (b->need_h) ml_reserve(need, c->T, ml_kept_width(c), c->size);
    if (grad_w.data) ml_reserve_grad_w(c, need);
  } else {
    if (b->own_hidden) ml_reserve(need, c->T, c->R, c->size);
    if (b->need_p) ml_reserve(need, c->T, c->R, c->size);
    if (b->any_b) ml_reserve(need, c->T, c->R, c->size);
    ml_reserve(need, 1, c->products->lanes, c->size); /* where vectors end that begin in P or the weighted H */
    if (grad_w.data) ml_reserve(need, c->T, p->n_experts, c->size);
    if (b->need_p) ml_reserve_projection(c, need, c->R, p->d_out, false);
    budget gradients[3] = {{0}}, together = {0}; /* but for dropout and pairs, these run at once */
    if (grad_x.data && c->drops)
      ml_reserve_masked_spreading(c, need, p->d_in);
    else if (grad_x.data)
      ml_reserve_spreading(c, &gradients[0], p->d_in);
    if (b->any_a) ml_reserve_collection(c, &gradients[1], p->d_in);
    if (b->any_a && c->drops) ml_reserve_masked_collection(c, need, p->d_in);
    if (b->any_b) ml_reserve_collection(c, &gradients[2], p->d_out);
    for (int i = 0; i < 3; i++) ml_reserve_apart(&together, gradients[i]);
    ml_reserve_phase(need, together);
  }
  return ML_OK;
}

void ml_run_backward(backward *b) {
  call *c = &b->c;
  const ml_routed_lora *p = c->p;
  ml_take_common(c);

  rows g = ml_input_rows(c, b->grad_y, p->d_out);
  gradient_weighing w = {.c = c, .h = b->hidden.data};
  grouping pairs;
  if (c->grouped) {
    if (b->need_p) w.p = ml_take(c, c->T, ml_kept_width(c), c->size);
    if (b->need_h) w.weighted = ml_take(c, c->T, ml_kept_width(c), c->size);
    ml_group(c, &pairs, b->hidden, false);
    ml_project_grads_grouped(c, &pairs, g, w.p, w.weighted, b->grad_w, (b->accumulate & ML_ACCUMULATE_W) != 0);
  } else {
    if (b->own_hidden) {
      ml_tokens copy = ml_dense(c, ml_take(c, c->T, c->R, c->size), c->R);
      ml_copy_tokens(c, b->hidden, copy, c->R);
      w.h = copy.data;
    }
    if (b->need_p) w.p = ml_take(c, c->T, c->R, c->size);
    if (b->any_b) w.weighted = ml_take(c, c->T, c->R, c->size);
    ml_take(c, 1, c->products->lanes, c->size);
    if (b->grad_w.data) w.token_grads = ml_take(c, c->T, p->n_experts, c->size);
    if (b->need_p && c->T)
      ml_project(c, ml_factor_b(c), g, (rows){w.p, c->R}, NULL, weigh_gradients, &w);
    else
      weigh_gradients(&w, 0, c->T);
    if (b->grad_w.data)
      c->elementwise->sum_weight_grads(p->batch, p->seq, p->n_experts, w.token_grads, b->grad_w,
                                       (b->accumulate & ML_ACCUMULATE_W) != 0);
  }

  rows out = {NULL, 0}, init = {NULL, 0}, x = {NULL, 0};
  bool add_a = (b->accumulate & ML_ACCUMULATE_A) != 0, add_b = (b->accumulate & ML_ACCUMULATE_B) != 0;
  if (b->grad_x.data && c->T) {
    out = ml_output_rows(c, b->grad_x, p->d_in);
    if (b->accumulate & ML_ACCUMULATE_X) {
      if (out.data != b->grad_x.data) ml_copy_tokens(c, b->grad_x, ml_dense(c, out.data, p->d_in), p->d_in);
      init = out;
    }
  }
  if (b->any_a) x = ml_input_rows(c, p->x, p->d_in);
  if (c->grouped) {
    if (out.data) ml_spread_grouped(c, &pairs, ml_factor_a(c), w.p, out, init);
    if (b->any_a && place_grads_a(c, false)) ml_collect_grouped(c, &pairs, ml_factor_grad_a(c), w.p, x, add_a);
    if (b->any_b) ml_collect_grouped(c, &pairs, ml_factor_grad_b(c), w.weighted, g, add_b);
  } else if (c->drops || c->pairs) {
    if (out.data && c->drops) ml_spread_masked(c, ml_factor_a(c), w.p, out, init);
    if (out.data && !c->drops) ml_spread(c, ml_factor_a(c), w.p, out, init);
    if (b->any_a && place_grads_a(c, false)) ml_collect(c, ml_factor_grad_a(c), w.p, x, add_a);
    if (b->any_a && place_grads_a(c, true)) ml_collect_masked(c, ml_factor_grad_a(c), w.p, x, add_a);
    if (b->any_b) ml_collect(c, ml_factor_grad_b(c), w.weighted, g, add_b);
  } else {
    ml_loop loops[3];
    int n = 0;
    size_t used = c->used;
    if (out.data) loops[n++] = ml_spread_loop(c, ml_factor_a(c), w.p, out, init);
    if (b->any_a) loops[n++] = ml_collect_loop(c, ml_factor_grad_a(c), w.p, x, add_a);
    if (b->any_b) loops[n++] = ml_collect_loop(c, ml_factor_grad_b(c), w.weighted, g, add_b);
    ml_parallel_loops(n, loops);
    c->used = used;
  }
  if (out.data) {
    if (p->weight.data) ml_add_base(c, g, p->d_out, p->weight, p->d_in, out);
    ml_finish_rows(c, out, b->grad_x, p->d_in);
  }
}

ml_status ml_routed_lora_backward(const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                                  ml_tokens grad_w, unsigned accumulate) {
  if (p->dtype == ML_BF16) return ml_bf16_backward(p, grad_y, hidden, grad_x, grad_w, accumulate);
  backward b;
  ml_status status = ml_begin_backward(&b, p, grad_y, hidden, grad_x, grad_w, accumulate);
  if (status != ML_OK) return status;
  status = ml_allocate(&b.c, b.need);
  if (status != ML_OK) return status;
  ml_run_backward(&b);
  free(b.c.workspace);
  return ML_OK;
}
