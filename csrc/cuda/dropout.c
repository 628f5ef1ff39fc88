/* Dropout of x, of which every expert has its own: what its masks follow from, and launches of dropout.cu. */
#include "kernels/philox.h"
#include "layer.h"

void ml_layer_drop(ml_layer *layer, uint64_t seed, const double *probabilities) {
  layer->drops = true;
  ml_dropout *to = &layer->dropout;
  _Static_assert(sizeof to->keys == PHILOX_ROUNDS * 2 * sizeof **to->keys, "the keys of all rounds");
  for (int round = 0; round < PHILOX_ROUNDS; round++) {
    for (int which = 0; which < 2; which++) {
      to->keys[round][which] = philox_key(seed, round, which);
    }
  }
  for (int e = 0; e < layer->n_experts; e++) {
    to->drops[e] = philox_threshold(probabilities[e]);
    to->scale[e] = (float)philox_scale(to->drops[e]);
  }
}

/* ---- slots, and the parts of sums ---- */

/* Blocks of 8 columns that an expert has. */
static int blocks_of(const ml_layer *layer, int e) { return (int)ceil_div(layer->experts[e].rank, 8); }

/* How many of them a slot has: more, and masks are drawn less often, but registers are few. */
static int slot_tiles(const ml_layer *layer) {
  int most = 1;
  for (int e = 0; e < layer->n_experts; e++) {
    int blocks = blocks_of(layer, e);
    most = blocks > most ? blocks : most;
  }
  return most > 2 ? 4 : most;
}

/* The slots of the experts that have a gradient of A, or of all. */
static ml_slots slots_of(const ml_layer *layer, const ml_adapter *grads) {
  ml_slots slots = {.n = 0};
  int tiles = slot_tiles(layer);
  for (int e = 0; e < layer->n_experts; e++) {
    int blocks = blocks_of(layer, e);
    for (int block = 0; block < blocks && (grads == NULL || grads[e].a != NULL); block += tiles) {
      slots.of[slots.n++] = (ml_slot){.block = (unsigned char)(layer->experts[e].column / 8 + block),
                                      .tiles = (unsigned char)min_(tiles, blocks - block),
                                      .expert = (unsigned char)e};
    }
  }
  return slots;
}

/* Groups of slots that share what a block reads, and how many are in each. */
static int slot_groups(const ml_slots *slots, int tiles) { return (int)ceil_div(slots->n, tiles == 4 ? 2 : 4); }
static int slot_ways(const ml_slots *slots, int groups) { return (int)ceil_div(slots->n, groups); }

/* Into how many parts a sum of `steps` is cut that `blocks` blocks would compute whole, for `wanted` on a multiprocessor. */
static int splits_for(const ml_layer *layer, int64_t blocks, int64_t steps, int wanted) {
  int64_t splits = wanted * (int64_t)layer->gpu->multiprocessors / blocks;
  return (int)(splits < 1 ? 1 : min_(splits, steps));
}

enum { SPAN = 128, DROP_ROWS = 64, COLLECT_ROWS = 32, SPREAD_ROWS = 128 }; /* as in dropout.cu */

static int project_splits(const ml_layer *layer, int groups) {
  return splits_for(layer, ceil_div(layer->tokens, DROP_ROWS) * groups, ceil_div(layer->d_in, SPAN), 4);
}
static int collect_splits(const ml_layer *layer, int groups) {
  return splits_for(layer, ceil_div(layer->d_in, SPAN) * groups, ceil_div(layer->tokens, COLLECT_ROWS), 3);
}

size_t ml_drop_parts_bytes(const ml_layer *layer, bool backward) {
  ml_slots slots = slots_of(layer, NULL);
  int groups = slot_groups(&slots, slot_tiles(layer));
  /* With fewer gradients there are fewer groups, and more parts: one group has the most. */
  int splits = backward ? collect_splits(layer, 1) : project_splits(layer, groups);
  return (size_t)splits * (size_t)layer->columns * (size_t)(backward ? layer->d_in : layer->tokens) * 4;
}

/* ---- launches ---- */

static ml_cuda_status launch_dropout(const ml_layer *layer, const char *entry, int64_t grid, int64_t block,
                                     int64_t shared_bytes, void **arguments) {
  ml_variant variant = {ML_DROPOUT, {layer->f16, (int16_t)slot_tiles(layer)}};
  ml_launch how = {.grid = (unsigned)grid, .block = (unsigned)block, .shared_bytes = (unsigned)shared_bytes};
  return ml_layer_launch(layer, variant, entry, how, arguments);
}

