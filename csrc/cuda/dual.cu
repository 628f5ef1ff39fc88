//options: ML_F16 ML_BACKWARD ML_WIDTH ML_COLS ML_BIAS
/* A layer in one kernel: y [T, n] = x [T, k] w + mixed [T, C] b (+ bias), on Hopper.
 *
 * The sum runs over x and w first and then, in the same accumulators, over the narrow side `mixed` (s w H forward, Q
 * backward) and its factor, which costs what C more elements of the sum cost. Forward w [n, k] and b [n, C] are K-major, and
 * backward, where y is the gradient of x and x that of y, w [k, n] and b [C, n] are MN-major: no copy is turned.
 *
 * With ML_COLS (64, 128: C) the shrink that makes `mixed` runs inside: blocks that would have one tile less than others
 * first compute it, 128 rows at a time, and raise a flag for those rows. Blocks number themselves in the order in which they
 * start, and the shrinking ones are the first, so nobody waits for a block that has not started. Without ML_COLS the kernel
 * before has made it.
 *
 * A block is a warp that loads and two warpgroups that multiply, on tiles of 128 rows by ML_WIDTH (128, 256) columns.
 * sync[0] counts blocks, sync[1 + i] flags of rows 128i..: zeros at the beginning.
 */
#include "hopper.cuh"

enum {
  ROWS = 128,
  X_BYTES = ROWS * 128,
  W_BYTES = ML_WIDTH * 128,
  STAGE_BYTES = X_BYTES + W_BYTES,
  STAGES = ML_WIDTH == 256 ? 4 : 6,
  Y_BYTES = 64 * 128, /* a box on its way out; each warpgroup has two */
  BARRIERS = STAGES * STAGE_BYTES + 4 * Y_BYTES,
#if ML_COLS
  PIECE_BYTES = X_BYTES + ML_COLS * 128,     /* 64 elements of a shrink's sum */
  PIECES = STAGE_BYTES / PIECE_BYTES,        /* in a stage */
  SHRINK_BYTES = PIECES * PIECE_BYTES,
#endif
  BANDS = 16 /* of rows that are walked through together, so that both operands stay in the second cache */
};

struct ring {
  u32 base;
  int stage;
  u32 phase;
  DEVICE u32 data() const { return base + stage * STAGE_BYTES; }
  DEVICE u32 full() const { return base + BARRIERS + 8 * stage; }
  DEVICE u32 empty(int s) const { return base + BARRIERS + 8 * (STAGES + s); }
  DEVICE void next() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

/* Row and column of the tile that comes t-th. */
struct place {
  int row, col;
};
DEVICE place place_of(int t, int row_tiles, int col_tiles) {
  int band = t / (BANDS * col_tiles), first = band * BANDS, high = min(row_tiles - first, BANDS);
  int within = t - band * BANDS * col_tiles;
  return {(first + within % high) * ROWS, within / high * ML_WIDTH};
}

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

/* One warpgroup's 64 rows of a tile, rounded, through shared memory. */
DEVICE void store_tile(const float (&d)[ML_WIDTH / 2], u32 boxes, const tensor_map *y, int row, int col, int n, const u16 *bias,
                       int group) {
  int t = threadIdx.x & 127, lane = t & 31, quarter = lane >> 3;
  int line = (t >> 5) * 16 + (quarter & 1) * 8 + (lane & 7);
#pragma unroll
  for (int chunk = 0; chunk < ML_WIDTH / 64; chunk++) {
    u32 box = boxes + (chunk & 1) * Y_BYTES;
    if (t == 0) stores_read<1>();
    warpgroup_sync(1 + group);
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

extern "C" __global__ __launch_bounds__(384, 1) void ml_dual(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ tensor_map b, const __grid_constant__ tensor_map y, const __grid_constant__ tensor_map factor,
    const __grid_constant__ ml_narrow shrunk, const u16 *bias, int n, int depth, int shrinkers, u32 *sync) {
  extern __shared__ char memory[];
  ring r = {(shared_address(memory) + 1023) & ~1023u, 0, 0};
  u32 number = r.base + BARRIERS + 8 * 2 * STAGES;
  int row_tiles = (shrunk.tokens + ROWS - 1) / ROWS, col_tiles = (n + ML_WIDTH - 1) / ML_WIDTH;
  int tiles = row_tiles * col_tiles, depth_x = (depth + 63) / 64, steps = depth_x + shrunk.columns / 64;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(r.base + BARRIERS + 8 * s, 1);
      barrier_init(r.empty(s), 2);
    }
    barrier_init_done();
#if ML_COLS
    wait_for_predecessor();
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(number), "r"(atomicAdd(sync, 1u)) : "memory");
#endif
  }
  __syncthreads();
#if ML_COLS
  if (threadIdx.x != 0) wait_for_predecessor();
  int block;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(block) : "r"(number) : "memory");
  int pieces = (depth_x + PIECES - 1) / PIECES;
