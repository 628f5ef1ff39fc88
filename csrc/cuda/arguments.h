/* What kernels and the C that launches them share. NVRTC reads this, too, so it includes nothing.
 *
 * The experts' ranks lie side by side in *columns*: those of expert e begin at a multiple of 8, and their number C is
 * rounded up to 64. Columns that belong to no rank hold zeros. Arrays of 16-bit elements have the call's dtype, bfloat16
 * or float16.
 */
#ifndef MOELORA_ARGUMENTS_H
#define MOELORA_ARGUMENTS_H

enum {
  ML_MAX_EXPERTS = 256,
  ML_TABLE_EXPERTS = 96, /* whose table travels in the arguments of a launch, */
  ML_MAX_COLUMNS = 2048  /* and so does which expert columns belong to */
};

/* Dtypes of arrays that may be of several. */
enum { ML_CUDA_F32 = 0, ML_CUDA_BF16 = 1, ML_CUDA_F16 = 2, ML_CUDA_F64 = 3 };

/* Expert e: A [rank, d_in] and B [d_out, rank], or their gradients, rows without gaps; NULL: none. */
typedef struct {
  void *a, *b;
  int column, rank;
  float scaling;
  int unused;
} ml_adapter;

typedef struct {
  ml_adapter of[ML_TABLE_EXPERTS];
  unsigned char expert_of[ML_MAX_COLUMNS / 8]; /* of 8 columns; the last expert past the last rank */
} ml_adapters;

/* Routing weights of T = batch * seq tokens: of token (b, s) and expert e at b * batch_stride + s * seq_stride + e * stride;
 * zero strides where tokens share them. */
typedef struct {
  const void *data;
  int dtype;
  int top_k; /* 0: all */
  int seq, n_experts;
  long long batch_stride, seq_stride, stride;
} ml_weights;

/* What is made anew for every call, of the adapters and the routing weights as they are now. */
typedef struct {
  void *a;        /* [C, d_in]  the experts' A, rounded */
  void *b;        /* [d_out, C]  their B */
  float *factors; /* as in ml_narrow */
  int *experts;
  float *scalings;
  unsigned *flags; /* [n_flags] zeros */
  int tokens, columns, n_experts, d_in, d_out, n_flags;
} ml_prepared;

/* The narrow side of a layer, [T, C]: what comes out of a shrink, and what becomes of it there.
 *
 * Forward, of H = x A^T:  hidden = H (where not NULL),  mixed = s w H
 * Backward, of P = g B:   mixed = Q = s w P,  weighted = s w H,  grad_w = s <P, H> per token and expert */
typedef struct {
  const float *factors;  /* [T, N] s_e w_te; elements.cuh has what top_k drops */
  const int *experts;    /* [C / 8] the expert of 8 columns */
  const float *scalings; /* [N] */
  void *mixed;           /* [T, C] out */
  void *hidden;          /* [T, C] forward: out; backward: in; NULL: none */
  void *weighted;        /* [T, C] out, backward; NULL: none */
  float *grad_w;         /* [T, N] out, backward; NULL: none */
  int tokens, columns, n_experts;
} ml_narrow;

/* Rows of 16-bit elements, `row` apart. */
typedef struct {
  const void *data;
  long long row;
  int rows, cols;
} ml_cuda_rows;

/* ---- the pairs of a token and one of its top k experts ----
 *
 * Pair t * k + i is that of token t and the i-th of its experts, the largest weight first. In `order` they come expert by
 * expert, those of one by their tokens, in tiles of ML_TILE_PAIRS: each expert's begin a tile. */
enum {
  ML_TILE_PAIRS = 64,
  ML_PAIR_CHUNKS = 128, /* of tokens, at most, in which pairs are counted */
  ML_MAX_PAIR_RANK = 64
};

typedef struct {
  ml_adapter *experts;   /* [N] */
  unsigned char *chosen; /* [T, k] the expert of a pair */
  float *factors;        /* [T, k] s w */
  int *counts;           /* [chunks, N] pairs of each expert in a chunk of tokens, */
  int *first;            /* [N] their places in `order`, */
  int *total;            /* [N] and how many they are */
  int *order;            /* [tiles * ML_TILE_PAIRS] pairs; -1: none */
  int *token_of;         /* [tiles * ML_TILE_PAIRS] their tokens; 0 for none */
  int *tile_expert;      /* [tiles] -1: none */
  int tokens, n_experts, top_k, chunk, tiles;
} ml_pairs;

/* The narrow side of pairs, R columns each: as ml_narrow, of H = x A^T of their experts or of P = g B. */
typedef struct {
  void *mixed;    /* [T, k, R] out */
  void *weighted; /* [T, k, R] out, backward; NULL: none */
  void *hidden;   /* [T, C] the columns of the pairs' experts: forward out, backward in; NULL: none */
  void *grad_w;   /* [T, N] in the weights' dtype, the pairs' numbers: out, backward; NULL: none */
  int columns, weights_dtype;
} ml_pair_side;

/* ---- routing; core/moelora.h has its meaning ----
 *
 * Rows are `row` elements apart and have no gaps. What is computed, "real", is float64 for float64 logits and float32
 * for all others. */
typedef struct {
  const void *rows; /* [T, N] logits; backward without top-k: probabilities, which are real */
  long long row;
  const unsigned char *mask; /* [T]; NULL: all tokens count */
  long long mask_stride;
  double rate; /* 1 / temperature, within real's normal numbers */
  int tokens, experts, top_k, renormalize;
} ml_routed_rows;

typedef struct {
  ml_routed_rows in;
  void *weights;      /* [T, N] real, out */
  long long *indices; /* [T, k] out */
  long long *counts;  /* [N] out */
  void *prob_sums;    /* [N] real, out */
  double *block_sums; /* [blocks, N] what each block of threads adds to prob_sums; not used by a single block */
  int *block_counts;  /* [blocks, N] and to counts */
  int blocks;
} ml_route_forward;

typedef struct {
  ml_routed_rows in;
  const void *grad_weights; /* [T, N] real; NULL: zeros */
  long long grad_row;
  const void *grad_sums; /* [N] real; NULL: zeros */
  long long grad_sums_stride;
  const long long *indices; /* [T, k] as the forward gave them */
  void *grad_logits;        /* [T, N] of the logits' dtype, out */
} ml_route_gradient;

/* Dropout of x, of which every expert has its own: what its masks follow from. */
typedef struct {
  unsigned keys[7][2];              /* of the rounds of Philox (core/kernels/philox.h) */
  unsigned drops[ML_TABLE_EXPERTS]; /* of the 2^16 numbers that an element may draw those for which it is dropped */
  float scale[ML_TABLE_EXPERTS];    /* of what is kept */
} ml_dropout;

/* Columns of one expert that share its masks: 8 * tiles of them, from 8 * block on. */
typedef struct {
  unsigned char block, tiles, expert;
} ml_slot;

typedef struct {
  ml_slot of[ML_MAX_COLUMNS / 8];
  int n;
} ml_slots;

#endif
