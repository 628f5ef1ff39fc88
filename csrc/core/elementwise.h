/* What happens between the products, element by element; plain loops that the compiler vectorises well enough: together
 * they read and write T * (R + N) elements where the products do T * R * d.
 *
 * Dense arrays: factors, keep [T, N], h, p, out [T, R]. offsets [N + 1]: expert e owns columns offsets[e] ..
 * offsets[e + 1] - 1. */
#ifndef MOELORA_ELEMENTWISE_H
#define MOELORA_ELEMENTWISE_H

#include "moelora.h"

typedef struct {
  size_t size; /* of one element */

  /* For tokens first <= t < last of weights [B, seq, N]: factors[t, e] = scaling[e] * w[t, e], 0 where top_k drops e;
   * with top_k > 0 also keep[t, e] = 1 or 0. A NaN counts as larger than any number, so it is kept and seen. */
  void (*factors)(int64_t first, int64_t last, int64_t seq, int64_t n_experts, ml_tokens weights,
                  const ml_expert *experts, int64_t top_k, void *factors, uint8_t *keep);

  /* Bit e: weights [B, seq, N] are zero for each of the tokens; n_experts <= 64. */
  uint64_t (*unused)(int64_t batch, int64_t seq, int64_t n_experts, ml_tokens weights);

  /* h[t, j] = 0 where keep[t, expert of j] == 0 */
  void (*drop)(int64_t first, int64_t last, int64_t n_experts, const int64_t *offsets, const uint8_t *keep, void *h);

  /* out[t, j] = factors[t, expert of j] * h[t, j]; out may be h */
  void (*weigh)(int64_t first, int64_t last, int64_t n_experts, const int64_t *offsets, const void *factors,
                const void *h, void *out);

  /* grads[t, e] = scaling[e] * <p[t, e], h[t, e]>; 0 where keep (NULL: everything is kept) drops e */
  void (*weight_grads)(int64_t first, int64_t last, int64_t n_experts, const int64_t *offsets, const ml_expert *experts,
                       const uint8_t *keep, const void *p, const void *h, void *grads);

  /* The top_k experts of each token, and their weights: chosen, largest [T, top_k], falling. NaN counts as in factors. */
  void (*pick)(int64_t first, int64_t last, int64_t seq, int64_t n_experts, ml_tokens weights, int64_t top_k,
               int64_t *chosen, void *largest);

  /* The same experts in ascending order, and scaling * weight. */
  void (*order_picks)(int64_t first, int64_t last, int64_t seq, ml_tokens weights, const ml_expert *experts,
                      int64_t top_k, int64_t *chosen, void *factors);

  /* to[t, j] = 0     first <= t < last, j < width */
  void (*clear)(int64_t first, int64_t last, int64_t seq, int64_t width, ml_tokens to);

  /* n rows [rank] of h, one for each of n pairs: to and from columns 0 .. rank - 1 of tokens[i]; times factors[pair[i]];
   * grads[pair[i]] = scaling * <p[i], h[i]> */
  void (*put_rows)(int64_t n, int64_t rank, const void *h, const int64_t *tokens, int64_t seq, ml_tokens to);
  void (*take_rows)(int64_t n, int64_t rank, void *h, const int64_t *tokens, int64_t seq, ml_tokens from);
  void (*weigh_rows)(int64_t n, int64_t rank, const void *factors, const int64_t *pair, void *h);
  void (*pair_grads)(int64_t n, int64_t rank, double scaling, const void *p, const void *h, const int64_t *pair,
                     void *grads);

  /* to[t, chosen[t, i]] += grads[t, i]     first <= t < last, i < top_k */
  void (*place)(int64_t first, int64_t last, int64_t seq, int64_t top_k, const int64_t *chosen, const void *grads,
                ml_tokens to);

  /* to [B, seq, N] = (add: +=) grads [T, N]; along an axis where `to` has stride zero the tokens are summed, in order */
  void (*sum_weight_grads)(int64_t batch, int64_t seq, int64_t n_experts, const void *grads, ml_tokens to, bool add);

  /* to[i*to_row + j*to_col] = (add: +=) from[i*from_row + j*from_col]; from NULL: zeros */
  void (*copy)(int64_t rows, int64_t cols, const void *from, int64_t from_row, int64_t from_col, void *to,
               int64_t to_row, int64_t to_col, bool add);
} ml_elementwise;

extern const ml_elementwise ml_elementwise_table[2]; /* by ml_dtype */

#endif