bool ml_can_drop(ml_rows x) { return is_aligned(x.data) && x.row % 8 == 0; }

static ml_cuda_rows x_of(const ml_layer *layer, ml_rows x) {
  return (ml_cuda_rows){x.data, x.row, (int)layer->tokens, (int)layer->d_in};
}

ml_cuda_status ml_drop_project(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x) {
  ml_slots slots = slots_of(layer, NULL);
  int tiles = slot_tiles(layer), groups = slot_groups(&slots, tiles), ways = slot_ways(&slots, groups);
  int splits = project_splits(layer, groups), columns = layer->columns;
  ml_slot last = slots.of[slots.n - 1];
  int blocks = last.block + last.tiles;
  ml_cuda_rows of_x = x_of(layer, x);
  const void *a = p->prepared.a;
  const float *parts = p->parts;
  void *shrink[] = {&of_x, &a, &parts, &columns, &splits, &slots, (void *)(uintptr_t)&layer->dropout};
  void *mix[] = {&narrow, &parts, &splits, &blocks};
  ml_cuda_status status = launch_dropout(layer, "ml_drop_project", ceil_div(layer->tokens, DROP_ROWS) * splits * groups,
                                         64 * ways, (2 * DROP_ROWS + 2 * ways * 8 * tiles) * SPAN * 2, shrink);
  return status == ML_CUDA_OK
             ? launch_dropout(layer, "ml_drop_mix", ceil_div(layer->tokens * columns / 8, 256), 256, 0, mix)
             : status;
}

/* dA_e = Q_e^T (D_e x). */
static ml_cuda_status drop_collect(const ml_layer *layer, const places *p, ml_rows x, const ml_adapter *grads) {
  ml_slots slots = slots_of(layer, grads);
  if (slots.n == 0) {
    return ML_CUDA_OK;
  }
  int groups = slot_groups(&slots, slot_tiles(layer)), ways = slot_ways(&slots, groups);
  int splits = collect_splits(layer, groups), columns = layer->columns, width = (int)layer->d_in;
  int f32 = layer->f32_adapters;
  ml_adapters to = layer->adapters;
  for (int e = 0; e < layer->n_experts; e++) {
    to.of[e].a = grads[e].a;
  }
  ml_cuda_rows of_x = x_of(layer, x);
  const void *q = p->mixed;
  const float *parts = p->parts;
  const int *experts = p->prepared.experts;
  void *collect[] = {&of_x, &q, &parts, &columns, &splits, &slots, (void *)(uintptr_t)&layer->dropout};
  void *store[] = {&to, &experts, &parts, &columns, &splits, &width, &f32};
  ml_cuda_status status =
      launch_dropout(layer, "ml_drop_collect", ceil_div(layer->d_in, SPAN) * splits * groups, 32 * ways, 0, collect);
  return status == ML_CUDA_OK
             ? launch_dropout(layer, "ml_drop_store", ceil_div(columns * layer->d_in / 4, 256), 256, 0, store)
             : status;
}

/* grad_x (+)= sum_e D_e (Q_e A_e). */
static ml_cuda_status drop_spread(const ml_layer *layer, const places *p, void *grad_x, bool adds) {
  ml_slots slots = slots_of(layer, NULL);
  const void *q = p->mixed, *a = p->prepared.a;
  int add = adds, tokens = (int)layer->tokens, width = (int)layer->d_in, columns = layer->columns;
  void *arguments[] = {&q, &a, &grad_x, &add, &tokens, &width, &columns, &slots, (void *)(uintptr_t)&layer->dropout};
  return launch_dropout(layer, "ml_drop_spread", ceil_div(layer->d_in, SPAN) * ceil_div(layer->tokens, SPREAD_ROWS),
                        256, 0, arguments);
}

ml_cuda_status ml_drop_backward(const ml_layer *layer, const places *p, ml_rows x, void *grad_x, bool adds,
                                const ml_adapter *grads) {
  ml_cuda_status status = drop_collect(layer, p, x, grads);
  return status == ML_CUDA_OK && grad_x != NULL ? drop_spread(layer, p, grad_x, adds) : status;
}
