/* The three products on rows in bfloat16, where the CPU multiplies pairs of it (kernels/avx512bf16.c). What is broadcast is
 * read from the rows of x and g as they stand, or from H and Q rounded to bfloat16; panels of A and B are packed as pairs:
 * words of their rows, or two rows interleaved. Sums are float32; what is stored in bfloat16 is rounded once. */
#include <string.h>

#include "call.h"

enum {
  PAIR_BLOCK = 256,    /* of a sum, whose blocks start from zero each */
  NARROW_TOKENS = 128, /* of a task that rounds H or Q */
  DOT_ROWS = 8,        /* of A in a task */
  SPREAD_TOKENS = 512, /* tokens that share one packing of a panel */
  COLLECT_TOKENS = 256 /* that are interleaved at a time */
};

static bool is_even(const ml_matrix m) { return m.col == 1 && m.row % 2 == 0 && (uintptr_t)m.data % 4 == 0; }

bool ml_takes_pairs(const ml_routed_lora *p, ml_tokens a, ml_tokens b, bool forward) {
  call c;
  if (!p->bf16_adapters || ml_begin(&c, p, false) != ML_OK || !c.pairs) return false;
  if (c.grouped || c.drops || c.T < (forward ? ML_PAIRS_FORWARD : 1)) return false;
  if (p->d_in % 2 || p->d_out % 2 || !ml_is_rows(p, p->x) || !ml_is_rows(p, a) || !ml_is_rows(p, b)) return false;
  for (int64_t e = 0; e < p->n_experts; e++) {
    const ml_expert *expert = &p->experts[e];
    if (expert->rank % 2 || !is_even(expert->a) || !is_even(expert->b)) return false;
    if ((expert->grad_a.data && expert->grad_a.col != 1) || (expert->grad_b.data && expert->grad_b.col != 1))
      return false;
  }
  return true;
}

static uint16_t *narrow_at(const void *data, int64_t elements) { return (uint16_t *)(uintptr_t)data + elements; }
static uint32_t *words_at(const void *data, int64_t elements) {
  return (uint32_t *)(uintptr_t)narrow_at(data, elements);
}

/* Rows i .. of M, words of M's columns (of B, whose rows stand apart) or two of its rows (of A), as pairs of a panel. */
static void pack_rows_of(const call *c, ml_matrix part, uint32_t *panel, int64_t width, int64_t n_rows, int64_t d0,
                         int64_t cols) {
  if (part.row == 1)
    c->products->pack(panel, width, n_rows / 2, cols, words_at(part.data, d0 * part.col), 1, part.col / 2);
  else
    c->pairs->interleave(panel, width, n_rows, cols, narrow_at(part.data, d0), part.row);
}

/* ---- project ---- */

typedef struct {
  const call *c;
  factor m;
  int64_t R;
  rows x, out; /* bfloat16, float32 */
  epilogue *then;
  const void *context;
  int64_t block;           /* tokens of a task */
  uint32_t *packed;        /* [panels][pairs of d][width] */
  const void **factor_row; /* [R], for dot products */
} projection;

void ml_reserve_pair_projection(const call *c, budget *b, int64_t R, int64_t d) {
  budget phase = {0};
  ml_reserve(&phase, round_up(R, c->pairs->lanes), d / 2, sizeof(uint32_t));
  ml_reserve(&phase, R, 1, sizeof(void *));
  ml_reserve_phase(b, phase);
}

static void pack_projection(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const call *c = j->c;
  int64_t full = c->pairs->panel_width, panels = ceil_div(j->R, full), all = j->m.d / 2;
  int64_t first = task % panels * full, last = min_(first + full, j->R);
  int64_t k0 = task / panels * PAIR_BLOCK, depth = min_(PAIR_BLOCK, all - k0);
  int64_t width = round_up(last - first, c->pairs->lanes);
  uint32_t *panel = j->packed + first * all + k0 * width;
  if (width > last - first) memset(panel, 0, (size_t)(depth * width) * sizeof *panel);
  for (int64_t e = 0; e < j->m.n_parts; e++) {
    int64_t from = j->m.offsets[e] > first ? j->m.offsets[e] : first, to = min_(j->m.offsets[e + 1], last);
    if (from >= to) continue;
    ml_matrix part = j->m.parts[e];
    const uint16_t *source = narrow_at(part.data, (from - j->m.offsets[e]) * part.row + 2 * k0 * part.col);
    if (part.col == 1)
      c->products->pack(panel + from - first, width, depth, to - from, words_at(source, 0), 1, part.row / 2);
    else
      c->pairs->interleave(panel + from - first, width, 2 * depth, to - from, source, part.col);
  }
}

