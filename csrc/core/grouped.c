/* See grouped.h. */
#include <string.h>

#include "grouped.h"

enum {
  BLOCK_PAIRS = 128,      /* of one expert, in one task */
  BLOCK_COLUMNS = 512,    /* of a sum in one go: rows of a few tokens and experts stay in the cache */
  SPREAD_TOKENS = 2048,   /* that share a packing of M */
  SPREAD_BYTES = 1 << 20, /* of packed panels, which stay in the second level of the cache */
  COLLECT_PAIRS = 64,     /* whose rows of x are brought together at a time */
  PICK_TOKENS = 64,
  FULL_LANES = 4,  /* from so many tokens on, each is looked at in a lane of its own */
  WIDE_TOKENS = 8, /* widened at a time: they stay in the first level of the cache */
  WIDE_COLUMNS = WIDE_TOKENS * BLOCK_COLUMNS
};

/* ---- grouping ---- */

static int64_t rank_of(const grouping *g, int64_t e) { return g->c->p->experts[e].rank; }

static int64_t widest_rank(const call *c) {
  int64_t widest = 0;
  for (int64_t e = 0; e < c->p->n_experts; e++)
    if (c->p->experts[e].rank > widest) widest = c->p->experts[e].rank;
  return widest;
}

int64_t ml_kept_width(const call *c) {
  int64_t k = c->p->top_k, widest = widest_rank(c);
  return widest > c->R / k ? c->R : k * widest;
}

static int64_t most_blocks(const call *c) { return c->T * c->p->top_k / BLOCK_PAIRS + c->p->n_experts; }

/* Where top_k saves half of the work, or more than that with more than four experts for a token, whose row is written
 * that often; what grouping costs apart from that takes more to pay for the fewer tokens there are. Measured on an Intel
 * Xeon (Emerald Rapids), AVX-512, float32, d 768 and 2048. With r 8, k 2, T 1 .. 2048 it is as fast as computing
 * everything, forward and backward, at T = 128 with N = 4, at 24 with N = 8, at 3 with N = 16 and always with more; with
 * T 2048 it ties at k 4, N 8, loses at k 8, N 16 and wins at k 8, N 24, and at k 16 has not won with N = 64 yet. Where dropout gives each expert an x of its own, everything is computed. */
bool ml_is_grouped(const call *c) {
  if (c->p->top_k == 0 || c->drops) return false;
  int64_t saved = min_(c->R / ml_kept_width(c), 16);
  if (saved < (c->pairs ? 4 : 2)) return false; /* pairs of bfloat16 take half the time that float32 takes */
  return 4 * saved >= c->p->top_k + 4 && (c->T >= 128 || c->T * saved * saved * saved >= 2048);
}

bool ml_groups_narrow_rows(const ml_routed_lora *p, ml_tokens a, ml_tokens b) {
  call c;
  if (p->top_k == 0 || ml_begin(&c, p, false) != ML_OK || !c.grouped) return false;
  for (int64_t e = 0; p->bf16_adapters && e < p->n_experts; e++)
    if ((p->experts[e].grad_a.data && p->experts[e].grad_a.col != 1) ||
        (p->experts[e].grad_b.data && p->experts[e].grad_b.col != 1))
      return false;
  return ml_is_rows(p, p->x) && ml_is_rows(p, a) && ml_is_rows(p, b);
}

/* Panels of a task: runs of 1 KB of a row where that leaves at least 8 tasks. */
static int64_t panels_of(const call *c, int64_t d) {
  int64_t panels = ceil_div(d, c->products->panel_width);
  return panels >= 32 ? 4 : panels >= 16 ? 2 : 1;
}

/* The same, as long as the panels of all experts stay in the second level of the cache. */
static int64_t spread_panels(const call *c, int64_t d) {
  int64_t most = SPREAD_BYTES / c->size / c->products->panel_width / c->R;
  return most < 1 ? 1 : min_(most, panels_of(c, d));
}

static int64_t spread_scratch(const call *c, int64_t d) {
  return (c->R + (c->narrow ? 1 : 0)) * spread_panels(c, d) * c->products->panel_width;
}

static int64_t collect_scratch(const call *c, int64_t d) {
  int64_t rank = widest_rank(c), narrow = c->narrow ? rank * c->products->panel_width : 0;
  return (COLLECT_PAIRS + rank) * panels_of(c, d) * c->products->panel_width + narrow;
}

