/* AVX-512 with vdpbf16ps, which adds the products of two pairs of bfloat16 to a float32. It takes denormal numbers for
 * zeros, and rounds after each of its two additions as if the products were exact, whatever the rounding mode; so sums
 * have other bits than fused multiply-adds give them, and errors of the same size. All else is as in avx512.c. */
#include "../compiler.h"
#include "kernels.h"

#if ML_X86

#include <immintrin.h>

enum { LANES = 16, TILE_ROWS = 6, TILE_VECTORS = 4 };

ML_INLINE __m512 load_some(const float *p, __mmask16 some) { return _mm512_maskz_loadu_ps(some, p); }
ML_INLINE __m512 widen_some(const uint16_t *p, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, p)), 16));
}
ML_INLINE __m256i narrow(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
ML_INLINE __mmask16 first_lanes(int64_t n) { return (__mmask16)(n < LANES ? (1u << n) - 1 : 0xffff); }

/* ---- product: a register tile of outputs, pairs of left broadcast against panel rows ---- */

ML_INLINE __m512 read(const bool narrows, __mmask16 some, const char *p) {
  return narrows ? widen_some((const uint16_t *)p, some) : load_some((const float *)p, some);
}
ML_INLINE void put(const bool narrows, __mmask16 some, __m512 v, char *p) {
  if (narrows)
    _mm256_mask_storeu_epi16(p, some, narrow(v));
  else
    _mm512_mask_storeu_ps(p, some, v);
}

/* out = init + sum */
ML_INLINE void store_tile(const int rows, const int vectors, const bool narrows, __mmask16 last,
                          __m512 sum[TILE_ROWS][TILE_VECTORS], char *out, int64_t out_row, const char *init,
                          int64_t init_row) {
  const int64_t bytes = narrows ? sizeof(uint16_t) : sizeof(float);
  /* All that is read first: stores would hold up reads of the same place in another page, as rows often have it. */
  if (init) ML_UNROLL for (int i = 0; i < rows; i++, init += init_row * bytes) {
      ML_OPAQUE(init); /* else the compiler keeps the places of all vectors, in memory */
      ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = _mm512_add_ps(
          read(narrows, j + 1 < vectors ? 0xffff : last, init + j * LANES * bytes), sum[i][j]);
    }
  ML_UNROLL for (int i = 0; i < rows; i++, out += out_row * bytes) {
    ML_OPAQUE(out);
    ML_UNROLL for (int j = 0; j < vectors; j++)
        put(narrows, j + 1 < vectors ? 0xffff : last, sum[i][j], out + j * LANES * bytes);
  }
}

ML_INLINE void tile(const int rows, const int vectors, const bool narrows, int64_t cols, int64_t depth,
                    const uint16_t *left, int64_t left_row, int64_t left_step, const uint32_t *panel, int64_t width,
                    char *out, int64_t out_row, const char *init, int64_t init_row) {
  if (narrows) { /* rows of y and its base, which come from far away: they are here when the sums are */
    const char *to = out, *from = init;
    ML_UNROLL for (int i = 0; i < rows; i++, to += out_row * 2) {
      ML_OPAQUE(to);
      ML_UNROLL for (int j = 0; j < vectors; j += 2) __builtin_prefetch(to + j * LANES * 2, 1, 3);
    }
    if (init && init != out) ML_UNROLL for (int i = 0; i < rows; i++, from += init_row * 2) {
        ML_OPAQUE(from);
        ML_UNROLL for (int j = 0; j < vectors; j += 2) ML_PREFETCH_NEAR(from + j * LANES * 2);
      }
  }
  __m512 sum[TILE_ROWS][TILE_VECTORS];
  ML_UNROLL for (int i = 0; i < rows; i++) ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; k++, left += left_step, panel += width) {
    __m512i p[TILE_VECTORS];
    ML_UNROLL for (int j = 0; j < vectors; j++) p[j] = _mm512_loadu_si512(panel + j * LANES);
    ML_UNROLL for (int i = 0; i < rows; i++) {
      int32_t pair;
      __builtin_memcpy(&pair, left + i * left_row, sizeof pair);
      __m512i l = _mm512_set1_epi32(pair);
      ML_UNROLL for (int j = 0; j < vectors; j++) sum[i][j] =
          _mm512_dpbf16_ps(sum[i][j], (__m512bh)l, (__m512bh)p[j]);
    }
  }
  if (cols == vectors * LANES)
    store_tile(rows, vectors, narrows, 0xffff, sum, out, out_row, init, init_row);
  else
    store_tile(rows, vectors, narrows, first_lanes(cols - (vectors - 1) * LANES), sum, out, out_row, init, init_row);
}

#define ML_ROWS(rows_, vectors, narrows)                                                                        \
  for (; rows - i >= (rows_); i += (rows_))                                                                     \
  tile((rows_), (vectors), (narrows), cols, depth, left + i * left_row, left_row, left_step, panel, width,      \
       out + i * out_row * bytes, out_row, init ? init + i * init_row * bytes : NULL, init_row)
