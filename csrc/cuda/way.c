/* Which way a layer is computed: a rule of its shape and the GPU, and what it counts with. */
#include <stdatomic.h>
#include <string.h>

#include "layer.h"

enum {
  DECODE_TOKENS = 128, /* for which W's rows fill the tiles */
  DECODE_COLUMNS = 256
};

static atomic_int forced = -1;

bool ml_layer_has_kernels(const ml_layer *layer) { return layer->gpu->major == 9 && layer->forced != ML_BY_TORCH; }

/* Whether the kernels of pairs can compute the mixture: weights of each token's own, of which top_k leaves some. */
static bool can_group(const ml_layer *layer) {
  return ml_layer_has_kernels(layer) && !layer->drops && layer->weights.top_k > 0 && layer->share == 1 &&
         layer->most_rank <= ML_MAX_PAIR_RANK && layer->tokens * layer->weights.top_k <= INT32_MAX / 2;
}

/* Whether that costs less than all experts do: a pair costs what its rows of x and y are to move, and its ranks; an expert its columns,
 * backward those of dA and dB, too. Measured on an H200 with 1024 to 8192 tokens, k = 1 to 8 and ranks of 16, 32 and 64
 * (docs/benchmarks.md has the two ways beside each other): pairs cost as much as 192 + 13 k r columns forward and 64 + 15/2 k r backward.
 * torch's operations, which are what is left where there are too many experts for the other ways, cost more than those. */
static bool grouping_pays(const ml_layer *layer, bool backward) {
  int ranks = layer->weights.top_k * ml_pair_ranks(layer);
  return layer->columns > (layer->dense && !backward ? 192 + 13 * ranks : 64 + 15 * ranks / 2);
}

ml_cuda_status ml_layer_begin(ml_layer *layer) {
  int64_t column = 0;
  if (layer->n_experts > ML_MAX_EXPERTS || layer->d_in % 8 != 0 || layer->d_out % 8 != 0 || layer->tokens < 1 ||
      layer->tokens > INT32_MAX / 2 || layer->d_in > INT32_MAX / 2 || layer->d_out > INT32_MAX / 2) {
    return ML_CUDA_UNSUPPORTED;
  }
  layer->forced = atomic_load(&forced);
  layer->most_rank = 0;
  for (int e = 0; e < layer->n_experts; e++) {
    ml_adapter *expert = &layer->experts[e];
    if (expert->rank > ML_MAX_COLUMNS || !is_aligned(expert->a) || !is_aligned(expert->b)) {
      return ML_CUDA_UNSUPPORTED;
    }
    layer->most_rank = expert->rank > layer->most_rank ? expert->rank : layer->most_rank;
    expert->column = (int)column;
    column += round_up(expert->rank, 8);
  }
  layer->columns = (int)round_up(column, 64);
  layer->dense = layer->n_experts <= ML_TABLE_EXPERTS && column <= ML_MAX_COLUMNS;
  if (!layer->dense) {
    return can_group(layer) && grouping_pays(layer, false) ? ML_CUDA_OK : ML_CUDA_UNSUPPORTED;
  }
  memcpy(layer->adapters.of, layer->experts, (size_t)layer->n_experts * sizeof *layer->experts);
  for (int e = 0; e < layer->n_experts; e++) {
    int end =
        e + 1 < layer->n_experts ? layer->experts[e + 1].column : layer->columns; /* the last one's: all that is left */
    memset(layer->adapters.expert_of + layer->experts[e].column / 8, e, (size_t)(end - layer->experts[e].column) / 8);
  }
  return ML_CUDA_OK;
}

/* ---- the rule ---- */

int ml_tile_width(int64_t n) { return n % 256 == 0 || n % 256 > 128 || n > 2048 ? 256 : 128; }
int64_t ml_tiles_of(const ml_layer *layer, int64_t n) {
  return ceil_div(layer->tokens, ROWS) * ceil_div(n, ml_tile_width(n));
}
int64_t ml_idle_blocks(const ml_layer *layer, int64_t n) {
  int64_t blocks = layer->gpu->multiprocessors, left = ml_tiles_of(layer, n) % blocks;
  return left == 0 ? 0 : blocks - left;
}

static const char *const way_names[] = {"torch", "decode", "dual", "fused", "shared", "grouped", "addmm"};

const char *ml_way_name(ml_way way) { return way_names[way]; }

ml_cuda_status ml_force_way(const char *name) {
  int way = name == NULL ? -1 : (int)(sizeof way_names / sizeof *way_names) - 1;
  while (way >= 0 && strcmp(way_names[way], name) != 0) {
    way--;
  }
  if (name != NULL && way < 0) {
    return ML_CUDA_VALUE;
  }
  atomic_store(&forced, way);
  return ML_CUDA_OK;
}

