/* Which kernel computes what: by the number of tokens T, a pure function of shape, dtype and instruction set. */
#ifndef MOELORA_REGIMES_H
#define MOELORA_REGIMES_H

#include "kernels/kernels.h"

/* Each field: the kernel is taken for fewer tokens than that, and panels are packed from there on. */
typedef struct {
  int64_t dots;             /* H = x A^T, rows of A in place */
  int64_t short_sums;       /* P = g B, columns of B in place */
  int64_t spread_rows;      /* Y = Hs B^T, lanes over the ranks ... */
  int64_t spread_lanes;     /* ... else lanes over the tokens */
  int64_t in_place;         /* dX = Q A, rows of A as panels */
  int64_t collect_in_place; /* dA = Q^T x, rows of x as panels, sums made in place */
  int64_t outer;            /* dB = g^T Hs, sums made in place where ranks fit vectors ... */
  int64_t turned_in_place;  /* ... else columns of g in place */
  int64_t base_dots;        /* x W^T, rows of W in place */
  int64_t base_in_place;    /* g W, rows of W as panels */
} ml_regime;

/* Pairs of bfloat16, where the CPU multiplies them; measured on an AMD EPYC (Zen 4), d 768 .. 4096, R 32 .. 512. */
enum {
  ML_PAIRS_FORWARD = 2, /* from there on; a single token's time goes into reading A and B, which packing does twice */
  ML_PAIR_DOTS = 48     /* for fewer, H = x A^T with rows of A in place */
};

/* By the dtype of A and B. */
const ml_regime *ml_regime_of(ml_isa isa, ml_dtype of_factors);

#endif
