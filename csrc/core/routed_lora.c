/* Forward and backward of a mixture of LoRA experts over one linear layer.
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
#include <stdlib.h>
#include <string.h>

#include "blas.h"
#include "compiler.h"
#include "elementwise.h"
#include "kernels/kernels.h"
#include "threads.h"

enum {
  DEPTH_BLOCK = 256,     /* of a sum; each block starts from zero, which also keeps the rounding error small */
  FEW_TOKENS = 48,       /* below, project takes dot products in place: packing would not pay */
  VERY_FEW_TOKENS = 9,   /* the same for spread and for B in project */
  IN_PLACE_COLUMNS = 64, /* outputs of one task of it */
  SPREAD_TOKENS = 512,   /* tokens that share one packing of a panel in spread */
  ROW_BLOCK = 48,        /* tokens that a group of panels is applied to at a time */
  MASKED_TOKENS = 128,   /* tokens of a masked panel of x in collect */
  ROW_PADDING = 16,      /* between rows of a masked block: a power of two apart, they would share few cache sets */
  BASE_COLUMNS = 512,    /* output features of one slice of the base product */
  BASE_TOKENS = 256,     /* tokens of the same */
  SMALL_WORK = 1 << 18   /* multiply-adds below which starting threads costs more than it saves */
};

static int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

/* ---- one call: its shapes, its kernels and its workspace ---- */

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
  const ml_elementwise *elementwise;
  int64_t T, R;
  uint64_t unused;  /* bit e: expert e, which no token uses, takes part with rank 0 */
  bool drops;       /* whether any expert has dropout */
  int64_t size;     /* bytes of an element */
  int64_t *offsets; /* [N + 1] */
  ml_matrix *a;     /* [N] parts of M_A */
  ml_matrix *b;     /* [N] parts of M_B */
  char *factors;    /* [T, N] */
  uint8_t *keep;    /* [T, N], with top_k */
  char *workspace;
  size_t used; /* of the workspace, while it is handed out */
} call;

/* Bytes of the workspace, with every overflow noticed: what lasts for the call, and the largest of the phases. */
typedef struct {
  size_t bytes;
  size_t phase;
  bool overflow;
} budget;

enum { ALIGNMENT = 64 };

static void reserve(budget *b, int64_t rows_, int64_t cols, int64_t size) {
  int64_t n;
  size_t total;
  if (ML_MUL_OVERFLOWS(rows_, cols, &n) || ML_MUL_OVERFLOWS(n, size, &n) || ML_ADD_OVERFLOWS(n, ALIGNMENT, &n) ||
      ML_ADD_OVERFLOWS(b->bytes, (size_t)n, &total))
    b->overflow = true;
  else
    b->bytes = total;
}

/* Phases come one after the other and share their part of the workspace: less to touch, so fewer page faults. */
static void reserve_phase(budget *b, budget phase) {
  if (phase.bytes > b->phase) b->phase = phase.bytes;
  b->overflow |= phase.overflow;
}

static void *take(call *c, int64_t rows_, int64_t cols, int64_t size) {
  void *taken = c->workspace + c->used;
  c->used += (size_t)round_up(rows_ * cols * size, ALIGNMENT);
  return taken;
}

static int threads_for(const call *c, int64_t multiply_adds) {
  return multiply_adds < SMALL_WORK ? 1 : c->p->n_threads;
}

static ml_mask mask_of(const ml_routed_lora *p, int64_t e) {
  /* A probability below 1 drops at most all numbers but one. */
  double probability = p->experts[e].dropout;
  uint32_t all = 1 << 16, threshold = (uint32_t)(probability * all + 0.5);
  if (threshold == all && probability < 1) threshold--;
  return (ml_mask){p->dropout_seed, (uint32_t)e, threshold, threshold < all ? (double)all / (all - threshold) : 0};
}

static int64_t rank_of(const call *c, int64_t e) { return e < 64 && c->unused >> e & 1 ? 0 : c->p->experts[e].rank; }

/* The experts whose weights are zero for every token, of the first 64; none where that would be all. */
static uint64_t unused_experts(const call *c) {
  int64_t N = c->p->n_experts, n = min_(N, 64);
  uint64_t unused = c->elementwise->unused(c->p->batch, c->p->seq, n, c->p->routing_weights);
  return N == n && unused == UINT64_MAX >> (64 - n) ? 0 : unused;
}

/* Checks p and fills in what follows from it alone; allocates nothing. `leave_out`: of a few tokens, whose time goes into
 * reading A and B, experts that none of them uses are not read. All sums stay in order, so the bits are the same. */
static ml_status begin(call *c, const ml_routed_lora *p, bool leave_out) {
  *c = (call){.p = p};
  if (p->dtype != ML_F32 && p->dtype != ML_F64) return ML_ERR_DTYPE;
  if (p->batch < 0 || p->seq < 0 || p->d_in <= 0 || p->d_out <= 0 || p->n_experts <= 0) return ML_ERR_SHAPE;
  if (p->top_k < 0 || p->top_k > p->n_experts) return ML_ERR_TOP_K;
  if (!p->experts) return ML_ERR_NULL;
  if (ML_MUL_OVERFLOWS(p->batch, p->seq, &c->T)) return ML_ERR_OVERFLOW;
  for (int64_t e = 0; e < p->n_experts; e++) {
    const ml_expert *expert = &p->experts[e];
    if (expert->rank <= 0) return ML_ERR_SHAPE;
    if (!ML_ISFINITE(expert->scaling) || !(expert->dropout >= 0 && expert->dropout <= 1)) return ML_ERR_VALUE;
    if (!expert->a.data || !expert->b.data) return ML_ERR_NULL;
  }
  if (c->T > 0 && !p->routing_weights.data) return ML_ERR_NULL;
  c->products = ml_active_kernels()->products[p->dtype];
  c->elementwise = &ml_elementwise_table[p->dtype];
  c->size = (int64_t)c->elementwise->size;
  if (leave_out && c->T > 0 && c->T < VERY_FEW_TOKENS) c->unused = unused_experts(c);
  for (int64_t e = 0; e < p->n_experts; e++) {
    c->drops |= mask_of(p, e).threshold > 0;
    if (ML_ADD_OVERFLOWS(c->R, rank_of(c, e), &c->R)) return ML_ERR_OVERFLOW;
  }
  return ML_OK;
}

