/* How dense.c cuts the shrink of any layer: every expert's columns, and all of them, where they have to be. */
#include <stdio.h>
#include <stdlib.h>

#include "../../csrc/cuda/dense.c"
#include "program.h"

const ml_file ml_cuda_files[] = {{NULL, NULL}};

static const ml_gpu gpus[] = {{.major = 9, .multiprocessors = 132}, {.major = 9, .multiprocessors = 114}};

static int below(int n) { return rand() % n; }

static ml_layer any_layer(void) {
  static const char memory[16] __attribute__((aligned(16)));
  ml_layer layer = {.gpu = &gpus[below(2)],
                    .tokens = 1 + (below(2) ? below(600) : below(20000)),
                    .d_in = 8 * (1 + below(1000)),
                    .d_out = 8 * (1 + below(1000)),
                    .n_experts = 1 + below(ML_TABLE_EXPERTS),
                    .weight = memory,
                    .share = 1};
  layer.weight_row = layer.d_in;
  int most = 1 + below(ML_MAX_COLUMNS / layer.n_experts - 7), equal = below(2);
  for (int e = 0; e < layer.n_experts; e++) {
    layer.experts[e].rank = equal ? most : 1 + below(most);
  }
  return layer;
}

/* Of which of so many clusters a tile is, as project.cu has it. */
static int share_of(int tile, int tiles, int sharers) {
  int share = 0;
  while (tiles * (share + 1) / sharers <= tile) {
    share++;
  }
  return share;
}

static bool is_fine(const ml_layer *layer, bool backward, bool keeps_experts) {
  cut by = cut_for(layer, backward, keeps_experts);
  int64_t depth = backward ? layer->d_out : layer->d_in, clusters = ceil_div(layer->tokens, ROWS) * by.sharers;
  int tiles = (int)ceil_div(layer->columns, by.cols);
  bool fits = clusters * by.cluster <= layer->gpu->multiprocessors || (by.sharers == 1 && by.cluster == 1);
  bool fine = (by.cols == 64 || by.cols == 128 || by.cols == 256) && by.sharers >= 1 && by.sharers <= tiles &&
              by.cluster >= 1 && by.cluster <= 4 && (by.cluster == 1 || by.cluster * 256 <= depth) && fits;
  for (int block = 1; fine && keeps_experts && block < layer->columns / 8; block++) {
    const unsigned char *expert = &layer->adapters.expert_of[block];
    int here = share_of(block * 8 / by.cols, tiles, by.sharers);
    int before = share_of((block - 1) * 8 / by.cols, tiles, by.sharers);
    fine = expert[-1] != expert[0] || here == before;
  }
  if (!fine) {
    printf("%d tokens, C = %d: tiles of %d, %d sharers, clusters of %u\n", (int)layer->tokens, layer->columns, by.cols,
           by.sharers, by.cluster);
  }
  return fine;
}

int main(void) {
  int wrong = 0, shared = 0, kept = 0;
  for (int i = 0; i < 20000; i++) {
    ml_layer layer = any_layer();
    if (ml_layer_begin(&layer) != ML_CUDA_OK || !layer.dense) {
      printf("no layer: %d experts, C = %d\n", layer.n_experts, layer.columns);
      wrong++;
      continue;
    }
    for (int which = 0; which < 4; which++) {
      wrong += !is_fine(&layer, which & 1, which & 2);
    }
    int any = cut_for(&layer, true, false).sharers, own = cut_for(&layer, true, true).sharers;
    shared += own > 1;
    kept += own < any;
  }
  if (shared < 1000 || kept < 1000) { /* or nothing has been asked */
    printf("only %d are shared, and %d less so for the sake of their experts\n", shared, kept);
    wrong++;
  }
  return wrong > 0;
}
