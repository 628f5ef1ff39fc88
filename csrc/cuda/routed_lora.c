/* Forward and backward of a layer: which kernels run, in which order. */
#include "layer.h"

static ml_narrow narrow_of(const places *p) {
  return (ml_narrow){.factors = p->prepared.factors,
                     .experts = p->prepared.experts,
                     .scalings = p->prepared.scalings,
                     .mixed = p->mixed,
                     .tokens = p->prepared.tokens,
                     .columns = p->prepared.columns,
                     .n_experts = p->prepared.n_experts};
}

/* Whether the gradient of weights is what the shrink leaves, [T, N] in float32. */
static bool is_plain_grad_w(const ml_layer *layer) {
  return layer->share == 1 && layer->weights.dtype == ML_CUDA_F32 && layer->weights.top_k == 0;
}

static ml_cuda_status grad_weights(const ml_layer *layer, const float *per_token, void *grad_w) {
  bool own = layer->share == 1;
  int64_t numbers = layer->tokens / layer->share * layer->n_experts;
  int count = (int)(own ? layer->tokens : layer->share);
  void *arguments[] = {(void *)(uintptr_t)&layer->weights, &per_token, &grad_w, &count};
  return ml_layer_launch(layer, (ml_variant){ML_MIX, {layer->f16}}, own ? "ml_grad_own_weights" : "ml_grad_weights",
                         (ml_launch){.grid = (unsigned)(own ? ceil_div(numbers, 256) : numbers), .block = 256},
                         arguments);
}

/* ---- forward and backward ---- */

ml_cuda_status ml_layer_forward(const ml_layer *layer, ml_rows x, void *y, void *hidden, void *workspace) {
  ml_way way = ml_layer_way(layer, false);
  places p = ml_places_in(layer, workspace, false);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = hidden;
  if (way == ML_BY_TORCH || !are_rows(x.data, x.row, layer->d_in)) {
    return ML_CUDA_UNSUPPORTED;
  }
  if (way == ML_BY_GROUPED) {
    pair_places of_pairs = ml_pair_places_in(layer, workspace, false);
    ml_cuda_status status = ml_pairs_arrange(layer, &of_pairs, NULL);
    if (status == ML_CUDA_OK) {
      ml_pair_side side = {.mixed = of_pairs.mixed, .hidden = hidden, .columns = layer->columns};
      status = ml_pairs_shrink(layer, &of_pairs, x, side, false);
    }
    return status == ML_CUDA_OK ? ml_pairs_spread(layer, &of_pairs, x, y, false) : status;
  }
  if (way == ML_BY_DECODE) {
    ml_cuda_status status = ml_few(layer, x, p.mixed, hidden);
    return status == ML_CUDA_OK ? ml_decode(layer, x, p.mixed, y) : status;
  }
  ml_cuda_status status = ml_dense_prepare(layer, &p);
  if (status == ML_CUDA_OK && layer->drops) {
    status = ml_drop_project(layer, &p, narrow, x);
  } else if (status == ML_CUDA_OK && (way == ML_BY_DUAL || way == ML_BY_ADDMM)) {
    status = ml_dense_project(layer, &p, narrow, x, false);
  }
  return status == ML_CUDA_OK && way != ML_BY_ADDMM ? ml_dense_wide_side(layer, way, &p, narrow, x, y, false) : status;
}

static ml_cuda_status grouped_backward(const ml_layer *layer, ml_rows x, ml_rows grad_y, const void *hidden,
                                       void *grad_x, void *grad_w, const ml_adapter *grads, void *workspace) {
  pair_places p = ml_pair_places_in(layer, workspace, true);
  ml_pair_side side = {.mixed = p.mixed,
                       .weighted = hidden != NULL ? p.weighted : NULL,
                       .hidden = (void *)(uintptr_t)hidden,
                       .grad_w = grad_w,
                       .columns = layer->columns,
                       .weights_dtype = layer->weights.dtype};
  ml_cuda_status status = ml_pairs_arrange(layer, &p, grad_w);
  if (status == ML_CUDA_OK) {
    status = ml_pairs_shrink(layer, &p, grad_y, side, true);
  }
  if (status == ML_CUDA_OK) {
    status = ml_pairs_collect(layer, &p, x, grad_y, grads);
  }
  return status == ML_CUDA_OK && grad_x != NULL ? ml_pairs_spread(layer, &p, grad_y, grad_x, true) : status;
}