#else
  int block = blockIdx.x;
#endif
  int blocks = gridDim.x, begin = blocks - 1 - block; /* the first blocks have one tile less, where not all have the same */

  if (threadIdx.x < 128) {
    registers_give<40>();
    if (threadIdx.x == 0) {
#if ML_COLS
      if (block < shrinkers) {
        for (int i = block; i < row_tiles; i += shrinkers) {
          for (int k = 0; k < pieces; k++, r.next()) {
            barrier_wait(r.empty(r.stage), r.phase ^ 1);
            barrier_expect(r.full(), SHRINK_BYTES);
            for (int p = 0; p < PIECES; p++) {
              u32 to = r.data() + p * PIECE_BYTES;
              load_box(to, &x, r.full(), (k * PIECES + p) * 64, i * ROWS);
              load_factor(to + X_BYTES, &factor, r.full(), (k * PIECES + p) * 64, 0, ML_COLS);
            }
          }
        }
      }
#else
      bool ready = false;
#endif
      for (int t = begin; t < tiles; t += blocks) {
        place at = place_of(t, row_tiles, col_tiles);
        for (int k = 0; k < steps; k++, r.next()) {
          bool wide = k < depth_x;
          int within = (wide ? k : k - depth_x) * 64;
          barrier_wait(r.empty(r.stage), r.phase ^ 1);
          barrier_expect(r.full(), STAGE_BYTES);
          if (k == depth_x) {
#if ML_COLS
            u32 raised;
            do {
              asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(sync + 1 + at.row / ROWS) : "memory");
            } while (raised < 2);
            fence_all();
#else
            if (!ready) {
              wait_for_predecessor();
              fence_all();
              ready = true;
            }
#endif
          }
          load_factor(r.data() + X_BYTES, wide ? &w : &b, r.full(), within, at.col, ML_WIDTH);
          load_box(r.data(), wide ? &x : &mixed, r.full(), within, at.row);
        }
      }
    }
  } else {
    registers_stay<232>();
    int group = (threadIdx.x >> 7) - 1, t = threadIdx.x & 127;
    int line = group * 64 + (t >> 5) * 16 + ((t & 31) >> 2);
#if ML_COLS
    if (block < shrinkers) {
      for (int i = block; i < row_tiles; i += shrinkers) {
        float d[ML_COLS / 2];
        int before = 0;
        for (int k = 0; k < pieces; k++) {
          barrier_wait(r.full(), r.phase);
          products_begin();
#pragma unroll
          for (int p = 0; p < PIECES; p++) {
            u32 at = r.data() + p * PIECE_BYTES;
            multiply_tile(d, at + group * 8192, at + X_BYTES, k == 0 && p == 0);
          }
          products_commit();
          products_wait<1>();
          if (k > 0 && t == 0) barrier_arrive(r.empty(before));
          before = r.stage;
          r.next();
        }
        products_wait<0>();
        if (t == 0) barrier_arrive(r.empty(before));
        settle(d);
        finish_shrink(d, shrunk, i * ROWS + line, 0);
        fence_all();
        __threadfence();
        warpgroup_sync(1 + group);
        if (t == 0) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(sync + 1 + i) : "memory");
      }
    }
#endif
    for (int tile = begin; tile < tiles; tile += blocks) {
      place at = place_of(tile, row_tiles, col_tiles);
      float d[ML_WIDTH / 2];
      int before = 0;
      for (int k = 0; k < steps; k++) {
        barrier_wait(r.full(), r.phase);
        products_begin();
        multiply_tile(d, r.data() + group * 8192, r.data() + X_BYTES, k == 0);
        products_commit();
        products_wait<1>();
        if (k > 0 && t == 0) barrier_arrive(r.empty(before));
        before = r.stage;
        r.next();
      }
      products_wait<0>();
      if (t == 0) barrier_arrive(r.empty(before));
      settle(d);
      store_tile(d, r.base + STAGES * STAGE_BYTES + group * 2 * Y_BYTES, &y, at.row + group * 64, at.col, n, bias, group);
    }
    if (t == 0) stores_done();
  }
}
