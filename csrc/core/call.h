/* What the parts of forward and backward share: one call with its shapes, its kernels and its workspace, and the products
 * that everything is made of.
 *
 * With M_A [R, d_in] the experts' A stacked and M_B [R, d_out] their B transposed and stacked, all products are three:
 *
 *   project   out [T, R] = x M^T        H = x M_A^T,  P = g M_B^T
 *   spread    out [T, d] = init + h M   Y = base + Hs M_B,  dX = Q M_A
 *   collect   grad M = h^T x            dA = Q^T x,  dB^T = Hs^T g
 *
 * M is never formed: the kernels pack its panels straight from the experts' own arrays. With dropout every expert has an
 * x of its own, D_e x, and what it adds to dX goes through D_e too; so those products run expert by expert, and the
 * masks are drawn where they are needed, a block of tokens at a time. Work is cut into tasks by shape
 * alone and every sum runs in an order fixed by shape, so the bits do not depend on the number of threads.
 */
#ifndef MOELORA_CALL_H
#define MOELORA_CALL_H

#include <string.h>

#include "compiler.h"
#include "elementwise.h"
#include "regimes.h"
#include "threads.h"

enum {
  DEPTH_BLOCK = 256,    /* of a sum; each block starts from zero, which also keeps the rounding error small */
  ROW_BLOCK = 48,       /* tokens that a group of panels is applied to at a time */
  ROW_PADDING = 16,     /* between rows of a masked block: a power of two apart, they would share few cache sets */
  SMALL_WORK = 1 << 18, /* multiply-adds below which starting threads costs more than it saves */
  READING_WORK = 4      /* multiply-adds that take as long as reading, or writing, an element of A or B */
};

static inline int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* Rows of T tokens with unit column stride, or all zeros where data is NULL. */
typedef struct {
  char *data;
  int64_t row;
} rows;

/* M [R, d]: row offsets[e] + r is row r of parts[e], an ml_matrix [rank, d]. */
typedef struct {
  int64_t d;
  int64_t n_parts;
  const int64_t *offsets; /* [n_parts + 1] */
  const ml_matrix *parts;
} factor;

typedef struct {
  const ml_routed_lora *p;
  const ml_products *products;
  const ml_routing *routing;
  const ml_bf16 *narrow;      /* where dtype is ML_BF16: rows of x, y and their gradients are; else NULL */
  const ml_pairs *pairs;      /* the same, where the CPU multiplies pairs of it */
  const ml_products *readers; /* the same for A and B, which may be bfloat16 */
  const ml_regime *regime;
  const ml_elementwise *elementwise;
  int64_t T, R;
  uint64_t unused;     /* bit e: expert e, which no token uses, takes part with rank 0 */
  bool grouped;        /* whether top_k's experts alone are computed: see grouped.h */
  bool drops;          /* whether any expert has dropout */
  int64_t size;        /* bytes of an element */
  int64_t row_size;    /* of one of x, y and their gradients */
  int64_t factor_size; /* of one of A and B */
  int64_t *offsets;    /* [N + 1] */
  ml_matrix *a;        /* [N] parts of M_A */
  ml_matrix *b;        /* [N] parts of M_B */
  ml_matrix *grad_a;   /* [N] of their gradients, backward */
  ml_matrix *grad_b;   /* [N] */
  char *factors;       /* [T, N], not where grouped */
  uint8_t *keep;       /* [T, N], with top_k, not where grouped */
  char *workspace;
  size_t used; /* of the workspace, while it is handed out */
} call;

/* Bytes of the workspace, with every overflow noticed: what lasts for the call, and the largest of the phases. */
typedef struct {
  size_t bytes;
  size_t phase;
  bool overflow;
} budget;

static inline char *at(const call *c, const void *data, int64_t elements) {
  return (char *)(uintptr_t)data + elements * c->size;
}

static inline char *at_row(const call *c, const void *data, int64_t elements) {
  return (char *)(uintptr_t)data + elements * c->row_size;
}

static inline char *at_factor(const call *c, const void *data, int64_t elements) {
  return (char *)(uintptr_t)data + elements * c->factor_size;
}