static int64_t spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, spread_panels(c, d) * c->products->panel_width) * ceil_div(c->T, SPREAD_TOKENS);
}

static int64_t collect_tasks(const call *c, int64_t d) {
  return ceil_div(d, panels_of(c, d) * c->products->panel_width);
}

static int64_t project_scratch(const call *c) {
  return widest_rank(c) * BLOCK_COLUMNS + (c->narrow ? WIDE_COLUMNS : 0);
}

static int64_t pick_tasks(const call *c) { return ceil_div(c->T, PICK_TOKENS); }

static int64_t pick_scratch(const call *c) { return c->p->n_experts * c->routing->scratch; }

static void reserve_phase(const call *c, budget *b, int64_t elements, int64_t tasks) {
  budget phase = {0};
  ml_reserve(&phase, elements, ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_reserve_phase(b, phase);
}

void ml_reserve_grouping(const call *c, budget *b) {
  int64_t N = c->p->n_experts, k = c->p->top_k;
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(b, c->T, k, c->size);
  ml_reserve(b, N + 1, 1, sizeof(int64_t));
  ml_reserve(b, N + 1, 1, sizeof(int64_t));
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(b, c->T, 1, sizeof(int64_t));
  if (b->overflow) return;
  ml_reserve(b, most_blocks(c), 1, sizeof(pair_block));
  budget picking = {0};
  ml_reserve(&picking, pick_scratch(c), ml_thread_bound(c->p->n_threads, pick_tasks(c)), 1);
  ml_reserve_phase(b, picking);
  reserve_phase(c, b, project_scratch(c), most_blocks(c));
  const int64_t widths[] = {c->p->d_in, c->p->d_out};
  for (int i = 0; i < 2; i++) {
    reserve_phase(c, b, spread_scratch(c, widths[i]), spread_tasks(c, widths[i]));
    reserve_phase(c, b, collect_scratch(c, widths[i]), collect_tasks(c, widths[i]));
  }
}

typedef struct {
  grouping *g;
  bool clear;
  char *scratch; /* per thread */
} picking;

/* The weights of all tokens as a matrix; false: batch and sequence do not have one stride. */
static bool as_matrix(const ml_routed_lora *p, ml_matrix *weights) {
  ml_tokens w = p->routing_weights;
  *weights = (ml_matrix){w.data, 0, w.col};
  return ml_one_stride(p, w, &weights->row);
}

static void pick_task(void *context, int64_t task, int thread) {
  const picking *j = context;
  const grouping *g = j->g;
  const call *c = g->c;
  const ml_routed_lora *p = c->p;
  int64_t first = task * PICK_TOKENS, last = min_(first + PICK_TOKENS, c->T);
  ml_matrix weights;
  bool found = last - first >= FULL_LANES && as_matrix(p, &weights);
  if (found) {
    weights.data = at(c, weights.data, first * weights.row);
    found = c->routing->pick(last - first, p->n_experts, weights, p->top_k, g->chosen + first * p->top_k,
                             j->scratch + thread * pick_scratch(c));
  }
  if (!found)
    c->elementwise->pick(first, last, p->seq, p->n_experts, p->routing_weights, p->top_k, g->chosen, g->factors);
  c->elementwise->order_picks(first, last, p->seq, p->routing_weights, p->experts, p->top_k, g->chosen, g->factors);
  if (j->clear) c->elementwise->clear(first, last, p->seq, c->R, g->hidden);
}

/* Within each run of SPREAD_TOKENS tokens by their first expert, whose panels then stay in the first level of the cache. */
static void order_tokens(grouping *g) {
  int64_t T = g->c->T, N = g->c->p->n_experts, k = g->c->p->top_k;
  int64_t *next = g->start; /* for the time being */
  for (int64_t t0 = 0; t0 < T; t0 += SPREAD_TOKENS) {
    int64_t t1 = min_(t0 + SPREAD_TOKENS, T), before = t0;
    memset(next, 0, (size_t)N * sizeof *next);
    for (int64_t t = t0; t < t1; t++) next[g->chosen[t * k]]++;
    for (int64_t e = 0; e < N; e++) {
      int64_t n = next[e];
      next[e] = before;
      before += n;
    }
    for (int64_t t = t0; t < t1; t++) g->order[next[g->chosen[t * k]]++] = t;
  }
}

void ml_group(call *c, grouping *g, ml_tokens hidden, bool write) {
  int64_t N = c->p->n_experts, k = c->p->top_k, T = c->T;
  *g = (grouping){.c = c, .hidden = hidden};
  g->chosen = ml_take(c, T, k, sizeof *g->chosen);
  g->factors = ml_take(c, T, k, c->size);
  g->first = ml_take(c, N + 1, 1, sizeof *g->first);
  g->start = ml_take(c, N + 1, 1, sizeof *g->start);
  g->pair = ml_take(c, T, k, sizeof *g->pair);
  g->token = ml_take(c, T, k, sizeof *g->token);
  g->element = ml_take(c, T, k, sizeof *g->element);
  g->order = ml_take(c, T, 1, sizeof *g->order);
  g->blocks = ml_take(c, most_blocks(c), 1, sizeof *g->blocks);
  size_t used = c->used;
  picking j = {.g = g, .clear = write && hidden.data};
  j.scratch = ml_take(c, pick_scratch(c), ml_thread_bound(c->p->n_threads, pick_tasks(c)), 1);
  ml_parallel_for(ml_threads_for(c, T * (N + (j.clear ? c->R : 0))), pick_tasks(c), pick_task, &j);
  c->used = used;

  memset(g->first, 0, (size_t)(N + 1) * sizeof *g->first);
  for (int64_t i = 0; i < T * k; i++) g->first[g->chosen[i] + 1]++;
  for (int64_t e = 0; e < N; e++) g->first[e + 1] += g->first[e];
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = t * k; i < (t + 1) * k; i++) {
      int64_t place = g->first[g->chosen[i]]++; /* which leaves the first of the next expert there */
      g->pair[place] = i;
      g->token[place] = t;
    }
  order_tokens(g);
  memmove(g->first + 1, g->first, (size_t)N * sizeof *g->first);
  g->first[0] = g->start[0] = 0;
  for (int64_t e = 0; e < N; e++) {
    g->start[e + 1] = g->start[e] + (g->first[e + 1] - g->first[e]) * rank_of(g, e);
    for (int64_t i = g->first[e]; i < g->first[e + 1]; i++)
      g->element[g->pair[i]] = g->start[e] + (i - g->first[e]) * rank_of(g, e);
    for (int64_t i = g->first[e]; i < g->first[e + 1]; i += BLOCK_PAIRS)
      g->blocks[g->n_blocks++] = (pair_block){e, i, min_(i + BLOCK_PAIRS, g->first[e + 1])};
  }
}