/* What every call needs of the workspace, whatever is asked. */
static void reserve_common(const call *c, budget *b) {
  int64_t N = c->p->n_experts;
  reserve(b, N + 1, 1, sizeof *c->offsets);
  reserve(b, N, 1, sizeof *c->a);
  reserve(b, N, 1, sizeof *c->b);
  reserve(b, c->T, N, c->size);
  if (c->p->top_k) reserve(b, c->T, N, 1);
}

/* Allocates the workspace and fills in what stands in it for the whole call. */
static ml_status allocate(call *c, budget b) {
  const ml_routed_lora *p = c->p;
  if (b.overflow || ML_ADD_OVERFLOWS(b.bytes, b.phase, &b.bytes) ||
      ML_ADD_OVERFLOWS(b.bytes, (size_t)ALIGNMENT, &b.bytes))
    return ML_ERR_OVERFLOW;
  c->workspace = malloc(b.bytes);
  if (!c->workspace) return ML_ERR_NO_MEMORY;
  c->used = (size_t)(-(intptr_t)c->workspace & (ALIGNMENT - 1));
  c->offsets = take(c, p->n_experts + 1, 1, sizeof *c->offsets);
  c->a = take(c, p->n_experts, 1, sizeof *c->a);
  c->b = take(c, p->n_experts, 1, sizeof *c->b);
  c->factors = take(c, c->T, p->n_experts, c->size);
  c->keep = p->top_k ? take(c, c->T, p->n_experts, 1) : NULL;
  c->offsets[0] = 0;
  for (int64_t e = 0; e < p->n_experts; e++) {
    const ml_expert *expert = &p->experts[e];
    c->offsets[e + 1] = c->offsets[e] + rank_of(c, e);
    c->a[e] = expert->a;
    c->b[e] = (ml_matrix){expert->b.data, expert->b.col, expert->b.row};
  }
  return ML_OK;
}

static factor factor_a(const call *c) { return (factor){c->p->d_in, c->p->n_experts, c->offsets, c->a}; }
static factor factor_b(const call *c) { return (factor){c->p->d_out, c->p->n_experts, c->offsets, c->b}; }

static char *at(const call *c, const void *data, int64_t elements) {
  return (char *)(uintptr_t)data + elements * c->size;
}

/* ---- tokens with any strides ---- */

/* Whether the tokens are rows of unit column stride; then *out says which. */
static bool as_rows(const call *c, ml_tokens v, int64_t width, rows *out) {
  if (v.col != 1 && width > 1) return false;
  out->data = v.data;
  out->row = c->p->seq > 1 ? v.seq : v.batch;
  return c->p->batch <= 1 || c->p->seq <= 1 || v.batch == c->p->seq * v.seq;
}

static void copy_tokens(const call *c, ml_tokens from, ml_tokens to, int64_t width) {
  if (c->T == 0) return;
  for (int64_t b = 0; b < c->p->batch; b++)
    c->elementwise->copy(c->p->seq, width, at(c, from.data, b * from.batch), from.seq, from.col,
                         at(c, to.data, b * to.batch), to.seq, to.col, false);
}

static ml_tokens dense(const call *c, void *data, int64_t width) {
  return (ml_tokens){data, c->p->seq * width, width, 1};
}

/* Rows of v: its own where it has them, else a dense copy in the workspace, for which the caller has reserved
 * T * width elements. */
static void reserve_rows(const call *c, budget *b, ml_tokens v, int64_t width) {
  rows unused;
  if (!as_rows(c, v, width, &unused)) reserve(b, c->T, width, c->size);
}

static rows input_rows(call *c, ml_tokens v, int64_t width) {
  rows r;
  if (as_rows(c, v, width, &r)) return r;
  ml_tokens copy = dense(c, take(c, c->T, width, c->size), width);
  copy_tokens(c, v, copy, width);
  return (rows){copy.data, width};
}

/* The same for an output: filled by the caller, then finish_rows brings it home. */
static rows output_rows(call *c, ml_tokens v, int64_t width) {
  rows r;
  if (as_rows(c, v, width, &r)) return r;
  return (rows){take(c, c->T, width, c->size), width};
}

static void finish_rows(const call *c, rows r, ml_tokens v, int64_t width) {
  if (r.data != v.data) copy_tokens(c, dense(c, r.data, width), v, width);
}

/* hidden must be dense [T, R] for the element-wise functions, not just rows. */
static bool is_dense_hidden(const call *c, ml_tokens v) {
  rows r;
  return v.data && as_rows(c, v, c->R, &r) && (r.row == c->R || c->T <= 1);
}

/* ---- project: out [T, R] = x M^T, or added to what is there ---- */

/* What happens to tokens first .. last - 1 of a projection's result, while they are in the cache. */
typedef void epilogue(const void *context, int64_t first, int64_t last);

typedef struct {
  const call *c;
  factor m;
  int64_t R;
  rows x;
  rows out;
  bool add;
  const ml_mask *mask; /* of x; NULL: none */
  epilogue *then;      /* NULL: nothing */
  const void *context;
  int64_t block;           /* tokens of a task */
  char *packed;            /* [panels][d][width]; NULL: M in place */
  char *masked;            /* with a mask, per thread [block][DEPTH_BLOCK + ROW_PADDING] */
  const void **factor_row; /* [R], for dot products */
} projection;

/* Whether M's rows are dense, as those of A are. */
static bool has_dense_rows(factor m) {
  for (int64_t e = 0; e < m.n_parts; e++)
    if (m.parts[e].col != 1 && m.d > 1) return false;
  return true;
}

