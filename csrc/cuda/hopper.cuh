/* Hopper's instructions by names: asynchronous matrix products (wgmma), the copy engine (TMA), barriers, clusters.
 *
 * A tile in shared memory consists of boxes [rows, 64] of 16-bit elements in the 128-byte swizzle, 1024-byte aligned. An
 * operand is K-major where its rows (of 64) run along the sum, and MN-major where they run along rows or columns of the
 * result (the transposed form: TA or TB = 1).
 */
#include "elements.cuh"

struct alignas(64) tensor_map {
  u64 words[16];
};

/* ---- barriers in shared memory ---- */

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}

/* The threads of one warpgroup, 1 or 2 (0 is __syncthreads). */
DEVICE void warpgroup_sync(int id) {
  __syncwarp();
  asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}
/* The threads of two warpgroups. */
DEVICE void warpgroups_sync() {
  __syncwarp();
  asm volatile("bar.sync 3, 256;" ::: "memory");
}

/* ---- the copy engine ---- */

DEVICE void load_box(u32 to, const tensor_map *map, u32 barrier, int col, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"((u64)map), "r"(barrier), "r"(col), "r"(row)
      : "memory");
}
DEVICE void store_box(u32 from, const tensor_map *map, int col, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%1, {%2, %3}], [%0];" ::"r"(from),
               "l"((u64)map), "r"(col), "r"(row)
               : "memory");
}
DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until all but the last N groups have been read from shared memory. */
template <int N>
DEVICE void stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

/* Between ordinary writes of shared memory, or of any memory, and the copy engine or wgmma that read them. */
DEVICE void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void fence_all() { asm volatile("fence.proxy.async;" ::: "memory"); }

/* Bytes as they lie in memory, a multiple of 16. */
DEVICE void load_bytes(u32 to, const void *from, u32 barrier, u32 bytes) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

/* ---- flags in memory, which count how often they were raised ---- */

/* Who sees it raised sees what this thread has written, and what others had when it met them at a barrier. */
DEVICE void raise(u32 *flag) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory"); }
DEVICE void wait_until(const u32 *flag, u32 count) {
  u32 raised;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  } while (raised < count);
}

/* ---- clusters ---- */

DEVICE u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE u32 cluster_size() {
  u32 size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
DEVICE void cluster_sync() {
  __syncwarp(); /* a barrier takes whole warps, and what went before may have parted this one */
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE u32 address_in(u32 rank, u32 shared) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared), "r"(rank));
  return there;
}
/* Sums that the blocks of a cluster hold in parts: each of 256 threads keeps its registers in its block's shared memory, four
 * (16 bytes) beside those of the next thread, so that no two lanes meet in a bank. `at` is the thread's first place. */
enum { PART_STEP = 256 * 16 }; /* bytes from four registers of a thread to its next four */
template <int N>
DEVICE void keep_part(u32 at, const float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4)
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at + i / 4 * PART_STEP), "f"(d[i]), "f"(d[i + 1]),
                 "f"(d[i + 2]), "f"(d[i + 3])
                 : "memory");
}
/* d = the sum over the blocks, in the order of their ranks. Eight loads are on their way together, as far as there are. */
template <int N>
DEVICE void sum_parts(float (&d)[N], u32 at, u32 blocks) {
  constexpr int LOADS = N < 32 ? N / 4 : 8, RANKS = 8 / LOADS;
#pragma unroll
  for (int i = 0; i < N; i++) d[i] = 0;
#pragma unroll 1
  for (u32 rank = 0; rank < blocks; rank += RANKS) {
#pragma unroll
    for (int first = 0; first < N / 4; first += LOADS) {
      float v[RANKS][LOADS][4];
#pragma unroll
      for (int r = 0; r < RANKS; r++) {
        if (rank + r >= blocks) continue;
        u32 there = address_in(rank + r, at) + first * PART_STEP;
#pragma unroll
        for (int i = 0; i < LOADS; i++)
          asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                       : "=f"(v[r][i][0]), "=f"(v[r][i][1]), "=f"(v[r][i][2]), "=f"(v[r][i][3])
                       : "r"(there + i * PART_STEP)
                       : "memory");
      }
#pragma unroll
      for (int r = 0; r < RANKS; r++) {
        if (rank + r >= blocks) continue;
#pragma unroll
        for (int i = 0; i < 4 * LOADS; i++) d[4 * first + i] += v[r][i / 4][i % 4];
      }
    }
  }
}

/* ---- warpgroup products ----
 *
 * d [64, n] in n / 2 registers: thread t of 128 has, for each 8 columns j, d[4j], d[4j+1] of row 16 (t / 32) + (t % 32) / 4 at
 * columns 8j + 2 (t % 4) and the next, and d[4j+2], d[4j+3] of the row 8 below.
 */
template <int N>
DEVICE void registers_stay() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
DEVICE void registers_give() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* After the last wait: keeps the compiler from reading registers before it. */
template <int N>
DEVICE void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/* Where an operand's tile begins, in the 128-byte swizzle. K-major: boxes of 8 rows are 1024 bytes apart, and 16 elements
 * of the sum further is DEPTH_STEP_K. MN-major: `far` bytes between boxes of 64 columns (8192 where a box has 64 rows), and 16
 * elements of the sum further is DEPTH_STEP_MN. */
enum { DEPTH_STEP_K = 32 >> 4, DEPTH_STEP_MN = 2048 >> 4 };
DEVICE u64 operand(u32 address, u32 far) {
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(far >> 4) << 16) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}
DEVICE u64 operand_k(u32 address) { return operand(address, 16); }
DEVICE u64 operand_mn(u32 address, u32 far) { return operand(address, far); }

