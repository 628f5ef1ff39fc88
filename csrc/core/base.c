/* The base product: out [T, n] += left [T, k] right. */
#include <stdatomic.h>
#include <string.h>

#include "blas.h"
#include "call.h"

enum {
  BASE_COLUMNS = 512, /* output features of one slice */
  BASE_TOKENS = 256   /* tokens of the same */
};

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

void ml_reserve_base(const call *c, budget *b, int64_t n, int64_t k) {
  ml_reserve_projection(c, b, min_(n, BASE_COLUMNS), k, false);
}

void ml_add_base(call *c, rows left, int64_t k, ml_matrix right, int64_t n, rows out) {
  /* A single row may have any stride of its own. */
  if (c->T == 1) left.row = k, out.row = n;
  base_product g = {.c = c, .left = left, .out = out, .n = n, .k = k, .right = right};
  if (ml_blas_takes(c->T, n, k, left.row, right, out.row)) {
    ml_parallel_for(ml_threads_for(c, c->T * n * k), ceil_div(n, BASE_COLUMNS) * ceil_div(c->T, BASE_TOKENS), base_task,
                    &g);
    return;
  }
  for (int64_t j0 = 0; j0 < n; j0 += BASE_COLUMNS) { /* as a projection, slice by slice */
    int64_t offsets[2] = {0, min_(BASE_COLUMNS, n - j0)};
    ml_matrix part = {at(c, right.data, j0 * right.col), right.col, right.row};
    ml_project(c, (factor){k, 1, offsets, &part}, left, (rows){at(c, out.data, j0), out.row}, true, NULL, NULL, NULL);
  }
}

/* ---- by whom, for torch tensors ---- */

static const char *const base_names[] = {NULL, "own", "torch"};
static atomic_int base_choice; /* index of its name */

ml_status ml_set_base(const char *name) {
  for (int i = 0; i < 3; i++) {
    const char *known = base_names[i];
    if (known ? name && strcmp(name, known) == 0 : !name || !*name) {
      atomic_store(&base_choice, i);
      return ML_OK;
    }
  }
  return ML_ERR_BASE;
}

const char *ml_get_base(void) { return base_names[atomic_load(&base_choice)]; }

const char *ml_base_rule(void) {
  const char *chosen = ml_get_base();
  return chosen ? chosen : "own for at most 32 tokens in float32, torch otherwise";
}

bool ml_base_is_faster(ml_dtype dtype, int64_t tokens, int64_t n, int64_t k, bool transposed) {
  (void)n, (void)k, (void)transposed;
  int choice = atomic_load_explicit(&base_choice, memory_order_relaxed);
  return choice ? choice == 1 : dtype == ML_F32 && tokens <= 32;
}