/* Whether M's columns are dense within each expert, as those of B's transpose are. */
static bool has_dense_columns(factor m) {
  for (int64_t e = 0; e < m.n_parts; e++)
    if (m.parts[e].row != 1 && m.offsets[e + 1] - m.offsets[e] > 1) return false;
  return true;
}

/* Tokens of a task: enough tasks to keep threads busy to the end, few enough tokens for x to stay in the cache. */
static int64_t projection_block(int64_t T) { return min_(96, round_up(ceil_div(T, 24), 6)); }

static int64_t masked_block(const call *c) { return projection_block(c->T) * (DEPTH_BLOCK + ROW_PADDING); }
static int masked_blocks(const call *c) {
  return ml_thread_bound(c->p->n_threads, ceil_div(c->T, projection_block(c->T)));
}

/* R is given apart: while the budget is drawn up, a factor has no offsets yet. */
static void reserve_projection(const call *c, budget *b, int64_t R, int64_t d, bool masked) {
  budget phase = {0};
  reserve(&phase, round_up(R, c->products->lanes), d, c->size);
  reserve(&phase, R, 1, sizeof(void *));
  if (masked && c->T) reserve(&phase, masked_block(c), masked_blocks(c), c->size);
  reserve_phase(b, phase);
}

static void pack_projection(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const call *c = j->c;
  int64_t full = c->products->panel_width, panels = ceil_div(j->R, full);
  int64_t first = task % panels * full, last = min_(first + full, j->R);
  int64_t k0 = task / panels * DEPTH_BLOCK, depth = min_(DEPTH_BLOCK, j->m.d - k0);
  int64_t width = round_up(last - first, c->products->lanes);
  char *panel = at(c, j->packed, first * j->m.d + k0 * width);
  if (width > last - first) memset(panel, 0, (size_t)(depth * width * c->size));
  for (int64_t e = 0; e < j->m.n_parts; e++) {
    int64_t from = j->m.offsets[e] > first ? j->m.offsets[e] : first, to = min_(j->m.offsets[e + 1], last);
    if (from >= to) continue;
    ml_matrix part = j->m.parts[e];
    c->products->pack(at(c, panel, from - first), width, depth, to - from,
                      at(c, part.data, (from - j->m.offsets[e]) * part.row + k0 * part.col), part.col, part.row);
  }
}

static void project_packed(void *context, int64_t task, int thread) {
  const projection *j = context;
  const call *c = j->c;
  int64_t full = c->products->panel_width;
  int64_t t0 = task * j->block, tokens = min_(j->block, c->T - t0);
  for (int64_t k0 = 0; k0 < j->m.d; k0 += DEPTH_BLOCK) {
    int64_t depth = min_(DEPTH_BLOCK, j->m.d - k0);
    rows x = {at(c, j->x.data, t0 * j->x.row + k0), j->x.row};
    if (j->mask) {
      rows masked = {at(c, j->masked, thread * masked_block(c)), DEPTH_BLOCK + ROW_PADDING};
      c->products->keep(j->mask, t0, k0, tokens, depth, x.data, x.row, masked.data, masked.row, NULL, 0);
      x = masked;
    }
    for (int64_t first = 0; first < j->R; first += full) {
      int64_t cols = min_(full, j->R - first), width = round_up(cols, c->products->lanes);
      void *out = at(c, j->out.data, t0 * j->out.row + first);
      c->products->product(tokens, cols, depth, x.data, x.row, 1, at(c, j->packed, first * j->m.d + k0 * width), width,
                           out, j->out.row, k0 || j->add ? out : NULL, j->out.row);
    }
  }
  if (j->then) j->then(j->context, t0, t0 + tokens);
}

enum { DOT_ROWS = 8 };

static void project_dots(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const call *c = j->c;
  int64_t first = task * DOT_ROWS, n = min_(DOT_ROWS, j->R - first);
  c->products->dots(c->T, n, j->m.d, j->x.data, j->x.row, j->factor_row + first, at(c, j->out.data, first), j->out.row);
}

/* B's columns summed in place, one expert a task. */
static void project_sums(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const call *c = j->c;
  int64_t first = j->m.offsets[task];
  c->products->short_sums(c->T, j->m.offsets[task + 1] - first, j->m.d, j->x.data, j->x.row, j->m.parts[task].data,
                          j->m.parts[task].col, at(c, j->out.data, first), j->out.row);
}

static void project(call *c, factor m, rows x, rows out, bool add, const ml_mask *mask, epilogue *then,
                    const void *context) {
  int64_t R = m.offsets[m.n_parts], work = c->T * R * m.d;
  size_t used = c->used;
  projection j = {.c = c, .m = m, .R = R, .x = x, .out = out, .add = add};
  j.mask = mask;
  j.then = then;
  j.context = context;
  j.block = projection_block(c->T);
  if (!add && !mask && c->T < VERY_FEW_TOKENS && has_dense_columns(m)) {
    ml_parallel_for(threads_for(c, work), m.n_parts, project_sums, &j);
    if (then) then(context, 0, c->T);
  } else if (!add && !mask && c->T < FEW_TOKENS && has_dense_rows(m)) {
    j.factor_row = take(c, R, 1, sizeof(void *));
    for (int64_t e = 0; e < m.n_parts; e++)
      for (int64_t r = m.offsets[e]; r < m.offsets[e + 1]; r++)
        j.factor_row[r] = at(c, m.parts[e].data, (r - m.offsets[e]) * m.parts[e].row);
    ml_parallel_for(threads_for(c, work), ceil_div(R, DOT_ROWS), project_dots, &j);
    if (then) then(context, 0, c->T);
  } else {
    j.packed = take(c, round_up(R, c->products->lanes), m.d, c->size);
    if (mask) j.masked = take(c, masked_block(c), masked_blocks(c), c->size);
    int64_t panels = ceil_div(R, c->products->panel_width);
    ml_parallel_for(threads_for(c, work), panels * ceil_div(m.d, DEPTH_BLOCK), pack_projection, &j);
    ml_parallel_for(threads_for(c, work), ceil_div(c->T, j.block), project_packed, &j);
  }
  c->used = used;
}

