/* bfloat16, the upper half of a float, to and from it: included by each instruction set's file, with NAME(op). Plain loops,
 * which the compiler turns into vectors. */

static void NAME(widen)(int64_t n, const uint16_t *from, float *to) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)from[i] << 16;
    __builtin_memcpy(to + i, &bits, sizeof bits);
  }
}

/* To the nearest, ties to even; a NaN stays one. */
ML_INLINE uint16_t NAME(round)(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return (uint16_t)(((bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : rounded) >> 16);
}

static void NAME(narrow)(int64_t n, const float *from, uint16_t *to) {
  for (int64_t i = 0; i < n; i++) to[i] = NAME(round)(from[i]);
}

static void NAME(narrow_sum)(int64_t n, const float *from, const uint16_t *init, uint16_t *to) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)init[i] << 16;
    float first;
    __builtin_memcpy(&first, &bits, sizeof bits);
    to[i] = NAME(round)(first + from[i]);
  }
}

const ml_bf16 NAME(bf16_table) = {.widen = NAME(widen), .narrow = NAME(narrow), .narrow_sum = NAME(narrow_sum)};

#undef NAME
