/* The C core of moelora: a mixture of LoRA experts in one pass.
 *
 * No Python, no NumPy, no global state but the dispatch table, the thread setting, the thread pool and the fork flag.
 * Every function takes pointers, dimensions and strides and returns an ml_status; nothing aborts or prints. On any
 * status but ML_OK the outputs are untouched.
 *
 * Shapes: B batch, S seq, T = B * S tokens, N experts, r_e rank of expert e, R = sum of r_e. Strides count elements,
 * not bytes, and may be zero or negative for inputs. Outputs have no zero strides (grad_w excepted, see below) and
 * overlap nothing but where a comment allows it; the caller checks that.
 */
#ifndef MOELORA_H
#define MOELORA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
  ML_OK = 0,
  ML_ERR_NULL,      /* a required pointer is NULL */
  ML_ERR_DTYPE,     /* not one of ml_dtype */
  ML_ERR_SHAPE,     /* a dimension that must be positive is not (N, d, r), or a negative T */
  ML_ERR_TOP_K,     /* top_k outside [0, N] */
  ML_ERR_VALUE,     /* a scalar out of its domain: temperature <= 0, a non-finite scaling, a dropout outside [0, 1] */
  ML_ERR_OVERFLOW,  /* a size does not fit in the address space */
  ML_ERR_NO_MEMORY, /* a workspace could not be allocated */
  ML_ERR_ISA,       /* an instruction set that is unknown or that this CPU lacks */
  ML_ERR_BASE       /* neither "own" nor "torch" */
} ml_status;

/* A short English phrase for a status; never NULL. */
const char *ml_status_message(ml_status status);

/* With ML_BF16 x, y, base and the gradients of x and y are bfloat16. So are A, B and their gradients where bf16_adapters
 * says so, and the routing weights and their gradient where bf16_weights does, else float32. Hidden is float32, as are all
 * sums, and contiguous; there is no weight. Where the CPU multiplies pairs of bfloat16, weighted H and Q are rounded to it. */
typedef enum { ML_F32 = 0, ML_F64 = 1, ML_BF16 = 2 } ml_dtype;

/* An array with one row per token, [B, S, width]: element (b, s, j) at data[b*batch + s*seq + j*col]. */
typedef struct {
  void *data;
  int64_t batch, seq, col;
} ml_tokens;

/* A matrix: element (i, j) at data[i*row + j*col]. */
typedef struct {
  void *data;
  int64_t row, col;
} ml_matrix;

/* One LoRA expert: a [rank, d_in], b [d_out, rank]. */
typedef struct {
  ml_matrix a, b;
  ml_matrix grad_a, grad_b; /* backward only; data == NULL: not wanted */
  int64_t rank;
  double scaling;
  double dropout; /* probability, in [0, 1], that the expert does not see an element of x; 0: none */
} ml_expert;

/* What forward and backward have in common. */
typedef struct {
  ml_dtype dtype; /* of every array, but for ML_BF16 */
  bool bf16_adapters,
      bf16_weights; /* with ML_BF16; inside the core, A and B of a call with ML_F32 may be bfloat16 too */
  int64_t batch, seq, d_in, d_out;
  int64_t n_experts;
  const ml_expert *experts;  /* [n_experts] */
  ml_tokens x;               /* [B, S, d_in] */
  ml_tokens routing_weights; /* [B, S, N]; zero strides: [N] static, [B, N] per sequence */
  int64_t top_k;             /* 0: dense; k: each token's k largest weights, ties to the lower index */
  ml_matrix weight;          /* the frozen base [d_out, d_in]; data == NULL: the mixture alone */
  int n_threads;             /* 0: ml_get_num_threads() */
  uint64_t dropout_seed;     /* of the masks: the same in forward and backward of one call */
  int64_t first_token;       /* what the first token counts as in the masks */
  const void *kernels;       /* inside the core, of a call that is part of another: that one's; NULL: those in use */
} ml_routed_lora;

/* D_e x is x as expert e sees it: with dropout, some elements are 0 and the others divided by the share that is kept.
 * Which follows from dropout_seed, e, the token's place first_token + b * S + s and the column alone (kernels/philox.h). Probabilities
 * are rounded to multiples of 2^-16; those below 1 never to 1.
 *
 * y = base or x W^T + bias or 0, plus sum_e (s_e w_e * (D_e x A_e^T)) B_e^T.
 *
 *   y      [B, S, d_out]  out; written whole
 *   hidden [B, S, R]      out; D_e x A_e^T side by side, unweighted, 0 where top_k drops the expert; data == NULL: none
 *   base   [B, S, d_out]  in; NULL: none. May be y itself (added in place). Not together with p->weight.
 *   bias   [d_out], stride bias_stride; NULL: none. Only with p->weight.
 */
ml_status ml_routed_lora_forward(const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base,
                                 const void *bias, int64_t bias_stride);

/* Whether the base product x W^T of so many tokens (transposed: g W) has been measured to be faster here than torch's: a pure
 * function of these, the instruction set and the maker of the CPU. A weight that is held transposed is W and W^T exchanged. */
