/* Top-k where it leaves out most of the work: the tokens of each expert side by side, and products of those alone.
 *
 * A pair is a token and one of its top_k experts, in the order of the tokens: pair t * top_k + i. A counting sort brings
 * them into the order of the experts, those of one expert in the order of their tokens. H, P and Q stand in that order,
 * `rank` elements for each pair, without what top_k drops. So every sum has an order that follows from shape and
 * weights. x and g are read and y is written in place: nothing of size T * top_k * d exists.
 */
#ifndef MOELORA_GROUPED_H
#define MOELORA_GROUPED_H

#include "call.h"

/* Some pairs of one expert: places first .. last - 1 in its order. */
typedef struct {
  int64_t expert, first, last;
} pair_block;

typedef struct {
  const call *c;
  int64_t *chosen;  /* [T, top_k]: experts, ascending */
  char *factors;    /* [T, top_k]: s w */
  int64_t *first;   /* [N + 1]: pairs of expert e stand at first[e] .. first[e + 1] - 1 */
  int64_t *start;   /* [N + 1]: their elements of H, P and Q at start[e] .. start[e + 1] - 1 */
  int64_t *pair;    /* [T * top_k]: which pair stands there */
  int64_t *token;   /* [T * top_k]: and its token */
  int64_t *element; /* [T, top_k]: where the elements of each pair start */
  int64_t *order;   /* [T]: tokens as spread takes them */
  pair_block *blocks;
  int64_t n_blocks;
  ml_tokens hidden; /* forward: H as the caller wants it; data == NULL: not at all. backward: H */
} grouping;

/* Whether a call runs this way or with everything computed and masked: a pure function of its shape. */
bool ml_is_grouped(const call *c);

/* Whether rows in bfloat16 are read and written in place, a, b being what is read or written besides x. */
bool ml_groups_narrow_rows(const ml_routed_lora *p, ml_tokens a, ml_tokens b);

/* For all that follows. */
void ml_reserve_grouping(const call *c, budget *b);

/* Elements of H, P or Q for each token, at most. */
int64_t ml_kept_width(const call *c);

/* With `write`, hidden is set to zero. */
void ml_group(call *c, grouping *g, ml_tokens hidden, bool write);

/* h = s w * H, and hidden. */
void ml_project_grouped(call *c, const grouping *g, rows x, char *h);

/* Apart from what ml_reserve_grouping does: for grad_w of the next. */
void ml_reserve_grad_w(const call *c, budget *b);

/* p = Q, h = s w * H (each NULL: not needed) and grad_w. */
void ml_project_grads_grouped(call *c, const grouping *g, rows grad_y, char *p, char *h, ml_tokens grad_w, bool add);

/* out = init + h M */
void ml_spread_grouped(call *c, const grouping *g, factor m, const char *h, rows out, rows init);

/* grads = h^T x, for the experts whose part of grads has data */
void ml_collect_grouped(call *c, const grouping *g, factor grads, const char *h, rows x, bool add);

#endif
