/* See grouped.h. */
#include <string.h>

#include "grouped.h"

enum {
  BLOCK_PAIRS = 64,       /* of one expert, in one task */
  BLOCK_COLUMNS = 512,    /* of a sum in one go: rows of a few tokens and experts stay in the cache */
  SPREAD_TOKENS = 2048,   /* that share a packing of M */
  SPREAD_BYTES = 1 << 20, /* of packed panels, which stay in the second level of the cache */
  PACK_COLUMNS = 256,
  PICK_TOKENS = 64,
  FEW_PAIRS = 8 /* up to here, B is read in place */
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

/* From half of the work on that top_k saves. Measured on an Intel Xeon (Emerald Rapids), float32, d 768 and 2048, r 8 and
 * 16, T 1 .. 2048, k 2: grouping takes .66 to 1.12 of the time of computing everything with N = 4, .51 to .97 with N = 8.
 * Where dropout gives each expert an x of its own, everything is computed. */
bool ml_is_grouped(const call *c) { return c->p->top_k > 0 && c->T > 0 && !c->drops && c->R / 2 >= ml_kept_width(c); }

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
  return c->R * spread_panels(c, d) * c->products->panel_width;
}

static int64_t collect_scratch(const call *c, int64_t d) {
  return (BLOCK_PAIRS + widest_rank(c)) * panels_of(c, d) * c->products->panel_width;
}

static int64_t spread_tasks(const call *c, int64_t d) {
  return ceil_div(d, spread_panels(c, d) * c->products->panel_width) * ceil_div(c->T, SPREAD_TOKENS);
}

static int64_t collect_tasks(const call *c, int64_t d) {
  return ceil_div(d, panels_of(c, d) * c->products->panel_width);
}

static void reserve_phase(const call *c, budget *b, int64_t elements, int64_t tasks) {
  budget phase = {0};
  ml_reserve(&phase, elements, ml_thread_bound(c->p->n_threads, tasks), c->size);
  ml_reserve_phase(b, phase);
}

void ml_reserve_grouping(const call *c, budget *b) {
  int64_t N = c->p->n_experts, k = c->p->top_k, d = c->p->d_in > c->p->d_out ? c->p->d_in : c->p->d_out;
  budget packed = {0};
  ml_reserve(b, c->T, k, sizeof(int32_t));
  ml_reserve(b, c->T, k, c->size);
  ml_reserve(b, N + 1, 1, sizeof(int64_t));
  ml_reserve(b, N + 1, 1, sizeof(int64_t));
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(b, c->T, k, sizeof(int64_t));
  ml_reserve(&packed, c->R, d, c->size);
  ml_reserve_phase(b, packed);
  if (b->overflow) return;
  ml_reserve(b, most_blocks(c), 1, sizeof(pair_block));
  const int64_t widths[] = {c->p->d_in, c->p->d_out};
  for (int i = 0; i < 2; i++) {
    reserve_phase(c, b, spread_scratch(c, widths[i]), spread_tasks(c, widths[i]));
    reserve_phase(c, b, collect_scratch(c, widths[i]), collect_tasks(c, widths[i]));
  }
}

typedef struct {
  grouping *g;
  bool clear;
} picking;

static void pick_task(void *context, int64_t task, int thread) {
  (void)thread;
  const picking *j = context;
  const grouping *g = j->g;
  const call *c = g->c;
  const ml_routed_lora *p = c->p;
  int64_t first = task * PICK_TOKENS, last = min_(first + PICK_TOKENS, c->T);
  c->elementwise->pick(first, last, p->seq, p->n_experts, p->routing_weights, p->experts, p->top_k, g->chosen,
                       g->factors);
  if (j->clear) c->elementwise->clear(first, last, p->seq, c->R, g->hidden);
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
  g->blocks = ml_take(c, most_blocks(c), 1, sizeof *g->blocks);
  picking j = {g, write && hidden.data};
  ml_parallel_for(ml_threads_for(c, T * (N + (j.clear ? c->R : 0))), ceil_div(T, PICK_TOKENS), pick_task, &j);

  memset(g->first, 0, (size_t)(N + 1) * sizeof *g->first);
  for (int64_t i = 0; i < T * k; i++) g->first[g->chosen[i] + 1]++;
  for (int64_t e = 0; e < N; e++) g->first[e + 1] += g->first[e];
  for (int64_t t = 0; t < T; t++)
    for (int64_t i = t * k; i < (t + 1) * k; i++) {
      int64_t place = g->first[g->chosen[i]]++; /* which leaves the first of the next expert there */
      g->pair[place] = i;
      g->token[place] = t;
    }
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
  char *packed; /* [R, d], where M's rows are not dense, or not of the dtype */
  void (*then)(const void *context, const pair_block *b);
  const void *context;
} projection;