/* Row of the pair at `place` in H, P or Q. */
static char *row_of(const grouping *g, const char *h, int64_t e, int64_t place) {
  return at(g->c, h, g->start[e] + (place - g->first[e]) * rank_of(g, e));
}

/* Multiply-adds of a product over d columns. */
static int64_t work_of(const grouping *g, int64_t d) { return g->start[g->c->p->n_experts] * d; }

/* ---- project: out [rank] of each pair = M_e x ---- */

typedef struct {
  const grouping *g;
  factor m;
  rows x;
  char *out;
  bool pack;     /* M, whose rows are not dense, or not of the dtype */
  char *scratch; /* per thread: M [widest rank, BLOCK_COLUMNS], widened x [WIDE_TOKENS, BLOCK_COLUMNS] */
  void (*then)(const void *context, const pair_block *b);
  const void *context;
} projection;

/* Columns of a row, on their way from memory. */
static void send_row(const call *c, const char *row, int64_t columns) {
  for (int64_t b = 0; b < columns * c->row_size; b += 64) ML_PREFETCH(row + b);
}

/* grouped_dots of rows in bfloat16, which are widened to `wide`. */
static void narrow_dots(const call *c, int64_t n, int64_t rank, int64_t depth, const void *const *x, ml_matrix rows,
                        char *wide, char *out, bool add) {
  for (int64_t i = 0; i < n; i += WIDE_TOKENS) {
    int64_t tokens = min_(WIDE_TOKENS, n - i);
    const void *widened[WIDE_TOKENS];
    for (int64_t t = 0; t < tokens; t++) {
      char *row = at(c, wide, t * BLOCK_COLUMNS);
      if (i + t + WIDE_TOKENS < n) send_row(c, x[i + t + WIDE_TOKENS], depth);
      c->narrow->widen(depth, x[i + t], (float *)row);
      widened[t] = row;
    }
    c->products->grouped_dots(tokens, rank, depth, widened, rows.data, rows.row, at(c, out, i * rank), rank, add);
  }
}