#define ML_COLUMNS(name, vectors, narrows)                                                                             \
  ML_NOINLINE void name##_##vectors(int64_t rows, int64_t cols, int64_t depth, const uint16_t *left, int64_t left_row, \
                                    int64_t left_step, const uint32_t *panel, int64_t width, char *out,                \
                                    int64_t out_row, const char *init, int64_t init_row) {                             \
    const int64_t bytes = (narrows) ? sizeof(uint16_t) : sizeof(float);                                                \
    int64_t i = 0;                                                                                                     \
    ML_ROWS(TILE_ROWS, vectors, narrows);                                                                              \
    ML_ROWS(4, vectors, narrows);                                                                                      \
    ML_ROWS(2, vectors, narrows);                                                                                      \
    ML_ROWS(1, vectors, narrows);                                                                                      \
  }
#define ML_PRODUCT(name, narrows, type)                                                                              \
  ML_COLUMNS(name, 1, narrows)                                                                                       \
  ML_COLUMNS(name, 2, narrows)                                                                                       \
  ML_COLUMNS(name, 3, narrows)                                                                                       \
  ML_COLUMNS(name, 4, narrows)                                                                                       \
  static void name(int64_t rows, int64_t cols, int64_t depth, const uint16_t *left, int64_t left_row,                \
                   int64_t left_step, const uint32_t *panel, int64_t width, type *out_, int64_t out_row,             \
                   const type *init_, int64_t init_row) {                                                            \
    char *out = (char *)out_;                                                                                        \
    const char *init = (const char *)init_;                                                                          \
    switch ((cols + LANES - 1) / LANES) {                                                                            \
      case 1: name##_1(rows, cols, depth, left, left_row, left_step, panel, width, out, out_row, init, init_row); break; \
      case 2: name##_2(rows, cols, depth, left, left_row, left_step, panel, width, out, out_row, init, init_row); break; \
      case 3: name##_3(rows, cols, depth, left, left_row, left_step, panel, width, out, out_row, init, init_row); break; \
      case 4: name##_4(rows, cols, depth, left, left_row, left_step, panel, width, out, out_row, init, init_row); break; \
    }                                                                                                                \
  }
ML_PRODUCT(product, false, float)
ML_PRODUCT(product_narrow, true, uint16_t)
#undef ML_PRODUCT
#undef ML_COLUMNS
#undef ML_ROWS

/* ---- dots: lanes over depth ---- */

/* The sums of the lanes of four vectors, in a fixed tree. */
ML_INLINE __m128 sum_lanes(const __m512 v[4]) {
  __m512 low = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  __m512 high = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  __m512d first = _mm512_unpacklo_pd(_mm512_castps_pd(low), _mm512_castps_pd(high));
  __m512d second = _mm512_unpackhi_pd(_mm512_castps_pd(low), _mm512_castps_pd(high));
  __m512 all = _mm512_add_ps(_mm512_castpd_ps(first), _mm512_castpd_ps(second));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

enum { DOT_ROWS = 4 }; /* of A in a tile */

/* Rows beyond the last are the last once more, and their sums are thrown away. */
ML_INLINE void dots_tile(const int tokens, int64_t n, int64_t depth, const uint16_t *x, int64_t x_row,
                         const void *const *rows, float *out, int64_t out_row) {
  for (int64_t j = 0; j < n; j += DOT_ROWS) {
    const uint16_t *row[DOT_ROWS];
    ML_UNROLL for (int i = 0; i < DOT_ROWS; i++) row[i] = rows[j + i < n ? j + i : n - 1];
    __m512 sum[TILE_ROWS][DOT_ROWS];
    ML_UNROLL for (int t = 0; t < tokens; t++) ML_UNROLL for (int i = 0; i < DOT_ROWS; i++) sum[t][i] =
        _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += 2 * LANES) {
      __mmask32 some = depth - k < 2 * LANES ? (1u << (depth - k)) - 1 : 0xffffffff;
      __m512i a[DOT_ROWS];
      ML_UNROLL for (int i = 0; i < DOT_ROWS; i++) a[i] = _mm512_maskz_loadu_epi16(some, row[i] + k);
      ML_UNROLL for (int t = 0; t < tokens; t++) {
        __m512i v = _mm512_maskz_loadu_epi16(some, x + t * x_row + k);
        ML_UNROLL for (int i = 0; i < DOT_ROWS; i++) sum[t][i] =
            _mm512_dpbf16_ps(sum[t][i], (__m512bh)v, (__m512bh)a[i]);
      }
    }
    ML_UNROLL for (int t = 0; t < tokens; t++)
        _mm_mask_storeu_ps(out + t * out_row + j, (__mmask8)first_lanes(n - j), sum_lanes(sum[t]));
  }
}

static void dots(int64_t tokens, int64_t n, int64_t depth, const uint16_t *x, int64_t x_row, const void *const *rows,
                 float *out, int64_t out_row) {
  int64_t t = 0;
#define ML_TOKENS(m)                \
  for (; tokens - t >= (m); t += (m)) \
    dots_tile((m), n, depth, x + t * x_row, x_row, rows, out + t * out_row, out_row);
  ML_TOKENS(TILE_ROWS)
  ML_TOKENS(4)
  ML_TOKENS(2)
  ML_TOKENS(1)
#undef ML_TOKENS
}

