/* What the parts of a layer on a GPU share: its rule, its workspace, and launches of its kernels. routed_lora.h is what
 * others see of it.
 */
#ifndef MOELORA_LAYER_H
#define MOELORA_LAYER_H

#include "routed_lora.h"

enum { ROWS = 128 }; /* of a tile */

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static inline bool is_aligned(const void *p) { return (uintptr_t)p % 16 == 0; }
/* Whether the copy engine can read them: in order, not one above the other. */
static inline bool are_rows(const void *data, int64_t row, int64_t width) {
  return is_aligned(data) && row % 8 == 0 && row >= width;
}

/* Of y = x W^T, or backward grad_x = g W: the length of the sum, and the columns of the result. */
static inline int64_t depth_of(const ml_layer *layer, bool backward) { return backward ? layer->d_out : layer->d_in; }
static inline int64_t width_of(const ml_layer *layer, bool backward) { return backward ? layer->d_in : layer->d_out; }

/* ---- way.c ---- */

/* Of the tiles of a [T, n] product: their width, and how many multiprocessors have one less than others in the end. */
int ml_tile_width(int64_t n);
int64_t ml_tiles_of(const ml_layer *layer, int64_t n);
int64_t ml_idle_blocks(const ml_layer *layer, int64_t n);

/* The columns of y that shared.cu computes, in tiles of one width, a block each; the others are dual.cu's. */
typedef struct {
  int width; /* 0: none */
  int64_t columns;
} wave;
wave ml_shared_wave(const ml_layer *layer, bool backward);

/* Whether a backward is computed by pairs. */
bool ml_backward_groups(const ml_layer *layer);

/* ---- workspace.c ---- */

/* Places of what all experts are computed with; parts: what blocks of shared.cu or dropout.cu leave for others. */
typedef struct {
  ml_prepared prepared;
  void *mixed, *weighted;
  void *parts;
  float *grad_w;
  size_t bytes;
} places;
places ml_places_in(const ml_layer *layer, char *workspace, bool backward);

/* Places of the pairs. */
typedef struct {
  ml_pairs pairs;
  void *mixed, *weighted, *added;
  size_t bytes;
} pair_places;
pair_places ml_pair_places_in(const ml_layer *layer, char *workspace, bool backward);

/* ---- launch.c ---- */

ml_cuda_status ml_layer_launch(const ml_layer *layer, ml_variant variant, const char *entry, ml_launch how,
                               void **arguments);

/* A matrix in boxes of 64 columns. */
ml_cuda_status ml_map_of(const ml_layer *layer, ml_tensor_map *map, const void *data, int64_t rows, int64_t cols,
                         int64_t row, int box_rows);

/* Over how many blocks a sum is cut that `blocks` of them would compute whole, into `parts` at most. */
unsigned ml_cluster_for(const ml_layer *layer, int64_t blocks, int64_t parts);

/* ---- dense.c: all experts, for all tokens ---- */

ml_cuda_status ml_dense_prepare(const ml_layer *layer, const places *p);

/* H = x A^T, or P = g B, and what becomes of it. */
ml_cuda_status ml_dense_project(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, bool backward);

/* y, or grad_x, by the layer's way; `mixed` has been made where that is ML_BY_DUAL. */
ml_cuda_status ml_dense_wide_side(const ml_layer *layer, ml_way way, const places *p, ml_narrow narrow, ml_rows x,
                                  void *y, bool backward);

/* The experts' gradients from Q and x, and from the weighted H and g. */
ml_cuda_status ml_dense_collect(const ml_layer *layer, const places *p, ml_rows x, ml_rows grad_y,
                                const ml_adapter *grads);

/* Some columns of y, or of grad_x, and the width of the tiles that they are computed in. */
typedef struct {
  int64_t first, n;
  int width;
} part;

/* Those from `first` on. */
part ml_columns_from(const ml_layer *layer, bool backward, int64_t first);

/* What dual.cu and shared.cu read and write: x, W, `mixed` and its factor, y, and the factor of a shrink inside. */
enum { OF_X, OF_W, OF_MIXED, OF_B, OF_Y, OF_SHRINK, N_MAPS };

/* Those of x, W and y. */
ml_cuda_status ml_wide_maps(const ml_layer *layer, ml_rows x, void *y, bool backward, part of,
                            ml_tensor_map maps[N_MAPS]);

/* The product of ml_dual; `adds` rows of each token are added to it, or none. */
ml_cuda_status ml_dual_tiles(const ml_layer *layer, ml_tensor_map maps[N_MAPS], ml_narrow narrow, bool backward,
                             bool fused, part of, unsigned *flags, const void *added, int adds);

/* ---- decode.c: a few tokens ---- */

/* H of them, and s w H; then y. */
ml_cuda_status ml_few(const ml_layer *layer, ml_rows x, void *mixed, void *hidden);
ml_cuda_status ml_decode(const ml_layer *layer, ml_rows x, void *mixed, void *y);

/* ---- dropout.c ---- */

/* Bytes of the parts that its sums are cut into. */
size_t ml_drop_parts_bytes(const ml_layer *layer, bool backward);

/* Whether they are as dropout.cu reads them. */
bool ml_can_drop(ml_rows x);

/* H_e = (D_e x) A_e^T, and s w H. */
ml_cuda_status ml_drop_project(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x);

/* What is left when Q is there. */
ml_cuda_status ml_drop_backward(const ml_layer *layer, const places *p, ml_rows x, void *grad_x, bool adds,
                                const ml_adapter *grads);

/* ---- pairs.c: the top k experts of each token alone ---- */

/* What choose.cu and pairs.cu call ML_RANKS. */
int ml_pair_ranks(const ml_layer *layer);

/* How many chunks of tokens pairs are counted in, and the tokens of one. */
int ml_pair_chunks(const ml_layer *layer, int *chunk);

/* The pairs in their order. */
ml_cuda_status ml_pairs_arrange(const ml_layer *layer, const pair_places *p, void *grad_w);

/* The pairs' H, or backward P, and what becomes of it. */
ml_cuda_status ml_pairs_shrink(const ml_layer *layer, const pair_places *p, ml_rows x, ml_pair_side side,
                               bool backward);

/* y = x W^T (+ bias), or grad_x = g W, and to each token what its pairs add. */
ml_cuda_status ml_pairs_spread(const ml_layer *layer, const pair_places *p, ml_rows x, void *y, bool backward);

/* The experts' gradients. */
ml_cuda_status ml_pairs_collect(const ml_layer *layer, const pair_places *p, ml_rows x, ml_rows grad_y,
                                const ml_adapter *grads);

#endif