static void project_task(void *context, int64_t task, int thread) {
  const projection *j = context;
  const grouping *g = j->g;
  const call *c = g->c;
  const pair_block *b = &g->blocks[task];
  int64_t rank = rank_of(g, b->expert), n = b->last - b->first;
  ml_matrix part = j->m.parts[b->expert];
  char *out = row_of(g, j->out, b->expert, b->first);
  const void *x[BLOCK_PAIRS];
  for (int64_t d0 = 0; d0 < j->m.d; d0 += BLOCK_COLUMNS) {
    int64_t depth = min_(BLOCK_COLUMNS, j->m.d - d0);
    ml_matrix rows = {at_factor(c, part.data, d0 * part.col), part.row, part.col};
    if (j->pack) {
      char *packed = at(c, j->scratch, thread * project_scratch(c));
      c->readers->pack(packed, BLOCK_COLUMNS, rank, depth, rows.data, rows.row, rows.col);
      rows = (ml_matrix){packed, BLOCK_COLUMNS, 1};
    }
    for (int64_t i = 0; i < n; i++) x[i] = at_row(c, j->x.data, g->token[b->first + i] * j->x.row + d0);
    if (c->narrow)
      narrow_dots(c, n, rank, depth, x, rows, at(c, j->scratch, (thread + 1) * project_scratch(c) - WIDE_COLUMNS), out,
                  d0 > 0);
    else
      c->products->grouped_dots(n, rank, depth, x, rows.data, rows.row, out, rank, d0 > 0);
  }
  j->then(j->context, b);
}

static void project(call *c, const grouping *g, factor m, rows x, char *out,
                    void (*then)(const void *context, const pair_block *b), const void *context) {
  size_t used = c->used;
  projection j = {.g = g, .m = m, .x = x, .out = out, .then = then, .context = context};
  j.pack = c->p->bf16_adapters || !ml_has_dense_rows(m);
  if (j.pack || c->narrow)
    j.scratch = ml_take(c, project_scratch(c), ml_thread_bound(c->p->n_threads, g->n_blocks), c->size);
  ml_parallel_for(ml_threads_for(c, work_of(g, m.d)), g->n_blocks, project_task, &j);
  c->used = used;
}

/* Columns first .. last - 1 of a part of M, on their way from memory. */
static void send_for(const call *c, int64_t rank, int64_t first, int64_t last, ml_matrix m) {
  const int64_t line = 64 / c->factor_size;
  if (m.row == 1 && m.col == rank) /* all of them side by side */
    for (int64_t i = first * rank; i < last * rank; i += line) ML_PREFETCH(at_factor(c, m.data, i));
  else if (m.col == 1)
    for (int64_t r = 0; r < rank; r++)
      for (int64_t i = first; i < last; i += line) ML_PREFETCH(at_factor(c, m.data, r * m.row + i));
}

/* ---- spread: out = init + h M_e over the pairs of each token ---- */

typedef struct {
  const grouping *g;
  factor m;
  const char *h;
  rows out, init;
  char *packed; /* per thread: panels [R, panel_width] of the experts that are used */
} spreading;

static void narrow_row(const call *c, int64_t n, const char *from, char *to, const char *init) {
  if (init)
    c->narrow->narrow_sum(n, (const float *)from, (const uint16_t *)init, (uint16_t *)to);
  else
    c->narrow->narrow(n, (const float *)from, (uint16_t *)to);
}