bool ml_base_is_faster(ml_dtype dtype, int64_t tokens, bool transposed);

/* The same in numbers: it is faster in float32 for fewer tokens than that; INT64_MAX: for any number. */
typedef struct {
  int64_t product, transposed;
} ml_base_limits;
ml_base_limits ml_base_rule(void);

/* "own" or "torch": ml_base_is_faster is always true or false from now on; NULL or "": it is as measured. ML_ERR_BASE: another
 * name. The environment variable MOELORA_BASE_PRODUCT is read once, by ml_init. */
ml_status ml_set_base(const char *name);
const char *ml_get_base(void); /* NULL: as measured */

/* Which gradients are added to what is there; those not named are overwritten. */
enum { ML_ACCUMULATE_X = 1, ML_ACCUMULATE_A = 2, ML_ACCUMULATE_B = 4, ML_ACCUMULATE_W = 8 };

/* With g = grad_y [B, S, d_out] and hidden as the forward left it:
 *
 *   P_e = g B_e, Q_e = s_e w_e * P_e          [T, r_e]
 *   grad_x   [B, S, d_in] = g W + sum_e D_e (Q_e A_e)   (g W only with p->weight)
 *   grad_a_e [r_e, d_in]  = Q_e^T (D_e x)         in p->experts
 *   grad_b_e [d_out, r_e] = g^T (s_e w_e * H_e)   in p->experts
 *   grad_w   [B, S, N]    = s_e <P_e, H_e>        strides as routing_weights has them: a zero stride sums over that axis
 *
 * data == NULL: that gradient is not computed, nor is anything that only it needs. hidden may be NULL where neither
 * grad_w nor any grad_b is wanted; p->x where no grad_a is.
 */
ml_status ml_routed_lora_backward(const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                                  ml_tokens grad_w, unsigned accumulate);

/* Routing. Rows are tokens; T may be 0.
 *
 *   logits [T, N] in; row_stride, col_stride
 *   mask   [T] in, bytes, 0: padding, left out of counts and prob_sums (its weights are computed as any other's);
 *          NULL: all tokens count
 *   p = softmax(logits / temperature); top_k: the k largest logits per token, ties to the lower index; renormalize: the
 *   kept p are divided by their sum
 *   weights   [T, N] out, contiguous; 0 outside the top k
 *   indices   [T, k] out, contiguous, by falling p; NULL exactly when top_k == 0
 *   counts    [N]    out; unmasked tokens whose top k holds i (top_k == 0: unmasked tokens)
 *   prob_sums [N]    out; sum of p over unmasked tokens, before top-k, summed in f64
 */
typedef struct {
  ml_dtype dtype;
  int64_t n_tokens, n_experts, top_k;
  ml_matrix logits;
  ml_matrix probs; /* see ml_route_backward */
  const uint8_t *mask;
  int64_t mask_stride;
  double temperature;
  bool renormalize;
  int n_threads;
} ml_route_params;

ml_status ml_route(const ml_route_params *p, void *weights, int64_t *indices, int64_t *counts, void *prob_sums);

/* grad_logits [T, N] out, contiguous; from grad_weights [T, N] and, where not NULL, grad_prob_sums [N] (contiguous).
 * indices [T, k] as ml_route gave them (NULL: dense); p->top_k is their k. The mask concerns grad_prob_sums alone.
 * p->probs [T, N] are the weights that ml_route gave without top_k, and take the place of the logits, which are not read
 * then; data == NULL: they are computed again, as always with top_k. */
ml_status ml_route_backward(const ml_route_params *p, void *grad_logits, ml_matrix grad_weights, const int64_t *indices,
                            const void *grad_prob_sums);

/* Threads. n = 0 in ml_set_num_threads: the default again (MOELORA_NUM_THREADS, OMP_NUM_THREADS, else the CPUs this
 * process may use). More than ML_MAX_THREADS are never used. Results do not depend on the number. */
enum { ML_MAX_THREADS = 64 };
void ml_set_num_threads(int n);
int ml_get_num_threads(void);
const char *ml_threading_layer(void); /* "torch's libgomp", "own pool" or "none (forked child)" */

/* Run-time dispatch: "portable", "avx2", "avx512", "avx512bf16", "neon". NULL or "" in ml_set_isa: the best for this CPU. The
 * environment variable MOELORA_ISA is read once, at first use, by ml_init. */
ml_status ml_init(void); /* ML_ERR_ISA, ML_ERR_BASE: such a variable names none of these; as if it weren't set, then */
ml_status ml_set_isa(const char *name);
const char *ml_get_isa(void);
const char *const *ml_isa_available(
    void); /* NULL-terminated; the best is the last, but for an avx512bf16 that does not pay */

/* "OpenBLAS 0.3.34 ... SkylakeX" of the base product's BLAS, or "none (own kernels)". */
const char *ml_blas_config(void);

#endif