/* `source` [depth, cols] as a panel, whose last columns are zeros up to a whole vector. */
static inline void pack_panel(const call *c, const ml_products *by, char *panel, int64_t depth, int64_t cols,
                              ml_matrix source) {
  int64_t width = round_up(cols, c->products->lanes);
  if (width > cols) memset(panel, 0, (size_t)(depth * width * c->size));
  by->pack(panel, width, depth, cols, source.data, source.row, source.col);
}

/* ---- call.c ---- */

void ml_reserve(budget *b, int64_t rows_, int64_t cols, int64_t size);

/* Phases come one after the other and share their part of the workspace: less to touch, so fewer page faults. */
void ml_reserve_phase(budget *b, budget phase);

/* Phases that come together do not share. */
void ml_reserve_apart(budget *b, budget phase);

/* What was reserved, in the same order. */
void *ml_take(call *c, int64_t rows_, int64_t cols, int64_t size);

int ml_threads_for(const call *c, int64_t multiply_adds);

/* The same for products of T rows and `elements` of the factors, which of a few tokens take their time by themselves. */
int ml_threads_for_factors(const call *c, int64_t elements);
ml_mask ml_mask_of(const ml_routed_lora *p, int64_t e);

/* Whether p makes sense; then the number of tokens and the sum of the ranks. */
ml_status ml_check(const ml_routed_lora *p, int64_t *T, int64_t *R);

/* Checks p and fills in what follows from it alone; allocates nothing. `leave_out`: of a few tokens, whose time goes into
 * reading A and B, experts that none of them uses are not read. All sums stay in order, so the bits are the same. */
ml_status ml_begin(call *c, const ml_routed_lora *p, bool leave_out);

/* What every call needs of the workspace, whatever is asked. */
void ml_reserve_common(const call *c, budget *b);

/* Takes it, and fills in what stands there for the whole call. */
void ml_take_common(call *c);

/* Allocates the workspace. */
ml_status ml_allocate(call *c, budget b);

factor ml_factor_a(const call *c);
factor ml_factor_b(const call *c);
factor ml_factor_grad_a(const call *c);
factor ml_factor_grad_b(const call *c);

/* The stride from each token to the next; false: batch and sequence do not have the same. */
bool ml_one_stride(const ml_routed_lora *p, ml_tokens v, int64_t *stride);

/* Whether the tokens, if there are any, are rows of unit column stride. */
bool ml_is_rows(const ml_routed_lora *p, ml_tokens v);

/* The same where their width is known; then *out says which rows. */
bool ml_as_rows(const call *c, ml_tokens v, int64_t width, rows *out);

void ml_copy_tokens(const call *c, ml_tokens from, ml_tokens to, int64_t width);
ml_tokens ml_dense(const call *c, void *data, int64_t width);

/* Rows of v: its own where it has them, else a dense copy in the workspace, for which the caller has reserved. */
void ml_reserve_rows(const call *c, budget *b, ml_tokens v, int64_t width);
rows ml_input_rows(call *c, ml_tokens v, int64_t width);

/* The same for an output: filled by the caller, then finish_rows brings it home. */
rows ml_output_rows(call *c, ml_tokens v, int64_t width);
void ml_finish_rows(const call *c, rows r, ml_tokens v, int64_t width);

/* hidden must be dense [T, R] for the element-wise functions, not just rows. */
bool ml_is_dense_hidden(const call *c, ml_tokens v);

/* Whether M's rows are dense, as those of A are; whether its columns are, within each expert, as those of B's transpose. */
bool ml_has_dense_rows(factor m);
bool ml_has_dense_columns(factor m);

/* ---- project.c ---- */

/* What happens to tokens first .. last - 1 of a projection's result, while they are in the cache. */
typedef void epilogue(const void *context, int64_t first, int64_t last);

/* R is given apart: while the budget is drawn up, a factor has no offsets yet. */
void ml_reserve_projection(const call *c, budget *b, int64_t R, int64_t d, bool masked);

/* out [T, R] = x M^T, x masked where mask is not NULL; then `then` on all tokens. */
void ml_project(call *c, factor m, rows x, rows out, const ml_mask *mask, epilogue *then, const void *context);

/* The same for M_A, with dropout: each expert's columns from its own x. */
void ml_project_masked(call *c, factor m, rows x, rows out, epilogue *then, const void *context);

