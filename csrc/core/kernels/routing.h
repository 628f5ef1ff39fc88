/* Routing for one dtype and one vector width; included by products.h, with its macros.
 *
 * Tokens come in blocks of vectors, of one of two kinds:
 *
 *   narrow   [N, lanes]: a token in each lane, transposed. No number meets one of another lane, so that a token's
 *            results depend on its own logits alone, wherever it stands.
 *   wide     [N / lanes, lanes]: one token, its experts in the lanes.
 *
 * Expert j of a block's token t is element t + j * step, step being lanes or 1.
 */
#ifndef MOELORA_ROUTING_H
#define MOELORA_ROUTING_H

#include <float.h>
#include <math.h>
#include <string.h>

/* ln(2)^i / i!, the series of 2^f. For |f| <= 1/2, 8 terms leave out 5e-9 and 14 of them 4e-18. */
static const double ml_exp2_terms[14] = {
    1.0,
    0.6931471805599453,
    0.24022650695910072,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.0001540353039338161,
    1.5252733804059841e-05,
    1.321548679014431e-06,
    1.01780860092397e-07,
    7.054911620801123e-09,
    4.4455382718708116e-10,
    2.5678435993488206e-11,
    1.3691488853904128e-12,
};

/* 1 / ln(2), and what its rounding left out. */
static const double ml_log2_e = 1.4426950408889634, ml_log2_e_rest = 2.0355273740931033e-17;

enum {
  ML_SLOTS = 8,        /* up to that many largest logits are kept in registers or near them, more in a heap */
  ML_SUM_VECTORS = 32, /* one long chain of additions costs digits */
};

#endif

/* Integers of REAL's width, and lanes of them: numbers of experts, or all bits or none. */
typedef __typeof__(__builtin_choose_expr(sizeof(REAL) == 4, (int32_t)0, (int64_t)0)) NAME(integer);
typedef NAME(integer) NAME(bits) __attribute__((vector_size(VECTOR_BYTES)));

ML_INLINE NAME(vector) NAME(choose)(NAME(bits) mask, NAME(vector) yes, NAME(vector) no) {
  return (NAME(vector))((mask & (NAME(bits))yes) | (~mask & (NAME(bits))no));
}

/* ---- blocks ---- */

typedef struct {
  int64_t n;       /* experts */
  int64_t vectors; /* of a block */
  int64_t step;    /* from an expert to the next */
  int64_t tokens;  /* of a block: the last one may have fewer */
} NAME(blocks);

ML_INLINE NAME(blocks) NAME(blocks_of)(const bool wide, int64_t n) {
  return wide ? (NAME(blocks)){n, (n + LANES - 1) / LANES, 1, 1} : (NAME(blocks)){n, n, LANES, LANES};
}

/* Which kind is faster: wide blocks where tokens would leave most lanes of a narrow one empty, and where experts fill so
 * many vectors that transposing costs more than sums over lanes do, which is soon where they are whole vectors, and at
 * once where probabilities are given. Lanes look for the largest logits faster than a heap does, which is how that is
 * done in wide blocks. */
ML_INLINE bool NAME(is_wide)(const ml_route_params *p, bool selects) {
  const int64_t n = p->n_experts, wide = (n % LANES ? 16 : p->probs.data ? 1 : 4) * LANES;
  return n >= LANES && (p->n_tokens * 4 <= LANES || (!selects && n >= wide));
}

/* Whether rows of a matrix are wide blocks as they stand. */
ML_INLINE bool NAME(are_blocks)(const bool wide, NAME(blocks) b, ml_matrix m) {
  return wide && b.n % LANES == 0 && m.col == 1;
}

/* Rows of m into a block; `fill` where there is no expert, zeros where there is no token. */
ML_INLINE void NAME(load_block)(const bool wide, NAME(blocks) b, REAL *block, ml_matrix m, int64_t first,
                                int64_t tokens, REAL fill) {
  const REAL *rows = (const REAL *)m.data + first * m.row;
  if (!wide) {
    if (tokens < b.tokens) memset(block, 0, (size_t)b.n * VECTOR_BYTES);
    NAME(pack)(block, LANES, b.n, tokens, rows, m.col, m.row);
    return;
  }
  for (int64_t j = b.n; j < b.vectors * LANES; j++) block[j] = fill;
  int64_t j = 0;
  for (; m.col == 1 && j + LANES <= b.n; j += LANES) NAME(store)(block + j, NAME(load)(rows + j));
  for (; j < b.n; j++) block[j] = rows[j * m.col];
}

