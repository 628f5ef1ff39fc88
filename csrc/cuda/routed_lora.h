/* A mixture of LoRA experts on a GPU, from C: which kernels, in which order, with which memory.
 *
 * x [T, d_in], y [T, d_out] and W are bfloat16 or float16, rows of unit stride; A and B of that dtype or float32, rows
 * without gaps; products accumulate in float32. All pointers are the GPU's. Nothing is allocated here: the caller asks how
 * many bytes a call needs and passes them. What is launched runs on the caller's stream, in its order.
 */
#ifndef MOELORA_CUDA_ROUTED_LORA_H
#define MOELORA_CUDA_ROUTED_LORA_H

#include "arguments.h"
#include "driver.h"

typedef struct {
  const ml_gpu *gpu;
  void *stream;
  bool f16, f32_adapters;
  int64_t tokens, d_in, d_out;
  int n_experts;
  ml_adapter experts[ML_MAX_EXPERTS]; /* a, b, rank, scaling are the caller's; ml_layer_begin fills in the rest */
  const void *weight;                 /* [d_out, d_in]; NULL: the mixture alone */
  int64_t weight_row;                 /* elements between its rows */
  const void *bias;                   /* [d_out] or NULL */
  ml_weights weights;
  int64_t share; /* tokens that have weights in common: 1, the tokens of a sequence, or all */
  /* Set by ml_layer_begin: */
  int columns;          /* C */
  int most_rank;        /* of the experts' */
  int forced;           /* the way that ml_force_way named, or -1 */
  bool dense;           /* whether all experts can be computed for all tokens; else only ML_BY_GROUPED remains */
  ml_adapters adapters; /* the experts with their columns, where dense */
  bool drops;           /* set by ml_layer_drop, as what follows */
  ml_dropout dropout;
} ml_layer;

/* How a layer is computed: a pure function of shape, dtype and GPU. */
typedef enum {
  ML_BY_TORCH,   /* torch's products, with ml_layer_mix, or what dropout has instead, between them */
  ML_BY_DECODE,  /* few.cu, then decode.cu: few tokens, forward */
  ML_BY_DUAL,    /* project.cu, or with dropout dropout.cu, then dual.cu */
  ML_BY_FUSED,   /* dual.cu with the shrink inside */
  ML_BY_SHARED,  /* shared.cu: a tile a multiprocessor, 64 columns; dual.cu, where there are more tiles */
  ML_BY_GROUPED, /* choose.cu, pairs.cu, dual.cu: the top k experts of each token alone */
  ML_BY_ADDMM /* project.cu, and backward collect.cu; the base's product and what adds the mixture to it are torch's */
} ml_way;

/* When all else is known. ML_CUDA_UNSUPPORTED: too many experts or columns, widths that are not multiples of 8, pointers that are
 * not of 16. */
ml_cuda_status ml_layer_begin(ml_layer *layer);
/* After that, and of a dense layer alone, dropout of x by masks that are those of core/moelora.h for this seed and these probabilities in [0, 1]. */
void ml_layer_drop(ml_layer *layer, uint64_t seed, const double *probabilities);
ml_way ml_layer_way(const ml_layer *layer, bool backward);
const char *ml_way_name(ml_way way);
/* From now on every layer that can be computed so is; NULL: by the rule again. ML_CUDA_VALUE: no name of a way. */
ml_cuda_status ml_force_way(const char *name);
/* Hopper's project.cu and collect.cu, which need no weight: false on other GPUs, and where ML_BY_TORCH is forced. */
bool ml_layer_has_kernels(const ml_layer *layer);

/* Rows [T, width] of 16-bit elements, `row` elements apart. */
typedef struct {
  void *data;
  int64_t row;
} ml_rows;

/* ---- the whole layer: not ML_BY_TORCH ---- */

/* hidden [T, C] without gaps, or NULL; of experts that top_k drops it may be left as it is. workspace: ml_layer_forward_bytes,
 * aligned to 256. ML_BY_ADDMM makes no y, and leaves mixed and the stack of B in their places. */
size_t ml_layer_forward_bytes(const ml_layer *layer);
ml_cuda_status ml_layer_forward(const ml_layer *layer, ml_rows x, void *y, void *hidden, void *workspace);

/* grad_x without gaps, NULL: not wanted. grad_w as the weights' own shape without gaps, in their dtype, or NULL. grads [N]: a and b
 * are the gradients' arrays of every expert, in the adapters' dtype, or NULL. x may be NULL data where no a is wanted, hidden
 * where neither b nor grad_w is. By ML_BY_ADDMM grad_x has to be NULL, and mixed and the stack of A are left in their places. With dropout, which any way has, it need not be, and
 * `adds`: it holds g W already, to which the experts' part is added. */
size_t ml_layer_backward_bytes(const ml_layer *layer);
ml_cuda_status ml_layer_backward(const ml_layer *layer, ml_rows x, ml_rows grad_y, const void *hidden, void *grad_x,
                                 bool adds, void *grad_w, const ml_adapter *grads, void *workspace);

/* ---- between torch's products, of a dense layer: on any GPU from 8.0 on ---- */

/* Places in a workspace of ml_layer_forward_bytes or ml_layer_backward_bytes. */
typedef struct {
  void *stacked_a; /* [C, d_in] */
  void *stacked_b; /* [d_out, C] */
  void *mixed;     /* [T, C] */
  void *weighted;  /* [T, C], backward */
} ml_places;
ml_places ml_layer_places(const ml_layer *layer, void *workspace);

/* Stacks and factors. */
ml_cuda_status ml_layer_prepare(const ml_layer *layer, void *workspace);
/* With dropout: hidden [T, C] (or NULL) and mixed from x, whose rows begin at multiples of 16 bytes, here and below. */
ml_cuda_status ml_layer_shrink(const ml_layer *layer, ml_rows x, void *hidden, void *workspace);
/* hidden [T, C] = x A^T, given; mixed is made of it. */
ml_cuda_status ml_layer_mix(const ml_layer *layer, const void *hidden, void *workspace);
/* mixed = P = g B, given, becomes Q; weighted and grad_w (or NULL) are made of it and of hidden. */
ml_cuda_status ml_layer_mix_backward(const ml_layer *layer, const void *hidden, void *grad_w, void *workspace);
/* With dropout, after that: the gradients of A and x, whose arguments are as ml_layer_backward's. */
ml_cuda_status ml_layer_drop_backward(const ml_layer *layer, ml_rows x, void *grad_x, bool adds,
                                      const ml_adapter *grads, void *workspace);

#endif