static int64_t pack_tasks(int64_t d) { return ceil_div(d, PACK_COLUMNS); }

static void pack_task(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const call *c = j->g->c;
  int64_t e = task / pack_tasks(j->m.d), d0 = task % pack_tasks(j->m.d) * PACK_COLUMNS;
  ml_matrix part = j->m.parts[e];
  if (j->g->first[e] < j->g->first[e + 1])
    c->readers->pack(at(c, j->packed, c->offsets[e] * j->m.d + d0), j->m.d, rank_of(j->g, e),
                     min_(PACK_COLUMNS, j->m.d - d0), at_factor(c, part.data, d0 * part.col), part.row, part.col);
}

static void project_task(void *context, int64_t task, int thread) {
  (void)thread;
  const projection *j = context;
  const grouping *g = j->g;
  const call *c = g->c;
  const pair_block *b = &g->blocks[task];
  int64_t rank = rank_of(g, b->expert), n = b->last - b->first;
  ml_matrix part = j->m.parts[b->expert];
  if (j->packed) part = (ml_matrix){at(c, j->packed, c->offsets[b->expert] * j->m.d), j->m.d, 1};
  const void *x[BLOCK_PAIRS];
  for (int64_t i = 0; i < n; i++) x[i] = at(c, j->x.data, g->token[b->first + i] * j->x.row);
  for (int64_t k = 0; k < j->m.d; k += BLOCK_COLUMNS)
    c->products->grouped_dots(n, rank, min_(BLOCK_COLUMNS, j->m.d - k), x, k, part.data, part.row,
                              row_of(g, j->out, b->expert, b->first), rank, k > 0);
  j->then(j->context, b);
}

static void project(call *c, const grouping *g, factor m, rows x, char *out,
                    void (*then)(const void *context, const pair_block *b), const void *context) {
  size_t used = c->used;
  projection j = {.g = g, .m = m, .x = x, .out = out, .then = then, .context = context};
  if (c->p->bf16_adapters || !ml_has_dense_rows(m)) {
    j.packed = ml_take(c, c->R, m.d, c->size);
    ml_parallel_for(ml_threads_for(c, work_of(g, m.d)), m.n_parts * pack_tasks(m.d), pack_task, &j);
  }
  ml_parallel_for(ml_threads_for(c, work_of(g, m.d)), g->n_blocks, project_task, &j);
  c->used = used;
}

/* ---- spread: out = init + h M_e over the pairs of each token ---- */

typedef struct {
  const grouping *g;
  factor m;
  const char *h;
  rows out, init;
  char *packed; /* per thread: panels [R, panel_width] of the experts that are used */
} spreading;

