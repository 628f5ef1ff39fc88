/* spread: out [T, d] = init + h M. */
#include <string.h>

#include "call.h"

enum {
  IN_PLACE_COLUMNS = 64, /* outputs of one task of it */
  SPREAD_TOKENS = 512    /* tokens that share one packing of a panel */
};

typedef struct {
  const call *c;
  factor m;
  const char *h; /* [T, R] dense */
  rows out;
  rows init;
  int64_t group;    /* panels of a task */
  int64_t groups;   /* tasks of the same tokens */
  char *packed;     /* per thread [group][R][panel_width] */
  ml_block *blocks; /* [n_parts], for a few tokens; with `widened` as many for each thread */
  char *widened;    /* per thread: rows of B [IN_PLACE_COLUMNS, R] from bfloat16; NULL: as they are */
  char *turned;     /* h transposed, [R][T rounded up to whole vectors]; NULL: as it is */
  char *products;   /* with masks, per thread [ROW_BLOCK][ML_MASK_COLUMNS + ROW_PADDING] */
} spreading;

/* Whether B's own rows are read. */
static bool takes_rows(const call *c) { return c->T < c->regime->spread_rows || c->T < c->regime->spread_lanes; }

/* Several tokens share the rows of B that a task widens; a single one has a kernel of its own. */
static bool widens(const call *c) { return c->p->bf16_adapters && c->T > 1; }

int64_t ml_spread_group(const call *c, int64_t d) {
  int64_t panels = ceil_div(d, c->products->panel_width);
  return panels >= 32 ? 4 : panels >= 16 ? 2 : 1; /* at least 8 tasks where there are 8 panels */
}

static int64_t spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, c->products->panel_width * ml_spread_group(c, d)) * ceil_div(c->T, SPREAD_TOKENS);
}

void ml_reserve_spreading(const call *c, budget *b, int64_t d) {
  if (c->pairs) {
    ml_reserve_pair_spreading(c, b, d);
    return;
  }
  budget phase = {0};
  int n_threads = ml_thread_bound(c->p->n_threads, INT64_MAX);
  ml_reserve(&phase, 1, 1, sizeof(spreading));
  ml_reserve(&phase, c->R * c->products->panel_width * ml_spread_group(c, d), n_threads, c->size);
  if (takes_rows(c)) {
    int n_scratch = widens(c) ? n_threads : 1;
    ml_reserve(&phase, c->p->n_experts, n_scratch, sizeof(ml_block));
    if (widens(c)) ml_reserve(&phase, c->R * IN_PLACE_COLUMNS, n_scratch, c->size);
    ml_reserve(&phase, c->R, round_up(c->T, c->products->lanes), c->size);
  }
  ml_reserve_phase(b, phase);
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
      c->readers->pack(at(c, panel, s->m.offsets[e] * width), width, s->m.offsets[e + 1] - s->m.offsets[e], cols,
                       at_factor(c, part.data, d0 * part.col), part.row, part.col);
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

/* The blocks of rows d0 .. d0 + cols - 1 of each B in bfloat16. */
static const ml_block *widen_rows(const spreading *s, int64_t d0, int64_t cols, int thread) {
  const call *c = s->c;
  ml_block *blocks = s->blocks + thread * s->m.n_parts;
  char *to = at(c, s->widened, thread * c->R * IN_PLACE_COLUMNS);
  for (int64_t e = 0; e < s->m.n_parts; e++) {
    int64_t rank = s->m.offsets[e + 1] - s->m.offsets[e], stride = s->m.parts[e].col;
    const char *from = at_factor(c, s->m.parts[e].data, d0 * stride);
    int64_t n = cols * rank, lanes = c->products->lanes;
    if (stride == rank && n % lanes == 0) /* without gaps: vector after vector */
      c->readers->pack(to, lanes, n / lanes, lanes, from, lanes, 1);
    else
      c->readers->pack(to, rank, cols, rank, from, stride, 1);
    blocks[e] = (ml_block){to, rank, rank};
    to = at(c, to, n);
  }
  return blocks;
}

static void spread_from_rows(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const call *c = s->c;
  int64_t d0 = task * IN_PLACE_COLUMNS, cols = min_(IN_PLACE_COLUMNS, s->m.d - d0);
  char *out = at(c, s->out.data, d0), *init = s->init.data ? at(c, s->init.data, d0) : NULL;
  const ml_products *k = s->widened ? c->products : c->readers;
  const ml_block *blocks = s->widened ? widen_rows(s, d0, cols, thread) : s->blocks;
  int64_t first = s->widened ? 0 : d0;
  if (s->turned)
    k->spread_lanes(c->T, first, cols, s->m.n_parts, blocks, s->turned, round_up(c->T, k->lanes), out, s->out.row, init,
                    s->init.row);
  else
    k->spread_rows(c->T, first, cols, s->m.n_parts, blocks, s->h, c->R, out, s->out.row, init, s->init.row);
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
      pack_panel(c, c->products, packed, rank, cols, (ml_matrix){(void *)(uintptr_t)panel, panel_row, 1});
      panel = packed;
      panel_row = width;
    }
    k->product(c->T, cols, rank, at(c, s->h, s->m.offsets[e]), c->R, 1, panel, panel_row, out.data, out.row, init.data,
               init.row);
    init = out;
  }
}

