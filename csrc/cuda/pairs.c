/* Launches for the top k experts of each token alone: choose.cu, pairs.cu, and dual.cu for the base product. */
#include <string.h>

#include "layer.h"

int ml_pair_ranks(const ml_layer *layer) { return layer->most_rank <= 16 ? 16 : layer->most_rank <= 32 ? 32 : 64; }

int ml_pair_chunks(const ml_layer *layer, int *chunk) {
  int64_t tokens = round_up(ceil_div(layer->tokens, ML_PAIR_CHUNKS), 8);
  *chunk = tokens < 32 ? 32 : (int)tokens;
  return (int)ceil_div(layer->tokens, *chunk);
}

static ml_cuda_status launch_pairs(const ml_layer *layer, const char *entry, bool backward, bool deep, int64_t grid,
                                   int64_t block, int64_t shared_bytes, void **arguments) {
  ml_variant variant = {ML_PAIRS, {layer->f16, layer->f32_adapters, backward, (int16_t)ml_pair_ranks(layer), deep}};
  return ml_layer_launch(
      layer, variant, entry,
      (ml_launch){
          .grid = (unsigned)grid, .block = (unsigned)block, .shared_bytes = (unsigned)shared_bytes, .early = true},
      arguments);
}

/* Those of the experts, or of their gradients, from `first` on that travel together; how many. */
static int table_from(const ml_adapter *experts, int n_experts, int first, ml_adapters *table) {
  int n = (int)min_(n_experts - first, ML_TABLE_EXPERTS);
  memcpy(table->of, experts + first, (size_t)n * sizeof *experts);
  return n;
}

ml_cuda_status ml_pairs_arrange(const ml_layer *layer, const pair_places *p, void *grad_w) {
  ml_variant variant = {ML_CHOOSE, {layer->f16}};
  ml_cuda_status status = ML_CUDA_OK;
  ml_adapters table;
  for (int first = ML_TABLE_EXPERTS; status == ML_CUDA_OK && first < layer->n_experts; first += ML_TABLE_EXPERTS) {
    int n = table_from(layer->experts, layer->n_experts, first, &table);
    ml_adapter *to = p->pairs.experts + first;
    void *arguments[] = {&table, &to, &n};
    status = ml_layer_launch(layer, variant, "ml_experts", (ml_launch){.grid = 1, .block = 128}, arguments);
  }
  table_from(layer->experts, layer->n_experts, 0, &table);
  int chunk;
  unsigned chunks = (unsigned)ml_pair_chunks(layer, &chunk);
  void *choose[] = {&table, (void *)(uintptr_t)&p->pairs, (void *)(uintptr_t)&layer->weights, &grad_w};
  void *order[] = {(void *)(uintptr_t)&p->pairs};
  if (status == ML_CUDA_OK) { /* not early: dual.cu, the last of this chain, reads x before it waits for anything */
    status = ml_layer_launch(layer, variant, "ml_choose", (ml_launch){.grid = chunks, .block = 1024}, choose);
  }
  ml_launch how = {.grid = chunks, .block = 1024, .early = true};
  return status == ML_CUDA_OK ? ml_layer_launch(layer, variant, "ml_arrange", how, order) : status;
}

static ml_cuda_rows rows_of(const ml_layer *layer, ml_rows rows, int64_t width) {
  return (ml_cuda_rows){rows.data, rows.row, (int)layer->tokens, (int)width};
}