/* Tokens of a task: enough tasks to keep threads busy to the end, few enough tokens for x to stay in the cache. */
int64_t ml_projection_block(int64_t T);

/* ---- spread.c: h [T, R] dense ---- */

/* Panels of a task. */
int64_t ml_spread_group(const call *c, int64_t d);

void ml_reserve_spreading(const call *c, budget *b, int64_t d);
void ml_spread(call *c, factor m, const char *h, rows out, rows init);

/* The same as a loop that may run beside others, not for pairs; the caller gives the workspace back. */
ml_loop ml_spread_loop(call *c, factor m, const char *h, rows out, rows init);

/* With dropout: out [T, d_in] = init + sum_e D_e (h_e M_e). */
void ml_reserve_masked_spreading(const call *c, budget *b, int64_t d);
void ml_spread_masked(call *c, factor m, const char *h, rows out, rows init);

/* ---- collect.c: for the experts that want it, those whose part of grads has data; h [T, R] dense, with
 * a vector's room behind it ---- */

void ml_reserve_collection(const call *c, budget *b, int64_t d);
void ml_collect(call *c, factor grads, const char *h, rows x, bool add);
ml_loop ml_collect_loop(call *c, factor grads, const char *h, rows x, bool add); /* as ml_spread_loop */

/* Brings sums [rank, cols] of one expert home; data == NULL: zeros. */
void ml_store_grads(const call *c, ml_matrix sums, int64_t rank, int64_t cols, ml_matrix to, bool add);

/* The same for the experts that dropout gives an x of their own. */
void ml_reserve_masked_collection(const call *c, budget *b, int64_t d);
void ml_collect_masked(call *c, factor grads, const char *h, rows x, bool add);

/* ---- bf16_pairs.c: the same for rows in bfloat16, with c->pairs; H and Q are float32 ---- */

/* Whether the call is one for these: a pure function of shapes, layouts and instruction set. a, b: what is read or written
 * besides x. */
bool ml_takes_pairs(const ml_routed_lora *p, ml_tokens a, ml_tokens b, bool forward);

void ml_reserve_pair_projection(const call *c, budget *b, int64_t R, int64_t d);
void ml_pair_project(call *c, factor m, rows x, rows out, epilogue *then, const void *context);
void ml_reserve_pair_spreading(const call *c, budget *b, int64_t d);
void ml_pair_spread(call *c, factor m, const float *h, rows out, rows init);
void ml_reserve_pair_collection(const call *c, budget *b, int64_t d);
void ml_pair_collect(call *c, factor grads, const float *h, rows x, bool add);

/* ---- routed_lora.c: forward and backward in two steps; with ML_BF16 where ml_takes_pairs or
 * ml_groups_narrow_rows says so, the routing weights and their gradient in float32 ---- */

typedef struct {
  call c;
  budget need; /* of c.workspace */
  ml_tokens y, hidden, base;
  const void *bias;
  int64_t bias_stride;
  bool own_hidden; /* H is computed in the workspace */
} forward;

typedef struct {
  call c;
  budget need;
  ml_tokens grad_y, hidden, grad_x, grad_w;
  unsigned accumulate;
  bool any_a, any_b, need_h, need_p; /* gradients of any A or B, H, P are needed */
  bool own_hidden;                   /* H is copied into the workspace */
} backward;

/* Checks the arguments of ml_routed_lora_forward and finds out what it needs; all that can fail but for memory. */
ml_status ml_begin_forward(forward *f, const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base,
                           const void *bias, int64_t bias_stride);
ml_status ml_begin_backward(backward *b, const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                            ml_tokens grad_w, unsigned accumulate);

/* Then it runs, in c.workspace from c.used on. */
void ml_run_forward(forward *f);
void ml_run_backward(backward *b);

/* ---- bf16.c: forward and backward with dtype ML_BF16, on these ---- */

ml_status ml_bf16_forward(const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base);
ml_status ml_bf16_backward(const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                           ml_tokens grad_w, unsigned accumulate);

/* ---- base.c: out [T, n] += left [T, k] right ---- */

void ml_reserve_base(const call *c, budget *b, int64_t n);
void ml_add_base(call *c, rows left, int64_t k, ml_matrix right, int64_t n, rows out);

#endif
