/* project: out [T, R] = x M^T. */
#include <string.h>

#include "call.h"

typedef struct {
  const call *c;
  factor m;
  int64_t R;
  rows x;
  rows out;
  const ml_mask *mask; /* of x; NULL: none */
  epilogue *then;      /* NULL: nothing */
  const void *context;
  int64_t block;           /* tokens of a task */
  char *packed;            /* [panels][d][width]; NULL: M in place */
  char *masked;            /* with a mask, per thread [block][DEPTH_BLOCK + ROW_PADDING] */
  const void **factor_row; /* [R], for dot products */
} projection;

int64_t ml_projection_block(int64_t T) { return min_(96, round_up(ceil_div(T, 24), 6)); }

static int64_t masked_block(const call *c) { return ml_projection_block(c->T) * (DEPTH_BLOCK + ROW_PADDING); }
static int masked_blocks(const call *c) {
  return ml_thread_bound(c->p->n_threads, ceil_div(c->T, ml_projection_block(c->T)));
}

void ml_reserve_projection(const call *c, budget *b, int64_t R, int64_t d, bool masked) {
  if (c->pairs) {
    ml_reserve_pair_projection(c, b, R, d);
    return;
  }
  budget phase = {0};
  ml_reserve(&phase, round_up(R, c->products->lanes), d, c->size);
  ml_reserve(&phase, R, 1, sizeof(void *));
  if (masked && c->T) ml_reserve(&phase, masked_block(c), masked_blocks(c), c->size);
  ml_reserve_phase(b, phase);
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
  if (j->factor_row) {
    c->readers->pack_rows(panel, width, depth, last - first, j->factor_row + first, k0);
    return;
  }
  for (int64_t e = 0; e < j->m.n_parts; e++) {
    int64_t from = j->m.offsets[e] > first ? j->m.offsets[e] : first, to = min_(j->m.offsets[e + 1], last);
    if (from >= to) continue;
    ml_matrix part = j->m.parts[e];
    c->readers->pack(at(c, panel, from - first), width, depth, to - from,
                     at_factor(c, part.data, (from - j->m.offsets[e]) * part.row + k0 * part.col), part.col, part.row);
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
      c->products->keep(j->mask, c->p->first_token + t0, k0, tokens, depth, x.data, x.row, masked.data, masked.row,
                        NULL, 0);
      x = masked;
    }
    for (int64_t first = 0; first < j->R; first += full) {
      int64_t cols = min_(full, j->R - first), width = round_up(cols, c->products->lanes);
      void *out = at(c, j->out.data, t0 * j->out.row + first);
      c->products->product(tokens, cols, depth, x.data, x.row, 1, at(c, j->packed, first * j->m.d + k0 * width), width,
                           out, j->out.row, k0 ? out : NULL, j->out.row);
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
  c->readers->dots(c->T, n, j->m.d, j->x.data, j->x.row, j->factor_row + first, at(c, j->out.data, first), j->out.row,
                   NULL, 0);
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

void ml_project(call *c, factor m, rows x, rows out, const ml_mask *mask, epilogue *then, const void *context) {
  if (c->pairs) {
    ml_pair_project(c, m, x, out, then, context);
    return;
  }
  int64_t R = m.offsets[m.n_parts];
  int n_threads = ml_threads_for_factors(c, R * m.d);
  size_t used = c->used;
  projection j = {.c = c, .m = m, .R = R, .x = x, .out = out};
  j.mask = mask;
  j.then = then;
  j.context = context;
  j.block = ml_projection_block(c->T);
  if (ml_has_dense_rows(m)) {
    j.factor_row = ml_take(c, R, 1, sizeof(void *));
    for (int64_t e = 0; e < m.n_parts; e++)
      for (int64_t r = m.offsets[e]; r < m.offsets[e + 1]; r++)
        j.factor_row[r] = at_factor(c, m.parts[e].data, (r - m.offsets[e]) * m.parts[e].row);
  }
  if (!mask && c->T < c->regime->short_sums && ml_has_dense_columns(m)) {
    ml_parallel_for(n_threads, m.n_parts, project_sums, &j);
    if (then) then(context, 0, c->T);
  } else if (!mask && c->T < c->regime->dots && j.factor_row) {
    ml_parallel_for(n_threads, ceil_div(R, DOT_ROWS), project_dots, &j);
    if (then) then(context, 0, c->T);
  } else {
    j.packed = ml_take(c, round_up(R, c->products->lanes), m.d, c->size);
    if (mask) j.masked = ml_take(c, masked_block(c), masked_blocks(c), c->size);
    int64_t panels = ceil_div(R, c->products->panel_width);
    ml_parallel_for(n_threads, panels * ceil_div(m.d, DEPTH_BLOCK), pack_projection, &j);
    ml_parallel_for(n_threads, ceil_div(c->T, j.block), project_packed, &j);
  }
  c->used = used;
}

void ml_project_masked(call *c, factor m, rows x, rows out, epilogue *then, const void *context) {
  for (int64_t e = 0; e < m.n_parts; e++) {
    int64_t offsets[2] = {0, m.offsets[e + 1] - m.offsets[e]};
    ml_mask mask = ml_mask_of(c->p, e);
    ml_project(c, (factor){m.d, 1, offsets, &m.parts[e]}, x, (rows){at(c, out.data, m.offsets[e]), out.row},
               mask.threshold ? &mask : NULL, e + 1 == m.n_parts ? then : NULL, context);
  }
}
