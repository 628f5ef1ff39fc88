/* collect: the gradient of M, h^T x, for the experts that want it. */
#include <string.h>

#include "call.h"

enum {
  TURNED_ROWS = 48, /* of the transpose, in a task, or twice or four times that: whole tiles of every instruction set */
  MASKED_TOKENS = 128 /* of a masked panel of x */
};

typedef struct {
  const call *c;
  factor grads;  /* parts without data are not wanted */
  const char *h; /* [T, R] dense */
  rows x;
  bool add;
  int64_t width; /* columns of x in a task */
  char *scratch; /* per thread: a packed panel of x [depth, width], sums [R, width] or [width, whole vectors of R] */
} collection;

/* Tokens of a packed panel of x. */
static int64_t collect_depth(const call *c) { return min_(DEPTH_BLOCK, c->T); }

static int64_t collect_scratch(const call *c, int64_t width) {
  return (collect_depth(c) + round_up(c->R, c->products->lanes)) * width;
}

/* Wide, since rows of x are far apart in memory; but at least 8 tasks. */
static int64_t turned_rows(int64_t d) {
  return TURNED_ROWS * (d >= 32 * TURNED_ROWS ? 4 : d >= 16 * TURNED_ROWS ? 2 : 1);
}

void ml_reserve_collection(const call *c, budget *b, int64_t d) {
  if (c->pairs) {
    ml_reserve_pair_collection(c, b, d);
    return;
  }
  int64_t narrow = collect_scratch(c, c->products->panel_width), wide = collect_scratch(c, turned_rows(d));
  budget phase = {0};
  ml_reserve(&phase, 1, 1, sizeof(collection));
  ml_reserve(&phase, narrow > wide ? narrow : wide, ml_thread_bound(c->p->n_threads, INT64_MAX), c->size);
  ml_reserve_phase(b, phase);
}

void ml_store_grads(const call *c, ml_matrix sums, int64_t rank, int64_t cols, ml_matrix to, bool add) {
  if (sums.data && !add && to.row == 1) /* as B has them */
    c->products->pack(to.data, to.col, cols, rank, sums.data, sums.col, sums.row);
  else if (sums.data && !add && to.col == 1) /* as A has them */
    c->products->pack(to.data, to.row, rank, cols, sums.data, sums.row, sums.col);
  else
    c->elementwise->copy(rank, cols, sums.data, sums.row, sums.col, to.data, to.row, to.col, add);
}

/* The same for all: sums [R, cols] are columns d0 .. of the gradients. */
static void finish_collection(const collection *g, const char *sums, int64_t width, int64_t d0, int64_t cols) {
  const call *c = g->c;
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    ml_matrix to = g->grads.parts[e];
    if (!to.data) continue;
    int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
    ml_store_grads(c, (ml_matrix){c->T ? at(c, sums, r0 * width) : NULL, width, 1}, rank, cols,
                   (ml_matrix){at(c, to.data, d0 * to.col), to.row, to.col}, g->add);
  }
}

/* Gradients with dense rows, as those of A, of a few tokens: x's own rows are a panel, but for its last columns, and sums
 * are made where they belong. */
static void collect_in_place(void *context, int64_t task, int thread) {
  const collection *g = context;
  const call *c = g->c;
  const ml_products *k = c->products;
  int64_t d0 = task * g->width, cols = min_(g->width, g->grads.d - d0), panel_row = g->x.row;
  const char *panel = at(c, g->x.data, d0);
  if (cols % k->lanes) {
    char *packed = at(c, g->scratch, thread * collect_scratch(c, g->width));
    pack_panel(c, c->products, packed, c->T, cols, (ml_matrix){(void *)(uintptr_t)panel, panel_row, 1});
    panel = packed;
    panel_row = round_up(cols, k->lanes);
  }
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    ml_matrix to = g->grads.parts[e];
    if (!to.data) continue;
    int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
    char *out = at(c, to.data, d0);
    k->product(rank, cols, c->T, at(c, g->h, r0), 1, c->R, panel, panel_row, out, to.row, g->add ? out : NULL, to.row);
  }
}

