/* Launches of the kernels that compute all experts for all tokens: prepare.cu, project.cu, dual.cu, shared.cu and
 * collect.cu. */
#include "layer.h"

ml_cuda_status ml_dense_prepare(const ml_layer *layer, const places *p) {
  int64_t eights = layer->columns * (layer->d_in + layer->d_out) / 8 + layer->tokens * layer->n_experts;
  void *arguments[] = {(void *)(uintptr_t)&layer->adapters, (void *)(uintptr_t)&p->prepared,
                       (void *)(uintptr_t)&layer->weights};
  return ml_layer_launch(
      layer, (ml_variant){ML_PREPARE, {layer->f16, layer->f32_adapters}}, "ml_prepare",
      (ml_launch){.grid = (unsigned)min_(ceil_div(eights, 256), 8 * (int64_t)layer->gpu->multiprocessors),
                  .block = 256},
      arguments);
}

/* The tile's columns of a factor with n of them, K-major (forward) or MN-major. */
static ml_cuda_status factor_map(const ml_layer *layer, bool backward, ml_tensor_map *map, const void *data, int64_t n,
                                 int64_t depth, int64_t row, int width) {
  return backward ? ml_map_of(layer, map, data, depth, n, row, 64) : ml_map_of(layer, map, data, n, depth, row, width);
}

/* How project.cu cuts its work: the width of a tile, the clusters that share the tiles of the same rows, and their blocks. */
typedef struct {
  int cols, sharers;
  unsigned cluster;
} cut;

/* Whether the columns of an expert lie in tiles of two clusters. */
static bool parts_experts(const ml_layer *layer, int cols, int64_t sharers) {
  const unsigned char *expert_of = layer->adapters.expert_of;
  int64_t tiles = ceil_div(layer->columns, cols);
  for (int64_t share = 1; share < sharers; share++) {
    int64_t block = tiles * share / sharers * cols / 8;
    if (expert_of[block - 1] == expert_of[block]) {
      return true;
    }
  }
  return false;
}

/* The one that costs least: a tile costs what it loads, and each of its columns to finish as much as 4096 elements to load. That was
 * fitted to layers timed on an H200, T = 256 to 8192, C = 64 to 2048, widths of 2048 and 4096. The blocks of dual.cu, which follow,
 * start early: where not all have a multiprocessor of their own beside these, they would start late. */
static cut cut_for(const ml_layer *layer, bool backward, bool keeps_experts) {
  int64_t depth = depth_of(layer, backward), rows = ceil_div(layer->tokens, ROWS), blocks = layer->gpu->multiprocessors;
  int64_t others = ml_tiles_of(layer, width_of(layer, backward));
  int64_t room = others * 4 > blocks * 3 ? blocks : blocks - others;
  int64_t least = INT64_MAX;
  cut best = {0};
  for (int cols = layer->columns <= 64 ? 64 : layer->columns <= 128 ? 128 : 256; cols >= 64; cols /= 2) {
    int64_t tiles = ceil_div(layer->columns, cols), most = min_(tiles, room / rows > 0 ? room / rows : 1);
    int64_t sharers = ceil_div(tiles, ceil_div(tiles, most)); /* more would wait for the slowest */
    while (keeps_experts && parts_experts(layer, cols, sharers)) {
      sharers--;
    }
    unsigned cluster = ml_cluster_for(layer, rows * sharers, min_(depth / 256, room / (rows * sharers)));
    int64_t cost = ceil_div(tiles, sharers) * (depth / cluster * (ROWS + cols) + 4096 * cols);
    if (cost < least) {
      least = cost;
      best = (cut){cols, (int)sharers, cluster};
    }
  }
  return best;
}

ml_cuda_status ml_dense_project(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, bool backward) {
  enum { STAGE_BYTES = 4 * 49152 + 2048 };
  int64_t depth = depth_of(layer, backward);
  cut by = cut_for(layer, backward, narrow.grad_w != NULL);
  ml_tensor_map x_map, factor;
  ml_cuda_status status = ml_map_of(layer, &x_map, x.data, layer->tokens, depth, x.row, ROWS);
  if (status == ML_CUDA_OK) {
    status = backward ? factor_map(layer, true, &factor, p->prepared.b, layer->columns, depth, layer->columns, by.cols)
                      : factor_map(layer, false, &factor, p->prepared.a, layer->columns, depth, depth, by.cols);
  }
  unsigned clusters = (unsigned)(ceil_div(layer->tokens, ROWS) * by.sharers);
  int depth_ = (int)depth;
  void *arguments[] = {&x_map, &factor, &narrow, &depth_, &by.sharers};
  return status != ML_CUDA_OK
             ? status
             : ml_layer_launch(layer, (ml_variant){ML_PROJECT, {layer->f16, backward, (int16_t)by.cols}}, "ml_project",
                               (ml_launch){.grid = clusters * by.cluster,
                                           .block = 384,
                                           .shared_bytes = STAGE_BYTES,
                                           .cluster = by.cluster,
                                           .early = true},
                               arguments);
}