ml_loop ml_spread_loop(call *c, factor m, const char *h, rows out, rows init) {
  const ml_products *k = c->products;
  spreading *s = ml_take(c, 1, 1, sizeof *s);
  *s = (spreading){.c = c, .m = m, .h = h, .out = out, .init = init, .group = ml_spread_group(c, m.d)};
  int64_t panels = ceil_div(m.d, k->panel_width), tasks = spread_tasks(c, m.d);
  int n_threads = ml_threads_for_factors(c, c->R * m.d);
  if (takes_rows(c) && ml_has_dense_columns(m)) {
    int n_scratch = widens(c) ? ml_thread_bound(c->p->n_threads, INT64_MAX) : 1;
    s->blocks = ml_take(c, m.n_parts, n_scratch, sizeof *s->blocks);
    if (widens(c)) s->widened = ml_take(c, c->R * IN_PLACE_COLUMNS, n_scratch, c->size);
    for (int64_t e = 0; e < m.n_parts && !widens(c); e++)
      s->blocks[e] = (ml_block){m.parts[e].data, m.parts[e].col, m.offsets[e + 1] - m.offsets[e]};
    if (c->T >= c->regime->spread_rows) {
      int64_t width = round_up(c->T, k->lanes);
      s->turned = ml_take(c, c->R, width, c->size);
      if (width > c->T) memset(s->turned, 0, (size_t)(c->R * width * c->size));
      k->pack(s->turned, width, c->R, c->T, h, 1, c->R);
    }
    return (ml_loop){spread_from_rows, s, ceil_div(m.d, IN_PLACE_COLUMNS), n_threads};
  }
  s->groups = ceil_div(panels, s->group);
  s->packed = ml_take(c, c->R * k->panel_width * s->group, ml_thread_bound(c->p->n_threads, INT64_MAX), c->size);
  if (c->T < c->regime->in_place && ml_has_dense_rows(m)) return (ml_loop){spread_in_place, s, panels, n_threads};
  return (ml_loop){spread_task, s, tasks, n_threads};
}

void ml_spread(call *c, factor m, const char *h, rows out, rows init) {
  if (c->pairs) {
    ml_pair_spread(c, m, (const float *)h, out, init);
    return;
  }
  size_t used = c->used;
  ml_loop loop = ml_spread_loop(c, m, h, out, init);
  ml_parallel_loops(1, &loop);
  c->used = used;
}

/* With dropout: out [T, d_in] = init + sum_e D_e (h_e M_e), for the groups of columns that masks come in. */

static int64_t masked_spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, ML_MASK_COLUMNS) * ceil_div(c->T, SPREAD_TOKENS);
}

void ml_reserve_masked_spreading(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  int n_threads = ml_thread_bound(c->p->n_threads, masked_spread_tasks(c, d));
  ml_reserve(&phase, c->R * ML_MASK_COLUMNS, n_threads, c->size);
  ml_reserve(&phase, ROW_BLOCK * (ML_MASK_COLUMNS + ROW_PADDING), n_threads, c->size);
  ml_reserve_phase(b, phase);
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
      ml_mask mask = ml_mask_of(c->p, e);
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
        k->keep(&mask, c->p->first_token + t, first, tokens, last - first, products.data, products.row, out.data,
                out.row, init.data, init.row);
      init = out;
    }
  }
}

void ml_spread_masked(call *c, factor m, const char *h, rows out, rows init) {
  size_t used = c->used;
  spreading s = {.c = c, .m = m, .h = h, .out = out, .init = init, .groups = ceil_div(m.d, ML_MASK_COLUMNS)};
  int64_t tasks = masked_spread_tasks(c, m.d);
  int n_threads = ml_thread_bound(c->p->n_threads, tasks);
  s.packed = ml_take(c, c->R * ML_MASK_COLUMNS, n_threads, c->size);
  s.products = ml_take(c, ROW_BLOCK * (ML_MASK_COLUMNS + ROW_PADDING), n_threads, c->size);
  ml_parallel_for(ml_threads_for(c, c->T * c->R * m.d), tasks, spread_masked_task, &s);
  c->used = used;
}