static void spread_task(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const grouping *g = s->g;
  const call *c = g->c;
  const ml_products *k = c->products;
  int64_t strip = spread_panels(c, s->m.d) * k->panel_width, strips = ceil_div(s->m.d, strip), top_k = c->p->top_k;
  int64_t first = task % strips * strip, last = min_(first + strip, s->m.d);
  int64_t t0 = task / strips * SPREAD_TOKENS, t1 = min_(t0 + SPREAD_TOKENS, c->T);
  char *packed = at(c, s->packed, thread * spread_scratch(c, s->m.d));
  for (int64_t e = 0; e < s->m.n_parts; e++) {
    if (e + 1 < s->m.n_parts) send_for(c, rank_of(g, e + 1), first, last, s->m.parts[e + 1]);
    if (g->first[e] == g->first[e + 1]) continue;
    ml_matrix part = s->m.parts[e];
    for (int64_t d0 = first; d0 < last; d0 += k->panel_width) {
      int64_t cols = min_(k->panel_width, last - d0), width = round_up(cols, k->lanes);
      pack_panel(c, c->readers, at(c, packed, (d0 - first) * c->R + c->offsets[e] * width), rank_of(g, e), cols,
                 (ml_matrix){at_factor(c, part.data, d0 * part.col), part.row, part.col});
    }
  }
  char *out = at_row(c, s->out.data, first), *init = s->init.data ? at_row(c, s->init.data, first) : NULL;
  if (!c->narrow) {
    k->grouped_sums(t1 - t0, g->order + t0, top_k, last - first, s->h, g->element, g->chosen, packed, c->R, c->offsets,
                    out, s->out.row, init, s->init.row);
    return;
  }
  char *sums = at(c, packed, c->R * strip);
  for (int64_t i = t0; i < t1; i++) {
    int64_t t = g->order[i], ahead = g->order[min_(i + 1, t1 - 1)];
    send_row(c, at_row(c, out, ahead * s->out.row), last - first);
    if (init) send_row(c, at_row(c, init, ahead * s->init.row), last - first);
    k->grouped_sums(1, &t, top_k, last - first, s->h, g->element, g->chosen, packed, c->R, c->offsets, sums, 0, NULL,
                    0);
    narrow_row(c, last - first, sums, at_row(c, out, t * s->out.row), init ? at_row(c, init, t * s->init.row) : NULL);
  }
}

