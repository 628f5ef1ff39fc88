/* The workspace of a call: what stands in it, and where. */
#include "layer.h"

enum { ALIGNMENT = 256 };

enum { SLICES = 8, SLICE_BYTES = 4096 }; /* as in shared.cu */

/* What the blocks of shared.cu leave for each other. */
static size_t shared_parts_bytes(const ml_layer *layer, bool backward) {
  wave first = ml_shared_wave(layer, backward);
  int64_t sharers = first.width == 0 ? 0 : min_(ceil_div(first.columns, first.width), SLICES);
  return (size_t)(ceil_div(layer->tokens, ROWS) * sharers) * SLICES * SLICE_BYTES;
}

/* Of 128 rows shared.cu has two, dual.cu one. */
static int n_flags(const ml_layer *layer) { return 2 * (int)ceil_div(layer->tokens, ROWS); }

/* The next of some places in a workspace of which so many bytes are used. */
#define PLACE(pointer, size)                                        \
  do {                                                              \
    (pointer) = (void *)(workspace + used);                         \
    used = (used + (size) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; \
  } while (0)

places ml_places_in(const ml_layer *layer, char *workspace, bool backward) {
  size_t T = (size_t)layer->tokens, C = (size_t)layer->columns, N = (size_t)layer->n_experts, used = 0;
  places p = {0};
  PLACE(p.prepared.a, C * (size_t)layer->d_in * 2);
  PLACE(p.prepared.b, C * (size_t)layer->d_out * 2);
  PLACE(p.prepared.factors, T * N * 4);
  PLACE(p.prepared.experts, C / 8 * 4);
  PLACE(p.prepared.scalings, N * 4);
  PLACE(p.prepared.flags, (size_t)n_flags(layer) * 4);
  PLACE(p.mixed, T * C * 2);
  if (backward) {
    PLACE(p.weighted, T * C * 2);
    PLACE(p.grad_w, T * N * 4);
  }
  PLACE(p.parts, layer->drops ? ml_drop_parts_bytes(layer, backward) : shared_parts_bytes(layer, backward));
  p.prepared.tokens = (int)layer->tokens;
  p.prepared.columns = layer->columns;
  p.prepared.n_experts = layer->n_experts;
  p.prepared.d_in = (int)layer->d_in;
  p.prepared.d_out = (int)layer->d_out;
  p.prepared.n_flags = n_flags(layer);
  p.bytes = used;
  return p;
}

pair_places ml_pair_places_in(const ml_layer *layer, char *workspace, bool backward) {
  size_t N = (size_t)layer->n_experts, P = (size_t)layer->tokens * (size_t)layer->weights.top_k, used = 0;
  size_t R = (size_t)ml_pair_ranks(layer), n = (size_t)round_up(width_of(layer, backward), 64);
  size_t tiles = (size_t)min_((int64_t)P, (int64_t)(P / ML_TILE_PAIRS + N));
  pair_places p = {0};
  size_t chunks = (size_t)ml_pair_chunks(layer, &p.pairs.chunk);
  PLACE(p.pairs.experts, N * sizeof *p.pairs.experts);
  PLACE(p.pairs.chosen, P);
  PLACE(p.pairs.factors, P * 4);
  PLACE(p.pairs.counts, chunks * N * 4);
  PLACE(p.pairs.first, N * 4);
  PLACE(p.pairs.total, N * 4);
  PLACE(p.pairs.order, tiles * ML_TILE_PAIRS * 4);
  PLACE(p.pairs.token_of, tiles * ML_TILE_PAIRS * 4);
  PLACE(p.pairs.tile_expert, tiles * 4);
  PLACE(p.mixed, P * R * 2);
  if (backward) {
    PLACE(p.weighted, P * R * 2);
  }
  PLACE(p.added, P * n * 2);
  p.pairs.tokens = (int)layer->tokens;
  p.pairs.n_experts = layer->n_experts;
  p.pairs.top_k = layer->weights.top_k;
  p.pairs.tiles = (int)tiles;
  p.bytes = used;
  return p;
}
#undef PLACE

size_t ml_layer_forward_bytes(const ml_layer *layer) {
  return ml_layer_way(layer, false) == ML_BY_GROUPED ? ml_pair_places_in(layer, NULL, false).bytes
                                                     : ml_places_in(layer, NULL, false).bytes;
}
size_t ml_layer_backward_bytes(const ml_layer *layer) {
  return ml_backward_groups(layer) ? ml_pair_places_in(layer, NULL, true).bytes : ml_places_in(layer, NULL, true).bytes;
}

ml_places ml_layer_places(const ml_layer *layer, void *workspace) {
  places p = ml_places_in(layer, workspace, true);
  return (ml_places){p.prepared.a, p.prepared.b, p.mixed, p.weighted};
}
