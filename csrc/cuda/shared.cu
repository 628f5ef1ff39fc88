//options: ML_F16 ML_BACKWARD ML_WIDTH ML_BIAS
/* A layer in one kernel, as dual.cu, for so few tiles that every block has one, and 64 columns: no block has time to spare for the
 * shrink then, but blocks with the same rows of x share it.
 *
 * Up to eight of them multiply one part of x each, which they have in shared memory anyway, with the shrink's factor, too, and
 * leave what comes of it in memory, `parts`. When all parts of 16 rows are there, a warp of one of these blocks adds them in the
 * order of the blocks, and makes `mixed` of them, while the long sum goes on, whose last step multiplies `mixed`.
 *
 * flags: for each 128 rows the parts that are there and, behind all of these, the slices that `mixed` has; zeros at the
 * beginning. Blocks wait for the first eight with their rows, which stand side by side and start in the order of their indices. So of
 * one launch at most seven blocks wait for one that has not started: launches would have to be many, and each begun with no more than
 * that, to keep each other from a multiprocessor. A cooperative launch, which starts all blocks at once, takes 1.1 us longer.
 */
#include "tile.cuh"

enum {
  COLS = 64,
  STAGE_BYTES = X_BYTES + W_BYTES,
  STAGES = ML_WIDTH == 256 ? 4 : 6,
  SCRATCH = STAGES * STAGE_BYTES, /* of the shrink's factor, then of parts */
  SCRATCH_BYTES = 32 << 10,
  BARRIERS = SCRATCH + SCRATCH_BYTES,
  PANEL_BYTES = COLS * 128,
  PANELS = SCRATCH_BYTES / PANEL_BYTES,
  SLICES = ROWS / 16, /* of rows, a warp's, */
  SLICE_BYTES = 16 * COLS * 4,
  FINISHERS = 3 /* and warps that finish them */
};
static_assert(SLICES * SLICE_BYTES <= SCRATCH_BYTES, "all parts of a slice are added at once");

struct none {};
DEVICE void multiply_more(none, u32, u32, bool) {}
template <int SIZE>
DEVICE void multiply_more(float (&h)[SIZE], u32 x, u32 factor, bool first) {
  multiply_tile(h, x, factor, first);
}

/* One more step of the sum, and of the shrink with a second accumulator, or none: what was multiplied before it is done then. */
template <class OTHER, class RING>
DEVICE void step(float (&d)[ML_WIDTH / 2], OTHER &&h, RING &r, u32 panel, int group, bool first, bool first_shrink, int &before) {
  u32 x = r.data() + group * 8192;
  barrier_wait(r.full(), r.phase);
  products_begin();
  multiply_tile(d, x, r.data() + X_BYTES, first);
  multiply_more(h, x, panel, first_shrink);
  products_commit();
  products_wait<1>();
  if (before >= 0 && (threadIdx.x & 127) == 0) barrier_arrive(r.empty(before));
  before = r.stage;
  r.next();
}

/* d = the sum of a slice's parts, `apart` bytes from each other in memory. */
DEVICE void add_parts(float (&d)[COLS / 2], const char *parts, u64 apart, int count, u32 scratch, u32 barrier, u32 phase) {
  int lane = threadIdx.x & 31;
  __syncwarp();
  if (lane == 0) {
    fence_all();
    barrier_expect(barrier, count * SLICE_BYTES);
    for (int i = 0; i < count; i++) load_bytes(scratch + i * SLICE_BYTES, parts + i * apart, barrier, SLICE_BYTES);
  }
  barrier_wait(barrier, phase);
#pragma unroll
  for (int i = 0; i < COLS / 2; i++) d[i] = 0;
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    float4 v[COLS / 8];
#pragma unroll
    for (int j = 0; j < COLS / 8; j++)
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v[j].x), "=f"(v[j].y), "=f"(v[j].z), "=f"(v[j].w)
                   : "r"(scratch + i * SLICE_BYTES + j * 512 + lane * 16));
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) d[4 * j] += v[j].x, d[4 * j + 1] += v[j].y, d[4 * j + 2] += v[j].z, d[4 * j + 3] += v[j].w;
  }
}

