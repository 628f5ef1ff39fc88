//options: ML_F16 ML_BACKWARD ML_WIDTH ML_SHARE ML_BIAS
/* A layer in one kernel, as dual.cu, for so few tiles that every block has one, and 64 columns: no block has time to spare for the
 * shrink then, but the ML_SHARE (2, 4, 8) blocks of a cluster, which have the same rows of x, share it.
 *
 * Each multiplies one part of x, which it has in shared memory anyway, with the shrink's factor, too. It sends what comes of it, the
 * warps' 16 rows each, to the blocks that finish those rows; they add the parts in the order of the ranks, scale, and
 * send `mixed` to all. Meanwhile the long sum goes on, whose last step multiplies `mixed` from shared memory.
 *
 * Blocks begin the long sum at different places, so that their part of the shrink comes early, but not before the kernel
 * before this one has made its factor.
 */
#include "tile.cuh"

enum {
  COLS = 64,
  PANEL_BYTES = COLS * 128,
  STAGE_BYTES = X_BYTES + W_BYTES + PANEL_BYTES,
  STAGES = ML_WIDTH == 256 ? 3 : 4,
  SLICE = ROWS / ML_SHARE,    /* rows that a block finishes, */
  WARPS = 8 / ML_SHARE,       /* and the warps of each block that have them */
  PART_BYTES = 16 * COLS * 4, /* of one warp */
  PARTS = STAGES * STAGE_BYTES,
  MIXED = PARTS + ML_SHARE * WARPS * PART_BYTES, /* parts lie where y's boxes go in the end */
  DOTS = MIXED + X_BYTES,
  BARRIERS = DOTS + SLICE * 8 * 4
};

/* Registers to another block's shared memory, where `barrier` counts the bytes. */
DEVICE void send(u32 to, u32 barrier, float a, float b, float c, float d) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to), "f"(a),
               "f"(b), "f"(c), "f"(d), "r"(barrier)
               : "memory");
}
DEVICE void send(u32 to, u32 barrier, u32 word) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(to), "r"(word), "r"(barrier)
               : "memory");
}

/* The rows that this block finishes: 16 rows of 8 columns a warp at a time. `first` is the first of them, of `slice` in the tile; one
 * cluster of those with the same rows writes what others will read. */
DEVICE void finish_slice(const ml_narrow &n, u32 base, u32 mixed_barrier, int first, int slice, bool writes) {
  int t = threadIdx.x - 128, lane = t & 31;
  for (int task = t >> 5; task < WARPS * 8; task += 8) {
    int group = task / 8, block = task % 8, column = block * 8 + 2 * (lane & 3), e = n.experts[block];
    float v[4] = {0, 0, 0, 0};
    for (int rank = 0; rank < ML_SHARE; rank++) {
      float4 part;
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(part.x), "=f"(part.y), "=f"(part.z), "=f"(part.w)
                   : "r"(base + PARTS + (rank * WARPS + group) * PART_BYTES + block * 512 + lane * 16)
                   : "memory");
      v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int row = group * 16 + (lane >> 2) + 8 * half, token = first + row;
      bool real = token < n.tokens;
      float f = real ? n.factors[(u64)token * n.n_experts + e] : 0.f, v0 = v[2 * half], v1 = v[2 * half + 1];
      u32 mixed = narrow(times(f, v0), times(f, v1));
      u64 at = ((u64)token * COLS + column) / 2;
#if ML_BACKWARD
      u32 h = real && n.hidden ? ((const u32 *)n.hidden)[at] : 0u;
      float dot = v0 * low_of(h) + v1 * high_of(h);
      dot += __shfl_xor_sync(~0u, dot, 1);
      dot += __shfl_xor_sync(~0u, dot, 2);
      if ((lane & 3) == 0) asm volatile("st.shared.f32 [%0], %1;" ::"r"(base + DOTS + (row * 8 + block) * 4), "f"(dot) : "memory");
      if (real && writes) {
        ((u32 *)n.mixed)[at] = mixed;
        if (n.weighted) ((u32 *)n.weighted)[at] = narrow(times(f, low_of(h)), times(f, high_of(h)));
      }
#else
      if (real && writes && n.hidden) ((u32 *)n.hidden)[at] = narrow(v0, v1);
#endif
      int line = slice + row;
      u32 to = base + MIXED + line * 128 + ((block ^ (line & 7)) << 4) + (lane & 3) * 4;
      for (int rank = 0; rank < ML_SHARE; rank++) send(address_in(rank, to), address_in(rank, mixed_barrier), mixed);
    }
  }
#if ML_BACKWARD
  if (!writes || !n.grad_w) return;
  warpgroups_sync();
  for (int i = t; i < SLICE * n.n_experts; i += 256) {
    int row = i / n.n_experts, e = i % n.n_experts;
    float sum = 0;
    for (int block = 0; block < 8; block++) {
      float dot;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(dot) : "r"(base + DOTS + (row * 8 + block) * 4) : "memory");
      sum += n.experts[block] == e ? dot : 0.f;
    }
    if (first + row < n.tokens) n.grad_w[(u64)(first + row) * n.n_experts + e] = n.scalings[e] * sum;
  }
