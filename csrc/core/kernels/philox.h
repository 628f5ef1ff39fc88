/* The numbers behind dropout: Philox4x32 (Salmon et al., SC 2011) with 7 rounds, the fewest that its authors found to
 * pass BigCrush. Key: seed. Counter: (lane, low and high half of token, expert), with
 *
 *   lane   column / 128 * 16 + column % 16
 *   slice  column % 128 / 16
 *
 * An element takes 16 bits of the four words: of word slice / 2 the high half where slice is odd, else the low one. So
 * 16 neighbouring lanes make 16 neighbouring columns at a time, and no instruction set has to shuffle.
 */
#ifndef MOELORA_PHILOX_H
#define MOELORA_PHILOX_H

#include <stdint.h>

enum { PHILOX_ROUNDS = 7, PHILOX_LANES = 16, PHILOX_SLICES = 8 };

static const uint32_t philox_multipliers[2] = {0xD2511F53, 0xCD9E8D57}, philox_steps[2] = {0x9E3779B9, 0xBB67AE85};

/* The part of the key that is of use to word 0 (which = 0) or word 2 (1) in a round. */
static inline uint32_t philox_key(uint64_t seed, int round, int which) {
  return (uint32_t)(seed >> 32 * which) + (uint32_t)round * philox_steps[which];
}

/* A product of 32-bit numbers, in halves. */
static inline uint64_t philox_product(int which, uint32_t word) { return (uint64_t)philox_multipliers[which] * word; }
static inline uint32_t philox_high(uint64_t product) { return (uint32_t)(product >> 32); }
static inline uint32_t philox_low(uint64_t product) { return (uint32_t)product; }

/* Of the 2^16 numbers that an element may draw, how many, the first, drop it: for a probability below 1 all but one at
 * most. */
static inline uint32_t philox_threshold(double probability) {
  uint32_t all = 1 << 16, threshold = (uint32_t)(probability * all + 0.5);
  return threshold == all && probability < 1 ? threshold - 1 : threshold;
}

/* 2^16 over how many do not, so that the mean is exact; 0 where there are none. */
static inline double philox_scale(uint32_t threshold) {
  uint32_t all = 1 << 16;
  return threshold < all ? (double)all / (all - threshold) : 0;
}

#endif