part ml_columns_from(const ml_layer *layer, bool backward, int64_t first) {
  int64_t n = width_of(layer, backward) - first;
  return (part){first, n, ml_tile_width(n)};
}

/* Row or column `i` of 16-bit elements that lie so many apart. */
static void *from(const void *data, int64_t i, int64_t apart) { return (char *)(uintptr_t)data + i * apart * 2; }

ml_cuda_status ml_wide_maps(const ml_layer *layer, ml_rows x, void *y, bool backward, part of,
                            ml_tensor_map maps[N_MAPS]) {
  int64_t T = layer->tokens, row = layer->weight_row;
  int64_t depth = depth_of(layer, backward), n = width_of(layer, backward);
  const void *w = from(layer->weight, of.first, backward ? 1 : row);
  ml_cuda_status status = ml_map_of(layer, &maps[OF_X], x.data, T, depth, x.row, ROWS);
  if (status == ML_CUDA_OK) {
    status = factor_map(layer, backward, &maps[OF_W], w, of.n, depth, row, of.width);
  }
  return status == ML_CUDA_OK ? ml_map_of(layer, &maps[OF_Y], from(y, of.first, 1), T, of.n, n, 64) : status;
}

/* Those, and of the narrow side: `mixed`, its factor, and the factor of a shrink inside. */
static ml_cuda_status all_maps(const ml_layer *layer, const places *p, ml_rows x, void *y, bool backward, part of,
                               ml_tensor_map maps[N_MAPS]) {
  int64_t T = layer->tokens, C = layer->columns;
  int64_t depth = depth_of(layer, backward), n = width_of(layer, backward);
  const void *b = backward ? from(p->prepared.a, of.first, 1) : from(p->prepared.b, of.first, C);
  const void *shrink = backward ? p->prepared.b : p->prepared.a;
  ml_cuda_status status = ml_wide_maps(layer, x, y, backward, of, maps);
  if (status == ML_CUDA_OK) {
    status = ml_map_of(layer, &maps[OF_MIXED], p->mixed, T, C, C, ROWS);
  }
  if (status == ML_CUDA_OK) {
    status = factor_map(layer, backward, &maps[OF_B], b, of.n, C, backward ? n : C, of.width);
  }
  return status == ML_CUDA_OK ? factor_map(layer, backward, &maps[OF_SHRINK], shrink, C, depth, backward ? C : depth,
                                           C == 128 ? 128 : 64)
                              : status;
}

static const void *bias_of(const ml_layer *layer, bool backward, part of) {
  return backward || layer->bias == NULL ? NULL : from(layer->bias, of.first, 1);
}

ml_cuda_status ml_dual_tiles(const ml_layer *layer, ml_tensor_map maps[N_MAPS], ml_narrow narrow, bool backward,
                             bool fused, part of, unsigned *flags, const void *added, int adds) {
  const void *bias = bias_of(layer, backward, of);
  int n = (int)of.n, depth = (int)depth_of(layer, backward);
  int shrinkers = fused ? (int)ml_idle_blocks(layer, n) : 0, stages = of.width == 256 ? 4 : 6;
  void *arguments[] = {&maps[OF_X], &maps[OF_W], &maps[OF_MIXED], &maps[OF_B], &maps[OF_Y], &maps[OF_SHRINK], &narrow,
                       &bias,       &n,          &depth,          &shrinkers,  &flags,      &added,           &adds};
  int64_t blocks = min_(layer->gpu->multiprocessors, fused ? INT32_MAX : ml_tiles_of(layer, n));
  ml_variant variant = {
      ML_DUAL,
      {layer->f16, backward, (int16_t)of.width, (int16_t)(fused ? layer->columns : 0), bias != NULL, adds > 0}};
  return ml_layer_launch(layer, variant, "ml_dual",
                         (ml_launch){.grid = (unsigned)blocks,
                                     .block = 384,
                                     .shared_bytes = (unsigned)(stages * (16384 + of.width * 128) + 4 * 8192 + 2048),
                                     .early = true},
                         arguments);
}

/* y = x W^T + mixed B^T (+ bias), or grad_x = g W + Q A, from column `first` on. */
static ml_cuda_status dual(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, void *y, bool backward,
                           bool fused, int64_t first) {
  part of = ml_columns_from(layer, backward, first);
  ml_tensor_map maps[N_MAPS];
  ml_cuda_status status = all_maps(layer, p, x, y, backward, of, maps);
  return status == ML_CUDA_OK ? ml_dual_tiles(layer, maps, narrow, backward, fused, of, p->prepared.flags, NULL, 0)
                              : status;
}

