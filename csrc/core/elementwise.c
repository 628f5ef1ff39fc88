#include "elementwise.h"

#include <string.h>

#include "compiler.h"

#define REAL float
#define NAME(op) ml_##op##_f32
#include "elementwise_typed.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(op) ml_##op##_f64
#include "elementwise_typed.h"
#undef REAL
#undef NAME

#define TABLE(dtype, real)                          \
  {.size = sizeof(real),                            \
   .factors = ml_factors_##dtype,                   \
   .unused = ml_unused_##dtype,                     \
   .drop = ml_drop_##dtype,                         \
   .weigh = ml_weigh_##dtype,                       \
   .weight_grads = ml_weight_grads_##dtype,         \
   .pick = ml_pick_##dtype,                         \
   .order_picks = ml_order_picks_##dtype,           \
   .clear = ml_clear_##dtype,                       \
   .put_rows = ml_put_rows_##dtype,                 \
   .take_rows = ml_take_rows_##dtype,               \
   .weigh_rows = ml_weigh_rows_##dtype,             \
   .pair_grads = ml_pair_grads_##dtype,             \
   .place = ml_place_##dtype,                       \
   .sum_weight_grads = ml_sum_weight_grads_##dtype, \
   .copy = ml_copy_##dtype}

const ml_elementwise ml_elementwise_table[2] = {[ML_F32] = TABLE(f32, float), [ML_F64] = TABLE(f64, double)};