/* The same for M_A, with dropout: each expert's columns from its own x. */
static void project_masked(call *c, factor m, rows x, rows out, epilogue *then, const void *context) {
  for (int64_t e = 0; e < m.n_parts; e++) {
    int64_t offsets[2] = {0, m.offsets[e + 1] - m.offsets[e]};
    ml_mask mask = mask_of(c->p, e);
    project(c, (factor){m.d, 1, offsets, &m.parts[e]}, x, (rows){at(c, out.data, m.offsets[e]), out.row}, false,
            mask.threshold ? &mask : NULL, e + 1 == m.n_parts ? then : NULL, context);
  }
}

/* ---- spread: out [T, d] = init + h M ---- */

typedef struct {
  const call *c;
  factor m;
  const char *h; /* [T, R] dense */
  rows out;
  rows init;
  int64_t group;  /* panels of a task */
  int64_t groups; /* tasks of the same tokens */
  char *packed;   /* per thread [group][R][panel_width] */
  char *products; /* with masks, per thread [ROW_BLOCK][ML_MASK_COLUMNS + ROW_PADDING] */
} spreading;

static int64_t spread_group(const call *c, int64_t d) {
  int64_t panels = ceil_div(d, c->products->panel_width);
  return panels >= 32 ? 4 : panels >= 16 ? 2 : 1; /* at least 8 tasks where there are 8 panels */
}

static int64_t spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, c->products->panel_width * spread_group(c, d)) * ceil_div(c->T, SPREAD_TOKENS);
}

static void reserve_spreading(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  reserve(&phase, c->R * c->products->panel_width * spread_group(c, d),
          ml_thread_bound(c->p->n_threads, spread_tasks(c, d)), c->size);
  reserve_phase(b, phase);
}

/* Columns first .. last - 1 of M as panels [R][width], one after the other. */
static void pack_spread(const spreading *s, int64_t first, int64_t last, char *packed) {
  const call *c = s->c;
  const ml_products *k = c->products;
  for (int64_t d0 = first; d0 < last; d0 += k->panel_width) {
    int64_t cols = min_(k->panel_width, last - d0), width = round_up(cols, k->lanes);
    char *panel = at(c, packed, (d0 - first) * c->R);
    if (width > cols) memset(panel, 0, (size_t)(c->R * width * c->size));
    for (int64_t e = 0; e < s->m.n_parts; e++) {
      ml_matrix part = s->m.parts[e];
      k->pack(at(c, panel, s->m.offsets[e] * width), width, s->m.offsets[e + 1] - s->m.offsets[e], cols,
              at(c, part.data, d0 * part.col), part.row, part.col);
    }
  }
}

static void spread_task(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const call *c = s->c;
  const ml_products *k = c->products;
  int64_t R = c->R, full = k->panel_width;
  int64_t t0 = task / s->groups * SPREAD_TOKENS, t1 = min_(t0 + SPREAD_TOKENS, c->T);
  int64_t first = task % s->groups * s->group * full, last = min_(first + s->group * full, s->m.d);
  char *packed = at(c, s->packed, thread * s->group * full * R);
  pack_spread(s, first, last, packed);
  for (int64_t t = t0; t < t1; t += ROW_BLOCK)
    for (int64_t d0 = first; d0 < last; d0 += full) {
      int64_t cols = min_(full, last - d0), width = round_up(cols, k->lanes);
      rows init = {s->init.data ? at(c, s->init.data, t * s->init.row + d0) : NULL, s->init.row};
      rows out = {at(c, s->out.data, t * s->out.row + d0), s->out.row};
      for (int64_t r0 = 0; r0 < R; r0 += DEPTH_BLOCK) {
        k->product(min_(ROW_BLOCK, t1 - t), cols, min_(DEPTH_BLOCK, R - r0), at(c, s->h, t * R + r0), R, 1,
                   at(c, packed, (d0 - first) * R + r0 * width), width, out.data, out.row, init.data, init.row);
        init = out;
      }
    }
}

/* The next two are for a few tokens, where packing would not pay. */

static void spread_dots(void *context, int64_t task, int thread) {
  (void)thread;
  const spreading *s = context;
  const call *c = s->c;
  int64_t d0 = task * IN_PLACE_COLUMNS, cols = min_(IN_PLACE_COLUMNS, s->m.d - d0);
  char *out = at(c, s->out.data, d0);
  if (s->init.data != s->out.data)
    c->elementwise->copy(c->T, cols, s->init.data ? at(c, s->init.data, d0) : NULL, s->init.row, 1, out, s->out.row, 1,
                         false);
  for (int64_t e = 0; e < s->m.n_parts; e++) {
    if (s->m.offsets[e] == s->m.offsets[e + 1]) continue;
    ml_matrix part = s->m.parts[e];
    c->products->short_dots(c->T, cols, s->m.offsets[e + 1] - s->m.offsets[e], at(c, s->h, s->m.offsets[e]), c->R,
                            at(c, part.data, d0 * part.col), part.col, out, s->out.row);
  }
}

/* A's own rows are a panel already, but for its last columns: a panel has whole vectors. */
static void spread_in_place(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const call *c = s->c;
  const ml_products *k = c->products;
  int64_t d0 = task * k->panel_width, cols = min_(k->panel_width, s->m.d - d0), width = round_up(cols, k->lanes);
  rows init = {s->init.data ? at(c, s->init.data, d0) : NULL, s->init.row}, out = {at(c, s->out.data, d0), s->out.row};
  for (int64_t e = 0; e < s->m.n_parts; e++) {
    int64_t rank = s->m.offsets[e + 1] - s->m.offsets[e], panel_row = s->m.parts[e].row;
    const char *panel = at(c, s->m.parts[e].data, d0);
    if (cols < width) {
      char *packed = at(c, s->packed, thread * c->R * k->panel_width);
      memset(packed, 0, (size_t)(rank * width * c->size));
      k->pack(packed, width, rank, cols, panel, panel_row, 1);
      panel = packed;
      panel_row = width;
    }
    k->product(c->T, cols, rank, at(c, s->h, s->m.offsets[e]), c->R, 1, panel, panel_row, out.data, out.row, init.data,
               init.row);
    init = out;
  }
}