/* The same, a tile a block, with a shrink that these blocks share; and dual.cu for the columns that are left. */
static ml_cuda_status shared(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, void *y,
                             bool backward) {
  wave all = ml_shared_wave(layer, backward);
  part of = {0, all.columns, all.width};
  ml_tensor_map maps[N_MAPS];
  ml_cuda_status status = all_maps(layer, p, x, y, backward, of, maps);
  if (status != ML_CUDA_OK) {
    return status;
  }
  const void *bias = bias_of(layer, backward, of);
  int n = (int)of.n, depth = (int)depth_of(layer, backward), stages = of.width == 256 ? 4 : 6;
  void *flags = p->prepared.flags, *parts = p->parts;
  void *arguments[] = {&maps[OF_X], &maps[OF_W], &maps[OF_MIXED], &maps[OF_B], &maps[OF_Y], &maps[OF_SHRINK], &narrow,
                       &bias,       &n,          &depth,          &parts,      &flags};
  ml_variant variant = {ML_SHARED, {layer->f16, backward, (int16_t)of.width, bias != NULL}};
  status = ml_layer_launch(layer, variant, "ml_shared",
                           (ml_launch){.grid = (unsigned)(ceil_div(layer->tokens, ROWS) * ceil_div(of.n, of.width)),
                                       .block = 384,
                                       .shared_bytes = (unsigned)(stages * (16384 + of.width * 128) + 32768 + 2048),
                                       .early = true},
                           arguments);
  bool whole = of.n == width_of(layer, backward);
  return status != ML_CUDA_OK || whole ? status : dual(layer, p, narrow, x, y, backward, false, of.n);
}

ml_cuda_status ml_dense_wide_side(const ml_layer *layer, ml_way way, const places *p, ml_narrow narrow, ml_rows x,
                                  void *y, bool backward) {
  return way == ML_BY_SHARED ? shared(layer, p, narrow, x, y, backward)
                             : dual(layer, p, narrow, x, y, backward, way == ML_BY_FUSED, 0);
}

ml_cuda_status ml_dense_collect(const ml_layer *layer, const places *p, ml_rows x, ml_rows grad_y,
                                const ml_adapter *grads) {
  enum { TILE = 256, STAGE_BYTES = 4 * 49152 + 2048 };
  int64_t T = layer->tokens, C = layer->columns;
  bool any_a = false, any_b = false;
  ml_adapters to = layer->adapters;
  for (int e = 0; e < layer->n_experts; e++) {
    to.of[e].a = grads[e].a;
    to.of[e].b = grads[e].b;
    any_a |= to.of[e].a != NULL;
    any_b |= to.of[e].b != NULL;
  }
  int a_tiles = any_a ? (int)ceil_div(layer->d_in, TILE) : 0, b_tiles = any_b ? (int)ceil_div(layer->d_out, TILE) : 0;
  if (a_tiles + b_tiles == 0) {
    return ML_CUDA_OK;
  }
  ml_tensor_map maps[4];
  ml_cuda_status status;
  ml_rows left = any_a ? x : grad_y; /* a map wants some memory even where it is not used */
  if ((status = ml_map_of(layer, &maps[0], p->mixed, T, C, C, 64)) != ML_CUDA_OK ||
      (status = ml_map_of(layer, &maps[1], left.data, T, any_a ? layer->d_in : layer->d_out, left.row, 64)) !=
          ML_CUDA_OK ||
      (status = ml_map_of(layer, &maps[2], p->weighted, T, C, C, 64)) != ML_CUDA_OK ||
      (status = ml_map_of(layer, &maps[3], grad_y.data, T, layer->d_out, grad_y.row, 64)) != ML_CUDA_OK) {
    return status;
  }
  int chunks = C > 64 ? 2 : 1;
  int64_t tiles = (a_tiles + b_tiles) * ceil_div(C, 64 * chunks);
  unsigned cluster = ml_cluster_for(layer, tiles, T / 128);
  const int *experts = p->prepared.experts;
  int T_ = (int)T, d_in = (int)layer->d_in, d_out = (int)layer->d_out, C_ = (int)C;
  void *arguments[] = {&maps[0], &maps[1], &maps[2], &maps[3], &to, &experts, &T_, &d_in, &d_out, &C_, &a_tiles};
  return ml_layer_launch(layer, (ml_variant){ML_COLLECT, {layer->f16, layer->f32_adapters, (int16_t)chunks}},
                         "ml_collect",
                         (ml_launch){.grid = (unsigned)tiles * cluster,
                                     .block = 384,
                                     .shared_bytes = STAGE_BYTES,
                                     .cluster = cluster,
                                     .early = true},
                         arguments);
}
