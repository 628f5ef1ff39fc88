/* Dropout for one dtype and one vector width; included by products.h, with its macros and
 *
 *   MULTIPLY_LOW(a, b)   products of the low halves of the 64-bit lanes of two NAME(wide)
 */
typedef uint64_t NAME(wide) __attribute__((vector_size(VECTOR_BYTES), may_alias));
/* 32-bit numbers, at any address: as many as a wide has lanes, and as many as a vector has. */
typedef uint32_t NAME(low_halves) __attribute__((vector_size(VECTOR_BYTES / 2), aligned(4), may_alias));
typedef uint32_t NAME(words) __attribute__((vector_size(VECTOR_BYTES / sizeof(REAL) * 4), aligned(4), may_alias));
/* Integers of REAL's width, as comparisons give them: all bits or none. */
typedef __typeof__((NAME(vector)){0} < (NAME(vector)){0}) NAME(integers);

/* The first two rounds treat lanes and tokens apart: after them the words are lane[0] ^ a, lane[1], lane[2] ^ b and c,
 * with a, b and c of the token alone. High halves of a wide may hold anything. */
typedef struct {
  uint64_t lane[3][PHILOX_LANES] __attribute__((aligned(VECTOR_BYTES)));
  uint32_t key[PHILOX_ROUNDS][2];
} NAME(generator);

ML_INLINE void NAME(start)(NAME(generator) * g, const ml_mask *mask, int64_t first_lane) {
  for (int round = 0; round < PHILOX_ROUNDS; round++)
    for (int which = 0; which < 2; which++) g->key[round][which] = philox_key(mask->seed, round, which);
  for (int i = 0; i < PHILOX_LANES; i++) {
    uint64_t first = philox_product(0, (uint32_t)(first_lane + i));
    uint64_t second = philox_product(1, philox_high(first) ^ mask->expert ^ g->key[0][1]);
    g->lane[0][i] = philox_high(second) ^ g->key[1][0];
    g->lane[1][i] = second;
    g->lane[2][i] = philox_low(first) ^ g->key[1][1];
  }
}

/* The four words of all lanes for one token. */
ML_INLINE void NAME(draw)(const NAME(generator) * g, int64_t token, uint32_t words[4][PHILOX_LANES]) {
  uint64_t first = philox_product(1, philox_high((uint64_t)token));
  uint64_t second = philox_product(0, philox_high(first) ^ philox_low((uint64_t)token) ^ g->key[0][0]);
  uint64_t a = philox_low(first), b = philox_high(second), c = philox_low(second);
  const NAME(wide) zero = {0}, by_0 = zero + philox_multipliers[0], by_1 = zero + philox_multipliers[1];
  ML_UNROLL for (int i = 0; i < PHILOX_LANES; i += VECTOR_BYTES / 8) {
    NAME(wide) w0 = *(const NAME(wide) *)&g->lane[0][i] ^ a, w1 = *(const NAME(wide) *)&g->lane[1][i];
    NAME(wide) w2 = *(const NAME(wide) *)&g->lane[2][i] ^ b, w3 = zero + c;
    ML_UNROLL for (int round = 2; round < PHILOX_ROUNDS; round++) {
      NAME(wide) p0 = MULTIPLY_LOW(w0, by_0), p1 = MULTIPLY_LOW(w2, by_1);
      w0 = (p1 >> 32) ^ w1 ^ (uint64_t)g->key[round][0];
      w1 = p1;
      w2 = (p0 >> 32) ^ w3 ^ (uint64_t)g->key[round][1];
      w3 = p0;
    }
    *(NAME(low_halves) *)&words[0][i] = __builtin_convertvector(w0, NAME(low_halves));
    *(NAME(low_halves) *)&words[1][i] = __builtin_convertvector(w1, NAME(low_halves));
    *(NAME(low_halves) *)&words[2][i] = __builtin_convertvector(w2, NAME(low_halves));
    *(NAME(low_halves) *)&words[3][i] = __builtin_convertvector(w3, NAME(low_halves));
  }
}

/* One slice, whole. */
ML_INLINE void NAME(keep_slice)(const ml_mask *mask, const uint32_t *words, const int odd, const REAL *in, REAL *out,
                                const REAL *init) {
  const REAL scale = (REAL)mask->scale;
  ML_UNROLL for (int i = 0; i < PHILOX_LANES; i += LANES) {
    NAME(integers) drawn = __builtin_convertvector(*(const NAME(words) *)(words + i), NAME(integers));
    drawn = odd ? (drawn >> 16) & 0xffff : drawn & 0xffff;
    NAME(vector) kept =
        (NAME(vector))((NAME(integers))(scale * NAME(load)(in + i)) & (drawn >= (int32_t)mask->threshold));
    NAME(store)(out + i, init ? NAME(load)(init + i) + kept : kept);
  }
}

static void NAME(keep)(const ml_mask *mask, int64_t token, int64_t column, int64_t rows, int64_t cols, const void *in_,
                       int64_t in_row, void *out_, int64_t out_row, const void *init_, int64_t init_row) {
  for (int64_t j = 0; j < cols; j += ML_MASK_COLUMNS) {
    NAME(generator) g;
    NAME(start)(&g, mask, (column + j) / PHILOX_SLICES);
    int64_t slices = (cols - j) / PHILOX_LANES, ragged = j + slices * PHILOX_LANES;
    if (slices > PHILOX_SLICES) slices = PHILOX_SLICES;
    for (int64_t t = 0; t < rows; t++) {
      uint32_t words[4][PHILOX_LANES];
      const REAL *in = (const REAL *)in_ + t * in_row, *init = init_ ? (const REAL *)init_ + t * init_row : NULL;
      REAL *out = (REAL *)out_ + t * out_row;
      NAME(draw)(&g, token + t, words);
      for (int slice = 0; slice < slices; slice++) {
        int64_t i = j + slice * PHILOX_LANES;
        NAME(keep_slice)(mask, words[slice / 2], slice % 2, in + i, out + i, init ? init + i : NULL);
      }
      if (slices == PHILOX_SLICES) continue;
      for (int64_t i = ragged; i < cols; i++) {
        uint32_t drawn = words[slices / 2][i - ragged] >> 16 * (slices % 2) & 0xffff;
        REAL kept = drawn >= mask->threshold ? (REAL)mask->scale * in[i] : 0;
        out[i] = init ? init[i] + kept : kept;
      }
    }
  }
}