void ml_spread_grouped(call *c, const grouping *g, factor m, const char *h, rows out, rows init) {
  size_t used = c->used;
  spreading s = {.g = g, .m = m, .h = h, .out = out, .init = init};
  int64_t tasks = spread_tasks(c, m.d);
  s.packed = ml_take(c, spread_scratch(c, m.d), ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_parallel_for(ml_threads_for(c, work_of(g, m.d) + c->T * m.d), tasks, spread_task, &s);
  c->used = used;
}

/* ---- collect: grad M_e = h^T x over the pairs of the expert ---- */

typedef struct {
  const grouping *g;
  factor grads; /* parts without data are not wanted */
  const char *h;
  rows x;
  bool add;
  char *scratch; /* per thread: panels of x [COLLECT_PAIRS, panel_width], of sums [widest rank, panel_width], and one of
                    sums to be narrowed */
} collection;

/* Whether gradients of A and B are bfloat16. Where x was widened before the call they are not, whatever A and B are. */
static bool has_narrow_grads(const call *c) { return c->narrow && c->p->bf16_adapters; }

/* Zeros into columns first .. last - 1 of the gradient of an expert without pairs. */
static void clear_grads(const call *c, int64_t rank, int64_t first, int64_t last, ml_matrix to) {
  int64_t size = has_narrow_grads(c) ? c->factor_size : c->size;
  if (to.col == 1) {
    for (int64_t r = 0; r < rank; r++)
      memset((char *)to.data + (r * to.row + first) * size, 0, (size_t)((last - first) * size));
  } else if (to.row == 1) {
    int64_t columns = to.col == rank ? last - first : 1; /* that lie side by side */
    for (int64_t j = first; j < last; j += columns)
      memset((char *)to.data + j * to.col * size, 0, (size_t)(columns * rank * size));
  } else {
    to.data = at(c, to.data, first * to.col);
    ml_store_grads(c, (ml_matrix){NULL, 0, 0}, rank, last - first, to, false);
  }
}

/* Brings sums [rank, cols] to columns d0 .. of the gradient of an expert. */
static void store_grads(const call *c, char *sums, int64_t width, int64_t rank, int64_t d0, int64_t cols, ml_matrix to,
                        bool add, char *scratch) {
  if (!has_narrow_grads(c)) {
    to.data = at(c, to.data, d0 * to.col);
    ml_store_grads(c, (ml_matrix){sums, width, 1}, rank, cols, to, add);
    return;
  }
  to.data = at_factor(c, to.data, d0 * to.col);
  int64_t n = rank, length = cols, stride = to.row; /* rows that lie side by side, of A's gradient */
  if (to.col != 1) {                                /* of B's, from the columns of sums */
    c->products->pack(scratch, rank, cols, rank, sums, 1, width);
    sums = scratch, width = rank, n = cols, length = rank, stride = to.col;
  }
  if (width == length && stride == length) length *= n, n = 1; /* all of them side by side */
  for (int64_t i = 0; i < n; i++) {
    char *row = at_factor(c, to.data, i * stride);
    narrow_row(c, length, at(c, sums, i * width), row, add ? row : NULL);
  }
}

static void collect_task(void *context, int64_t task, int thread) {
  const collection *g = context;
  const grouping *all = g->g;
  const call *c = all->c;
  const ml_products *k = c->products;
  int64_t full = k->panel_width, strip = panels_of(c, g->grads.d) * full;
  int64_t first = task * strip, last = min_(first + strip, g->grads.d), n_pairs = all->first[g->grads.n_parts];
  char *panels = at(c, g->scratch, thread * collect_scratch(c, g->grads.d)),
       *sums = at(c, panels, COLLECT_PAIRS * strip), *last_sums = at(c, sums, widest_rank(c) * strip);
  memset(panels, 0, (size_t)(COLLECT_PAIRS * strip * c->size)); /* what pads the last columns to whole vectors */
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    if (!g->grads.parts[e].data) continue;
    int64_t rank = rank_of(all, e);
    if (all->first[e] == all->first[e + 1]) {
      if (!g->add) clear_grads(c, rank, first, last, g->grads.parts[e]);
      continue;
    }
    send_for(c, rank, first, last, g->grads.parts[e]);
    for (int64_t i = all->first[e]; i < all->first[e + 1]; i += COLLECT_PAIRS) {
      int64_t n = min_(COLLECT_PAIRS, all->first[e + 1] - i);
      for (int64_t t = 0; t < n; t++) {
        const char *x = at_row(c, g->x.data, all->token[i + t] * g->x.row + first);
        send_row(c, at_row(c, g->x.data, all->token[min_(i + t + COLLECT_PAIRS, n_pairs - 1)] * g->x.row + first),
                 last - first);
        for (int64_t d0 = 0; d0 < last - first; d0 += full) {
          int64_t cols = min_(full, last - first - d0), width = round_up(cols, k->lanes);
          char *panel = at(c, panels, d0 * COLLECT_PAIRS + t * width);
          if (c->narrow)
            c->narrow->widen(cols, (const uint16_t *)at_row(c, x, d0), (float *)panel);
          else
            memcpy(panel, at(c, x, d0), (size_t)(cols * c->size));
        }
      }
      for (int64_t d0 = 0; d0 < last - first; d0 += full) {
        int64_t cols = min_(full, last - first - d0), width = round_up(cols, k->lanes);
        char *out = at(c, sums, d0 * rank);
        k->product(rank, cols, n, row_of(all, g->h, e, i), 1, rank, at(c, panels, d0 * COLLECT_PAIRS), width, out,
                   width, i > all->first[e] ? out : NULL, width);
      }
    }
    for (int64_t d0 = 0; d0 < last - first; d0 += full) {
      int64_t cols = min_(full, last - first - d0), width = round_up(cols, k->lanes);
      store_grads(c, at(c, sums, d0 * rank), width, rank, first + d0, cols, g->grads.parts[e], g->add, last_sums);
    }
  }
}

