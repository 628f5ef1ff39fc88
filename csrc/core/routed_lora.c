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

ml_status ml_routed_lora_forward(const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base,
                                 const void *bias, int64_t bias_stride) {
  if (p->dtype == ML_BF16) return bias ? ML_ERR_VALUE : ml_bf16_forward(p, y, hidden, base);
  call c;
  budget need = {0};
  ml_status status = ml_begin(&c, p, !hidden.data);
  if (status != ML_OK) return status;
  if (c.T > 0 && (!p->x.data || !y.data)) return ML_ERR_NULL;
  if ((base.data && p->weight.data) || (bias && !p->weight.data)) return ML_ERR_VALUE;
  bool own_hidden = !c.grouped && !ml_is_dense_hidden(&c, hidden);

  ml_reserve_common(&c, &need);
  ml_reserve_rows(&c, &need, p->x, p->d_in);
  ml_reserve_rows(&c, &need, y, p->d_out);
  if (bias) ml_reserve(&need, 1, p->d_out, c.size);
  if (c.grouped) {
    ml_reserve_grouping(&c, &need);
    ml_reserve(&need, c.T, ml_kept_width(&c), c.size);
  } else {
    if (own_hidden) ml_reserve(&need, c.T, c.R, c.size);
    if (hidden.data) ml_reserve(&need, c.T, c.R, c.size);
    ml_reserve_projection(&c, &need, c.R, p->d_in, c.drops);
    ml_reserve_spreading(&c, &need, p->d_out);
  }
  if (p->weight.data) ml_reserve_base(&c, &need, p->d_out);
  status = ml_allocate(&c, need);
  if (status != ML_OK || c.T == 0) goto done;

  rows x = ml_input_rows(&c, p->x, p->d_in);
  rows out = ml_output_rows(&c, y, p->d_out);
  rows init = {NULL, 0};
  if (bias) {
    init = (rows){ml_take(&c, 1, p->d_out, c.size), 0};
    c.elementwise->copy(1, p->d_out, bias, 0, bias_stride, init.data, 0, 1, false);
  } else if (base.data && !ml_as_rows(&c, base, p->d_out, &init)) {
    ml_copy_tokens(&c, base, (ml_tokens){out.data, p->seq * out.row, out.row, 1}, p->d_out);
    init = out;
  }

  if (c.grouped) {
    grouping g;
    char *h = ml_take(&c, c.T, ml_kept_width(&c), c.size);
    ml_group(&c, &g, hidden, true);
    ml_project_grouped(&c, &g, x, h);
    ml_spread_grouped(&c, &g, ml_factor_b(&c), h, out, init);
  } else {
    char *h = own_hidden ? ml_take(&c, c.T, c.R, c.size) : hidden.data;
    weighing w = {.c = &c, .h = h, .weighted = hidden.data ? ml_take(&c, c.T, c.R, c.size) : h};
    if (c.drops)
      ml_project_masked(&c, ml_factor_a(&c), x, (rows){h, c.R}, weigh, &w);
    else
      ml_project(&c, ml_factor_a(&c), x, (rows){h, c.R}, NULL, weigh, &w);
    ml_spread(&c, ml_factor_b(&c), w.weighted, out, init);
    if (own_hidden && hidden.data) ml_copy_tokens(&c, ml_dense(&c, h, c.R), hidden, c.R);
  }
  if (p->weight.data)
    ml_add_base(&c, x, p->d_in, (ml_matrix){p->weight.data, p->weight.col, p->weight.row}, p->d_out, out);

  ml_finish_rows(&c, out, y, p->d_out);
done:
  free(c.workspace);
  return status;
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

/* Makes M_A the wanted gradients of A, of the experts with dropout or of those without; false: there are none. */
static bool place_grads_a(call *c, bool with_dropout) {
  bool any = false;
  for (int64_t e = 0; e < c->p->n_experts; e++) {
    bool here = (ml_mask_of(c->p, e).threshold > 0) == with_dropout;
    c->a[e] = here ? c->p->experts[e].grad_a : (ml_matrix){0};
    any |= c->a[e].data != NULL;
  }
  return any;
}

ml_status ml_routed_lora_backward(const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                                  ml_tokens grad_w, unsigned accumulate) {
  if (p->dtype == ML_BF16) return ml_bf16_backward(p, grad_y, hidden, grad_x, grad_w, accumulate);
  call c;
  budget need = {0};
  ml_status status = ml_begin(&c, p, false);
  if (status != ML_OK) return status;
  bool any_a = false, any_b = false;
  for (int64_t e = 0; e < p->n_experts; e++) {
    any_a |= p->experts[e].grad_a.data != NULL;
    any_b |= p->experts[e].grad_b.data != NULL;
  }
  bool need_h = any_b || grad_w.data, need_p = grad_x.data || any_a || grad_w.data;
  if (c.T > 0 && (!grad_y.data || (need_h && !hidden.data) || (any_a && !p->x.data))) return ML_ERR_NULL;
  bool own_hidden = need_h && !c.grouped && !ml_is_dense_hidden(&c, hidden);

  ml_reserve_common(&c, &need);
  ml_reserve_rows(&c, &need, grad_y, p->d_out);
  if (any_a) ml_reserve_rows(&c, &need, p->x, p->d_in);
  if (grad_x.data) ml_reserve_rows(&c, &need, grad_x, p->d_in);
  if (grad_x.data && p->weight.data) ml_reserve_base(&c, &need, p->d_in);
  if (c.grouped) {
    ml_reserve_grouping(&c, &need);
    if (need_p) ml_reserve(&need, c.T, ml_kept_width(&c), c.size);
    if (need_h) ml_reserve(&need, c.T, ml_kept_width(&c), c.size);
    if (grad_w.data) ml_reserve_grad_w(&c, &need);
  } else {
    if (own_hidden) ml_reserve(&need, c.T, c.R, c.size);
    if (need_p) ml_reserve(&need, c.T, c.R, c.size);
    if (any_b) ml_reserve(&need, c.T, c.R, c.size);
    ml_reserve(&need, 1, c.products->lanes, c.size); /* where vectors end that begin in P or the weighted H */
    if (grad_w.data) ml_reserve(&need, c.T, p->n_experts, c.size);
    if (need_p) ml_reserve_projection(&c, &need, c.R, p->d_out, false);
    if (grad_x.data && c.drops)
      ml_reserve_masked_spreading(&c, &need, p->d_in);
    else if (grad_x.data)
      ml_reserve_spreading(&c, &need, p->d_in);
    if (any_a) ml_reserve_collection(&c, &need, p->d_in);
    if (any_a && c.drops) ml_reserve_masked_collection(&c, &need, p->d_in);
    if (any_b) ml_reserve_collection(&c, &need, p->d_out);
  }
  status = ml_allocate(&c, need);
  if (status != ML_OK) goto done;

  rows g = ml_input_rows(&c, grad_y, p->d_out);
  gradient_weighing w = {.c = &c, .h = hidden.data};
  grouping pairs;
  if (c.grouped) {
    if (need_p) w.p = ml_take(&c, c.T, ml_kept_width(&c), c.size);
    if (need_h) w.weighted = ml_take(&c, c.T, ml_kept_width(&c), c.size);
    ml_group(&c, &pairs, hidden, false);
    ml_project_grads_grouped(&c, &pairs, g, w.p, w.weighted, grad_w, (accumulate & ML_ACCUMULATE_W) != 0);
  } else {
    if (own_hidden) {
      ml_tokens copy = ml_dense(&c, ml_take(&c, c.T, c.R, c.size), c.R);
      ml_copy_tokens(&c, hidden, copy, c.R);
      w.h = copy.data;
    }
    if (need_p) w.p = ml_take(&c, c.T, c.R, c.size);
    if (any_b) w.weighted = ml_take(&c, c.T, c.R, c.size);
    ml_take(&c, 1, c.products->lanes, c.size);
    if (grad_w.data) w.token_grads = ml_take(&c, c.T, p->n_experts, c.size);
    if (need_p && c.T)
      ml_project(&c, ml_factor_b(&c), g, (rows){w.p, c.R}, NULL, weigh_gradients, &w);
    else
      weigh_gradients(&w, 0, c.T);
    if (grad_w.data)
      c.elementwise->sum_weight_grads(p->batch, p->seq, p->n_experts, w.token_grads, grad_w,
                                      (accumulate & ML_ACCUMULATE_W) != 0);
  }

  if (grad_x.data && c.T) {
    rows out = ml_output_rows(&c, grad_x, p->d_in);
    rows init = {NULL, 0};
    if (accumulate & ML_ACCUMULATE_X) {
      if (out.data != grad_x.data) ml_copy_tokens(&c, grad_x, ml_dense(&c, out.data, p->d_in), p->d_in);
      init = out;
    }
    if (c.grouped)
      ml_spread_grouped(&c, &pairs, ml_factor_a(&c), w.p, out, init);
    else if (c.drops)
      ml_spread_masked(&c, ml_factor_a(&c), w.p, out, init);
    else
      ml_spread(&c, ml_factor_a(&c), w.p, out, init);
    if (p->weight.data) ml_add_base(&c, g, p->d_out, p->weight, p->d_in, out);
    ml_finish_rows(&c, out, grad_x, p->d_in);
  }
  /* A and B have been read for the last time: their places in the factors now say where the gradients go. */
  if (any_a) {
    rows x = ml_input_rows(&c, p->x, p->d_in);
    bool add = (accumulate & ML_ACCUMULATE_A) != 0;
    if (place_grads_a(&c, false)) {
      if (c.grouped)
        ml_collect_grouped(&c, &pairs, ml_factor_a(&c), w.p, x, add);
      else
        ml_collect(&c, ml_factor_a(&c), w.p, x, add);
    }
    if (c.drops && place_grads_a(&c, true)) ml_collect_masked(&c, ml_factor_a(&c), w.p, x, add);
  }
  for (int64_t e = 0; e < p->n_experts; e++) {
    ml_matrix grad_b = p->experts[e].grad_b;
    c.b[e] = (ml_matrix){grad_b.data, grad_b.col, grad_b.row};
  }
  if (any_b && c.grouped)
    ml_collect_grouped(&c, &pairs, ml_factor_b(&c), w.weighted, g, (accumulate & ML_ACCUMULATE_B) != 0);
  else if (any_b)
    ml_collect(&c, ml_factor_b(&c), w.weighted, g, (accumulate & ML_ACCUMULATE_B) != 0);
done:
  free(c.workspace);
  return status;
}
