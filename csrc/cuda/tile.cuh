/* What the kernels that compute tiles of y, 128 rows by ML_WIDTH (128, 256) columns, have in common; ML_BACKWARD, ML_BIAS.
 *
 * Forward w [n, k] and b [n, C] are K-major, and backward, where y is the gradient of x and x that of y, w [k, n] and b [C, n] are
 * MN-major: no copy is turned.
 */
#include "hopper.cuh"

enum {
  ROWS = 128,
  X_BYTES = ROWS * 128,
  W_BYTES = ML_WIDTH * 128,
  Y_BYTES = 64 * 128 /* a box on its way out; each warpgroup has two */
};

/* Stages of shared memory that are filled and emptied in turn, each with two barriers. */
template <int N, int BYTES>
struct ring {
  u32 memory, barriers;
  int stage;
  u32 phase;
  DEVICE u32 data() const { return memory + stage * BYTES; }
  DEVICE u32 full() const { return barriers + 8 * stage; }
  DEVICE u32 empty(int s) const { return barriers + 8 * (N + s); }
  DEVICE void begin() const {
    for (int s = 0; s < N; s++) {
      barrier_init(barriers + 8 * s, 1);
      barrier_init(empty(s), 2);
    }
  }
  DEVICE void wait_empty() const { barrier_wait(empty(stage), phase ^ 1); }
  DEVICE void next() {
    if (++stage == N) {
      stage = 0;
      phase ^= 1;
    }
  }
};

/* `width` columns of w or b at 64 elements of the sum: one K-major box, or MN-major ones side by side. */
DEVICE void load_factor(u32 to, const tensor_map *map, u32 barrier, int k, int col, int width) {
#if ML_BACKWARD
  for (int i = 0; i < width / 64; i++) load_box(to + i * 8192, map, barrier, col + i * 64, k);
#else
  load_box(to, map, barrier, k, col);
#endif
}

/* d (+)= x [64 rows, 64] times a factor's tile. */
template <int SIZE>
DEVICE void multiply_tile(float (&d)[SIZE], u32 x, u32 factor, bool first) {
  u64 a = operand_k(x);
#if ML_BACKWARD
  u64 b = operand_mn(factor, 8192);
  const int step = DEPTH_STEP_MN;
#else
  u64 b = operand_k(factor);
  const int step = DEPTH_STEP_K;
#endif
#pragma unroll
  for (int k = 0; k < 4; k++) multiply<0, ML_BACKWARD>(d, a + DEPTH_STEP_K * k, b + step * k, !(first && k == 0));
}

/* d = what the ring brings in so many steps: the warpgroup's 64 rows of x, each time, times a factor's tile. */
template <int SIZE, class RING>
DEVICE void sum_tiles(float (&d)[SIZE], RING &r, int steps, int group) {
  bool tells = (threadIdx.x & 127) == 0;
  int before = 0;
  for (int k = 0; k < steps; k++) {
    u32 x = r.data() + group * 8192;
    barrier_wait(r.full(), r.phase);
    products_begin();
    multiply_tile(d, x, r.data() + X_BYTES, k == 0);
    products_commit();
    products_wait<1>();
    if (k > 0 && tells) barrier_arrive(r.empty(before));
    before = r.stage;
    r.next();
  }
  products_wait<0>();
  if (steps > 0 && tells) barrier_arrive(r.empty(before));
  settle(d);
}

/* One warpgroup's 64 rows of a tile, rounded, through N boxes of shared memory that are `apart` bytes from each other. */
template <int N>
DEVICE void store_tile(const float (&d)[ML_WIDTH / 2], u32 boxes, u32 apart, const tensor_map *y, int row, int col, int n,
                       const u16 *bias, int group) {
  int t = threadIdx.x & 127, lane = t & 31, quarter = lane >> 3;
  int line = (t >> 5) * 16 + (quarter & 1) * 8 + (lane & 7);
#pragma unroll
  for (int chunk = 0; chunk < ML_WIDTH / 64; chunk++) {
    u32 box = boxes + chunk % N * apart;
    if (N < 4) { /* it may still be on its way */
      if (t == 0) stores_read<N - 1>();
      warpgroup_sync(1 + group);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int i = chunk * 32 + j * 8;
      float add[4] = {0, 0, 0, 0};
#if ML_BIAS
      int c = col + chunk * 64 + j * 16 + 2 * (lane & 3);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        u32 both = c + 8 * h < n ? *(const u32 *)(bias + c + 8 * h) : 0u;
        add[2 * h] = low_of(both);
        add[2 * h + 1] = high_of(both);
      }
#endif
      u32 to = box + line * 128 + (((2 * j + (quarter >> 1)) ^ (line & 7)) << 4);
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                   "r"(narrow(d[i] + add[0], d[i + 1] + add[1])), "r"(narrow(d[i + 2] + add[0], d[i + 3] + add[1])),
                   "r"(narrow(d[i + 4] + add[2], d[i + 5] + add[3])), "r"(narrow(d[i + 6] + add[2], d[i + 7] + add[3]))
                   : "memory");
    }
    fence_shared();
    warpgroup_sync(1 + group);
    if (t == 0) {
      store_box(box, y, col + chunk * 64, row);
      stores_commit();
    }
  }
}
