/* The skinny products that all of forward and backward are made of, one table per instruction set and dtype.
 *
 * Everything here works on dense rows with unit column stride; routed_lora.c brings other layouts into that form.
 * Each output element is computed by one call in an order that depends on depth alone, so results do not change with
 * how rows and columns are shared out among tasks.
 */
#ifndef MOELORA_KERNELS_H
#define MOELORA_KERNELS_H

#include "../moelora.h"

/* Which elements of x an expert sees, as a pure function of these and of the element's token and column. */
typedef struct {
  uint64_t seed;
  uint32_t expert;
  uint32_t threshold; /* of the 2^16 numbers that an element may draw, those below drop it; 0: nothing is dropped */
  double scale; /* of the others: 2^16 over how many they are, so that the mean is exact; 0 where there are none */
} ml_mask;

/* Rows of `depth` elements with unit stride, row_stride apart: an expert's B. */
typedef struct {
  const void *rows;
  int64_t row_stride, depth;
} ml_block;

enum { ML_MASK_COLUMNS = 128 }; /* drawn at a time; panel widths divide it */

typedef struct {
  int64_t lanes;       /* elements in a vector; panel widths are multiples of it */
  int64_t panel_width; /* columns of a full panel */

  /* out[i, j] = init[i, j] + sum_k left[i, k] panel[k, j]      i < rows, j < cols, k < depth
   *
   *   left  element (i, k) at left[i*left_row + k*left_step]
   *   panel [depth, width] as pack wrote it, width = cols rounded up to whole vectors, at most panel_width
   *   init  rows init_row apart (0: the same row for all); NULL: zeros; may be out itself */
  void (*product)(int64_t rows, int64_t cols, int64_t depth, const void *left, int64_t left_row, int64_t left_step,
                  const void *panel, int64_t width, void *out, int64_t out_row, const void *init, int64_t init_row);

  /* panel[k*width + j] = source[k*depth_stride + j*col_stride]     k < depth, j < cols */
  void (*pack)(void *panel, int64_t width, int64_t depth, int64_t cols, const void *source, int64_t depth_stride,
               int64_t col_stride);

  /* The same for a source whose columns are rows[j] + first, of unit stride. */
  void (*pack_rows)(void *panel, int64_t width, int64_t depth, int64_t cols, const void *const *rows, int64_t first);

  /* out[t, j] = init[t, j] + <x[t, :], rows[j][:]> over depth     t < tokens, j < n; init as in product */
  void (*dots)(int64_t tokens, int64_t n, int64_t depth, const void *x, int64_t x_row, const void *const *rows,
               void *out, int64_t out_row, const void *init, int64_t init_row);

  /* out[t, j] = init[t, j] + sum_e <h_e[t, :], row first + j of blocks[e]>     t < tokens, j < n; init as in product
   *
   * The h_e stand side by side in the rows of h. Reads each block once for each token. */
  void (*spread_rows)(int64_t tokens, int64_t first, int64_t n, int64_t n_blocks, const ml_block *blocks, const void *h,
                      int64_t h_row, void *out, int64_t out_row, const void *init, int64_t init_row);

  /* The same from h transposed, panel [sum of depths, width], width = tokens rounded up to whole vectors. Reads each
   * block once for each vector of tokens. */
  void (*spread_lanes)(int64_t tokens, int64_t first, int64_t n, int64_t n_blocks, const ml_block *blocks,
                       const void *panel, int64_t width, void *out, int64_t out_row, const void *init,
                       int64_t init_row);

  /* out[t, j] = sum_k x[t, k] rows[k, j], the rows row_stride apart: product for a few tokens and columns, in place */
  void (*short_sums)(int64_t tokens, int64_t n, int64_t depth, const void *x, int64_t x_row, const void *rows,
                     int64_t row_stride, void *out, int64_t out_row);

  /* out[i, j] = (add: +=) sum_t x[t, i] h[t, j]     i < rows, j < n, out without gaps: product for a few tokens, in place
   *
   * n is a multiple of the lanes, or 4 or more and a divisor of them. */
  void (*outer)(int64_t tokens, int64_t rows, int64_t n, const void *x, int64_t x_row, const void *h, int64_t h_row,
                void *out, bool add);

  /* out[t, j] = init[t, j] + (mask keeps element (token + t, column + j) ? scale * in[t, j] : 0)
   *
   *   t < rows, j < cols; column a multiple of ML_MASK_COLUMNS; init NULL: zeros; may be out itself, as may in */
  void (*keep)(const ml_mask *mask, int64_t token, int64_t column, int64_t rows, int64_t cols, const void *in,
               int64_t in_row, void *out, int64_t out_row, const void *init, int64_t init_row);

  /* For tokens that stand apart, few or many, the rows in place:
   * out[t, j] = (add: +=) <x[t], row j> over depth     t < tokens, j < n */
  void (*grouped_dots)(int64_t tokens, int64_t n, int64_t depth, const void *const *x, const void *rows, int64_t row,
                       void *out, int64_t out_row, bool add);

  /* out[t, j] = init[t, j] + sum over i < k, r < rank of h[element[t, i] + r] M[offsets[expert[t, i]] + r, j]
   *
   *   t < tokens, j < cols; M [R, cols] in panels one after the other, as wide as they can be; init as in product */
  void (*grouped_sums)(int64_t tokens, const int64_t *token, int64_t k, int64_t cols, const void *h,
                       const int64_t *element, const int64_t *expert, const void *panels, int64_t R,
                       const int64_t *offsets, void *out, int64_t out_row, const void *init, int64_t init_row);
} ml_products;