static void spread(call *c, factor m, const char *h, rows out, rows init) {
  size_t used = c->used;
  spreading s = {.c = c, .m = m, .h = h, .out = out, .init = init, .group = spread_group(c, m.d)};
  int64_t panels = ceil_div(m.d, c->products->panel_width), tasks = spread_tasks(c, m.d);
  int n_threads = threads_for(c, c->T * c->R * m.d);
  s.groups = ceil_div(panels, s.group);
  s.packed = take(c, c->R * c->products->panel_width * s.group, ml_thread_bound(c->p->n_threads, tasks), c->size);
  if (c->T < VERY_FEW_TOKENS && has_dense_columns(m))
    ml_parallel_for(n_threads, ceil_div(m.d, IN_PLACE_COLUMNS), spread_dots, &s);
  else if (c->T < VERY_FEW_TOKENS && has_dense_rows(m))
    ml_parallel_for(n_threads, panels, spread_in_place, &s);
  else
    ml_parallel_for(n_threads, tasks, spread_task, &s);
  c->used = used;
}

/* With dropout: out [T, d_in] = init + sum_e D_e (h_e M_e), for the groups of columns that masks come in. */

static int64_t masked_spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, ML_MASK_COLUMNS) * ceil_div(c->T, SPREAD_TOKENS);
}

static void reserve_masked_spreading(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  int n_threads = ml_thread_bound(c->p->n_threads, masked_spread_tasks(c, d));
  reserve(&phase, c->R * ML_MASK_COLUMNS, n_threads, c->size);
  reserve(&phase, ROW_BLOCK * (ML_MASK_COLUMNS + ROW_PADDING), n_threads, c->size);
  reserve_phase(b, phase);
}

static void spread_masked_task(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const call *c = s->c;
  const ml_products *k = c->products;
  int64_t t0 = task / s->groups * SPREAD_TOKENS, t1 = min_(t0 + SPREAD_TOKENS, c->T);
  int64_t first = task % s->groups * ML_MASK_COLUMNS, last = min_(first + ML_MASK_COLUMNS, s->m.d);
  char *packed = at(c, s->packed, thread * ML_MASK_COLUMNS * c->R);
  rows products = {NULL, ML_MASK_COLUMNS + ROW_PADDING};
  products.data = at(c, s->products, thread * ROW_BLOCK * products.row);
  pack_spread(s, first, last, packed);
  for (int64_t t = t0; t < t1; t += ROW_BLOCK) {
    int64_t tokens = min_(ROW_BLOCK, t1 - t);
    rows out = {at(c, s->out.data, t * s->out.row + first), s->out.row};
    rows init = {s->init.data ? at(c, s->init.data, t * s->init.row + first) : NULL, s->init.row};
    for (int64_t e = 0; e < s->m.n_parts; e++) {
      ml_mask mask = mask_of(c->p, e);
      rows to = mask.threshold ? products : out;
      for (int64_t d0 = first; d0 < last; d0 += k->panel_width) {
        int64_t cols = min_(k->panel_width, last - d0), width = round_up(cols, k->lanes);
        const char *panel = at(c, packed, (d0 - first) * c->R);
        char *sum = at(c, to.data, d0 - first);
        rows from = {mask.threshold || !init.data ? NULL : at(c, init.data, d0 - first), init.row};
        for (int64_t r0 = s->m.offsets[e]; r0 < s->m.offsets[e + 1]; r0 += DEPTH_BLOCK) {
          k->product(tokens, cols, min_(DEPTH_BLOCK, s->m.offsets[e + 1] - r0), at(c, s->h, t * c->R + r0), c->R, 1,
                     at(c, panel, r0 * width), width, sum, to.row, from.data, from.row);
          from = (rows){sum, to.row};
        }
      }
      if (mask.threshold)
        k->keep(&mask, t, first, tokens, last - first, products.data, products.row, out.data, out.row, init.data,
                init.row);
      init = out;
    }
  }
}

static void spread_masked(call *c, factor m, const char *h, rows out, rows init) {
  size_t used = c->used;
  spreading s = {.c = c, .m = m, .h = h, .out = out, .init = init, .groups = ceil_div(m.d, ML_MASK_COLUMNS)};
  int64_t tasks = masked_spread_tasks(c, m.d);
  int n_threads = ml_thread_bound(c->p->n_threads, tasks);
  s.packed = take(c, c->R * ML_MASK_COLUMNS, n_threads, c->size);
  s.products = take(c, ROW_BLOCK * (ML_MASK_COLUMNS + ROW_PADDING), n_threads, c->size);
  ml_parallel_for(threads_for(c, c->T * c->R * m.d), tasks, spread_masked_task, &s);
  c->used = used;
}

/* ---- collect: the gradient of M, h^T x, for the experts that want it ---- */

typedef struct {
  const call *c;
  factor grads;  /* parts without data are not wanted */
  const char *h; /* [T, R] dense */
  rows x;
  bool add;
  char *scratch; /* per thread: a packed panel of x [DEPTH_BLOCK, panel_width], sums [R, panel_width] */
} collection;

static int64_t collect_scratch(const call *c) { return (DEPTH_BLOCK + c->R) * c->products->panel_width; }

static void reserve_collection(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  reserve(&phase, collect_scratch(c), ml_thread_bound(c->p->n_threads, ceil_div(d, c->products->panel_width)), c->size);
  reserve_phase(b, phase);
}

