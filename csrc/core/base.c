/* The base product: out [T, n] += left [T, k] right. */
#include "blas.h"
#include "call.h"

enum {
  BASE_COLUMNS = 512, /* output features of one slice that BLAS computes */
  BASE_TOKENS = 256,  /* tokens of the same */
  DOT_COLUMNS = 32,
  IN_PLACE_COLUMNS = 512,
  IN_PLACE_DEPTH = 16,
  PACKED_TOKENS = 512, /* tokens that share one packing of the right operand */
  PACKED_PANELS = 4
};

typedef struct {
  const call *c;
  rows left, out;
  int64_t n, k;
  ml_matrix right; /* [k, n] */
  char *packed;    /* per thread [PACKED_PANELS][DEPTH_BLOCK][panel_width] */
} base_product;

/* Slices depend on shape alone: BLAS gives other bits for other slices. */
static void base_by_blas(void *context, int64_t task, int thread) {
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

/* Columns of `right` as rows of unit stride, a few tokens: nothing is packed. */
static void base_by_dots(void *context, int64_t task, int thread) {
  (void)thread;
  const base_product *g = context;
  const call *c = g->c;
  int64_t j0 = task * DOT_COLUMNS, n = min_(DOT_COLUMNS, g->n - j0);
  const void *columns[DOT_COLUMNS];
  for (int64_t j = 0; j < n; j++) columns[j] = at(c, g->right.data, (j0 + j) * g->right.col);
  char *out = at(c, g->out.data, j0);
  c->products->dots(c->T, n, g->k, g->left.data, g->left.row, columns, out, g->out.row, out, g->out.row);
}

/* Rows of `right` of unit stride, a few tokens: a few rows at a time, which are panels as they stand. */
static void base_in_place(void *context, int64_t task, int thread) {
  (void)thread;
  const base_product *g = context;
  const call *c = g->c;
  const ml_products *p = c->products;
  int64_t j0 = task * IN_PLACE_COLUMNS, j1 = min_(j0 + IN_PLACE_COLUMNS, g->n);
  for (int64_t k0 = 0; k0 < g->k; k0 += IN_PLACE_DEPTH)
    for (int64_t j = j0; j < j1; j += p->panel_width) {
      char *out = at(c, g->out.data, j);
      p->product(c->T, min_(p->panel_width, j1 - j), min_(IN_PLACE_DEPTH, g->k - k0), at(c, g->left.data, k0),
                 g->left.row, 1, at(c, g->right.data, k0 * g->right.row + j), g->right.row, out, g->out.row, out,
                 g->out.row);
    }
}

static void base_by_panels(void *context, int64_t task, int thread) {
  const base_product *g = context;
  const call *c = g->c;
  const ml_products *p = c->products;
  int64_t full = p->panel_width, group = PACKED_PANELS * full, groups = ceil_div(g->n, group);
  int64_t t0 = task / groups * PACKED_TOKENS, t1 = min_(t0 + PACKED_TOKENS, c->T);
  int64_t j0 = task % groups * group, j1 = min_(j0 + group, g->n);
  char *packed = at(c, g->packed, thread * group * DEPTH_BLOCK);
  for (int64_t k0 = 0; k0 < g->k; k0 += DEPTH_BLOCK) {
    int64_t depth = min_(DEPTH_BLOCK, g->k - k0);
    for (int64_t j = j0; j < j1; j += full) {
      int64_t cols = min_(full, j1 - j);
      ml_matrix part = {at(c, g->right.data, k0 * g->right.row + j * g->right.col), g->right.row, g->right.col};
      pack_panel(c, c->products, at(c, packed, (j - j0) * depth), depth, cols, part);
    }
    for (int64_t t = t0; t < t1; t += ROW_BLOCK)
      for (int64_t j = j0; j < j1; j += full) {
        int64_t cols = min_(full, j1 - j);
        char *out = at(c, g->out.data, t * g->out.row + j);
        p->product(min_(ROW_BLOCK, t1 - t), cols, depth, at(c, g->left.data, t * g->left.row + k0), g->left.row, 1,
                   at(c, packed, (j - j0) * depth), round_up(cols, p->lanes), out, g->out.row, out, g->out.row);
      }
  }
}

/* Rows of unit stride that end with whole vectors, as panels do. */
static bool takes_rows_in_place(const call *c, ml_matrix right, int64_t n) {
  return c->T < c->regime->base_in_place && right.col == 1 && n % c->products->lanes == 0;
}

/* Of a slice with one row or column BLAS makes a product with a vector, whose bits depend on where the arrays are. */
static bool takes_blas(const base_product *g) {
  int64_t T = g->c->T;
  return g->n % BASE_COLUMNS != 1 && T % BASE_TOKENS != 1 &&
         ml_blas_takes(T, g->n, g->k, g->left.row, g->right, g->out.row);
}

static int64_t packed_tasks(const call *c, int64_t n) {
  return ceil_div(n, PACKED_PANELS * c->products->panel_width) * ceil_div(c->T, PACKED_TOKENS);
}

void ml_reserve_base(const call *c, budget *b, int64_t n) {
  budget phase = {0};
  ml_reserve(&phase, PACKED_PANELS * DEPTH_BLOCK * c->products->panel_width,
             ml_thread_bound(c->p->n_threads, packed_tasks(c, n)), c->size);
  ml_reserve_phase(b, phase);
}

void ml_add_base(call *c, rows left, int64_t k, ml_matrix right, int64_t n, rows out) {
  size_t used = c->used;
  /* A single row may have any stride of its own. */
  if (c->T == 1) left.row = k, out.row = n;
  base_product g = {.c = c, .left = left, .out = out, .n = n, .k = k, .right = right};
  int n_threads = ml_threads_for(c, c->T * n * k);
  if (c->T < c->regime->base_dots && right.row == 1) {
    ml_parallel_for(n_threads, ceil_div(n, DOT_COLUMNS), base_by_dots, &g);
  } else if (takes_rows_in_place(c, right, n)) {
    ml_parallel_for(n_threads, ceil_div(n, IN_PLACE_COLUMNS), base_in_place, &g);
  } else if (takes_blas(&g)) {
    ml_parallel_for(n_threads, ceil_div(n, BASE_COLUMNS) * ceil_div(c->T, BASE_TOKENS), base_by_blas, &g);
  } else {
    int64_t tasks = packed_tasks(c, n);
    g.packed = ml_take(c, PACKED_PANELS * DEPTH_BLOCK * c->products->panel_width,
                       ml_thread_bound(c->p->n_threads, tasks), c->size);
    ml_parallel_for(n_threads, tasks, base_by_panels, &g);
  }
  c->used = used;
}
