#include "blas.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>

#if ML_HAVE_BLAS

/* ML_BLAS_PREFIX is `moelora_` for the bundled library (setup.py renames it so) and empty for a system's OpenBLAS. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define BLAS(name) JOIN(ML_BLAS_PREFIX, name)

enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };
void BLAS(cblas_sgemm)(int order, int trans_a, int trans_b, int m, int n, int k, float alpha, const float *a, int lda,
                       const float *b, int ldb, float beta, float *c, int ldc);
void BLAS(cblas_dgemm)(int order, int trans_a, int trans_b, int m, int n, int k, double alpha, const double *a, int lda,
                       const double *b, int ldb, double beta, double *c, int ldc);
void BLAS(openblas_set_num_threads)(int n);
char *BLAS(openblas_get_config)(void);
char *BLAS(openblas_get_corename)(void);

/* Our own copy of the library, our own threads: its pool stays out of the way. */
static void one_thread(void) { BLAS(openblas_set_num_threads)(1); }
static void init(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, one_thread);
}

bool ml_blas_takes(int64_t m, int64_t n, int64_t k, int64_t left_row, ml_matrix right, int64_t out_row) {
  int64_t right_lead = right.col == 1 ? right.row : right.row == 1 ? right.col : 0;
  int64_t right_min = right.col == 1 ? n : k;
  return m <= INT_MAX && n <= INT_MAX && k <= INT_MAX && left_row >= k && left_row <= INT_MAX && out_row >= n &&
         out_row <= INT_MAX && right_lead >= right_min && right_lead <= INT_MAX;
}

bool ml_blas_product(ml_dtype dtype, int64_t m, int64_t n, int64_t k, const void *left, int64_t left_row,
                     ml_matrix right, void *out, int64_t out_row) {
  if (!ml_blas_takes(m, n, k, left_row, right, out_row)) return false;
  init();
  int trans = right.col == 1 ? NO_TRANS : TRANS;
  int lead = (int)(right.col == 1 ? right.row : right.col);
  if (dtype == ML_F32)
    BLAS(cblas_sgemm)(ROW_MAJOR, NO_TRANS, trans, (int)m, (int)n, (int)k, 1.0F, left, (int)left_row, right.data, lead,
                      1.0F, out, (int)out_row);
  else
    BLAS(cblas_dgemm)(ROW_MAJOR, NO_TRANS, trans, (int)m, (int)n, (int)k, 1.0, left, (int)left_row, right.data, lead,
                      1.0, out, (int)out_row);
  return true;
}

const char *ml_blas_config(void) {
  static char text[256];
  init();
  snprintf(text, sizeof text, "%s, core %s", BLAS(openblas_get_config)(), BLAS(openblas_get_corename)());
  return text;
}

#else

bool ml_blas_takes(int64_t m, int64_t n, int64_t k, int64_t left_row, ml_matrix right, int64_t out_row) {
  (void)m, (void)n, (void)k, (void)left_row, (void)right, (void)out_row;
  return false;
}

bool ml_blas_product(ml_dtype dtype, int64_t m, int64_t n, int64_t k, const void *left, int64_t left_row,
                     ml_matrix right, void *out, int64_t out_row) {
  (void)dtype, (void)left, (void)out;
  return ml_blas_takes(m, n, k, left_row, right, out_row);
}

const char *ml_blas_config(void) { return "none (own kernels)"; }

#endif