static void spread_task(void *context, int64_t task, int thread) {
  const spreading *s = context;
  const grouping *g = s->g;
  const call *c = g->c;
  const ml_products *k = c->products;
  int64_t strip = spread_panels(c, s->m.d) * k->panel_width, strips = ceil_div(s->m.d, strip), top_k = c->p->top_k;
  int64_t first = task % strips * strip, last = min_(first + strip, s->m.d);
  int64_t t0 = task / strips * SPREAD_TOKENS, t1 = min_(t0 + SPREAD_TOKENS, c->T);
  char *packed = at(c, s->packed, thread * spread_scratch(c, s->m.d));
  for (int64_t d0 = first; d0 < last; d0 += k->panel_width) {
    int64_t cols = min_(k->panel_width, last - d0), width = round_up(cols, k->lanes);
    for (int64_t e = 0; e < s->m.n_parts; e++) {
      if (g->first[e] == g->first[e + 1]) continue;
      ml_matrix part = s->m.parts[e];
      pack_panel(c, c->readers, at(c, packed, (d0 - first) * c->R + c->offsets[e] * width), rank_of(g, e), cols,
                 (ml_matrix){at_factor(c, part.data, d0 * part.col), part.row, part.col});
    }
  }
  for (int64_t t = t0; t < t1; t += ROW_BLOCK)
    for (int64_t d0 = first; d0 < last; d0 += k->panel_width) {
      int64_t cols = min_(k->panel_width, last - d0), width = round_up(cols, k->lanes);
      k->grouped_sums(min_(ROW_BLOCK, t1 - t), top_k, cols, s->h, g->element + t * top_k, g->chosen + t * top_k,
                      at(c, packed, (d0 - first) * c->R), c->offsets, width, at(c, s->out.data, t * s->out.row + d0),
                      s->out.row, s->init.data ? at(c, s->init.data, t * s->init.row + d0) : NULL, s->init.row);
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
  char *scratch; /* per thread: panels of x [BLOCK_PAIRS, panel_width], of sums [widest rank, panel_width] */
} collection;

static void collect_task(void *context, int64_t task, int thread) {
  const collection *g = context;
  const grouping *all = g->g;
  const call *c = all->c;
  const ml_products *k = c->products;
  int64_t full = k->panel_width, strip = panels_of(c, g->grads.d) * full;
  int64_t first = task * strip, last = min_(first + strip, g->grads.d), n_pairs = all->first[g->grads.n_parts];
  char *panels = at(c, g->scratch, thread * collect_scratch(c, g->grads.d)), *sums = at(c, panels, BLOCK_PAIRS * strip);
  memset(panels, 0, (size_t)(BLOCK_PAIRS * strip * c->size)); /* what pads the last columns to whole vectors */
  for (int64_t e = 0; e < g->grads.n_parts; e++) {
    if (!g->grads.parts[e].data) continue;
    int64_t rank = rank_of(all, e);
    for (int64_t i = all->first[e]; i < all->first[e + 1]; i += BLOCK_PAIRS) {
      int64_t n = min_(BLOCK_PAIRS, all->first[e + 1] - i);
      for (int64_t t = 0; t < n; t++) {
        const char *x = at(c, g->x.data, all->token[i + t] * g->x.row + first);
        const char *ahead = at(c, g->x.data, all->token[min_(i + t + BLOCK_PAIRS, n_pairs - 1)] * g->x.row + first);
        for (int64_t b = 0; b < (last - first) * c->size; b += 64) ML_PREFETCH(ahead + b);
        for (int64_t d0 = 0; d0 < last - first; d0 += full) {
          int64_t cols = min_(full, last - first - d0), width = round_up(cols, k->lanes);
          memcpy(at(c, panels, d0 * BLOCK_PAIRS + t * width), at(c, x, d0), (size_t)(cols * c->size));
        }
      }
      for (int64_t d0 = 0; d0 < last - first; d0 += full) {
        int64_t cols = min_(full, last - first - d0), width = round_up(cols, k->lanes);
        char *out = at(c, sums, d0 * rank);
        k->product(rank, cols, n, row_of(all, g->h, e, i), 1, rank, at(c, panels, d0 * BLOCK_PAIRS), width, out, width,
                   i > all->first[e] ? out : NULL, width);
      }
    }
    for (int64_t d0 = 0; d0 < last - first; d0 += full) {
      int64_t cols = min_(full, last - first - d0), width = round_up(cols, k->lanes);
      ml_matrix to = g->grads.parts[e];
      to.data = at(c, to.data, (first + d0) * to.col);
      ml_store_grads(c, all->first[e] < all->first[e + 1] ? at(c, sums, d0 * rank) : NULL, width, rank, cols, to,
                     g->add);
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