/* A block into dense rows. */
ML_INLINE void NAME(store_block)(const bool wide, NAME(blocks) b, REAL *rows, const REAL *block, int64_t tokens) {
  if (wide)
    memcpy(rows, block, (size_t)b.n * sizeof(REAL));
  else
    NAME(pack)(rows, b.n, tokens, b.n, block, 1, LANES);
}

/* Of a block's tokens those that count: all bits, in wide blocks in all lanes. */
ML_INLINE NAME(bits) NAME(counted)(const bool wide, const ml_route_params *p, int64_t first, int64_t tokens,
                                   NAME(integer) counts[LANES]) {
  for (int64_t t = 0; t < LANES; t++) counts[t] = t < tokens || wide ? -1 : 0;
  for (int64_t t = 0; p->mask && t < LANES; t++)
    if (t < tokens || wide) counts[t] = p->mask[(first + (wide ? 0 : t)) * p->mask_stride] ? -1 : 0;
  return (NAME(bits))NAME(load)((const REAL *)counts);
}

/* ---- softmax ---- */

/* 1 / (temperature ln 2) as a sum of two: where multiply-adds are fused, the exponent of 2 then has no other error than
 * the difference of two logits that is multiplied. Temperatures so small that the type can't hold this act like the
 * smallest for which it can. */
typedef struct {
  REAL high, low;
} NAME(rate);

ML_INLINE NAME(rate) NAME(rate_of)(double temperature) {
  const double least = sizeof(REAL) == 4 ? (double)FLT_MIN : DBL_MIN,
               most = sizeof(REAL) == 4 ? (double)FLT_MAX : DBL_MAX;
  double rate = ml_log2_e / temperature;
  if (rate > most) return (NAME(rate)){(REAL)most, 0};
  REAL high = (REAL)(rate > least ? rate : least);
  return (NAME(rate)){high, (REAL)((fma(-(double)high, temperature, ml_log2_e) + ml_log2_e_rest) / temperature)};
}

/* 2^(d * rate) for d <= 0; 0 where that is below the smallest normal number. NaN stays NaN. The series and its scaling
 * are good to 2 ULP; where multiply-adds are not fused, the rounding of the exponent comes to that. */
ML_INLINE NAME(vector) NAME(power)(NAME(vector) d, NAME(rate) rate) {
  const int terms = sizeof(REAL) == 4 ? 8 : 14, mantissa = sizeof(REAL) == 4 ? 23 : 52;
  const int bias = sizeof(REAL) == 4 ? 127 : 1023;
  /* Added to a number, this leaves its integral part in the lowest bits. */
  const REAL shift = (REAL)(sizeof(REAL) == 4 ? 0x1.8p23 : 0x1.8p52);
  NAME(vector) shifted = d * rate.high + shift, whole = shifted - shift;
  NAME(vector) f = (d * rate.high - whole) + d * rate.low, sum = (NAME(vector)){0} + (REAL)ml_exp2_terms[terms - 1];
  ML_UNROLL for (int i = terms - 2; i >= 0; i--) sum = sum * f + (REAL)ml_exp2_terms[i];
  NAME(vector) scale = (NAME(vector))(((NAME(bits))shifted + bias) << mantissa);
  return (NAME(vector))((NAME(bits))(sum * scale) & ~(NAME(bits))(whole < (REAL)(1 - bias)));
}

/* Each lane meets the one that is `step` lanes away. */
#if LANES == 16
#define ML_PARTNERS(s) \
  0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s, 8 ^ s, 9 ^ s, 10 ^ s, 11 ^ s, 12 ^ s, 13 ^ s, 14 ^ s, 15 ^ s
#elif LANES == 8
#define ML_PARTNERS(s) 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s, 4 ^ s, 5 ^ s, 6 ^ s, 7 ^ s
#elif LANES == 4
#define ML_PARTNERS(s) 0 ^ s, 1 ^ s, 2 ^ s, 3 ^ s
#else
#define ML_PARTNERS(s) 0 ^ s, 1 ^ s
#endif
#define ML_MEET(step)                                                      \
  do {                                                                     \
    NAME(vector) other = __builtin_shufflevector(v, v, ML_PARTNERS(step)); \
    v = sum ? v + other : NAME(choose)((NAME(bits))(v > other), v, other); \
  } while (0)