ml_cuda_status ml_pairs_shrink(const ml_layer *layer, const pair_places *p, ml_rows x, ml_pair_side side,
                               bool backward) {
  /* As in pairs.cu. */
  int64_t ranks = ml_pair_ranks(layer), size = layer->f32_adapters ? 4 : 2, warps = ranks < 64 ? 4 : 8;
  int64_t depth = ranks * size <= 64 ? 64 : ranks * size < 256 ? 32 : 16;
  int64_t factor = backward ? depth * (ranks * size + 16) : ranks * (depth * size + (size == 4 ? 32 : 16));
  int64_t ring = warps * (ML_TILE_PAIRS * (depth * 2 + 16) + factor);
  ml_cuda_rows of_x = rows_of(layer, x, depth_of(layer, backward));
  void *arguments[] = {(void *)(uintptr_t)&p->pairs, &of_x, &side};
  bool deep = p->pairs.tiles <= layer->gpu->multiprocessors; /* each of which has all its memory for one tile then */
  int64_t half = (108 << 10) / ring, stages = deep || half < 2 ? (216 << 10) / ring : half;
  return launch_pairs(layer, "ml_pairs_shrink", backward, deep, p->pairs.tiles, 32 * warps, stages * ring, arguments);
}

ml_cuda_status ml_pairs_spread(const ml_layer *layer, const pair_places *p, ml_rows x, void *y, bool backward) {
  enum { SPREAD = 1024 }; /* as in pairs.cu */
  int64_t n = width_of(layer, backward);
  int cols = (int)n, width = (int)round_up(n, 64);
  void *arguments[] = {(void *)(uintptr_t)&p->pairs, (void *)(uintptr_t)&p->mixed, (void *)(uintptr_t)&p->added, &cols,
                       &width};
  part of = ml_columns_from(layer, backward, 0);
  ml_tensor_map maps[N_MAPS];
  ml_cuda_status status = ml_wide_maps(layer, x, y, backward, of, maps);
  if (status == ML_CUDA_OK) {
    status = launch_pairs(layer, "ml_pairs_spread", backward, false, p->pairs.tiles * ceil_div(n, SPREAD), 256, 0,
                          arguments);
  }
  maps[OF_MIXED] = maps[OF_X], maps[OF_B] = maps[OF_SHRINK] = maps[OF_W]; /* not used */
  ml_narrow tokens = {.tokens = p->pairs.tokens};
  return status == ML_CUDA_OK ? ml_dual_tiles(layer, maps, tokens, backward, false, of, NULL, p->added, p->pairs.top_k)
                              : status;
}

ml_cuda_status ml_pairs_collect(const ml_layer *layer, const pair_places *p, ml_rows x, ml_rows grad_y,
                                const ml_adapter *grads) {
  enum { STRIPE = 128, LINES = 32, STAGES = 3 }; /* as in pairs.cu */
  ml_cuda_status status = ML_CUDA_OK;
  ml_cuda_rows of_x = rows_of(layer, x, layer->d_in), of_g = rows_of(layer, grad_y, layer->d_out);
  int64_t shared_bytes = STAGES * LINES * ((STRIPE * 2 + 16) + (ml_pair_ranks(layer) * 2 + 16));
  for (int first = 0; status == ML_CUDA_OK && first < layer->n_experts; first += ML_TABLE_EXPERTS) {
    ml_adapters table;
    int n = table_from(layer->experts, layer->n_experts, first, &table);
    bool any_a = false, any_b = false;
    for (int e = 0; e < n; e++) {
      any_a |= (table.of[e].a = grads[first + e].a) != NULL;
      any_b |= (table.of[e].b = grads[first + e].b) != NULL;
    }
    int a_stripes = any_a ? (int)ceil_div(layer->d_in, STRIPE) : 0;
    int b_stripes = any_b ? (int)ceil_div(layer->d_out, STRIPE) : 0;
    void *arguments[] = {&table,
                         &first,
                         (void *)(uintptr_t)&p->pairs,
                         &of_x,
                         &of_g,
                         (void *)(uintptr_t)&p->mixed,
                         (void *)(uintptr_t)&p->weighted,
                         &a_stripes,
                         &b_stripes};
    if (any_a || any_b) {
      status = launch_pairs(layer, "ml_pairs_collect", true, false, (int64_t)n * (a_stripes + b_stripes), 128,
                            shared_bytes, arguments);
    }
  }
  return status;
}