/* Gradients like those of B, of a few tokens: made where they belong, too. */
static void collect_outer(void *context, int64_t task, int thread) {
  (void)thread;
  const collection *g = context;
  const call *c = g->c;
  int64_t d0 = task * g->width, cols = min_(g->width, g->grads.d - d0);
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    ml_matrix to = g->grads.parts[e];
    if (!to.data) continue;
    int64_t r0 = g->grads.offsets[e], rank = g->grads.offsets[e + 1] - r0;
    c->products->outer(c->T, cols, rank, at(c, g->x.data, d0), g->x.row, at(c, g->h, r0), c->R,
                       at(c, to.data, d0 * to.col), g->add);
  }
}

/* Whether that can be: columns without gaps, of whole vectors or of a whole part of one. */
static bool takes_outer(const call *c, factor grads) {
  int64_t lanes = c->products->lanes;
  if (c->T >= c->regime->outer) return false;
  for (int64_t e = 0; e < grads.n_parts; e++) {
    ml_matrix to = grads.parts[e];
    int64_t rank = grads.offsets[e + 1] - grads.offsets[e];
    if (to.data && (to.row != 1 || to.col != rank || (rank % lanes && (rank < 4 || lanes % rank)))) return false;
  }
  return true;
}

/* All others: the transpose x^T h, with h's own rows as panels, whose last vector may end beyond h. */
static void collect_turned(void *context, int64_t task, int thread) {
  const collection *g = context;
  const call *c = g->c;
  const ml_products *k = c->products;
  const factor *grads = &g->grads;
  int64_t d0 = task * g->width, cols = min_(g->width, grads->d - d0);
  char *packed = at(c, g->scratch, thread * collect_scratch(c, g->width));
  char *sums = at(c, packed, collect_depth(c) * g->width);
  for (int64_t e = 0; e < grads->n_parts; e++) {
    int64_t first = e; /* neighbours that are wanted go into one product */
    while (e < grads->n_parts && grads->parts[e].data) e++;
    int64_t r0 = grads->offsets[first], width = round_up(grads->offsets[e] - r0, k->lanes);
    for (int64_t t0 = 0; t0 < c->T && width > 0; t0 += DEPTH_BLOCK) {
      int64_t tokens = min_(DEPTH_BLOCK, c->T - t0);
      rows x = {at(c, g->x.data, t0 * g->x.row + d0), g->x.row};
      if (c->T >= c->regime->turned_in_place) {
        k->pack(packed, g->width, tokens, cols, x.data, x.row, 1);
        x = (rows){packed, g->width};
      }
      for (int64_t j = 0; j < width; j += k->panel_width) {
        char *out = at(c, sums, j);
        k->product(cols, min_(k->panel_width, width - j), tokens, x.data, 1, x.row, at(c, g->h, t0 * c->R + r0 + j),
                   c->R, out, width, t0 ? out : NULL, width);
      }
    }
    for (int64_t i = first; i < e; i++) {
      ml_matrix to = grads->parts[i];
      ml_matrix of_expert = {at(c, sums, grads->offsets[i] - r0), 1, width};
      to.data = at(c, to.data, d0 * to.col);
      ml_store_grads(c, of_expert, grads->offsets[i + 1] - grads->offsets[i], cols, to, g->add);
    }
  }
}

ml_loop ml_collect_loop(call *c, factor grads, const char *h, rows x, bool add) {
  collection *g = ml_take(c, 1, 1, sizeof *g);
  *g = (collection){.c = c, .grads = grads, .h = h, .x = x, .add = add};
  if (c->T == 0) {
    finish_collection(g, NULL, 0, 0, grads.d);
    return (ml_loop){0};
  }
  bool in_place = c->T < c->regime->collect_in_place && ml_has_dense_rows(grads);
  g->width = in_place ? c->products->panel_width : turned_rows(grads.d);
  g->scratch = ml_take(c, collect_scratch(c, g->width), ml_thread_bound(c->p->n_threads, INT64_MAX), c->size);
  ml_task *collect = in_place ? collect_in_place : takes_outer(c, grads) ? collect_outer : collect_turned;
  return (ml_loop){collect, g, ceil_div(grads.d, g->width), ml_threads_for_factors(c, c->R * grads.d)};
}

void ml_collect(call *c, factor grads, const char *h, rows x, bool add) {
  if (c->pairs) {
    ml_pair_collect(c, grads, (const float *)h, x, add);
    return;
  }
  size_t used = c->used;
  ml_loop loop = ml_collect_loop(c, grads, h, x, add);
  ml_parallel_loops(1, &loop);
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