extern "C" __global__ __launch_bounds__(384, 1) void ml_shared(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map mixed,
    const __grid_constant__ tensor_map b, const __grid_constant__ tensor_map y, const __grid_constant__ tensor_map factor,
    const __grid_constant__ ml_narrow shrunk, const u16 *bias, int n, int depth, char *parts, u32 *flags) {
  extern __shared__ char memory[];
  u32 base = (shared_address(memory) + 1023) & ~1023u;
  ring<STAGES, STAGE_BYTES> r = {base, base + BARRIERS, 0, 0};
  u32 parts_barriers = base + BARRIERS + 16 * STAGES;
  int col_tiles = (n + ML_WIDTH - 1) / ML_WIDTH, steps = (depth + 63) / 64;
  int row_tile = blockIdx.x / col_tiles, own = blockIdx.x % col_tiles, row = row_tile * ROWS, col = own * ML_WIDTH;
  int sharers = min(col_tiles, SLICES), each = (steps + sharers - 1) / sharers, shares = (steps + each - 1) / each;
  int begin = own < shares ? own * each : 0, mine = own < shares ? min(steps - begin, each) : 0; /* the shrink's steps come first */
  u32 *parts_there = flags + row_tile, *mixed_there = flags + gridDim.x / col_tiles + row_tile;
  if (threadIdx.x == 0) {
    r.begin();
    for (int i = 0; i < FINISHERS; i++) barrier_init(parts_barriers + 8 * i, 1);
    barrier_init_done();
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    registers_give<120>();
    int finisher = (int)threadIdx.x / 32 - 1, finishers = min(FINISHERS, SLICES / shares), lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
      for (int i = 0, k = begin; i < steps; i++, k = k + 1 == steps ? 0 : k + 1, r.next()) {
        bool shrinks = i < mine;
        r.wait_empty();
        barrier_expect(r.full(), STAGE_BYTES + (shrinks ? PANEL_BYTES : 0));
        load_factor(r.data() + X_BYTES, &w, r.full(), k * 64, col, ML_WIDTH);
        load_box(r.data(), &x, r.full(), k * 64, row);
        if (shrinks) {
          if (i == 0) {
            wait_for_predecessor();
            fence_all();
          }
          if (i >= PANELS) barrier_wait(r.empty((i - PANELS) % STAGES), (i - PANELS) / STAGES & 1);
          load_factor(base + SCRATCH + i % PANELS * PANEL_BYTES, &factor, r.full(), k * 64, 0, COLS);
        }
      }
      if (mine == 0) wait_for_predecessor();
      r.wait_empty();
      barrier_expect(r.full(), STAGE_BYTES);
      load_factor(r.data() + X_BYTES, &b, r.full(), 0, col, ML_WIDTH);
      wait_until(mixed_there, SLICES);
      fence_all();
      load_box(r.data(), &mixed, r.full(), 0, row);
    } else if (finisher >= 0 && own < sharers) {
      wait_for_predecessor();
      if (mine > 0) asm volatile("bar.sync 4, 352;" ::: "memory");
      if (mine > 0 && threadIdx.x == 32) raise(parts_there);
      u32 phase = 0;
      for (int slice = own + finisher * col_tiles; slice < SLICES && finisher < finishers; slice += finishers * col_tiles, phase ^= 1) {
        float d[COLS / 2];
        if (lane == 0) wait_until(parts_there, shares);
        add_parts(d, parts + ((u64)row_tile * shares * SLICES + slice) * SLICE_BYTES, SLICES * SLICE_BYTES, shares,
                  base + SCRATCH + finisher * shares * SLICE_BYTES, parts_barriers + 8 * finisher, phase);
        finish_shrink(d, shrunk, row + slice * 16 + lane / 4, 0);
        fence_all();
        __syncwarp();
        if (lane == 0) raise(mixed_there);
      }
    }
  } else {
    registers_stay<192>();
    int group = (threadIdx.x >> 7) - 1, t = threadIdx.x & 127, lane = t & 31, warp = group * 4 + (t >> 5), before = -1;
    float d[ML_WIDTH / 2], h[COLS / 2];
    for (int i = 0; i < mine; i++) step(d, h, r, base + SCRATCH + i % PANELS * PANEL_BYTES, group, i == 0, i == 0, before);
    /* The share is whole with the step after it, which runs on while it goes to memory. */
    int done = mine;
    if (done < steps) {
      step(d, none(), r, 0, group, done == 0, false, before);
      done++;
    } else {
      products_wait<0>();
    }
    settle(h);
    if (mine > 0) {
      wait_for_predecessor(); /* which may be using that memory */
      float4 *to = (float4 *)(parts + (((u64)row_tile * shares + own) * SLICES + warp) * SLICE_BYTES) + lane;
#pragma unroll
      for (int j = 0; j < COLS / 8; j++) to[32 * j] = float4{h[4 * j], h[4 * j + 1], h[4 * j + 2], h[4 * j + 3]};
      __syncwarp();
      asm volatile("bar.arrive 4, 352;" ::: "memory");
    }
    for (int i = done; i <= steps; i++) step(d, none(), r, 0, group, false, false, before);
    products_wait<0>();
    settle(d);
    /* Through what only this warpgroup has read, once all of it has: its rows of x in each stage. */
    warpgroup_sync(1 + group);
    store_tile<4>(d, base + group * 8192, STAGE_BYTES, &y, row + group * 64, col, n, bias, group);
    if (t == 0) stores_read<0>();
  }
}