static void project_packed(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const call *c = j->c;
  int64_t full = c->pairs->panel_width, all = j->m.d / 2;
  int64_t t0 = task * j->block, tokens = min_(j->block, c->T - t0);
  for (int64_t k0 = 0; k0 < all; k0 += PAIR_BLOCK)
    for (int64_t first = 0; first < j->R; first += full) {
      int64_t cols = min_(full, j->R - first), width = round_up(cols, c->pairs->lanes);
      float *out = (float *)j->out.data + t0 * j->out.row + first;
      c->pairs->product(tokens, cols, min_(PAIR_BLOCK, all - k0), narrow_at(j->x.data, t0 * j->x.row + 2 * k0),
                        j->x.row, 2, j->packed + first * all + k0 * width, width, out, j->out.row, k0 ? out : NULL,
                        j->out.row);
    }
  if (j->then) j->then(j->context, t0, t0 + tokens);
}

static void project_dots(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  int64_t first = task * DOT_ROWS, n = min_(DOT_ROWS, j->R - first);
  j->c->pairs->dots(j->c->T, n, j->m.d, narrow_at(j->x.data, 0), j->x.row, j->factor_row + first,
                    (float *)j->out.data + first, j->out.row);
}

void ml_pair_project(call *c, factor m, rows x, rows out, epilogue *then, const void *context) {
  int64_t R = m.offsets[m.n_parts];
  int n_threads = ml_threads_for(c, c->T * R * m.d);
  size_t used = c->used;
  projection j = {.c = c, .m = m, .R = R, .x = x, .out = out, .then = then, .context = context};
  if (c->T < ML_PAIR_DOTS && ml_has_dense_rows(m)) {
    j.factor_row = ml_take(c, R, 1, sizeof(void *));
    for (int64_t e = 0; e < m.n_parts; e++)
      for (int64_t r = m.offsets[e]; r < m.offsets[e + 1]; r++)
        j.factor_row[r] = narrow_at(m.parts[e].data, (r - m.offsets[e]) * m.parts[e].row);
    ml_parallel_for(n_threads, ceil_div(R, DOT_ROWS), project_dots, &j);
    if (then) then(context, 0, c->T);
  } else {
    j.block = ml_projection_block(c->T);
    j.packed = ml_take(c, round_up(R, c->pairs->lanes), m.d / 2, sizeof *j.packed);
    int64_t panels = ceil_div(R, c->pairs->panel_width);
    ml_parallel_for(n_threads, panels * ceil_div(m.d / 2, PAIR_BLOCK), pack_projection, &j);
    ml_parallel_for(n_threads, ceil_div(c->T, j.block), project_packed, &j);
  }
  c->used = used;
}

/* ---- H or Q rounded, as rows, or as pairs of tokens ---- */

typedef struct {
  const call *c;
  const float *h;  /* [T, R] */
  uint16_t *rows;  /* [T, R]; NULL: pairs */
  uint32_t *pairs; /* [pairs of T, width] */
  int64_t width;
} rounding;

static void round_task(void *context, int64_t task, int thread) {
  (void)thread;
  const rounding *r = context;
  const call *c = r->c;
  int64_t t = task * NARROW_TOKENS, n = min_(NARROW_TOKENS, c->T - t);
  if (r->rows)
    c->pairs->narrow_rows(n, c->R, r->h + t * c->R, c->R, r->rows + t * c->R, c->R, false);
  else
    c->pairs->interleave_wide(r->pairs + t / 2 * r->width, r->width, n, c->R, r->h + t * c->R, c->R);
}

static void round_tokens(rounding r) {
  ml_parallel_for(ml_threads_for(r.c, r.c->T * r.c->R), ceil_div(r.c->T, NARROW_TOKENS), round_task, &r);
}