/* Whether the fused kernel's first blocks have nothing to do for as long as the shrinks take. Measured: a shrink of 128 rows takes
 * .36 (64 columns) or .5 (128) of the time of a tile; backward two of 128 columns are slower than project.cu where the waves are few. */
static bool shrinks_are_free(const ml_layer *layer, bool backward) {
  int64_t n = width_of(layer, backward), idle = ml_idle_blocks(layer, n), few = 3 * layer->gpu->multiprocessors;
  int64_t each = idle == 0 ? 0 : ceil_div(ceil_div(layer->tokens, ROWS), idle);
  int of_a_tile = layer->columns == 64 ? 36 : backward && ml_tiles_of(layer, n) < few ? 70 : 50;
  return idle > 0 && each * of_a_tile <= 100;
}

/* Whether torch's products cost less than dual.cu's tiles: they split the sum where multiprocessors would be idle. Measured: that costs
 * what 1400 more of the sum would, and what is added to y, which is written and read once more, 512. */
static bool splitting_pays(const ml_layer *layer, bool backward) {
  int64_t n = width_of(layer, backward), tiles = ml_tiles_of(layer, n), blocks = layer->gpu->multiprocessors;
  int64_t depth = depth_of(layer, backward);
  return tiles * 5 < blocks || (depth + layer->columns) * ml_idle_blocks(layer, n) > 512 * tiles + 1400 * blocks;
}

/* All columns, in the widest tiles of which every block has one, and more than half of the multiprocessors (of narrow ones: two in
 * five) have a block; or a first wave, as many as nearly all multiprocessors have a tile of, where it makes no wave more and the sum is
 * long: few blocks have the same rows then, so each finishes more of them. Measured: 8192 tokens and 1024 columns are slower so
 * than by dual.cu with a sum of 1024, and faster with one of 2048. */
wave ml_shared_wave(const ml_layer *layer, bool backward) {
  int64_t depth = depth_of(layer, backward), n = width_of(layer, backward);
  int64_t rows = ceil_div(layer->tokens, ROWS), blocks = layer->gpu->multiprocessors;
  if (layer->drops || layer->columns != 64) {
    return (wave){0, 0};
  }
  for (int width = 256; width >= 128; width /= 2) {
    int64_t tiles = rows * ceil_div(n, width);
    if (tiles <= blocks && tiles * (width == 256 ? 4 : 5) > blocks * 2) {
      return (wave){width, n};
    }
  }
  int64_t across = blocks / rows, tiles = rows * ceil_div(n, 256);
  if (depth >= 2048 && ml_tile_width(n) == 256 && tiles > blocks && rows * across * 10 >= blocks * 9 &&
      1 + ceil_div(tiles - rows * across, blocks) == ceil_div(tiles, blocks)) {
    return (wave){256, across * 256};
  }
  return (wave){0, 0};
}

ml_way ml_layer_way(const ml_layer *layer, bool backward) {
  if (!ml_layer_has_kernels(layer)) {
    return ML_BY_TORCH;
  }
  bool reads_weight =
      layer->weight != NULL && is_aligned(layer->bias) && are_rows(layer->weight, layer->weight_row, layer->d_in);
  if (!layer->dense) {
    return reads_weight && can_group(layer) ? ML_BY_GROUPED : ML_BY_TORCH;
  }
  if (!reads_weight) {
    return ML_BY_ADDMM;
  }
  int64_t n = width_of(layer, backward);
  bool can[] = {true,
                !backward && !layer->drops && layer->tokens <= DECODE_TOKENS && layer->columns <= DECODE_COLUMNS,
                true,
                !layer->drops && layer->columns <= 128 && ml_idle_blocks(layer, n) > 0,
                ml_shared_wave(layer, backward).width > 0,
                can_group(layer),
                true};
  if (layer->forced >= 0 && can[layer->forced]) {
    return (ml_way)layer->forced;
  }
  if (can[ML_BY_DECODE]) {
    return ML_BY_DECODE;
  }
  int64_t tiles = ml_tiles_of(layer, n), blocks = layer->gpu->multiprocessors;
  if (can[ML_BY_GROUPED] && grouping_pays(layer, backward) && tiles * 2 >= blocks) {
    return ML_BY_GROUPED;
  }
  if (can[ML_BY_FUSED] && shrinks_are_free(layer, backward) && tiles * 10 >= blocks * 9) {
    return ML_BY_FUSED;
  }
  if (can[ML_BY_SHARED]) {
    return ML_BY_SHARED;
  }
  return splitting_pays(layer, backward) ? ML_BY_ADDMM : ML_BY_DUAL;
}

/* Without a weight no gradient of x is wanted, or torch's products are between what is made here. */
bool ml_backward_groups(const ml_layer *layer) {
  return !layer->dense || (layer->weight != NULL && ml_layer_way(layer, true) == ML_BY_GROUPED);
}