/* Routing of the tokens first <= t < end; route.c shares them out, and has checked everything. */
typedef struct {
  int64_t scratch; /* bytes for each expert */

  /* Writes the tokens' weights and indices, and adds to counts [N] and sums [N] what they are worth. */
  void (*route)(const ml_route_params *p, int64_t first, int64_t end, void *weights, int64_t *indices, int64_t *counts,
                double *sums, void *scratch);

  /* indices [tokens, k]: of each row of weights [tokens, n_experts] the k largest, falling, ties to the lower index. false:
   * some row has a NaN, and nothing is written. */
  bool (*pick)(int64_t tokens, int64_t n_experts, ml_matrix weights, int64_t k, int64_t *indices, void *scratch);

  /* Writes the tokens' grad_logits; grad_sums [N] may be NULL. */
  void (*route_backward)(const ml_route_params *p, int64_t first, int64_t end, void *grad_logits,
                         ml_matrix grad_weights, const int64_t *indices, const void *grad_sums, void *scratch);
} ml_routing;

/* bfloat16 to float32 and back; n elements. */
typedef struct {
  void (*widen)(int64_t n, const uint16_t *from, float *to);
  void (*narrow)(int64_t n, const float *from, uint16_t *to);
  void (*narrow_sum)(int64_t n, const float *from, const uint16_t *init,
                     uint16_t *to); /* to = init + from; may be init */
} ml_bf16;

/* Products of bfloat16 with sums in float32, for CPUs that have an instruction for it. It multiplies pairs: elements 2k and
 * 2k + 1 of a sum stand side by side, and are one uint32_t of a panel. Strides of left, x, rows and out count elements. */
typedef struct {
  int64_t lanes, panel_width; /* as in ml_products */

  /* out[i, j] = init[i, j] + sum_k left[i, k] panel[k, j]      i < rows, j < cols, k < depth, over pairs
   *
   *   left  pair (i, k) at left[i*left_row + k*left_step]; panel, width, init as in ml_products */
  void (*product)(int64_t rows, int64_t cols, int64_t depth, const uint16_t *left, int64_t left_row, int64_t left_step,
                  const uint32_t *panel, int64_t width, float *out, int64_t out_row, const float *init,
                  int64_t init_row);

  /* The same, init and out in bfloat16, rounded once. */
  void (*product_narrow)(int64_t rows, int64_t cols, int64_t depth, const uint16_t *left, int64_t left_row,
                         int64_t left_step, const uint32_t *panel, int64_t width, uint16_t *out, int64_t out_row,
                         const uint16_t *init, int64_t init_row);

  /* out[t, j] = <x[t, :], rows[j][:]> over depth, which is even     t < tokens, j < n */
  void (*dots)(int64_t tokens, int64_t n, int64_t depth, const uint16_t *x, int64_t x_row, const void *const *rows,
               float *out, int64_t out_row);

  /* panel[k*width + j] = the pair of rows[2k, j] and rows[2k + 1, j], which is 0 beyond the last row     j < cols */
  void (*interleave)(uint32_t *panel, int64_t width, int64_t n_rows, int64_t cols, const uint16_t *rows,
                     int64_t row_stride);
  void (*interleave_wide)(uint32_t *panel, int64_t width, int64_t n_rows, int64_t cols, const float *rows,
                          int64_t row_stride);

  /* to[i, j] = (add: +=) from[i, j] */
  void (*narrow_rows)(int64_t n_rows, int64_t cols, const float *from, int64_t from_row, uint16_t *to, int64_t to_row,
                      bool add);
} ml_pairs;

typedef enum { ML_PORTABLE, ML_AVX2, ML_AVX512, ML_NEON, ML_ISAS } ml_isa;

typedef struct {
  ml_isa isa;
  const char *name;
  bool (*supported)(void);
  bool (*preferred)(void); /* to those before it in the dispatch table; NULL: always */
  /* By ml_dtype. With ML_BF16 the factors A and B alone, all else being float; it has what reads these: pack, pack_rows,
   * dots and spread_rows. */
  const ml_products *products[3];
  const ml_bf16 *bf16;
  const ml_pairs *pairs; /* NULL: none */
  const ml_routing *routing[2];
} ml_kernels;

extern const ml_kernels ml_kernels_portable;
extern const ml_kernels ml_kernels_avx2;
extern const ml_kernels ml_kernels_avx512;
extern const ml_kernels ml_kernels_avx512bf16;
extern const ml_kernels ml_kernels_neon;

/* What the two with AVX-512 share. */
extern const ml_products ml_table_f32_avx512, ml_table_f64_avx512, ml_table_bf16_f32_avx512;
extern const ml_routing ml_routing_f32_avx512, ml_routing_f64_avx512;
extern const ml_bf16 ml_bf16_table_avx512;

/* The table in use; set by ml_init and ml_set_isa. */
const ml_kernels *ml_active_kernels(void);

#endif