/* ---- spread ---- */

typedef struct {
  const call *c;
  factor m;
  const uint16_t *h; /* [T, R] */
  rows out, init;
  int64_t group;    /* panels of a task */
  int64_t groups;   /* tasks of the same tokens */
  uint32_t *packed; /* per thread [group][pairs of R][panel_width] */
} spreading;

static int64_t spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, c->pairs->panel_width * ml_spread_group(c, d)) * ceil_div(c->T, SPREAD_TOKENS);
}

void ml_reserve_pair_spreading(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  ml_reserve(&phase, c->T, c->R, sizeof(uint16_t));
  ml_reserve(&phase, c->R / 2 * c->pairs->panel_width * ml_spread_group(c, d),
             ml_thread_bound(c->p->n_threads, spread_tasks(c, d)), sizeof(uint32_t));
  ml_reserve_phase(b, phase);
}

static void spread_task(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const call *c = s->c;
  const ml_pairs *k = c->pairs;
  int64_t R = c->R, full = k->panel_width, panel_size = R / 2 * full;
  int64_t t0 = task / s->groups * SPREAD_TOKENS, t1 = min_(t0 + SPREAD_TOKENS, c->T);
  int64_t first = task % s->groups * s->group * full, last = min_(first + s->group * full, s->m.d);
  uint32_t *packed = s->packed + thread * s->group * panel_size, *panel = packed;
  for (int64_t d0 = first; d0 < last; d0 += full, panel += panel_size) {
    int64_t cols = min_(full, last - d0), width = round_up(cols, k->lanes);
    if (width > cols) memset(panel, 0, (size_t)(R / 2 * width) * sizeof *panel);
    for (int64_t e = 0; e < s->m.n_parts; e++)
      pack_rows_of(c, s->m.parts[e], panel + s->m.offsets[e] / 2 * width, width, s->m.offsets[e + 1] - s->m.offsets[e],
                   d0, cols);
  }
  for (int64_t t = t0; t < t1; t += ROW_BLOCK) {
    panel = packed;
    for (int64_t d0 = first; d0 < last; d0 += full, panel += panel_size) {
      int64_t cols = min_(full, last - d0);
      k->product_narrow(min_(ROW_BLOCK, t1 - t), cols, R / 2, s->h + t * R, R, 2, panel, round_up(cols, k->lanes),
                        narrow_at(s->out.data, t * s->out.row + d0), s->out.row,
                        s->init.data ? narrow_at(s->init.data, t * s->init.row + d0) : NULL, s->init.row);
    }
  }
}

void ml_pair_spread(call *c, factor m, const float *h, rows out, rows init) {
  size_t used = c->used;
  spreading s = {.c = c, .m = m, .out = out, .init = init, .group = ml_spread_group(c, m.d)};
  int64_t tasks = spread_tasks(c, m.d);
  uint16_t *narrow = ml_take(c, c->T, c->R, sizeof *narrow);
  s.h = narrow;
  s.groups = ceil_div(m.d, c->pairs->panel_width * s.group);
  s.packed =
      ml_take(c, c->R / 2 * c->pairs->panel_width * s.group, ml_thread_bound(c->p->n_threads, tasks), sizeof *s.packed);
  round_tokens((rounding){.c = c, .h = h, .rows = narrow});
  ml_parallel_for(ml_threads_for(c, c->T * c->R * m.d), tasks, spread_task, &s);
  c->used = used;
}

/* ---- collect ---- */

typedef struct {
  const call *c;
  factor grads;      /* parts without data are not wanted */
  const uint32_t *h; /* pairs of tokens, [pairs of T, width_h] */
  int64_t width_h;
  rows x;
  bool add;
  int64_t width; /* columns of x in a task */
  char *scratch; /* per thread: pairs of x [pairs of COLLECT_TOKENS, width], sums [R, width] or [width, width_h] */
} collection;

static int64_t collect_width(const call *c, int64_t d) {
  return c->pairs->panel_width * (d >= 2048 ? 4 : d >= 1024 ? 2 : 1);
}
static int64_t width_of_h(const call *c) { return round_up(c->R, c->pairs->lanes); }
static int64_t collect_depth(const call *c) { return ceil_div(min_(COLLECT_TOKENS, c->T), 2); }
static int64_t collect_scratch(const call *c, int64_t d) {
  return (collect_depth(c) + width_of_h(c)) * collect_width(c, d);
}