ml_cuda_status ml_layer_backward(const ml_layer *layer, ml_rows x, ml_rows grad_y, const void *hidden, void *grad_x,
                                 bool adds, void *grad_w, const ml_adapter *grads, void *workspace) {
  ml_way way = ml_layer_way(layer, true);
  places p = ml_places_in(layer, workspace, true);
  ml_narrow narrow = narrow_of(&p);
  bool has_product = layer->drops || (way != ML_BY_TORCH && way != ML_BY_ADDMM);
  if (!ml_layer_has_kernels(layer) || (grad_x != NULL && !has_product) ||
      !are_rows(grad_y.data, grad_y.row, layer->d_out) || (x.data != NULL && !are_rows(x.data, x.row, layer->d_in))) {
    return ML_CUDA_UNSUPPORTED;
  }
  if (ml_backward_groups(layer)) {
    return grouped_backward(layer, x, grad_y, hidden, grad_x, grad_w, grads, workspace);
  }
  narrow.hidden = (void *)(uintptr_t)hidden;
  narrow.weighted = hidden != NULL ? p.weighted : NULL;
  narrow.grad_w = grad_w == NULL ? NULL : is_plain_grad_w(layer) ? grad_w : p.grad_w;
  ml_adapter undropped[ML_TABLE_EXPERTS];
  for (int e = 0; e < layer->n_experts; e++) {
    undropped[e] = (ml_adapter){.a = layer->drops ? NULL : grads[e].a, .b = grads[e].b};
  }
  ml_cuda_status status = ml_dense_prepare(layer, &p);
  if (status == ML_CUDA_OK && (grad_x == NULL || way == ML_BY_DUAL || layer->drops)) {
    status = ml_dense_project(layer, &p, narrow, grad_y, true);
  }
  if (status == ML_CUDA_OK && grad_x != NULL && !layer->drops) {
    status = ml_dense_wide_side(layer, way, &p, narrow, grad_y, grad_x, true);
  }
  if (status == ML_CUDA_OK) {
    status = ml_dense_collect(layer, &p, x, grad_y, undropped);
  }
  if (status == ML_CUDA_OK && layer->drops) {
    status = ml_drop_backward(layer, &p, x, grad_x, adds, grads);
  }
  if (status == ML_CUDA_OK && narrow.grad_w != grad_w) {
    status = grad_weights(layer, p.grad_w, grad_w);
  }
  return status;
}

/* ---- between torch's products ---- */

ml_cuda_status ml_layer_prepare(const ml_layer *layer, void *workspace) {
  places p = ml_places_in(layer, workspace, true);
  return ml_dense_prepare(layer, &p);
}

ml_cuda_status ml_layer_shrink(const ml_layer *layer, ml_rows x, void *hidden, void *workspace) {
  places p = ml_places_in(layer, workspace, false);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = hidden;
  return layer->drops && ml_can_drop(x) ? ml_drop_project(layer, &p, narrow, x) : ML_CUDA_UNSUPPORTED;
}

ml_cuda_status ml_layer_mix(const ml_layer *layer, const void *hidden, void *workspace) {
  places p = ml_places_in(layer, workspace, true);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = (void *)(uintptr_t)hidden;
  void *arguments[] = {&narrow};
  return ml_layer_launch(layer, (ml_variant){ML_MIX, {layer->f16}}, "ml_mix",
                         (ml_launch){.grid = (unsigned)ceil_div(layer->tokens * layer->columns / 8, 256), .block = 256},
                         arguments);
}

ml_cuda_status ml_layer_mix_backward(const ml_layer *layer, const void *hidden, void *grad_w, void *workspace) {
  places p = ml_places_in(layer, workspace, true);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = (void *)(uintptr_t)hidden;
  narrow.weighted = hidden != NULL ? p.weighted : NULL;
  narrow.grad_w = grad_w == NULL ? NULL : is_plain_grad_w(layer) ? grad_w : p.grad_w;
  void *arguments[] = {(void *)(uintptr_t)&layer->adapters, &narrow};
  ml_cuda_status status = ml_layer_launch(
      layer, (ml_variant){ML_MIX, {layer->f16}}, "ml_mix_backward",
      (ml_launch){.grid = (unsigned)ceil_div(layer->tokens * layer->n_experts, 256), .block = 256}, arguments);
  return status == ML_CUDA_OK && narrow.grad_w != grad_w ? grad_weights(layer, p.grad_w, grad_w) : status;
}

ml_cuda_status ml_layer_drop_backward(const ml_layer *layer, ml_rows x, void *grad_x, bool adds,
                                      const ml_adapter *grads, void *workspace) {
  places p = ml_places_in(layer, workspace, true);
  return layer->drops && ml_can_drop(x) && is_aligned(grad_x) ? ml_drop_backward(layer, &p, x, grad_x, adds, grads)
                                                              : ML_CUDA_UNSUPPORTED;
}
