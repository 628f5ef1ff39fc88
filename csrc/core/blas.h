/* The base product through BLAS, where there is one. */
#ifndef MOELORA_BLAS_H
#define MOELORA_BLAS_H

#include "moelora.h"

/* out [m, n] += left [m, k] right, with right [k, n] element (i, j) at right.data[i*right.row + j*right.col]. left and
 * out have unit column stride. False: BLAS can't take these operands (strides, sizes, none built in), nothing is done.
 * The caller slices and threads: one call runs on the calling thread. */
bool ml_blas_product(ml_dtype dtype, int64_t m, int64_t n, int64_t k, const void *left, int64_t left_row,
                     ml_matrix right, void *out, int64_t out_row);

/* Whether ml_blas_product takes these operands. */
bool ml_blas_takes(int64_t m, int64_t n, int64_t k, int64_t left_row, ml_matrix right, int64_t out_row);

#endif