/* Brings sums [rank, cols] of one expert home. */
static void store_grads(const call *c, const char *sums, int64_t width, int64_t rank, int64_t cols, ml_matrix to,
                        bool add) {
  if (c->T && to.row == 1 && !add) /* B: a transposition, which packing is */
    c->products->pack(to.data, to.col, cols, rank, sums, 1, width);
  else
    c->elementwise->copy(rank, cols, c->T ? sums : NULL, width, 1, to.data, to.row, to.col, add);
}

/* The same for all: sums [R, cols] are columns d0 .. of the gradients. */
static void finish_collection(const collection *g, const char *sums, int64_t width, int64_t d0, int64_t cols) {
  const call *c = g->c;
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    ml_matrix to = g->grads.parts[e];
    if (!to.data) continue;
    int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
    store_grads(c, at(c, sums, r0 * width), width, rank, cols, (ml_matrix){at(c, to.data, d0 * to.col), to.row, to.col},
                g->add);
  }
}

static void collect_task(void *context, int64_t task, int thread) {
  const collection *g = context;
  const call *c = g->c;
  const ml_products *k = c->products;
  int64_t full = k->panel_width, d0 = task * full, cols = min_(full, g->grads.d - d0), width = round_up(cols, k->lanes);
  char *panel = at(c, g->scratch, thread * collect_scratch(c)), *sums = at(c, panel, DEPTH_BLOCK * full);
  if (width > cols) memset(panel, 0, (size_t)(DEPTH_BLOCK * width * c->size));
  for (int64_t t0 = 0; t0 < c->T; t0 += DEPTH_BLOCK) {
    int64_t tokens = min_(DEPTH_BLOCK, c->T - t0);
    k->pack(panel, width, tokens, cols, at(c, g->x.data, t0 * g->x.row + d0), g->x.row, 1);
    for (int64_t e = 0; e < g->grads.n_parts; e++) {
      int64_t first = e; /* neighbours that are wanted go into one product */
      while (e < g->grads.n_parts && g->grads.parts[e].data) e++;
      int64_t r0 = g->grads.offsets[first], r1 = g->grads.offsets[e];
      char *out = at(c, sums, r0 * width);
      if (r1 > r0)
        k->product(r1 - r0, cols, tokens, at(c, g->h, t0 * c->R + r0), 1, c->R, panel, width, out, width,
                   t0 ? out : NULL, width);
    }
  }
  finish_collection(g, sums, width, d0, cols);
}

