//options: ML_F16 ML_BACKWARD ML_WIDTH ML_COLS ML_BIAS ML_ADDS
/* A layer in one kernel: y [T, n] = x [T, k] w + mixed [T, C] b (+ bias), on Hopper.
 *
 * The sum runs over x and w first and then, in the same accumulators, over the narrow side `mixed` (s w H forward, Q
 * backward) and its factor b, which costs what C more elements of the sum cost.
 *
 * With ML_COLS (64, 128: C) the shrink that makes `mixed` runs inside: blocks that would have one tile less than others
 * first compute it, 128 rows at a time, and raise a flag for those rows, flags[i] for 128i.., which are zeros at the
 * beginning. The shrinking blocks are the first, which start before all others and wait for nobody. Without ML_COLS the
 * kernel before has made it.
 *
 * With ML_ADDS nothing narrow is multiplied: what a token's `adds` pairs add to it, rows [T, adds, n up to 64] as pairs.cu makes
 * them, is added to the sum over x and w before it is rounded.
 *
 * A block is a warp that loads and two warpgroups that multiply, on tiles of 128 rows by ML_WIDTH (128, 256) columns. x and w
 * are older than the kernel before this one, so they stream in while that one still runs.
 */
#include "tile.cuh"

enum {
  STAGE_BYTES = X_BYTES + W_BYTES,
  STAGES = ML_WIDTH == 256 ? 4 : 6,
  BARRIERS = STAGES * STAGE_BYTES + 4 * Y_BYTES,
#if ML_COLS
  SHRINK_BYTES = X_BYTES + ML_COLS * 128,
  SHRINK_STAGES = STAGES * STAGE_BYTES / SHRINK_BYTES,
#endif
  BANDS = 16 /* of rows that are walked through together, so that both operands stay in the second cache */
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

#if ML_ADDS
/* To rows `row` and `row + 8` of a tile: of 64 columns a thread has 16, in two eights of what is added. */
DEVICE void add_rows(float (&d)[ML_WIDTH / 2], const u16 *added, int adds, int row, int col, int tokens, int n) {
  int width = (n + 63) / 64 * 64;
  for (int i = 0; i < adds; i++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int t = row + 8 * half;
      if (t >= tokens) continue;
      const uint4 *from = (const uint4 *)(added + ((u64)t * adds + i) * width + col) + threadIdx.x % 4;
      uint4 v[ML_WIDTH / 64][2];
#pragma unroll
      for (int chunk = 0; chunk < ML_WIDTH / 64; chunk++)
#pragma unroll
        for (int j = 0; j < 2; j++) v[chunk][j] = col + 64 * chunk < width ? from[8 * chunk + 4 * j] : uint4{0, 0, 0, 0};
#pragma unroll
      for (int chunk = 0; chunk < ML_WIDTH / 64; chunk++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          u32 both[4] = {v[chunk][j].x, v[chunk][j].y, v[chunk][j].z, v[chunk][j].w};
#pragma unroll
          for (int c = 0; c < 4; c++) {
            d[32 * chunk + 16 * j + 4 * c + 2 * half] += low_of(both[c]);
            d[32 * chunk + 16 * j + 4 * c + 2 * half + 1] += high_of(both[c]);
          }
        }
    }
  }
}
#endif

extern "C" __global__ __launch_bounds__(384, 1) void ml_dual(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ tensor_map b, const __grid_constant__ tensor_map y, const __grid_constant__ tensor_map factor,
    const __grid_constant__ ml_narrow shrunk, const u16 *bias, int n, int depth, int shrinkers, u32 *flags,
    const u16 *added, int adds) {
  extern __shared__ char memory[];
  u32 base = (shared_address(memory) + 1023) & ~1023u;
  ring<STAGES, STAGE_BYTES> r = {base, base + BARRIERS, 0, 0};
  int row_tiles = (shrunk.tokens + ROWS - 1) / ROWS, col_tiles = (n + ML_WIDTH - 1) / ML_WIDTH;
  int tiles = row_tiles * col_tiles, depth_x = (depth + 63) / 64, steps = depth_x + (ML_ADDS ? 0 : shrunk.columns / 64);
  int block = blockIdx.x, blocks = gridDim.x;
  int begin = blocks - 1 - block; /* the first blocks have one tile less, where not all have the same */
#if ML_COLS
  ring<SHRINK_STAGES, SHRINK_BYTES> shrink = {base, base + BARRIERS + 16 * STAGES, 0, 0};
#endif
  if (threadIdx.x == 0) {
    r.begin();
#if ML_COLS
    shrink.begin();
#endif
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_give<40>();
    if (threadIdx.x == 0) {
#if ML_COLS
      if (block < shrinkers) {
        wait_for_predecessor();
        for (int i = block; i < row_tiles; i += shrinkers) {
          for (int k = 0; k < depth_x; k++, shrink.next()) {
            shrink.wait_empty();
            barrier_expect(shrink.full(), SHRINK_BYTES);
            load_box(shrink.data(), &x, shrink.full(), k * 64, i * ROWS);
            load_factor(shrink.data() + X_BYTES, &factor, shrink.full(), k * 64, 0, ML_COLS);
          }
        }
        for (int s = 0; s < SHRINK_STAGES; s++, shrink.next()) shrink.wait_empty(); /* tiles take their place */
      }
#endif
      bool waited = false;
      for (int t = begin; t < tiles; t += blocks) {
        place at = place_of(t, row_tiles, col_tiles);
        for (int k = 0; k < steps; k++, r.next()) {
          bool wide = k < depth_x;
          int within = (wide ? k : k - depth_x) * 64;
          r.wait_empty();
          barrier_expect(r.full(), STAGE_BYTES);
          if (k == depth_x) {
            if (!waited) wait_for_predecessor();
            waited = true;
#if ML_COLS
            wait_until(flags + at.row / ROWS, 2);
#endif
            fence_all();
          }
          load_factor(r.data() + X_BYTES, wide ? &w : &b, r.full(), within, at.col, ML_WIDTH);
          load_box(r.data(), wide ? &x : &mixed, r.full(), within, at.row);
        }
      }
    }
  } else {
    registers_stay<232>();
    int group = (threadIdx.x >> 7) - 1, t = threadIdx.x & 127;
#if ML_COLS
    if (block < shrinkers) {
      wait_for_predecessor();
      for (int i = block; i < row_tiles; i += shrinkers) {
        float d[ML_COLS / 2];
        sum_tiles(d, shrink, depth_x, group);
        finish_shrink(d, shrunk, i * ROWS + group * 64 + (t >> 5) * 16 + ((t & 31) >> 2), 0);
        fence_all();
        __threadfence();
        warpgroup_sync(1 + group);
        if (t == 0) raise(flags + i);
      }
    }
#endif
    for (int tile = begin; tile < tiles; tile += blocks) {
      place at = place_of(tile, row_tiles, col_tiles);
      float d[ML_WIDTH / 2];
      sum_tiles(d, r, steps, group);
#if ML_ADDS
      wait_for_predecessor();
      add_rows(d, added, adds, at.row + group * 64 + (t >> 5) * 16 + ((t & 31) >> 2), at.col, shrunk.tokens, n);
#endif
      store_tile<2>(d, base + STAGES * STAGE_BYTES + group * 2 * Y_BYTES, Y_BYTES, &y, at.row + group * 64, at.col, n, bias, group);
    }
    if (t == 0) stores_read<0>();
  }
}