/* Of wide blocks the sum, or the largest, of all lanes, in all lanes. */
ML_INLINE NAME(vector) NAME(over_lanes)(const bool wide, const bool sum, NAME(vector) v) {
  if (!wide) return v;
#if LANES > 8
  ML_MEET(8);
#endif
#if LANES > 4
  ML_MEET(4);
#endif
#if LANES > 2
  ML_MEET(2);
#endif
  ML_MEET(1);
  return v;
}
#undef ML_MEET
#undef ML_PARTNERS

/* A block of probabilities from one of logits, which may be the same, given each token's largest logit. */
ML_INLINE void NAME(softmax)(const bool wide, NAME(blocks) b, REAL *prob, const REAL *x, NAME(vector) largest,
                             NAME(rate) rate) {
  NAME(vector) total = {0};
  for (int64_t start = 0; start < b.vectors; start += ML_SUM_VECTORS) {
    NAME(vector) part = {0};
    for (int64_t j = start; j < b.vectors && j < start + ML_SUM_VECTORS; j++) {
      NAME(vector) e = NAME(power)(NAME(load)(x + j * LANES) - largest, rate);
      NAME(store)(prob + j * LANES, e);
      part += e;
    }
    total += part;
  }
  const NAME(vector) inverse = 1 / NAME(over_lanes)(wide, true, total);
  for (int64_t j = 0; j < b.vectors; j++) NAME(store)(prob + j * LANES, inverse * NAME(load)(prob + j * LANES));
}

/* ---- top k ---- */

/* Lane by lane the numbers of the vectors with the k largest elements, k <= ML_SLOTS, in order, ties to the lower one.
 * Returns the largest elements. In a lane with a NaN all this means nothing, save that there are such vectors. */
ML_INLINE NAME(vector) NAME(largest)(const int k, const REAL *x, int64_t vectors, NAME(bits) at[ML_SLOTS]) {
  NAME(vector) best[ML_SLOTS];
  for (int s = 0; s < ML_SLOTS; s++) {
    best[s] = (NAME(vector)){0} + (REAL)NAN; /* empty: no element, not even -inf, finds it as large as itself */
    at[s] = (NAME(bits)){0};
  }
  for (int64_t j = 0; j < vectors; j++) {
    NAME(vector) v = NAME(load)(x + j * LANES);
    NAME(bits) number = (NAME(bits)){0} + (NAME(integer))j, stays = (NAME(bits))(best[k - 1] >= v);
    for (int s = k - 1; s > 0; s--) {
      NAME(bits) next_stays = (NAME(bits))(best[s - 1] >= v);
      best[s] = NAME(choose)(stays, best[s], NAME(choose)(next_stays, v, best[s - 1]));
      at[s] = (stays & at[s]) | (~stays & ((next_stays & number) | (~next_stays & at[s - 1])));
      stays = next_stays;
    }
    best[0] = NAME(choose)(stays, best[0], v);
    at[0] = (stays & at[0]) | (~stays & number);
  }
  return best[0];
}

/* A total order on the experts of a token: larger logits first, then the lower index, which also decides among NaN. */
ML_INLINE bool NAME(comes_after)(const REAL *x, int64_t step, int64_t a, int64_t b) {
  REAL x_a = x[a * step], x_b = x[b * step];
  return x_a < x_b || (!(x_a > x_b) && a > b);
}

