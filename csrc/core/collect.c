/* collect: the gradient of M, h^T x, for the experts that want it. */
#include <string.h>

#include "call.h"

enum { MASKED_TOKENS = 128 /* of a masked panel of x */ };

typedef struct {
  const call *c;
  factor grads;  /* parts without data are not wanted */
  const char *h; /* [T, R] dense */
  rows x;
  bool add;
  char *scratch; /* per thread: a packed panel of x [DEPTH_BLOCK, panel_width], sums [R, panel_width] */
} collection;

static int64_t collect_scratch(const call *c) { return (DEPTH_BLOCK + c->R) * c->products->panel_width; }

void ml_reserve_collection(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  ml_reserve(&phase, collect_scratch(c), ml_thread_bound(c->p->n_threads, ceil_div(d, c->products->panel_width)),
             c->size);
  ml_reserve_phase(b, phase);
}

void ml_store_grads(const call *c, const char *sums, int64_t width, int64_t rank, int64_t cols, ml_matrix to,
                    bool add) {
  if (sums && to.row == 1 && !add) /* B: a transposition, which packing is */
    c->products->pack(to.data, to.col, cols, rank, sums, 1, width);
  else
    c->elementwise->copy(rank, cols, sums, width, 1, to.data, to.row, to.col, add);
}

/* The same for all: sums [R, cols] are columns d0 .. of the gradients. */
static void finish_collection(const collection *g, const char *sums, int64_t width, int64_t d0, int64_t cols) {
  const call *c = g->c;
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    ml_matrix to = g->grads.parts[e];
    if (!to.data) continue;
    int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
    ml_store_grads(c, c->T ? at(c, sums, r0 * width) : NULL, width, rank, cols,
                   (ml_matrix){at(c, to.data, d0 * to.col), to.row, to.col}, g->add);
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

void ml_collect(call *c, factor grads, const char *h, rows x, bool add) {
  size_t used = c->used;
  collection g = {.c = c, .grads = grads, .h = h, .x = x, .add = add};
  int64_t tasks = ceil_div(grads.d, c->products->panel_width);
  g.scratch = ml_take(c, collect_scratch(c), ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_parallel_for(ml_threads_for(c, c->T * c->R * grads.d), tasks, collect_task, &g);
  c->used = used;
}

/* The same for the experts that dropout gives an x of their own: each in blocks of the columns that masks come in, which
 * are panels side by side. */

static int64_t masked_collect_scratch(const call *c) {
  return MASKED_TOKENS * (ML_MASK_COLUMNS + ROW_PADDING) + c->R * ML_MASK_COLUMNS;
}

void ml_reserve_masked_collection(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  ml_reserve(&phase, masked_collect_scratch(c), ml_thread_bound(c->p->n_threads, ceil_div(d, ML_MASK_COLUMNS)),
             c->size);
  ml_reserve_phase(b, phase);
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
      ml_mask mask = ml_mask_of(c->p, e);
      int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
      k->keep(&mask, c->p->first_token + t0, first, tokens, all, at(c, g->x.data, t0 * g->x.row + first), g->x.row,
              x.data, x.row, NULL, 0);
      for (int64_t d0 = 0; d0 < all; d0 += k->panel_width) {
        char *out = at(c, sums, r0 * ML_MASK_COLUMNS + d0);
        k->product(rank, min_(k->panel_width, all - d0), tokens, at(c, g->h, t0 * c->R + r0), 1, c->R,
                   at(c, x.data, d0), x.row, out, ML_MASK_COLUMNS, t0 ? out : NULL, ML_MASK_COLUMNS);
      }
    }
  }
  finish_collection(g, sums, ML_MASK_COLUMNS, first, all);
}

void ml_collect_masked(call *c, factor grads, const char *h, rows x, bool add) {
  size_t used = c->used;
  collection g = {.c = c, .grads = grads, .h = h, .x = x, .add = add};
  int64_t tasks = ceil_div(grads.d, ML_MASK_COLUMNS);
  g.scratch = ml_take(c, masked_collect_scratch(c), ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_parallel_for(ml_threads_for(c, c->T * c->R * grads.d), tasks, collect_masked_task, &g);
  c->used = used;
}