/* ---- pairs, made of rows ---- */

ML_INLINE __m512i pair_up(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

/* The last columns, a vector at a time. */
ML_INLINE void interleave_some(uint32_t *panel, int64_t width, int64_t n_rows, __mmask16 some, const uint16_t *rows,
                               int64_t row_stride) {
  int64_t k = 0;
  for (; k + 2 <= n_rows; k += 2, rows += 2 * row_stride, panel += width)
    _mm512_mask_storeu_epi32(panel, some, pair_up(_mm256_maskz_loadu_epi16(some, rows),
                                                  _mm256_maskz_loadu_epi16(some, rows + row_stride)));
  if (k < n_rows)
    _mm512_mask_storeu_epi32(panel, some, pair_up(_mm256_maskz_loadu_epi16(some, rows), _mm256_setzero_si256()));
}

static void interleave(uint32_t *panel, int64_t width, int64_t n_rows, int64_t cols, const uint16_t *rows,
                       int64_t row_stride) {
  static const uint16_t order[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                     8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_loadu_si512(order), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const int64_t whole = cols / (2 * LANES) * (2 * LANES);
  for (int64_t k = 0; k < n_rows && whole > 0; k += 2) {
    const uint16_t *first = rows + k * row_stride, *second = k + 1 < n_rows ? first + row_stride : NULL;
    uint32_t *to = panel + k / 2 * width;
    for (int64_t j = 0; j < whole; j += 2 * LANES) {
      __m512i a = _mm512_loadu_si512(first + j), b = second ? _mm512_loadu_si512(second + j) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + j, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + j + LANES, _mm512_permutex2var_epi16(a, high, b));
    }
  }
  for (int64_t j = whole; j < cols; j += LANES)
    if (cols - j < LANES)
      interleave_some(panel + j, width, n_rows, first_lanes(cols - j), rows + j, row_stride);
    else
      interleave_some(panel + j, width, n_rows, 0xffff, rows + j, row_stride);
}

static void interleave_wide(uint32_t *panel, int64_t width, int64_t n_rows, int64_t cols, const float *rows,
                            int64_t row_stride) {
  for (int64_t k = 0; k < n_rows; k += 2, rows += 2 * row_stride, panel += width)
    for (int64_t j = 0; j < cols; j += LANES) {
      __mmask16 some = first_lanes(cols - j), second = k + 1 < n_rows ? some : 0;
      _mm512_mask_storeu_epi32(panel + j, some,
                               pair_up(narrow(load_some(rows + j, some)),
                                       narrow(load_some(second ? rows + row_stride + j : rows, second))));
    }
}

ML_INLINE void narrow_some(int64_t n_rows, __mmask16 some, const float *from, int64_t from_row, uint16_t *to,
                           int64_t to_row, const bool add) {
  for (int64_t i = 0; i < n_rows; i++, from += from_row, to += to_row) {
    __m512 v = load_some(from, some);
    put(true, some, add ? _mm512_add_ps(widen_some(to, some), v) : v, (char *)to);
  }
}

static void narrow_rows(int64_t n_rows, int64_t cols, const float *from, int64_t from_row, uint16_t *to, int64_t to_row,
                        bool add) {
  for (int64_t j = 0; j < cols; j += LANES) {
    __mmask16 some = first_lanes(cols - j);
    if (add)
      narrow_some(n_rows, some, from + j, from_row, to + j, to_row, true);
    else if (cols - j < LANES)
      narrow_some(n_rows, some, from + j, from_row, to + j, to_row, false);
    else
      narrow_some(n_rows, 0xffff, from + j, from_row, to + j, to_row, false);
  }
}

static const ml_pairs pairs = {
    .lanes = LANES,
    .panel_width = TILE_VECTORS * LANES,
    .product = product,
    .product_narrow = product_narrow,
    .dots = dots,
    .interleave = interleave,
    .interleave_wide = interleave_wide,
    .narrow_rows = narrow_rows,
};

static bool supported(void) { return ml_kernels_avx512.supported() && ML_CPU_HAS("avx512bf16"); }

/* On a thread of an AMD EPYC (Zen 4) product runs at 230 GF/s from the first cache, float32's at 115; on Intel's CPUs
 * (Emerald Rapids) the instruction ran at half the rate of float32's multiply-adds, and would lose digits for nothing. */
static bool preferred(void) { return __builtin_cpu_is("amd") != 0; }

const ml_kernels ml_kernels_avx512bf16 = {
    .isa = ML_AVX512,
    .name = "avx512bf16",
    .supported = supported,
    .preferred = preferred,
    .products = {[ML_F32] = &ml_table_f32_avx512,
                 [ML_F64] = &ml_table_f64_avx512,
                 [ML_BF16] = &ml_table_bf16_f32_avx512},
    .bf16 = &ml_bf16_table_avx512,
    .pairs = &pairs,
    .routing = {[ML_F32] = &ml_routing_f32_avx512, [ML_F64] = &ml_routing_f64_avx512},
};

#endif