/* d [64, n] (+)= a [64, 16] b [16, n], for n = 8, 16, 32, 64, 128, 256. */
template <int TA, int TB>
DEVICE void multiply(float (&d)[4], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %6, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPE "." TYPE " {%0, %1, %2, %3}, %4, %5, p, 1, 1, %7, %8;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}

template <int TA, int TB>
DEVICE void multiply(float (&d)[8], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, p, 1, 1, %11, %12;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}

template <int TA, int TB>
DEVICE void multiply(float (&d)[16], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %19, %20;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}

template <int TA, int TB>
DEVICE void multiply(float (&d)[32], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, %35, %36;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}

template <int TA, int TB>
DEVICE void multiply(float (&d)[64], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, p, 1, 1, %67, %68;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
      : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}

template <int TA, int TB>
DEVICE void multiply(float (&d)[128], u64 a, u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, %128, %129, p, 1, 1, %131, %132;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
      : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB));
}


/* ---- what becomes of a shrink ---- */

/* Element i of lane q, of the four lanes that share a row, becomes element q of lane i. */
DEVICE void turn(float (&m)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    bool high = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & bit) continue;
      float other = __shfl_xor_sync(~0u, high ? m[i] : m[i + bit], bit);
      m[i] = high ? other : m[i];
      m[i + bit] = high ? m[i + bit] : other;
    }
  }
}

/* Rows `row` and `row + 8` of H (or, backward, of P) [T, C], in a warpgroup's registers: the columns [first, first + 2 * SIZE)
 * as far as there are any, by whole warps. 32 columns are turned so that each lane has 8 of one expert, which it reads and
 * writes as 16 bytes; of 64, all loads come before the first store, which the compiler could not move them past. */
template <int SIZE>
DEVICE void finish_shrink(const float (&d)[SIZE], const ml_narrow &n, int row, int first) {
  static_assert(SIZE % 32 == 0, "whole blocks of 64 columns");
  int lane = threadIdx.x & 3;
#if ML_BACKWARD
  float sum[2] = {0, 0};
#endif
#pragma unroll
  for (int part = 0; part < SIZE / 32; part++) {
    int column = first + 64 * part;
    if (column >= n.columns) break;
    const int *experts = n.experts + column / 8;
    int e[2] = {experts[lane], experts[4 + lane]};
    float f[2][2];
#if ML_BACKWARD
    int next = part < SIZE / 32 - 1 && column + 64 < n.columns ? experts[8] : -1;
    uint4 hidden[2][2];
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int half = i / 2, g = i % 2, t = row + 8 * half;
      bool real = t < n.tokens; /* all lanes of a row agree */
      f[half][g] = real ? n.factors[(u64)t * n.n_experts + e[g]] : 0.f;
#if ML_BACKWARD
      hidden[half][g] = real && n.hidden ? ((const uint4 *)n.hidden)[((u64)t * n.columns + column) / 8 + 4 * g + lane]
                                         : uint4{0, 0, 0, 0};
#endif
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int half = i / 2, g = i % 2, t = row + 8 * half;
      bool real = t < n.tokens;
      u64 at = ((u64)t * n.columns + column) / 8 + 4 * g + lane;
      float s = f[half][g], v0[4], v1[4]; /* v0[j], v1[j]: columns 2j and 2j + 1 of the lane's 8 */
#pragma unroll
      for (int j = 0; j < 4; j++) {
        v0[j] = d[32 * part + 16 * g + 4 * j + 2 * half];
        v1[j] = d[32 * part + 16 * g + 4 * j + 2 * half + 1];
      }
      turn(v0);
      turn(v1);
#if ML_BACKWARD
      u32 h[4] = {hidden[half][g].x, hidden[half][g].y, hidden[half][g].z, hidden[half][g].w};
      if (n.grad_w) {
        float dot = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) dot += v0[j] * low_of(h[j]) + v1[j] * high_of(h[j]);
        int after = g == 0 ? __shfl_sync(~0u, e[1], 0, 4) : next;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          int own = __shfl_sync(~0u, e[g], j, 4), then = j < 3 ? __shfl_sync(~0u, e[g], j + 1, 4) : after;
          sum[half] += __shfl_sync(~0u, dot, j, 4);
          if (then == own) continue; /* all ranks of an expert lie in these columns, or are added to what came before */
          bool begun = first > 0 && n.experts[first / 8 - 1] == own;
          if (real && lane == 0) {
            float *to = n.grad_w + (u64)t * n.n_experts + own;
            *to = n.scalings[own] * sum[half] + (begun ? *to : 0.f);
          }
          sum[half] = 0;
        }
      }
      if (real && n.weighted)
        ((uint4 *)n.weighted)[at] =
            uint4{narrow(times(s, low_of(h[0])), times(s, high_of(h[0]))), narrow(times(s, low_of(h[1])), times(s, high_of(h[1]))),
                  narrow(times(s, low_of(h[2])), times(s, high_of(h[2]))), narrow(times(s, low_of(h[3])), times(s, high_of(h[3])))};
#else
      if (real && n.hidden)
        ((uint4 *)n.hidden)[at] =
            uint4{narrow(v0[0], v1[0]), narrow(v0[1], v1[1]), narrow(v0[2], v1[2]), narrow(v0[3], v1[3])};
#endif
      if (real)
        ((uint4 *)n.mixed)[at] = uint4{narrow(times(s, v0[0]), times(s, v1[0])), narrow(times(s, v0[1]), times(s, v1[1])),
                                       narrow(times(s, v0[2]), times(s, v1[2])), narrow(times(s, v0[3]), times(s, v1[3]))};
    }
  }
}