static void collect(call *c, factor grads, const char *h, rows x, bool add) {
  size_t used = c->used;
  collection g = {.c = c, .grads = grads, .h = h, .x = x, .add = add};
  int64_t tasks = ceil_div(grads.d, c->products->panel_width);
  g.scratch = take(c, collect_scratch(c), ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_parallel_for(threads_for(c, c->T * c->R * grads.d), tasks, collect_task, &g);
  c->used = used;
}

/* The same for the experts that dropout gives an x of their own: each in blocks of the columns that masks come in, which
 * are panels side by side. */

static int64_t masked_collect_scratch(const call *c) {
  return MASKED_TOKENS * (ML_MASK_COLUMNS + ROW_PADDING) + c->R * ML_MASK_COLUMNS;
}

static void reserve_masked_collection(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  reserve(&phase, masked_collect_scratch(c), ml_thread_bound(c->p->n_threads, ceil_div(d, ML_MASK_COLUMNS)), c->size);
  reserve_phase(b, phase);
}

static void collect_masked_task(void *context, int64_t task, int thread) {
  const collection *g = context;
  const call *c = g->c;
  const ml_products *k = c->products;
  int64_t first = task * ML_MASK_COLUMNS, all = min_(ML_MASK_COLUMNS, g->grads.d - first);
  rows x = {at(c, g->scratch, thread * masked_collect_scratch(c)), ML_MASK_COLUMNS + ROW_PADDING};
  char *sums = at(c, x.data, MASKED_TOKENS * x.row);
  memset(x.data, 0, (size_t)(MASKED_TOKENS * x.row * c->size)); /* what pads the last columns to whole vectors */
  for (int64_t t0 = 0; t0 < c->T; t0 += MASKED_TOKENS) {
    int64_t tokens = min_(MASKED_TOKENS, c->T - t0);
    for (int64_t e = 0; e < g->grads.n_parts; e++) {
      if (!g->grads.parts[e].data) continue;
      ml_mask mask = mask_of(c->p, e);
      int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
      k->keep(&mask, t0, first, tokens, all, at(c, g->x.data, t0 * g->x.row + first), g->x.row, x.data, x.row, NULL, 0);
      for (int64_t d0 = 0; d0 < all; d0 += k->panel_width) {
        char *out = at(c, sums, r0 * ML_MASK_COLUMNS + d0);
        k->product(rank, min_(k->panel_width, all - d0), tokens, at(c, g->h, t0 * c->R + r0), 1, c->R,
                   at(c, x.data, d0), x.row, out, ML_MASK_COLUMNS, t0 ? out : NULL, ML_MASK_COLUMNS);
      }
    }
  }
  finish_collection(g, sums, ML_MASK_COLUMNS, first, all);
}

static void collect_masked(call *c, factor grads, const char *h, rows x, bool add) {
  size_t used = c->used;
  collection g = {.c = c, .grads = grads, .h = h, .x = x, .add = add};
  int64_t tasks = ceil_div(grads.d, ML_MASK_COLUMNS);
  g.scratch = take(c, masked_collect_scratch(c), ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_parallel_for(threads_for(c, c->T * c->R * grads.d), tasks, collect_masked_task, &g);
  c->used = used;
}

/* ---- the base product: out [T, n] += left [T, k] right ---- */

typedef struct {
  const call *c;
  rows left, out;
  int64_t n, k;
  ml_matrix right;
} base_product;

/* Slices depend on shape alone: BLAS gives other bits for other slices. */
static void base_task(void *context, int64_t task, int thread) {
  (void)thread;
  const base_product *g = context;
  const call *c = g->c;
  int64_t slices = ceil_div(g->n, BASE_COLUMNS);
  int64_t t0 = task / slices * BASE_TOKENS, j0 = task % slices * BASE_COLUMNS;
  ml_matrix right = {at(c, g->right.data, j0 * g->right.col), g->right.row, g->right.col};
  ml_blas_product(c->p->dtype, min_(BASE_TOKENS, c->T - t0), min_(BASE_COLUMNS, g->n - j0), g->k,
                  at(c, g->left.data, t0 * g->left.row), g->left.row, right, at(c, g->out.data, t0 * g->out.row + j0),
                  g->out.row);
}

static void reserve_base(const call *c, budget *b, int64_t n, int64_t k) {
  reserve_projection(c, b, min_(n, BASE_COLUMNS), k, false);
}

static void add_base(call *c, rows left, int64_t k, ml_matrix right, int64_t n, rows out) {
  /* A single row may have any stride of its own. */
  if (c->T == 1) left.row = k, out.row = n;
  base_product g = {.c = c, .left = left, .out = out, .n = n, .k = k, .right = right};
  if (ml_blas_takes(c->T, n, k, left.row, right, out.row)) {
    ml_parallel_for(threads_for(c, c->T * n * k), ceil_div(n, BASE_COLUMNS) * ceil_div(c->T, BASE_TOKENS), base_task,
                    &g);
    return;
  }
  for (int64_t j0 = 0; j0 < n; j0 += BASE_COLUMNS) { /* as a projection, slice by slice */
    int64_t offsets[2] = {0, min_(BASE_COLUMNS, n - j0)};
    ml_matrix part = {at(c, right.data, j0 * right.col), right.col, right.row};
    project(c, (factor){k, 1, offsets, &part}, left, (rows){at(c, out.data, j0), out.row}, true, NULL, NULL, NULL);
  }
}

/* ---- forward ---- */

typedef struct {
  const call *c;
  char *h;        /* [T, R]: H; dropped experts are zeroed */
  char *weighted; /* [T, R]: s w * H */
} weighing;

static void weigh(const void *context, int64_t first, int64_t last) {
  const weighing *w = context;
  const call *c = w->c;
  const ml_routed_lora *p = c->p;
  c->elementwise->factors(first, last, p->seq, p->n_experts, p->routing_weights, p->experts, p->top_k, c->factors,
                          c->keep);
  if (p->top_k) c->elementwise->drop(first, last, p->n_experts, c->offsets, c->keep, w->h);
  c->elementwise->weigh(first, last, p->n_experts, c->offsets, c->factors, w->h, w->weighted);
}

ml_status ml_routed_lora_forward(const ml_routed_lora *p, ml_tokens y, ml_tokens hidden, ml_tokens base,
                                 const void *bias, int64_t bias_stride) {
  call c;
  budget need = {0};
  ml_status status = begin(&c, p, !hidden.data);
  if (status != ML_OK) return status;
  if (c.T > 0 && (!p->x.data || !y.data)) return ML_ERR_NULL;
  if ((base.data && p->weight.data) || (bias && !p->weight.data)) return ML_ERR_VALUE;
  bool own_hidden = !is_dense_hidden(&c, hidden);

  reserve_common(&c, &need);
  reserve_rows(&c, &need, p->x, p->d_in);
  reserve_rows(&c, &need, y, p->d_out);
  if (own_hidden) reserve(&need, c.T, c.R, c.size);
  if (hidden.data) reserve(&need, c.T, c.R, c.size);
  if (bias) reserve(&need, 1, p->d_out, c.size);
  reserve_projection(&c, &need, c.R, p->d_in, c.drops);
  reserve_spreading(&c, &need, p->d_out);
  if (p->weight.data) reserve_base(&c, &need, p->d_out, p->d_in);
  status = allocate(&c, need);
  if (status != ML_OK || c.T == 0) goto done;

  rows x = input_rows(&c, p->x, p->d_in);
  rows out = output_rows(&c, y, p->d_out);
  char *h = own_hidden ? take(&c, c.T, c.R, c.size) : hidden.data;
  weighing w = {.c = &c, .h = h, .weighted = hidden.data ? take(&c, c.T, c.R, c.size) : h};
  rows init = {NULL, 0};
  if (bias) {
    init = (rows){take(&c, 1, p->d_out, c.size), 0};
    c.elementwise->copy(1, p->d_out, bias, 0, bias_stride, init.data, 0, 1, false);
  } else if (base.data && !as_rows(&c, base, p->d_out, &init)) {
    copy_tokens(&c, base, (ml_tokens){out.data, p->seq * out.row, out.row, 1}, p->d_out);
    init = out;
  }

  if (c.drops)
    project_masked(&c, factor_a(&c), x, (rows){h, c.R}, weigh, &w);
  else
    project(&c, factor_a(&c), x, (rows){h, c.R}, false, NULL, weigh, &w);
  spread(&c, factor_b(&c), w.weighted, out, init);
  if (p->weight.data)
    add_base(&c, x, p->d_in, (ml_matrix){p->weight.data, p->weight.col, p->weight.row}, p->d_out, out);

  finish_rows(&c, out, y, p->d_out);
  if (own_hidden && hidden.data) copy_tokens(&c, dense(&c, h, c.R), hidden, c.R);
done:
  free(c.workspace);
  return status;
}

/* ---- backward ---- */

typedef struct {
  const call *c;
  const char *h;     /* [T, R] */
  char *p;           /* [T, R]: P, turned into Q = s w * P; NULL: not needed */
  char *weighted;    /* [T, R]: s w * H; NULL: not needed */
  char *token_grads; /* [T, N]: gradient of each token's weights; NULL: not needed */
} gradient_weighing;

static void weigh_gradients(const void *context, int64_t first, int64_t last) {
  const gradient_weighing *w = context;
  const call *c = w->c;
  const ml_routed_lora *p = c->p;
  const ml_elementwise *f = c->elementwise;
  int64_t N = p->n_experts;
  f->factors(first, last, p->seq, N, p->routing_weights, p->experts, p->top_k, c->factors, c->keep);
  if (w->token_grads) f->weight_grads(first, last, N, c->offsets, p->experts, c->keep, w->p, w->h, w->token_grads);
  if (w->p) {
    if (p->top_k) f->drop(first, last, N, c->offsets, c->keep, w->p);
    f->weigh(first, last, N, c->offsets, c->factors, w->p, w->p);
  }
  if (w->weighted) f->weigh(first, last, N, c->offsets, c->factors, w->h, w->weighted);
}

/* Makes M_A the wanted gradients of A, of the experts with dropout or of those without; false: there are none. */
static bool place_grads_a(call *c, bool with_dropout) {
  bool any = false;
  for (int64_t e = 0; e < c->p->n_experts; e++) {
    bool here = (mask_of(c->p, e).threshold > 0) == with_dropout;
    c->a[e] = here ? c->p->experts[e].grad_a : (ml_matrix){0};
    any |= c->a[e].data != NULL;
  }
  return any;
}

ml_status ml_routed_lora_backward(const ml_routed_lora *p, ml_tokens grad_y, ml_tokens hidden, ml_tokens grad_x,
                                  ml_tokens grad_w, unsigned accumulate) {
  call c;
  budget need = {0};
  ml_status status = begin(&c, p, false);
  if (status != ML_OK) return status;
  bool any_a = false, any_b = false;
  for (int64_t e = 0; e < p->n_experts; e++) {
    any_a |= p->experts[e].grad_a.data != NULL;
    any_b |= p->experts[e].grad_b.data != NULL;
  }
  bool need_h = any_b || grad_w.data, need_p = grad_x.data || any_a || grad_w.data;
  if (c.T > 0 && (!grad_y.data || (need_h && !hidden.data) || (any_a && !p->x.data))) return ML_ERR_NULL;
  bool own_hidden = need_h && !is_dense_hidden(&c, hidden);

  reserve_common(&c, &need);
  reserve_rows(&c, &need, grad_y, p->d_out);
  if (any_a) reserve_rows(&c, &need, p->x, p->d_in);
  if (grad_x.data) reserve_rows(&c, &need, grad_x, p->d_in);
  if (own_hidden) reserve(&need, c.T, c.R, c.size);
  if (need_p) reserve(&need, c.T, c.R, c.size);
  if (any_b) reserve(&need, c.T, c.R, c.size);
  if (grad_w.data) reserve(&need, c.T, p->n_experts, c.size);
  if (need_p) reserve_projection(&c, &need, c.R, p->d_out, false);
  if (grad_x.data && c.drops)
    reserve_masked_spreading(&c, &need, p->d_in);
  else if (grad_x.data)
    reserve_spreading(&c, &need, p->d_in);
  if (grad_x.data && p->weight.data) reserve_base(&c, &need, p->d_in, p->d_out);
  if (any_a) reserve_collection(&c, &need, p->d_in);
  if (any_a && c.drops) reserve_masked_collection(&c, &need, p->d_in);
  if (any_b) reserve_collection(&c, &need, p->d_out);
  status = allocate(&c, need);
  if (status != ML_OK) goto done;

  rows g = input_rows(&c, grad_y, p->d_out);
  gradient_weighing w = {.c = &c, .h = hidden.data};
  if (own_hidden) {
    ml_tokens copy = dense(&c, take(&c, c.T, c.R, c.size), c.R);
    copy_tokens(&c, hidden, copy, c.R);
    w.h = copy.data;
  }
  if (need_p) w.p = take(&c, c.T, c.R, c.size);
  if (any_b) w.weighted = take(&c, c.T, c.R, c.size);
  if (grad_w.data) w.token_grads = take(&c, c.T, p->n_experts, c.size);

  if (need_p && c.T)
    project(&c, factor_b(&c), g, (rows){w.p, c.R}, false, NULL, weigh_gradients, &w);
  else
    weigh_gradients(&w, 0, c.T);

  if (grad_x.data && c.T) {
    rows out = output_rows(&c, grad_x, p->d_in);
    rows init = {NULL, 0};
    if (accumulate & ML_ACCUMULATE_X) {
      if (out.data != grad_x.data) copy_tokens(&c, grad_x, dense(&c, out.data, p->d_in), p->d_in);
      init = out;
    }
    if (c.drops)
      spread_masked(&c, factor_a(&c), w.p, out, init);
    else
      spread(&c, factor_a(&c), w.p, out, init);
    if (p->weight.data) add_base(&c, g, p->d_out, p->weight, p->d_in, out);
    finish_rows(&c, out, grad_x, p->d_in);
  }
  /* A and B have been read for the last time: their places in the factors now say where the gradients go. */
  if (any_a) {
    rows x = input_rows(&c, p->x, p->d_in);
    bool add = (accumulate & ML_ACCUMULATE_A) != 0;
    if (place_grads_a(&c, false)) collect(&c, factor_a(&c), w.p, x, add);
    if (c.drops && place_grads_a(&c, true)) collect_masked(&c, factor_a(&c), w.p, x, add);
  }
  for (int64_t e = 0; e < p->n_experts; e++) {
    ml_matrix grad_b = p->experts[e].grad_b;
    c.b[e] = (ml_matrix){grad_b.data, grad_b.col, grad_b.row};
  }
  if (any_b) collect(&c, factor_b(&c), w.weighted, g, (accumulate & ML_ACCUMULATE_B) != 0);
  if (grad_w.data)
    c.elementwise->sum_weight_grads(p->batch, p->seq, p->n_experts, w.token_grads, grad_w,
                                    (accumulate & ML_ACCUMULATE_W) != 0);
done:
  free(c.workspace);
  return status;
}
