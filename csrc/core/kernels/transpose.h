/* Squares of WIDTH vectors of WIDTH elements, transposed, for one dtype: included by products.h once for each width that
 * a vector register has room for, with its macros and WIDTH.
 */
#define SQUARE_(op, width) NAME(op##_##width)
#define SQUARE(op, width) SQUARE_(op, width)

/* WIDTH elements at any address. */
typedef REAL SQUARE(lanes, WIDTH) __attribute__((vector_size(WIDTH * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));

/* Lanes of a pair of vectors a, b that exchange what stands h lanes apart: KEEP becomes a's new value, MOVE b's. */
#define KEEP(h, j) ((j) & (h) ? WIDTH + (j) - (h) : (j))
#define MOVE(h, j) ((j) & (h) ? WIDTH + (j) : (j) + (h))
#define LIST_2(which, h, j) which(h, j), which(h, (j) + 1)
#define LIST_4(which, h, j) LIST_2(which, h, j), LIST_2(which, h, (j) + 2)
#define LIST_8(which, h, j) LIST_4(which, h, j), LIST_4(which, h, (j) + 4)
#define LIST_16(which, h, j) LIST_8(which, h, j), LIST_8(which, h, (j) + 8)
#define LIST_(width) LIST_##width
#define LIST(width) LIST_(width)

/* Eklundh's way: blocks of size h change places across the diagonal, for h = 1, 2, 4, ... */
#define EXCHANGE(h)                                                      \
  ML_UNROLL for (int i = 0; i < WIDTH; i++) {                            \
    if (i & (h)) continue;                                               \
    SQUARE(lanes, WIDTH) a = v[i], b = v[i + (h)];                       \
    v[i] = __builtin_shufflevector(a, b, LIST(WIDTH)(KEEP, h, 0));       \
    v[i + (h)] = __builtin_shufflevector(a, b, LIST(WIDTH)(MOVE, h, 0)); \
  }

ML_INLINE void SQUARE(transpose, WIDTH)(SQUARE(lanes, WIDTH) v[WIDTH]) {
  EXCHANGE(1)
#if WIDTH > 2
  EXCHANGE(2)
#endif
#if WIDTH > 4
  EXCHANGE(4)
#endif
#if WIDTH > 8
  EXCHANGE(8)
#endif
}

#undef SQUARE_
#undef SQUARE
#undef KEEP
#undef MOVE
#undef LIST_2
#undef LIST_4
#undef LIST_8
#undef LIST_16
#undef LIST_
#undef LIST
#undef EXCHANGE
#undef WIDTH