#endif
}

extern "C" __global__ __launch_bounds__(384, 1) void ml_shared(
    const __grid_constant__ tensor_map x, const __grid_constant__ tensor_map w, const __grid_constant__ tensor_map b,
    const __grid_constant__ tensor_map y, const __grid_constant__ tensor_map factor, const __grid_constant__ ml_narrow shrunk,
    const u16 *bias, int n, int depth) {
  extern __shared__ char memory[];
  u32 base = (shared_address(memory) + 1023) & ~1023u;
  ring<STAGES, STAGE_BYTES> r = {base, base + BARRIERS, 0, 0};
  u32 parts_barrier = base + BARRIERS + 16 * STAGES, mixed_barrier = parts_barrier + 8;
  int rank = cluster_rank(), cluster = blockIdx.x / ML_SHARE, col_tiles = (n + ML_WIDTH - 1) / ML_WIDTH;
  int across = (col_tiles + ML_SHARE - 1) / ML_SHARE; /* clusters with the same rows */
  int row = cluster / across * ROWS, col = (cluster % across * ML_SHARE + rank) * ML_WIDTH;
  int steps = (depth + 63) / 64, each = (steps + ML_SHARE - 1) / ML_SHARE;
  int mine = max(min(steps - rank * each, each), 0); /* steps of the shrink, from rank * each on */
  int early = min(steps / 4, steps - each), end = early + mine; /* they are the steps [early, end) here */
  int begin = (rank * each - early + 2 * steps) % steps, finish = min(end + 2, steps);
  if (threadIdx.x == 0) {
    r.begin();
    barrier_init(parts_barrier, 1);
    barrier_init(mixed_barrier, 1);
    barrier_init_done();
    barrier_expect(parts_barrier, ML_SHARE * WARPS * PART_BYTES);
    barrier_expect(mixed_barrier, X_BYTES);
  }
  __syncthreads();
  cluster_sync();

  if (threadIdx.x < 128) {
    registers_give<40>();
    if (threadIdx.x == 0) {
      for (int i = 0, k = begin; i < steps; i++, k = k + 1 == steps ? 0 : k + 1, r.next()) {
        bool shrinks = i >= early && i < end;
        r.wait_empty();
        barrier_expect(r.full(), X_BYTES + W_BYTES + (shrinks ? PANEL_BYTES : 0));
        load_factor(r.data() + X_BYTES, &w, r.full(), k * 64, col, ML_WIDTH);
        load_box(r.data(), &x, r.full(), k * 64, row);
        if (shrinks) {
          if (i == early) {
            wait_for_predecessor();
            fence_all();
          }
          load_factor(r.data() + X_BYTES + W_BYTES, &factor, r.full(), k * 64, 0, COLS);
        }
      }
      if (mine == 0) wait_for_predecessor();
      r.wait_empty();
      barrier_expect(r.full(), W_BYTES);
      load_factor(r.data() + X_BYTES, &b, r.full(), 0, col, ML_WIDTH);
    }
  } else {
    registers_stay<232>();
    int group = (threadIdx.x >> 7) - 1, t = threadIdx.x & 127, lane = t & 31, warp = group * 4 + (t >> 5);
    float d[ML_WIDTH / 2], h[COLS / 2];
    sum_tiles(d, none(), r, early, group, true);
    if (mine > 0) {
      sum_tiles(d, h, r, mine, group, early == 0);
    } else {
#pragma unroll
      for (int i = 0; i < COLS / 2; i++) h[i] = 0;
    }
    /* The shrink's part is whole: to those who finish it. */
    u32 owner = warp / WARPS, to = address_in(owner, base + PARTS + (rank * WARPS + warp % WARPS) * PART_BYTES + lane * 16);
    u32 barrier = address_in(owner, parts_barrier);
#pragma unroll
    for (int j = 0; j < COLS / 8; j++) send(to + j * 512, barrier, h[4 * j], h[4 * j + 1], h[4 * j + 2], h[4 * j + 3]);
    sum_tiles(d, none(), r, finish - end, group, end == 0);
    wait_for_predecessor(); /* it has ended, and what it wrote is to be seen here, too */
    barrier_wait(parts_barrier, 0);
    finish_slice(shrunk, base, mixed_barrier, row + rank * SLICE, rank * SLICE, cluster % across == 0);
    sum_tiles(d, none(), r, steps - finish, group, finish == 0);
    barrier_wait(r.full(), r.phase);
    barrier_wait(mixed_barrier, 0);
    fence_shared();
    products_begin();
    multiply_tile(d, base + MIXED + group * 8192, r.data() + X_BYTES, false);
    products_commit();
    products_wait<0>();
    settle(d);
    warpgroups_sync(); /* nobody reads parts any more */
    store_tile(d, base + PARTS + group * 2 * Y_BYTES, &y, row + group * 64, col, n, bias, group);
    if (t == 0) stores_done();
  }
}