/* Restores the heap order of heap [k], where each expert comes after its children, from `at` downwards. */
static void NAME(sift_down)(const REAL *x, int64_t step, int64_t *heap, int64_t k, int64_t at) {
  int64_t moved = heap[at];
  for (int64_t child = 2 * at + 1; child < k; child = 2 * at + 1) {
    if (child + 1 < k && NAME(comes_after)(x, step, heap[child + 1], heap[child])) child++;
    if (!NAME(comes_after)(x, step, heap[child], moved)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

/* The same for one token and any k: kept [k]. A heap whose root is the last of those kept: O(n log k) at worst, and one
 * comparison for an expert that is not kept. */
static void NAME(select)(const REAL *x, int64_t step, int64_t n, int64_t k, int64_t *kept) {
  for (int64_t i = 0; i < k; i++) kept[i] = i;
  for (int64_t i = k / 2 - 1; i >= 0; i--) NAME(sift_down)(x, step, kept, k, i);
  for (int64_t i = k; i < n; i++) {
    if (!NAME(comes_after)(x, step, kept[0], i)) continue;
    kept[0] = i;
    NAME(sift_down)(x, step, kept, k, 0);
  }
  for (int64_t left = k - 1; left > 0; left--) {
    int64_t last = kept[0];
    kept[0] = kept[left];
    kept[left] = last;
    NAME(sift_down)(x, step, kept, left, 0);
  }
}

/* indices [tokens, k] of a block of logits, and each token's largest logit. */
ML_INLINE NAME(vector) NAME(top)(const bool wide, NAME(blocks) b, const REAL *x, int64_t k, int64_t tokens,
                                 int64_t *indices) {
  NAME(bits) at[ML_SLOTS];
  const bool heap = wide || k > ML_SLOTS;
  for (int64_t t = 0; heap && k > 0 && t < tokens; t++) NAME(select)(x + t, b.step, b.n, k, indices + t * k);
  if (heap || k == 0) return NAME(over_lanes)(wide, false, NAME(largest)(1, x, b.vectors, at));

  NAME(vector) largest;
  switch (k) {
    case 1: largest = NAME(largest)(1, x, b.n, at); break;
    case 2: largest = NAME(largest)(2, x, b.n, at); break;
    default: largest = NAME(largest)((int)k, x, b.n, at);
  }
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t s = 0; s < k; s++) indices[t * k + s] = at[s][t];
  return largest;
}

/* ---- forward ---- */

/* One token's row of weights, from its probabilities. */
ML_INLINE void NAME(weigh)(const REAL *prob, int64_t step, int64_t n, int64_t k, const int64_t *kept, bool renormalize,
                           REAL *weights) {
  renormalize = renormalize && k < n; /* all of them sum to 1 as they are */
  double norm = renormalize ? 0 : 1;
  for (int64_t i = 0; renormalize && i < k; i++) norm += (double)prob[kept[i] * step];
  memset(weights, 0, (size_t)n * sizeof(REAL));
  for (int64_t i = 0; i < k; i++) weights[kept[i]] = (REAL)((double)prob[kept[i] * step] / norm);
}

/* sums [N] += the sums of blocks, which are zero again afterwards. */
ML_INLINE void NAME(flush)(const bool wide, NAME(blocks) b, REAL *block_sums, double *sums) {
  for (int64_t j = 0; wide && j < b.n; j++) sums[j] += (double)block_sums[j];
  for (int64_t j = 0; !wide && j < b.n; j += 4) {
    const int64_t n = b.n - j < 4 ? b.n - j : 4;
    NAME(vector) part[4] = {{0}};
    NAME(lanes_4) total;
    for (int64_t i = 0; i < n; i++) part[i] = NAME(load)(block_sums + (j + i) * LANES);
    NAME(reduce_4)(part, &total);
    for (int64_t i = 0; i < n; i++) sums[j + i] += (double)total[i];
  }
  memset(block_sums, 0, (size_t)b.vectors * VECTOR_BYTES);
}

ML_INLINE void NAME(route_blocks)(const bool wide, const ml_route_params *p, int64_t first, int64_t end, REAL *weights,
                                  int64_t *indices, int64_t *counts, double *sums, REAL *scratch) {
  const int64_t n = p->n_experts, k = p->top_k;
  const NAME(blocks) b = NAME(blocks_of)(wide, n);
  const NAME(rate) rate = NAME(rate_of)(p->temperature);
  const bool in_place = k == 0 && NAME(are_blocks)(wide, b, p->logits);
  REAL *block_sums = scratch + b.vectors * LANES;
  int64_t all = 0, unflushed = 0;
  memset(block_sums, 0, (size_t)b.vectors * VECTOR_BYTES);

  for (int64_t start = first; start < end; start += b.tokens) {
    int64_t tokens = end - start < b.tokens ? end - start : b.tokens;
    int64_t *kept = k > 0 ? indices + start * k : NULL;
    REAL *rows = weights + start * n;
    NAME(integer) counted[LANES];
    const NAME(bits) counted_lanes = NAME(counted)(wide, p, start, tokens, counted);
    REAL *x = in_place ? rows : scratch;
    const REAL *logits = (const REAL *)p->logits.data + start * p->logits.row;
    if (!in_place) {
      NAME(load_block)(wide, b, scratch, p->logits, start, tokens, -(REAL)INFINITY);
      logits = scratch;
    }
    NAME(softmax)(wide, b, x, logits, NAME(top)(wide, b, logits, k, tokens, kept), rate);
    for (int64_t j = 0; j < b.vectors; j++) {
      NAME(vector) prob = (NAME(vector))(counted_lanes & (NAME(bits))NAME(load)(x + j * LANES));
      NAME(store)(block_sums + j * LANES, NAME(load)(block_sums + j * LANES) + prob);
    }
    if (k == 0 && !in_place) NAME(store_block)(wide, b, rows, x, tokens);
    for (int64_t t = 0; t < tokens; t++) {
      all -= counted[t];
      if (x[t] != x[t]) /* a bad row, all of it */
        for (int64_t i = 0; i < k; i++) kept[t * k + i] = i;
      if (k > 0) NAME(weigh)(x + t, b.step, n, k, kept + t * k, p->renormalize, rows + t * n);
      for (int64_t i = 0; i < k; i++) counts[kept[t * k + i]] -= counted[t];
    }
    if (++unflushed == ML_SUM_VECTORS) {
      NAME(flush)(wide, b, block_sums, sums);
      unflushed = 0;
    }
  }
  NAME(flush)(wide, b, block_sums, sums);
  for (int64_t j = 0; k == 0 && j < n; j++) counts[j] += all;
}

static void NAME(route)(const ml_route_params *p, int64_t first, int64_t end, void *weights, int64_t *indices,
                        int64_t *counts, double *sums, void *scratch) {
  if (NAME(is_wide)(p, p->top_k > 0))
    NAME(route_blocks)(true, p, first, end, weights, indices, counts, sums, scratch);
  else
    NAME(route_blocks)(false, p, first, end, weights, indices, counts, sums, scratch);
}

static bool NAME(pick)(int64_t tokens, int64_t n_experts, ml_matrix weights, int64_t k, int64_t *indices,
                       void *scratch) {
  const NAME(blocks) b = NAME(blocks_of)(false, n_experts);
  for (int64_t start = 0; start < tokens; start += b.tokens) {
    int64_t n = tokens - start < b.tokens ? tokens - start : b.tokens;
    NAME(load_block)(false, b, scratch, weights, start, n, 0);
    NAME(bits) unordered = {0};
    for (int64_t j = 0; j < b.vectors; j++) {
      NAME(vector) v = NAME(load)((const REAL *)scratch + j * LANES);
      unordered |= (NAME(bits))(v != v);
    }
    for (int64_t t = 0; t < n; t++)
      if (unordered[t]) return false;
    NAME(top)(false, b, scratch, k, n, indices + start * k);
  }
  return true;
}

/* ---- backward ---- */

/* One token's gradient by p, from that by w: through the choice of k, and the division by their sum. */
ML_INLINE void NAME(unweigh)(const REAL *prob, int64_t step, int64_t k, const int64_t *kept, bool renormalize,
                             const REAL *grad_w, int64_t col, REAL *grad) {
  double norm = 0, mean = 0;
  for (int64_t i = 0; i < k; i++) {
    double p = (double)prob[kept[i] * step], g = (double)grad_w[kept[i] * col];
    norm += p;
    mean += p * g;
    grad[kept[i] * step] = (REAL)g;
  }
  if (!renormalize) return;
  mean /= norm;
  for (int64_t i = 0; i < k; i++)
    grad[kept[i] * step] = (REAL)(((double)grad[kept[i] * step] - mean) / norm);
}

/* With g = dL/dp, first through the renormalisation w_i = p_i / S, S = sum of p over K, then through the softmax:
 *
 *   g_i       = (grad_w_i - sum_K grad_w w) / S     on K, 0 elsewhere; grad_w_i where nothing is renormalised
 *   g_i      += grad_prob_sums_i                    unmasked tokens
 *   grad_logits_i = p_i (g_i - sum g p) / temperature
 */
ML_INLINE void NAME(route_backward_blocks)(const bool wide, const ml_route_params *p, int64_t first, int64_t end,
                                           REAL *grad_logits, ml_matrix grad_weights, const int64_t *indices,
                                           const REAL *grad_sums, REAL *scratch) {
  const int64_t n = p->n_experts, k = p->top_k;
  const NAME(blocks) b = NAME(blocks_of)(wide, n);
  const NAME(rate) rate = NAME(rate_of)(p->temperature);
  const double most = sizeof(REAL) == 4 ? (double)FLT_MAX : DBL_MAX, inverse = 1 / p->temperature;
  const REAL factor = (REAL)(inverse < most ? inverse : most);
  REAL *more = scratch + b.vectors * LANES;
  const bool in_place = p->probs.data && NAME(are_blocks)(wide, b, p->probs);

  for (int64_t start = first; start < end; start += b.tokens) {
    int64_t tokens = end - start < b.tokens ? end - start : b.tokens;
    NAME(integer) counted[LANES];
    const NAME(bits) counted_lanes = NAME(counted)(wide, p, start, tokens, counted);
    REAL *rows = grad_logits + start * n, *grad = in_place ? rows : more;
    const REAL *prob = (const REAL *)p->probs.data + start * p->probs.row;
    if (!p->probs.data) {
      NAME(load_block)(wide, b, scratch, p->logits, start, tokens, -(REAL)INFINITY);
      NAME(softmax)(wide, b, scratch, scratch, NAME(top)(wide, b, scratch, 0, tokens, NULL), rate);
      prob = scratch;
    } else if (!in_place) {
      NAME(load_block)(wide, b, scratch, p->probs, start, tokens, 0);
      prob = scratch;
    }
    if (k == 0) {
      NAME(load_block)(wide, b, grad, grad_weights, start, tokens, 0);
    } else {
      memset(grad, 0, (size_t)b.vectors * VECTOR_BYTES);
      for (int64_t t = 0; t < tokens; t++)
        NAME(unweigh)(prob + t, b.step, k, indices + (start + t) * k, p->renormalize,
                      (const REAL *)grad_weights.data + (start + t) * grad_weights.row, grad_weights.col, grad + t);
    }
    if (grad_sums && wide && counted[0])
      for (int64_t j = 0; j < n; j++) grad[j] += grad_sums[j];
    NAME(vector) mean = {0};
    for (int64_t from = 0; from < b.vectors; from += ML_SUM_VECTORS) {
      NAME(vector) part = {0};
      for (int64_t j = from; j < b.vectors && j < from + ML_SUM_VECTORS; j++) {
        NAME(vector) g = NAME(load)(grad + j * LANES);
        if (grad_sums && !wide) {
          g += (NAME(vector))(counted_lanes & (NAME(bits))((NAME(vector)){0} + grad_sums[j]));
          NAME(store)(grad + j * LANES, g);
        }
        part += g * NAME(load)(prob + j * LANES);
      }
      mean += part;
    }
    mean = NAME(over_lanes)(wide, true, mean);
    for (int64_t j = 0; j < b.vectors; j++) {
      NAME(vector) g = NAME(load)(grad + j * LANES) - mean;
      NAME(store)(grad + j * LANES, NAME(load)(prob + j * LANES) * g * factor);
    }
    if (!in_place) NAME(store_block)(wide, b, rows, grad, tokens);
  }
}

static void NAME(route_backward)(const ml_route_params *p, int64_t first, int64_t end, void *grad_logits,
                                 ml_matrix grad_weights, const int64_t *indices, const void *grad_sums,
                                 void *scratch) {
  if (NAME(is_wide)(p, false))
    NAME(route_backward_blocks)(true, p, first, end, grad_logits, grad_weights, indices, grad_sums, scratch);
  else
    NAME(route_backward_blocks)(false, p, first, end, grad_logits, grad_weights, indices, grad_sums, scratch);
}

const ml_routing NAME(routing) = {
    .scratch = 2 * VECTOR_BYTES,
    .route = NAME(route),
    .pick = NAME(pick),
    .route_backward = NAME(route_backward),
};
