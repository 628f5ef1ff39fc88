/* Launches for a few tokens, forward: few.cu, then decode.cu. */
#include "layer.h"

ml_cuda_status ml_few(const ml_layer *layer, ml_rows x, void *mixed, void *hidden) {
  enum { LEAST = 256 }; /* of a sum that a block has work for */
  int64_t width = layer->tokens <= 16 ? 16 : 32, blocks = layer->columns / 8 * ceil_div(layer->tokens, width);
  unsigned cluster = 1;
  while (cluster < 8 && blocks * cluster * 2 <= layer->gpu->multiprocessors && layer->d_in / (cluster * 2) >= LEAST) {
    cluster *= 2;
  }
  long long x_row = x.row;
  int tokens = (int)layer->tokens, depth = (int)layer->d_in, columns = layer->columns;
  void *arguments[] = {(void *)(uintptr_t)&layer->adapters,
                       (void *)(uintptr_t)&layer->weights,
                       &x.data,
                       &x_row,
                       &mixed,
                       &hidden,
                       &tokens,
                       &depth,
                       &columns};
  return ml_layer_launch(
      layer, (ml_variant){ML_FEW, {layer->f16, layer->f32_adapters, (int16_t)width}}, "ml_few",
      (ml_launch){.grid = (unsigned)blocks * cluster, .block = 256, .cluster = cluster, .early = true}, arguments);
}

ml_cuda_status ml_decode(const ml_layer *layer, ml_rows x, void *mixed, void *y) {
  /* Of a multiprocessor's memory; the rest is for blocks of few.cu. */
  enum { SHARED_BYTES = 200 << 10, LEAST_STAGES = 4, MAX_STAGES = 32, MAX_ROWS = 256 };
  int64_t T = layer->tokens, C = layer->columns, n = layer->d_out, depth = layer->d_in,
          blocks = layer->gpu->multiprocessors;
  int width = T <= 8 ? 8 : T <= 16 ? 16 : T <= 32 ? 32 : T <= 64 ? 64 : 128;
  /* Tiles for all multiprocessors, equally many for each, and room for the narrow side and some stages. */
  int64_t rows = round_up(ceil_div(n, blocks * ceil_div(n, blocks * MAX_ROWS)), 16);
  while ((C / 64 + LEAST_STAGES) * (rows + width) * 128 > SHARED_BYTES) {
    rows -= 16;
  }
  /* Every tile reads x, too, which is much of many tokens: two blocks share it, or the sum of a tile twice as high. */
  unsigned share = width == 128 && rows > 64 ? 2 : 1;
  if (rows <= 32 && width * depth >= 128 * 4096) {
    rows *= 2;
  }
  unsigned cluster = share > 1 ? 1 : ml_cluster_for(layer, ceil_div(n, rows), depth / 512);
  int64_t tiles = round_up(ceil_div(n, rows), share), groups = rows > 64 ? 2 : 1, part = (rows + width) * 128;
  int64_t stage = (rows > 32 ? 1 : 2) * part, beyond = round_up(rows, 64 * groups) * 128 - part;
  int64_t narrow = C / 64 * part;
  int stages = (int)min_((SHARED_BYTES - narrow) / stage, MAX_STAGES);
  ml_tensor_map maps[3];
  ml_cuda_status status;
  if ((status = ml_map_of(layer, &maps[0], x.data, T, depth, x.row, width / (int)share)) != ML_CUDA_OK ||
      (status = ml_map_of(layer, &maps[1], layer->weight, n, depth, layer->weight_row, (int)rows)) != ML_CUDA_OK ||
      (status = ml_map_of(layer, &maps[2], mixed, T, C, C, width)) != ML_CUDA_OK) {
    return status;
  }
  const void *bias = layer->bias;
  int T_ = (int)T, n_ = (int)n, depth_ = (int)depth, C_ = (int)C;
  void *arguments[] = {&maps[0], &maps[1], &maps[2], (void *)(uintptr_t)&layer->adapters, &y, &bias, &T_, &n_,
                       &depth_,  &C_,      &stages};
  ml_variant variant = {ML_DECODE,
                        {layer->f16, layer->f32_adapters, (int16_t)width, (int16_t)rows, bias != NULL, (int16_t)share}};
  return ml_layer_launch(
      layer, variant, "ml_decode",
      (ml_launch){.grid = (unsigned)(tiles * cluster),
                  .block = (unsigned)(groups * 128 + 128),
                  .shared_bytes = (unsigned)(1024 + stages * (stage + 16) + 8 + narrow + (beyond > 0 ? beyond : 0)),
                  .cluster = cluster * share,
                  .early = true},
      arguments);
}