void ml_reserve_pair_collection(const call *c, budget *b, int64_t d) {
  budget phase = {0};
  ml_reserve(&phase, ceil_div(c->T, 2) + 1, width_of_h(c), sizeof(uint32_t));
  ml_reserve(&phase, collect_scratch(c, d), ml_thread_bound(c->p->n_threads, ceil_div(d, collect_width(c, d))),
             sizeof(float));
  ml_reserve_phase(b, phase);
}

static void collect_task(void *context, int64_t task, int thread) {
  const collection *g = context;
  const call *c = g->c;
  const ml_pairs *k = c->pairs;
  const factor *grads = &g->grads;
  bool of_a = ml_has_dense_rows(*grads);
  int64_t d0 = task * g->width, cols = min_(g->width, grads->d - d0), panel_width = k->panel_width;
  uint32_t *packed = (uint32_t *)(g->scratch + thread * collect_scratch(c, grads->d) * (int64_t)sizeof(float));
  float *sums = (float *)(packed + collect_depth(c) * g->width);
  memset(packed, 0, (size_t)(collect_depth(c) * g->width) * sizeof *packed);
  for (int64_t t0 = 0; t0 < c->T; t0 += COLLECT_TOKENS) {
    int64_t tokens = min_(COLLECT_TOKENS, c->T - t0), depth = ceil_div(tokens, 2);
    k->interleave(packed, g->width, tokens, cols, narrow_at(g->x.data, t0 * g->x.row + d0), g->x.row);
    for (int64_t e = 0; e < grads->n_parts; e++) {
      int64_t r0 = grads->offsets[e]; /* neighbours that are wanted go into one product */
      while (e < grads->n_parts && grads->parts[e].data) e++;
      int64_t n = grads->offsets[min_(e, grads->n_parts)] - r0;
      const uint32_t *h = g->h + t0 / 2 * g->width_h + r0;
      if (of_a)
        for (int64_t j = 0; j < cols && n > 0; j += panel_width) {
          float *out = sums + r0 * g->width + j;
          k->product(n, min_(panel_width, cols - j), depth, narrow_at(h, 0), 2, 2 * g->width_h, packed + j, g->width,
                     out, g->width, t0 ? out : NULL, g->width);
        }
      else
        for (int64_t j = 0; j < n; j += panel_width) {
          float *out = sums + r0 + j;
          k->product(cols, min_(panel_width, n - j), depth, narrow_at(packed, 0), 2, 2 * g->width, h + j, g->width_h,
                     out, g->width_h, t0 ? out : NULL, g->width_h);
        }
    }
  }
  for (int64_t e = 0; e < grads->n_parts; e++) {
    ml_matrix to = grads->parts[e];
    if (!to.data) continue;
    int64_t r0 = grads->offsets[e], rank = grads->offsets[e + 1] - r0;
    if (of_a)
      k->narrow_rows(rank, cols, sums + r0 * g->width, g->width, narrow_at(to.data, d0), to.row, g->add);
    else
      k->narrow_rows(cols, rank, sums + r0, g->width_h, narrow_at(to.data, d0 * to.col), to.col, g->add);
  }
}

void ml_pair_collect(call *c, factor grads, const float *h, rows x, bool add) {
  size_t used = c->used;
  collection g = {.c = c, .grads = grads, .width_h = width_of_h(c), .x = x, .add = add};
  int64_t tasks;
  uint32_t *pairs = ml_take(c, ceil_div(c->T, 2) + 1, g.width_h, sizeof *pairs);
  g.h = pairs;
  g.width = collect_width(c, grads.d);
  tasks = ceil_div(grads.d, g.width);
  g.scratch = ml_take(c, collect_scratch(c, grads.d), ml_thread_bound(c->p->n_threads, tasks), sizeof(float));
  round_tokens((rounding){.c = c, .h = h, .pairs = pairs, .width = g.width_h});
  ml_parallel_for(ml_threads_for(c, c->T * c->R * grads.d), tasks, collect_task, &g);
  c->used = used;
}