void ml_collect_grouped(call *c, const grouping *g, factor grads, const char *h, rows x, bool add) {
  size_t used = c->used;
  collection j = {.g = g, .grads = grads, .h = h, .x = x, .add = add};
  int64_t tasks = collect_tasks(c, grads.d);
  j.scratch = ml_take(c, collect_scratch(c, grads.d), ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_parallel_for(ml_threads_for(c, work_of(g, grads.d) + c->R * grads.d), tasks, collect_task, &j);
  c->used = used;
}

/* ---- what happens to H and P while they are in the cache ---- */

/* An expert's columns of hidden. */
static ml_tokens hidden_of(const grouping *g, int64_t e) {
  ml_tokens h = g->hidden;
  h.data = at(g->c, h.data, g->c->offsets[e] * h.col);
  return h;
}

typedef struct {
  const grouping *g;
  char *h; /* H, turned into s w * H */
} weighing;

static void weigh(const void *context, const pair_block *b) {
  const weighing *w = context;
  const grouping *g = w->g;
  const ml_elementwise *f = g->c->elementwise;
  int64_t rank = rank_of(g, b->expert), n = b->last - b->first;
  char *h = row_of(g, w->h, b->expert, b->first);
  if (g->hidden.data) f->put_rows(n, rank, h, g->token + b->first, g->c->p->seq, hidden_of(g, b->expert));
  f->weigh_rows(n, rank, g->factors, g->pair + b->first, h);
}

void ml_project_grouped(call *c, const grouping *g, rows x, char *h) {
  weighing w = {g, h};
  project(c, g, ml_factor_a(c), x, h, weigh, &w);
}

typedef struct {
  const grouping *g;
  char *p;          /* P, turned into Q = s w * P; NULL: not needed */
  char *h;          /* H, turned into s w * H; NULL: not needed */
  char *pair_grads; /* [T, top_k]: gradients of the weights; NULL: not needed */
} gradient_weighing;

static void weigh_gradients(const void *context, const pair_block *b) {
  const gradient_weighing *w = context;
  const grouping *g = w->g;
  const ml_routed_lora *p = g->c->p;
  const ml_elementwise *f = g->c->elementwise;
  int64_t rank = rank_of(g, b->expert), n = b->last - b->first;
  const int64_t *pair = g->pair + b->first;
  char *P = w->p ? row_of(g, w->p, b->expert, b->first) : NULL;
  char *H = w->h ? row_of(g, w->h, b->expert, b->first) : NULL;
  if (H) f->take_rows(n, rank, H, g->token + b->first, p->seq, hidden_of(g, b->expert));
  if (w->pair_grads) f->pair_grads(n, rank, p->experts[b->expert].scaling, P, H, pair, w->pair_grads);
  if (P) f->weigh_rows(n, rank, g->factors, pair, P);
  if (H) f->weigh_rows(n, rank, g->factors, pair, H);
}

static void weigh_task(void *context, int64_t task, int thread) {
  (void)thread;
  const gradient_weighing *w = context;
  weigh_gradients(w, &w->g->blocks[task]);
}

typedef struct {
  const grouping *g;
  const char *pair_grads;
  ml_tokens to;
  bool add;
} grad_placing;

static void place_task(void *context, int64_t task, int thread) {
  (void)thread;
  const grad_placing *j = context;
  const call *c = j->g->c;
  int64_t first = task * PICK_TOKENS, last = min_(first + PICK_TOKENS, c->T);
  if (!j->add) c->elementwise->clear(first, last, c->p->seq, c->p->n_experts, j->to);
  c->elementwise->place(first, last, c->p->seq, c->p->top_k, j->g->chosen, j->pair_grads, j->to);
}

void ml_reserve_grad_w(const call *c, budget *b) {
  ml_reserve(b, c->T, c->p->top_k, c->size);
  ml_reserve(b, c->T, c->p->n_experts, c->size);
}

void ml_project_grads_grouped(call *c, const grouping *g, rows grad_y, char *p, char *h, ml_tokens grad_w, bool add) {
  size_t used = c->used;
  const ml_routed_lora *q = c->p;
  gradient_weighing w = {.g = g, .p = p, .h = h};
  if (grad_w.data) w.pair_grads = ml_take(c, c->T, q->top_k, c->size);
  if (p)
    project(c, g, ml_factor_b(c), grad_y, p, weigh_gradients, &w);
  else
    ml_parallel_for(ml_threads_for(c, work_of(g, 1)), g->n_blocks, weigh_task, &w);
  if (grad_w.data) {
    /* Tokens that share a weight: their gradients one by one, then the sums. */
    bool sum = (grad_w.batch == 0 && q->batch > 1) || (grad_w.seq == 0 && q->seq > 1);
    grad_placing j = {g, w.pair_grads, grad_w, add};
    if (sum) {
      j.to = ml_dense(c, ml_take(c, c->T, q->n_experts, c->size), q->n_experts);
      j.add = false;
    }
    ml_parallel_for(ml_threads_for(c, c->T * q->n_experts), ceil_div(c->T, PICK_TOKENS), place_task, &j);
    if (sum) c->elementwise->sum_weight_grads(q->batch, q->seq, q->n_experts, j.to.data, grad_w, add);
  }
  c->used = used;
}
