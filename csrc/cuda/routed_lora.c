#include "routed_lora.h"

#include <stdatomic.h>
#include <string.h>

#include "kernels/philox.h"

enum {
  ROWS = 128,
  DECODE_TOKENS = 128, /* for which W's rows fill the tiles */
  DECODE_COLUMNS = 256,
  ALIGNMENT = 256
};

static int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
static bool is_aligned(const void *p) { return (uintptr_t)p % 16 == 0; }
/* Whether the copy engine can read them: in order, not one above the other. */
static bool are_rows(const void *data, int64_t row, int64_t width) {
  return is_aligned(data) && row % 8 == 0 && row >= width;
}

static atomic_int forced = -1;

bool ml_layer_has_kernels(const ml_layer *layer) { return layer->gpu->major == 9 && layer->forced != ML_BY_TORCH; }

/* Whether the kernels of pairs can compute the mixture: weights of each token's own, of which top_k leaves some. */
static bool can_group(const ml_layer *layer) {
  return ml_layer_has_kernels(layer) && !layer->drops && layer->weights.top_k > 0 && layer->share == 1 &&
         layer->most_rank <= ML_MAX_PAIR_RANK && layer->tokens * layer->weights.top_k <= INT32_MAX / 2;
}

ml_cuda_status ml_layer_begin(ml_layer *layer) {
  int64_t column = 0;
  if (layer->n_experts > ML_MAX_EXPERTS || layer->d_in % 8 != 0 || layer->d_out % 8 != 0 || layer->tokens < 1 ||
      layer->tokens > INT32_MAX / 2 || layer->d_in > INT32_MAX / 2 || layer->d_out > INT32_MAX / 2) {
    return ML_CUDA_UNSUPPORTED;
  }
  layer->forced = atomic_load(&forced);
  layer->most_rank = 0;
  for (int e = 0; e < layer->n_experts; e++) {
    ml_adapter *expert = &layer->experts[e];
    if (expert->rank > ML_MAX_COLUMNS || !is_aligned(expert->a) || !is_aligned(expert->b)) {
      return ML_CUDA_UNSUPPORTED;
    }
    layer->most_rank = expert->rank > layer->most_rank ? expert->rank : layer->most_rank;
    expert->column = (int)column;
    column += round_up(expert->rank, 8);
  }
  layer->columns = (int)round_up(column, 64);
  layer->dense = layer->n_experts <= ML_TABLE_EXPERTS && column <= ML_MAX_COLUMNS;
  if (!layer->dense) {
    return can_group(layer) ? ML_CUDA_OK : ML_CUDA_UNSUPPORTED;
  }
  memcpy(layer->adapters.of, layer->experts, (size_t)layer->n_experts * sizeof *layer->experts);
  for (int e = 0; e < layer->n_experts; e++) {
    int end =
        e + 1 < layer->n_experts ? layer->experts[e + 1].column : layer->columns; /* the last one's: all that is left */
    memset(layer->adapters.expert_of + layer->experts[e].column / 8, e, (size_t)(end - layer->experts[e].column) / 8);
  }
  return ML_CUDA_OK;
}

void ml_layer_drop(ml_layer *layer, uint64_t seed, const double *probabilities) {
  layer->drops = true;
  ml_dropout *to = &layer->dropout;
  _Static_assert(sizeof to->keys == PHILOX_ROUNDS * 2 * sizeof **to->keys, "the keys of all rounds");
  for (int round = 0; round < PHILOX_ROUNDS; round++) {
    for (int which = 0; which < 2; which++) {
      to->keys[round][which] = philox_key(seed, round, which);
    }
  }
  for (int e = 0; e < layer->n_experts; e++) {
    to->drops[e] = philox_threshold(probabilities[e]);
    to->scale[e] = (float)philox_scale(to->drops[e]);
  }
}

/* ---- which way ---- */

/* Of the tiles of a [T, n] product: their width, and how many multiprocessors have one less than others in the end. */
static int tile_width(int64_t n) { return n % 256 == 0 || n % 256 > 128 || n > 2048 ? 256 : 128; }
static int64_t tiles_of(const ml_layer *layer, int64_t n) {
  return ceil_div(layer->tokens, ROWS) * ceil_div(n, tile_width(n));
}
static int64_t idle_blocks(const ml_layer *layer, int64_t n) {
  int64_t blocks = layer->gpu->multiprocessors, left = tiles_of(layer, n) % blocks;
  return left == 0 ? 0 : blocks - left;
}

static const char *const way_names[] = {"torch", "decode", "dual", "fused", "shared", "grouped", "addmm"};

const char *ml_way_name(ml_way way) { return way_names[way]; }

ml_cuda_status ml_force_way(const char *name) {
  int way = name == NULL ? -1 : (int)(sizeof way_names / sizeof *way_names) - 1;
  while (way >= 0 && strcmp(way_names[way], name) != 0) {
    way--;
  }
  if (name != NULL && way < 0) {
    return ML_CUDA_VALUE;
  }
  atomic_store(&forced, way);
  return ML_CUDA_OK;
}

/* Whether the fused kernel's first blocks have nothing to do for as long as the shrinks take. Measured: a shrink of 128 rows takes
 * .36 (64 columns) or .5 (128) of the time of a tile. */
static bool shrinks_are_free(const ml_layer *layer, int64_t n) {
  int64_t idle = idle_blocks(layer, n);
  int64_t each = idle == 0 ? 0 : ceil_div(ceil_div(layer->tokens, ROWS), idle);
  return idle > 0 && each * (layer->columns == 64 ? 36 : 50) <= 100;
}

/* The columns of y that shared.cu computes, in tiles of one width, a block each; the others are dual.cu's. */
typedef struct {
  int width; /* 0: none */
  int64_t columns;
} wave;

/* All of them, in the widest tiles of which every block has one, and more than half of the multiprocessors (of narrow ones: two in
 * five) have a block; or a first wave, as many as nearly all multiprocessors have a tile of, where it makes no wave more and the sum is
 * long: few blocks have the same rows then, so each finishes more of them. Measured: 8192 tokens and 1024 columns are slower so
 * than by dual.cu with a sum of 1024, and faster with one of 2048. */
static wave shared_wave(const ml_layer *layer, bool backward) {
  int64_t depth = backward ? layer->d_out : layer->d_in, n = backward ? layer->d_in : layer->d_out;
  int64_t rows = ceil_div(layer->tokens, ROWS), blocks = layer->gpu->multiprocessors;
  if (layer->drops || layer->columns != 64) {
    return (wave){0, 0};
  }
  for (int width = 256; width >= 128; width /= 2) {
    int64_t tiles = rows * ceil_div(n, width);
    if (tiles <= blocks && tiles * (width == 256 ? 4 : 5) > blocks * 2) {
      return (wave){width, n};
    }
  }
  int64_t across = blocks / rows, tiles = rows * ceil_div(n, 256);
  if (depth >= 2048 && tile_width(n) == 256 && tiles > blocks && rows * across * 10 >= blocks * 9 &&
      1 + ceil_div(tiles - rows * across, blocks) == ceil_div(tiles, blocks)) {
    return (wave){256, across * 256};
  }
  return (wave){0, 0};
}

/* Whether that costs less than all experts do: a pair costs what its rows of x and y are to move, an expert its columns. Measured on an
 * H200 with k = 2, d = 4096 and 8 or 64 experts of rank 16, linear in between: as much as 470 to 560 columns of 2048 tokens, and 690 to
 * 870 of 8192; but before ml_choose had a warp for each token. */
static bool grouping_pays(const ml_layer *layer, int64_t n) {
  return layer->columns > 128 + 256 * layer->weights.top_k && tiles_of(layer, n) * 2 >= layer->gpu->multiprocessors;
}

ml_way ml_layer_way(const ml_layer *layer, bool backward) {
  if (!ml_layer_has_kernels(layer)) {
    return ML_BY_TORCH;
  }
  if (layer->weight == NULL || !is_aligned(layer->bias) || !are_rows(layer->weight, layer->weight_row, layer->d_in)) {
    return ML_BY_ADDMM;
  }
  int64_t n = backward ? layer->d_in : layer->d_out;
  bool can[] = {true,
                !backward && !layer->drops && layer->tokens <= DECODE_TOKENS && layer->columns <= DECODE_COLUMNS,
                true,
                !layer->drops && layer->columns <= 128 && idle_blocks(layer, n) > 0,
                shared_wave(layer, backward).width > 0,
                can_group(layer),
                true};
  if (!layer->dense) {
    return can[ML_BY_GROUPED] ? ML_BY_GROUPED : ML_BY_TORCH;
  }
  if (layer->forced >= 0 && can[layer->forced]) {
    return (ml_way)layer->forced;
  }
  if (can[ML_BY_DECODE]) {
    return ML_BY_DECODE;
  }
  if (can[ML_BY_GROUPED] && grouping_pays(layer, n)) {
    return ML_BY_GROUPED;
  }
  int64_t tiles = tiles_of(layer, n), blocks = layer->gpu->multiprocessors;
  if (can[ML_BY_FUSED] && shrinks_are_free(layer, n) && tiles * 10 >= blocks * 9) {
    return ML_BY_FUSED;
  }
  if (can[ML_BY_SHARED]) {
    return ML_BY_SHARED;
  }
  return tiles * 2 < blocks ? ML_BY_ADDMM : ML_BY_DUAL; /* torch's products split the sum where tiles are few */
}

/* ---- dropout's slots, and the parts of its sums ---- */

/* Blocks of 8 columns that an expert has. */
static int blocks_of(const ml_layer *layer, int e) { return (int)ceil_div(layer->experts[e].rank, 8); }

/* How many of them a slot has: more, and masks are drawn less often, but registers are few. */
static int slot_tiles(const ml_layer *layer) {
  int most = 1;
  for (int e = 0; e < layer->n_experts; e++) {
    int blocks = blocks_of(layer, e);
    most = blocks > most ? blocks : most;
  }
  return most > 2 ? 4 : most;
}

/* The slots of the experts that have a gradient of A, or of all. */
static ml_slots slots_of(const ml_layer *layer, const ml_adapter *grads) {
  ml_slots slots = {.n = 0};
  int tiles = slot_tiles(layer);
  for (int e = 0; e < layer->n_experts; e++) {
    int blocks = blocks_of(layer, e);
    for (int block = 0; block < blocks && (grads == NULL || grads[e].a != NULL); block += tiles) {
      slots.of[slots.n++] = (ml_slot){.block = (unsigned char)(layer->experts[e].column / 8 + block),
                                      .tiles = (unsigned char)min_(tiles, blocks - block),
                                      .expert = (unsigned char)e};
    }
  }
  return slots;
}

/* Groups of slots that share what a block reads, and how many are in each. */
static int slot_groups(const ml_slots *slots, int tiles) { return (int)ceil_div(slots->n, tiles == 4 ? 2 : 4); }
static int slot_ways(const ml_slots *slots, int groups) { return (int)ceil_div(slots->n, groups); }

/* Into how many parts a sum of `steps` is cut that `blocks` blocks would compute whole, for `wanted` on a multiprocessor. */
static int splits_for(const ml_layer *layer, int64_t blocks, int64_t steps, int wanted) {
  int64_t splits = wanted * (int64_t)layer->gpu->multiprocessors / blocks;
  return (int)(splits < 1 ? 1 : min_(splits, steps));
}

enum { SPAN = 128, DROP_ROWS = 64, COLLECT_ROWS = 32, SPREAD_ROWS = 128 }; /* as in dropout.cu */

static int project_splits(const ml_layer *layer, int groups) {
  return splits_for(layer, ceil_div(layer->tokens, DROP_ROWS) * groups, ceil_div(layer->d_in, SPAN), 4);
}
static int collect_splits(const ml_layer *layer, int groups) {
  return splits_for(layer, ceil_div(layer->d_in, SPAN) * groups, ceil_div(layer->tokens, COLLECT_ROWS), 3);
}

static size_t parts_bytes(const ml_layer *layer, bool backward) {
  ml_slots slots = slots_of(layer, NULL);
  int groups = slot_groups(&slots, slot_tiles(layer));
  /* With fewer gradients there are fewer groups, and more parts: one group has the most. */
  int splits = backward ? collect_splits(layer, 1) : project_splits(layer, groups);
  return (size_t)splits * (size_t)layer->columns * (size_t)(backward ? layer->d_in : layer->tokens) * 4;
}

/* ---- the workspace ---- */

enum { SLICES = 8, SLICE_BYTES = 4096 }; /* as in shared.cu */

/* What the blocks of shared.cu leave for each other. */
static size_t shared_parts_bytes(const ml_layer *layer, bool backward) {
  wave first = shared_wave(layer, backward);
  int64_t sharers = first.width == 0 ? 0 : min_(ceil_div(first.columns, first.width), SLICES);
  return (size_t)(ceil_div(layer->tokens, ROWS) * sharers) * SLICES * SLICE_BYTES;
}

typedef struct {
  ml_prepared prepared;
  void *mixed, *weighted;
  void *parts;
  float *grad_w;
  size_t bytes;
} places;

/* Of 128 rows shared.cu has two, dual.cu one. */
static int n_flags(const ml_layer *layer) { return 2 * (int)ceil_div(layer->tokens, ROWS); }

/* The next of some places in a workspace of which so many bytes are used. */
#define PLACE(pointer, size)                                        \
  do {                                                              \
    (pointer) = (void *)(workspace + used);                         \
    used = (used + (size) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; \
  } while (0)

static places places_in(const ml_layer *layer, char *workspace, bool backward) {
  size_t T = (size_t)layer->tokens, C = (size_t)layer->columns, N = (size_t)layer->n_experts, used = 0;
  places p = {0};
  PLACE(p.prepared.a, C * (size_t)layer->d_in * 2);
  PLACE(p.prepared.b, C * (size_t)layer->d_out * 2);
  PLACE(p.prepared.factors, T * N * 4);
  PLACE(p.prepared.experts, C / 8 * 4);
  PLACE(p.prepared.scalings, N * 4);
  PLACE(p.prepared.flags, (size_t)n_flags(layer) * 4);
  PLACE(p.mixed, T * C * 2);
  if (backward) {
    PLACE(p.weighted, T * C * 2);
    PLACE(p.grad_w, T * N * 4);
  }
  PLACE(p.parts, layer->drops ? parts_bytes(layer, backward) : shared_parts_bytes(layer, backward));
  p.prepared.tokens = (int)layer->tokens;
  p.prepared.columns = layer->columns;
  p.prepared.n_experts = layer->n_experts;
  p.prepared.d_in = (int)layer->d_in;
  p.prepared.d_out = (int)layer->d_out;
  p.prepared.n_flags = n_flags(layer);
  p.bytes = used;
  return p;
}

/* Places of the pairs. */
typedef struct {
  ml_pairs pairs;
  void *mixed, *weighted, *added;
  size_t bytes;
} pair_places;

/* What choose.cu and pairs.cu call ML_RANKS. */
static int pair_ranks(const ml_layer *layer) { return layer->most_rank <= 16 ? 16 : layer->most_rank <= 32 ? 32 : 64; }

static int pair_chunks(const ml_layer *layer, int *chunk) {
  int64_t tokens = round_up(ceil_div(layer->tokens, ML_PAIR_CHUNKS), 8);
  *chunk = tokens < 32 ? 32 : (int)tokens;
  return (int)ceil_div(layer->tokens, *chunk);
}

static pair_places pair_places_in(const ml_layer *layer, char *workspace, bool backward) {
  size_t N = (size_t)layer->n_experts, P = (size_t)layer->tokens * (size_t)layer->weights.top_k, used = 0;
  size_t R = (size_t)pair_ranks(layer), n = (size_t)round_up(backward ? layer->d_in : layer->d_out, 64);
  size_t tiles = (size_t)min_((int64_t)P, (int64_t)(P / ML_TILE_PAIRS + N));
  pair_places p = {0};
  size_t chunks = (size_t)pair_chunks(layer, &p.pairs.chunk);
  PLACE(p.pairs.experts, N * sizeof *p.pairs.experts);
  PLACE(p.pairs.chosen, P);
  PLACE(p.pairs.factors, P * 4);
  PLACE(p.pairs.counts, chunks * N * 4);
  PLACE(p.pairs.first, N * 4);
  PLACE(p.pairs.total, N * 4);
  PLACE(p.pairs.order, tiles * ML_TILE_PAIRS * 4);
  PLACE(p.pairs.tile_expert, tiles * 4);
  PLACE(p.mixed, P * R * 2);
  if (backward) {
    PLACE(p.weighted, P * R * 2);
  }
  PLACE(p.added, P * n * 2);
  p.pairs.tokens = (int)layer->tokens;
  p.pairs.n_experts = layer->n_experts;
  p.pairs.top_k = layer->weights.top_k;
  p.pairs.tiles = (int)tiles;
  p.bytes = used;
  return p;
}
#undef PLACE

/* Without a weight no gradient of x is wanted, or torch's products are between what is made here. */
static bool backward_groups(const ml_layer *layer) {
  return layer->weight != NULL ? ml_layer_way(layer, true) == ML_BY_GROUPED : !layer->dense;
}

size_t ml_layer_forward_bytes(const ml_layer *layer) {
  return ml_layer_way(layer, false) == ML_BY_GROUPED ? pair_places_in(layer, NULL, false).bytes
                                                     : places_in(layer, NULL, false).bytes;
}
size_t ml_layer_backward_bytes(const ml_layer *layer) {
  return backward_groups(layer) ? pair_places_in(layer, NULL, true).bytes : places_in(layer, NULL, true).bytes;
}

ml_places ml_layer_places(const ml_layer *layer, void *workspace) {
  places p = places_in(layer, workspace, true);
  return (ml_places){p.prepared.a, p.prepared.b, p.mixed, p.weighted};
}

static ml_narrow narrow_of(const places *p) {
  return (ml_narrow){.factors = p->prepared.factors,
                     .experts = p->prepared.experts,
                     .scalings = p->prepared.scalings,
                     .mixed = p->mixed,
                     .tokens = p->prepared.tokens,
                     .columns = p->prepared.columns,
                     .n_experts = p->prepared.n_experts};
}

/* ---- launches ---- */

static ml_cuda_status launch(const ml_layer *layer, ml_variant variant, const char *entry, ml_launch how,
                             void **arguments) {
  ml_kernel *kernel;
  ml_cuda_status status = ml_kernel_of(layer->gpu, &variant, entry, (int)how.shared_bytes, &kernel);
  return status == ML_CUDA_OK ? ml_launch_kernel(layer->gpu, kernel, &how, layer->stream, arguments) : status;
}

static ml_cuda_status prepare(const ml_layer *layer, const places *p) {
  int64_t eights = layer->columns * (layer->d_in + layer->d_out) / 8 + layer->tokens * layer->n_experts;
  void *arguments[] = {(void *)(uintptr_t)&layer->adapters, (void *)(uintptr_t)&p->prepared,
                       (void *)(uintptr_t)&layer->weights};
  return launch(layer, (ml_variant){ML_PREPARE, {layer->f16, layer->f32_adapters}}, "ml_prepare",
                (ml_launch){.grid = (unsigned)min_(ceil_div(eights, 256), 8 * (int64_t)layer->gpu->multiprocessors),
                            .block = 256},
                arguments);
}

/* A matrix in boxes of 64 columns. */
static ml_cuda_status map_of(const ml_layer *layer, ml_tensor_map *map, const void *data, int64_t rows, int64_t cols,
                             int64_t row, int box_rows) {
  return ml_tensor_map_of(layer->gpu, map, layer->f16, data, rows, cols, row * 2, box_rows);
}

/* The tile's columns of a factor with n of them, K-major (forward) or MN-major. */
static ml_cuda_status factor_map(const ml_layer *layer, bool backward, ml_tensor_map *map, const void *data, int64_t n,
                                 int64_t depth, int64_t row, int width) {
  return backward ? map_of(layer, map, data, depth, n, row, 64) : map_of(layer, map, data, n, depth, row, width);
}

/* Over how many blocks a sum is cut that `blocks` of them would compute whole, into `parts` at most. Clusters that are not all resident
 * at once take twice as long; of a GPU with 132 multiprocessors 66 of two, 39 of three and 30 of four are. More brought nothing. */
static unsigned cluster_for(const ml_layer *layer, int64_t blocks, int64_t parts) {
  static const int resident[] = {66, 39, 30};
  unsigned cluster = 4;
  while (cluster > 1 &&
         (blocks * 132 > (int64_t)resident[cluster - 2] * layer->gpu->multiprocessors || (int64_t)cluster > parts)) {
    cluster--;
  }
  return cluster;
}

/* H = x A^T, or P = g B, and what becomes of it. */
static ml_cuda_status project(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, bool backward) {
  enum { STAGE_BYTES = 4 * 49152 + 2048 };
  int64_t depth = backward ? layer->d_out : layer->d_in;
  int cols = layer->columns <= 64 ? 64 : layer->columns <= 128 ? 128 : 256;
  ml_tensor_map x_map, factor;
  ml_cuda_status status = map_of(layer, &x_map, x.data, layer->tokens, depth, x.row, ROWS);
  if (status == ML_CUDA_OK) {
    status = backward ? factor_map(layer, true, &factor, p->prepared.b, layer->columns, depth, layer->columns, cols)
                      : factor_map(layer, false, &factor, p->prepared.a, layer->columns, depth, depth, cols);
  }
  int64_t blocks = ceil_div(layer->tokens, ROWS);
  unsigned cluster = cluster_for(layer, blocks, depth / 256);
  int depth_ = (int)depth;
  void *arguments[] = {&x_map, &factor, &narrow, &depth_};
  return status != ML_CUDA_OK
             ? status
             : launch(layer, (ml_variant){ML_PROJECT, {layer->f16, backward, (int16_t)cols}}, "ml_project",
                      (ml_launch){.grid = (unsigned)blocks * cluster,
                                  .block = 384,
                                  .shared_bytes = STAGE_BYTES,
                                  .cluster = cluster,
                                  .early = true},
                      arguments);
}

/* Some columns of y, or of grad_x, and the width of the tiles that they are computed in. */
typedef struct {
  int64_t first, n;
  int width;
} part;

/* Those from `first` on. */
static part columns_from(const ml_layer *layer, bool backward, int64_t first) {
  int64_t n = (backward ? layer->d_in : layer->d_out) - first;
  return (part){first, n, tile_width(n)};
}

/* Row or column `i` of 16-bit elements that lie so many apart. */
static void *from(const void *data, int64_t i, int64_t apart) { return (char *)(uintptr_t)data + i * apart * 2; }

/* What dual.cu and shared.cu read and write: x, W, `mixed` and its factor, y, and the factor of a shrink inside. */
enum { OF_X, OF_W, OF_MIXED, OF_B, OF_Y, OF_SHRINK, N_MAPS };

static ml_cuda_status wide_maps(const ml_layer *layer, ml_rows x, void *y, bool backward, part of,
                                ml_tensor_map maps[N_MAPS]) {
  int64_t T = layer->tokens, row = layer->weight_row;
  int64_t depth = backward ? layer->d_out : layer->d_in, n = backward ? layer->d_in : layer->d_out;
  const void *w = from(layer->weight, of.first, backward ? 1 : row);
  ml_cuda_status status = map_of(layer, &maps[OF_X], x.data, T, depth, x.row, ROWS);
  if (status == ML_CUDA_OK) {
    status = factor_map(layer, backward, &maps[OF_W], w, of.n, depth, row, of.width);
  }
  return status == ML_CUDA_OK ? map_of(layer, &maps[OF_Y], from(y, of.first, 1), T, of.n, n, 64) : status;
}

static ml_cuda_status narrow_maps(const ml_layer *layer, const places *p, bool backward, part of,
                                  ml_tensor_map maps[N_MAPS]) {
  int64_t T = layer->tokens, C = layer->columns;
  int64_t depth = backward ? layer->d_out : layer->d_in, n = backward ? layer->d_in : layer->d_out;
  const void *b = backward ? from(p->prepared.a, of.first, 1) : from(p->prepared.b, of.first, C);
  const void *shrink = backward ? p->prepared.b : p->prepared.a;
  ml_cuda_status status = map_of(layer, &maps[OF_MIXED], p->mixed, T, C, C, ROWS);
  if (status == ML_CUDA_OK) {
    status = factor_map(layer, backward, &maps[OF_B], b, of.n, C, backward ? n : C, of.width);
  }
  return status == ML_CUDA_OK ? factor_map(layer, backward, &maps[OF_SHRINK], shrink, C, depth, backward ? C : depth,
                                           C == 128 ? 128 : 64)
                              : status;
}

static const void *bias_of(const ml_layer *layer, bool backward, part of) {
  return backward || layer->bias == NULL ? NULL : from(layer->bias, of.first, 1);
}

/* The product of ml_dual; `adds` rows of each token are added to it, or none. */
static ml_cuda_status dual_tiles(const ml_layer *layer, ml_tensor_map maps[N_MAPS], ml_narrow narrow, bool backward,
                                 bool fused, part of, unsigned *flags, const void *added, int adds) {
  const void *bias = bias_of(layer, backward, of);
  int n = (int)of.n, depth = (int)(backward ? layer->d_out : layer->d_in);
  int shrinkers = fused ? (int)idle_blocks(layer, n) : 0, stages = of.width == 256 ? 4 : 6;
  void *arguments[] = {&maps[OF_X], &maps[OF_W], &maps[OF_MIXED], &maps[OF_B], &maps[OF_Y], &maps[OF_SHRINK], &narrow,
                       &bias,       &n,          &depth,          &shrinkers,  &flags,      &added,           &adds};
  int64_t blocks = min_(layer->gpu->multiprocessors, fused ? INT32_MAX : tiles_of(layer, n));
  ml_variant variant = {
      ML_DUAL,
      {layer->f16, backward, (int16_t)of.width, (int16_t)(fused ? layer->columns : 0), bias != NULL, adds > 0}};
  return launch(layer, variant, "ml_dual",
                (ml_launch){.grid = (unsigned)blocks,
                            .block = 384,
                            .shared_bytes = (unsigned)(stages * (16384 + of.width * 128) + 4 * 8192 + 2048),
                            .early = true},
                arguments);
}

/* y = x W^T + mixed B^T (+ bias), or grad_x = g W + Q A, from column `first` on. */
static ml_cuda_status dual(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, void *y, bool backward,
                           bool fused, int64_t first) {
  part of = columns_from(layer, backward, first);
  ml_tensor_map maps[N_MAPS];
  ml_cuda_status status = wide_maps(layer, x, y, backward, of, maps);
  if (status == ML_CUDA_OK) {
    status = narrow_maps(layer, p, backward, of, maps);
  }
  return status == ML_CUDA_OK ? dual_tiles(layer, maps, narrow, backward, fused, of, p->prepared.flags, NULL, 0)
                              : status;
}

/* The same, a tile a block, with a shrink that these blocks share; and dual.cu for the columns that are left. */
static ml_cuda_status shared(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x, void *y,
                             bool backward) {
  wave all = shared_wave(layer, backward);
  part of = {0, all.columns, all.width};
  ml_tensor_map maps[N_MAPS];
  ml_cuda_status status = wide_maps(layer, x, y, backward, of, maps);
  if (status == ML_CUDA_OK) {
    status = narrow_maps(layer, p, backward, of, maps);
  }
  if (status != ML_CUDA_OK) {
    return status;
  }
  const void *bias = bias_of(layer, backward, of);
  int n = (int)of.n, depth = (int)(backward ? layer->d_out : layer->d_in), stages = of.width == 256 ? 4 : 6;
  void *flags = p->prepared.flags, *parts = p->parts;
  void *arguments[] = {&maps[OF_X], &maps[OF_W], &maps[OF_MIXED], &maps[OF_B], &maps[OF_Y], &maps[OF_SHRINK], &narrow,
                       &bias,       &n,          &depth,          &parts,      &flags};
  ml_variant variant = {ML_SHARED, {layer->f16, backward, (int16_t)of.width, bias != NULL}};
  status = launch(layer, variant, "ml_shared",
                  (ml_launch){.grid = (unsigned)(ceil_div(layer->tokens, ROWS) * ceil_div(of.n, of.width)),
                              .block = 384,
                              .shared_bytes = (unsigned)(stages * (16384 + of.width * 128) + 32768 + 2048),
                              .early = true},
                  arguments);
  bool whole = of.n == (backward ? layer->d_in : layer->d_out);
  return status != ML_CUDA_OK || whole ? status : dual(layer, p, narrow, x, y, backward, false, of.n);
}

/* y, or grad_x, by the layer's way; `mixed` has been made where that is ML_BY_DUAL. */
static ml_cuda_status wide_side(const ml_layer *layer, ml_way way, const places *p, ml_narrow narrow, ml_rows x,
                                void *y, bool backward) {
  return way == ML_BY_SHARED ? shared(layer, p, narrow, x, y, backward)
                             : dual(layer, p, narrow, x, y, backward, way == ML_BY_FUSED, 0);
}

/* H of a few tokens, and s w H. */
static ml_cuda_status few(const ml_layer *layer, ml_rows x, void *mixed, void *hidden) {
  enum { LEAST = 256 }; /* of a sum that a block has work for */
  int64_t width = layer->tokens <= 16 ? 16 : 32, blocks = layer->columns / 8 * ceil_div(layer->tokens, width);
  unsigned cluster = 1;
  while (cluster < 8 && blocks * cluster * 2 <= layer->gpu->multiprocessors && layer->d_in / (cluster * 2) >= LEAST) {
    cluster *= 2;
  }
  long long x_row = x.row;
  int tokens = (int)layer->tokens, depth = (int)layer->d_in, columns = layer->columns;
  void *arguments[] = {(void *)(uintptr_t)&layer->adapters,
                       (void *)(uintptr_t)&layer->weights,
                       &x.data,
                       &x_row,
                       &mixed,
                       &hidden,
                       &tokens,
                       &depth,
                       &columns};
  return launch(layer, (ml_variant){ML_FEW, {layer->f16, layer->f32_adapters, (int16_t)width}}, "ml_few",
                (ml_launch){.grid = (unsigned)blocks * cluster, .block = 256, .cluster = cluster, .early = true},
                arguments);
}

/* y of a few tokens. */
static ml_cuda_status decode(const ml_layer *layer, ml_rows x, void *mixed, void *y) {
  /* Of a multiprocessor's memory; the rest is for blocks of few.cu. */
  enum { SHARED_BYTES = 200 << 10, LEAST_STAGES = 4, MAX_STAGES = 32, MAX_ROWS = 256 };
  int64_t T = layer->tokens, C = layer->columns, n = layer->d_out, depth = layer->d_in,
          blocks = layer->gpu->multiprocessors;
  int width = T <= 8 ? 8 : T <= 16 ? 16 : T <= 32 ? 32 : T <= 64 ? 64 : 128;
  /* Tiles for all multiprocessors, equally many for each, and room for the narrow side and some stages. */
  int64_t rows = round_up(ceil_div(n, blocks * ceil_div(n, blocks * MAX_ROWS)), 16);
  while ((C / 64 + LEAST_STAGES) * (rows + width) * 128 > SHARED_BYTES) {
    rows -= 16;
  }
  /* Every tile reads x, too, which is much of many tokens: two blocks share it, or the sum of a tile twice as high. */
  unsigned share = width == 128 && rows > 64 ? 2 : 1;
  if (rows <= 32 && width * depth >= 128 * 4096) {
    rows *= 2;
  }
  unsigned cluster = share > 1 ? 1 : cluster_for(layer, ceil_div(n, rows), depth / 512);
  int64_t tiles = round_up(ceil_div(n, rows), share), groups = rows > 64 ? 2 : 1, part = (rows + width) * 128;
  int64_t stage = (rows > 32 ? 1 : 2) * part, beyond = round_up(rows, 64 * groups) * 128 - part;
  int64_t narrow = C / 64 * part;
  int stages = (int)min_((SHARED_BYTES - narrow) / stage, MAX_STAGES);
  ml_tensor_map maps[3];
  ml_cuda_status status;
  if ((status = map_of(layer, &maps[0], x.data, T, depth, x.row, width / (int)share)) != ML_CUDA_OK ||
      (status = map_of(layer, &maps[1], layer->weight, n, depth, layer->weight_row, (int)rows)) != ML_CUDA_OK ||
      (status = map_of(layer, &maps[2], mixed, T, C, C, width)) != ML_CUDA_OK) {
    return status;
  }
  const void *bias = layer->bias;
  int T_ = (int)T, n_ = (int)n, depth_ = (int)depth, C_ = (int)C;
  void *arguments[] = {&maps[0], &maps[1], &maps[2], (void *)(uintptr_t)&layer->adapters, &y, &bias, &T_, &n_,
                       &depth_,  &C_,      &stages};
  ml_variant variant = {ML_DECODE,
                        {layer->f16, layer->f32_adapters, (int16_t)width, (int16_t)rows, bias != NULL, (int16_t)share}};
  return launch(
      layer, variant, "ml_decode",
      (ml_launch){.grid = (unsigned)(tiles * cluster),
                  .block = (unsigned)(groups * 128 + 128),
                  .shared_bytes = (unsigned)(1024 + stages * (stage + 16) + 8 + narrow + (beyond > 0 ? beyond : 0)),
                  .cluster = cluster * share,
                  .early = true},
      arguments);
}

/* The experts' gradients from Q and x, and from the weighted H and g. */
static ml_cuda_status collect(const ml_layer *layer, const places *p, ml_rows x, ml_rows grad_y,
                              const ml_adapter *grads) {
  enum { TILE = 256, STAGE_BYTES = 4 * 49152 + 2048 };
  int64_t T = layer->tokens, C = layer->columns;
  bool any_a = false, any_b = false;
  ml_adapters to = layer->adapters;
  for (int e = 0; e < layer->n_experts; e++) {
    to.of[e].a = grads[e].a;
    to.of[e].b = grads[e].b;
    any_a |= to.of[e].a != NULL;
    any_b |= to.of[e].b != NULL;
  }
  int a_tiles = any_a ? (int)ceil_div(layer->d_in, TILE) : 0, b_tiles = any_b ? (int)ceil_div(layer->d_out, TILE) : 0;
  if (a_tiles + b_tiles == 0) {
    return ML_CUDA_OK;
  }
  ml_tensor_map maps[4];
  ml_cuda_status status;
  ml_rows left = any_a ? x : grad_y; /* a map wants some memory even where it is not used */
  if ((status = map_of(layer, &maps[0], p->mixed, T, C, C, 64)) != ML_CUDA_OK ||
      (status = map_of(layer, &maps[1], left.data, T, any_a ? layer->d_in : layer->d_out, left.row, 64)) !=
          ML_CUDA_OK ||
      (status = map_of(layer, &maps[2], p->weighted, T, C, C, 64)) != ML_CUDA_OK ||
      (status = map_of(layer, &maps[3], grad_y.data, T, layer->d_out, grad_y.row, 64)) != ML_CUDA_OK) {
    return status;
  }
  int chunks = C > 64 ? 2 : 1;
  int64_t tiles = (a_tiles + b_tiles) * ceil_div(C, 64 * chunks);
  unsigned cluster = cluster_for(layer, tiles, T / 128);
  const int *experts = p->prepared.experts;
  int T_ = (int)T, d_in = (int)layer->d_in, d_out = (int)layer->d_out, C_ = (int)C;
  void *arguments[] = {&maps[0], &maps[1], &maps[2], &maps[3], &to, &experts, &T_, &d_in, &d_out, &C_, &a_tiles};
  return launch(layer, (ml_variant){ML_COLLECT, {layer->f16, layer->f32_adapters, (int16_t)chunks}}, "ml_collect",
                (ml_launch){.grid = (unsigned)tiles * cluster,
                            .block = 384,
                            .shared_bytes = STAGE_BYTES,
                            .cluster = cluster,
                            .early = true},
                arguments);
}

/* ---- launches with dropout ---- */

static ml_cuda_status launch_dropout(const ml_layer *layer, const char *entry, int64_t grid, int64_t block,
                                     int64_t shared_bytes, void **arguments) {
  ml_variant variant = {ML_DROPOUT, {layer->f16, (int16_t)slot_tiles(layer)}};
  ml_launch how = {.grid = (unsigned)grid, .block = (unsigned)block, .shared_bytes = (unsigned)shared_bytes};
  return launch(layer, variant, entry, how, arguments);
}

/* Whether they are as dropout.cu reads them. */
static bool can_drop(ml_rows x) { return is_aligned(x.data) && x.row % 8 == 0; }

static ml_cuda_rows x_of(const ml_layer *layer, ml_rows x) {
  return (ml_cuda_rows){x.data, x.row, (int)layer->tokens, (int)layer->d_in};
}

/* H_e = (D_e x) A_e^T, and s w H. */
static ml_cuda_status drop_project(const ml_layer *layer, const places *p, ml_narrow narrow, ml_rows x) {
  ml_slots slots = slots_of(layer, NULL);
  int tiles = slot_tiles(layer), groups = slot_groups(&slots, tiles), ways = slot_ways(&slots, groups);
  int splits = project_splits(layer, groups), columns = layer->columns;
  ml_slot last = slots.of[slots.n - 1];
  int blocks = last.block + last.tiles;
  ml_cuda_rows of_x = x_of(layer, x);
  const void *a = p->prepared.a;
  const float *parts = p->parts;
  void *shrink[] = {&of_x, &a, &parts, &columns, &splits, &slots, (void *)(uintptr_t)&layer->dropout};
  void *mix[] = {&narrow, &parts, &splits, &blocks};
  ml_cuda_status status = launch_dropout(layer, "ml_drop_project", ceil_div(layer->tokens, DROP_ROWS) * splits * groups,
                                         64 * ways, (2 * DROP_ROWS + 2 * ways * 8 * tiles) * SPAN * 2, shrink);
  return status == ML_CUDA_OK
             ? launch_dropout(layer, "ml_drop_mix", ceil_div(layer->tokens * columns / 8, 256), 256, 0, mix)
             : status;
}

/* dA_e = Q_e^T (D_e x). */
static ml_cuda_status drop_collect(const ml_layer *layer, const places *p, ml_rows x, const ml_adapter *grads) {
  ml_slots slots = slots_of(layer, grads);
  if (slots.n == 0) {
    return ML_CUDA_OK;
  }
  int groups = slot_groups(&slots, slot_tiles(layer)), ways = slot_ways(&slots, groups);
  int splits = collect_splits(layer, groups), columns = layer->columns, width = (int)layer->d_in;
  int f32 = layer->f32_adapters;
  ml_adapters to = layer->adapters;
  for (int e = 0; e < layer->n_experts; e++) {
    to.of[e].a = grads[e].a;
  }
  ml_cuda_rows of_x = x_of(layer, x);
  const void *q = p->mixed;
  const float *parts = p->parts;
  const int *experts = p->prepared.experts;
  void *collect[] = {&of_x, &q, &parts, &columns, &splits, &slots, (void *)(uintptr_t)&layer->dropout};
  void *store[] = {&to, &experts, &parts, &columns, &splits, &width, &f32};
  ml_cuda_status status =
      launch_dropout(layer, "ml_drop_collect", ceil_div(layer->d_in, SPAN) * splits * groups, 32 * ways, 0, collect);
  return status == ML_CUDA_OK
             ? launch_dropout(layer, "ml_drop_store", ceil_div(columns * layer->d_in / 4, 256), 256, 0, store)
             : status;
}

/* grad_x (+)= sum_e D_e (Q_e A_e). */
static ml_cuda_status drop_spread(const ml_layer *layer, const places *p, void *grad_x, bool adds) {
  ml_slots slots = slots_of(layer, NULL);
  const void *q = p->mixed, *a = p->prepared.a;
  int add = adds, tokens = (int)layer->tokens, width = (int)layer->d_in, columns = layer->columns;
  void *arguments[] = {&q, &a, &grad_x, &add, &tokens, &width, &columns, &slots, (void *)(uintptr_t)&layer->dropout};
  return launch_dropout(layer, "ml_drop_spread", ceil_div(layer->d_in, SPAN) * ceil_div(layer->tokens, SPREAD_ROWS),
                        256, 0, arguments);
}

/* ---- launches of pairs ---- */

static ml_cuda_status launch_pairs(const ml_layer *layer, const char *entry, bool backward, bool deep, int64_t grid,
                                   int64_t block, int64_t shared_bytes, void **arguments) {
  ml_variant variant = {ML_PAIRS, {layer->f16, layer->f32_adapters, backward, (int16_t)pair_ranks(layer), deep}};
  return launch(
      layer, variant, entry,
      (ml_launch){
          .grid = (unsigned)grid, .block = (unsigned)block, .shared_bytes = (unsigned)shared_bytes, .early = true},
      arguments);
}

/* Those of the experts, or of their gradients, from `first` on that travel together; how many. */
static int table_from(const ml_adapter *experts, int n_experts, int first, ml_adapters *table) {
  int n = (int)min_(n_experts - first, ML_TABLE_EXPERTS);
  memcpy(table->of, experts + first, (size_t)n * sizeof *experts);
  return n;
}

/* The pairs in their order. */
static ml_cuda_status arrange(const ml_layer *layer, const pair_places *p, void *grad_w) {
  ml_variant variant = {ML_CHOOSE, {layer->f16}};
  ml_cuda_status status = ML_CUDA_OK;
  ml_adapters table;
  for (int first = ML_TABLE_EXPERTS; status == ML_CUDA_OK && first < layer->n_experts; first += ML_TABLE_EXPERTS) {
    int n = table_from(layer->experts, layer->n_experts, first, &table);
    ml_adapter *to = p->pairs.experts + first;
    void *arguments[] = {&table, &to, &n};
    status = launch(layer, variant, "ml_experts", (ml_launch){.grid = 1, .block = 128}, arguments);
  }
  table_from(layer->experts, layer->n_experts, 0, &table);
  int chunk;
  unsigned chunks = (unsigned)pair_chunks(layer, &chunk);
  void *choose[] = {&table, (void *)(uintptr_t)&p->pairs, (void *)(uintptr_t)&layer->weights, &grad_w};
  void *order[] = {(void *)(uintptr_t)&p->pairs};
  if (status == ML_CUDA_OK) {
    status = launch(layer, variant, "ml_choose", (ml_launch){.grid = chunks, .block = 1024}, choose);
  }
  ml_launch how = {.grid = chunks, .block = 256, .early = true};
  return status == ML_CUDA_OK ? launch(layer, variant, "ml_arrange", how, order) : status;
}

static ml_cuda_rows rows_of(const ml_layer *layer, ml_rows rows, int64_t width) {
  return (ml_cuda_rows){rows.data, rows.row, (int)layer->tokens, (int)width};
}

/* The pairs' H, or backward P, and what becomes of it. */
static ml_cuda_status pairs_shrink(const ml_layer *layer, const pair_places *p, ml_rows x, ml_pair_side side,
                                   bool backward) {
  int64_t ranks = pair_ranks(layer), size = layer->f32_adapters ? 4 : 2, depth = ranks * size < 256 ? 32 : 16;
  int64_t factor = backward ? depth * (ranks * size + 16) : ranks * (depth * size + (size == 4 ? 32 : 16));
  int64_t ring = 8 * (ML_TILE_PAIRS * (depth * 2 + 16) + factor); /* as in pairs.cu */
  ml_cuda_rows of_x = rows_of(layer, x, backward ? layer->d_out : layer->d_in);
  void *arguments[] = {(void *)(uintptr_t)&p->pairs, &of_x, &side};
  bool deep = p->pairs.tiles <= layer->gpu->multiprocessors; /* each of which has all its memory for one tile then */
  int64_t stages = ((deep || ranks == 64 ? 216 : 108) << 10) / ring;
  return launch_pairs(layer, "ml_pairs_shrink", backward, deep, p->pairs.tiles, 256, (stages > 2 ? stages : 2) * ring,
                      arguments);
}

/* y = x W^T (+ bias), or grad_x = g W, and to each token what its pairs add. */
static ml_cuda_status pairs_spread(const ml_layer *layer, const pair_places *p, ml_rows x, void *y, bool backward) {
  int64_t n = backward ? layer->d_in : layer->d_out;
  int cols = (int)n, width = (int)round_up(n, 64);
  void *arguments[] = {(void *)(uintptr_t)&p->pairs, (void *)(uintptr_t)&p->mixed, (void *)(uintptr_t)&p->added, &cols,
                       &width};
  part of = columns_from(layer, backward, 0);
  ml_tensor_map maps[N_MAPS];
  ml_cuda_status status = wide_maps(layer, x, y, backward, of, maps);
  if (status == ML_CUDA_OK) {
    status = launch_pairs(layer, "ml_pairs_spread", backward, false, p->pairs.tiles * ceil_div(n, 4 * 256), 256, 0,
                          arguments);
  }
  maps[OF_MIXED] = maps[OF_X], maps[OF_B] = maps[OF_SHRINK] = maps[OF_W]; /* not used */
  ml_narrow tokens = {.tokens = p->pairs.tokens};
  return status == ML_CUDA_OK ? dual_tiles(layer, maps, tokens, backward, false, of, NULL, p->added, p->pairs.top_k)
                              : status;
}

/* The experts' gradients. */
static ml_cuda_status pairs_collect(const ml_layer *layer, const pair_places *p, ml_rows x, ml_rows grad_y,
                                    const ml_adapter *grads) {
  enum { STRIPE = 128, LINES = 32, STAGES = 3 }; /* as in pairs.cu */
  ml_cuda_status status = ML_CUDA_OK;
  ml_cuda_rows of_x = rows_of(layer, x, layer->d_in), of_g = rows_of(layer, grad_y, layer->d_out);
  int64_t shared_bytes = STAGES * LINES * ((STRIPE * 2 + 16) + (pair_ranks(layer) * 2 + 16));
  for (int first = 0; status == ML_CUDA_OK && first < layer->n_experts; first += ML_TABLE_EXPERTS) {
    ml_adapters table;
    int n = table_from(layer->experts, layer->n_experts, first, &table);
    bool any_a = false, any_b = false;
    for (int e = 0; e < n; e++) {
      any_a |= (table.of[e].a = grads[first + e].a) != NULL;
      any_b |= (table.of[e].b = grads[first + e].b) != NULL;
    }
    int a_stripes = any_a ? (int)ceil_div(layer->d_in, STRIPE) : 0;
    int b_stripes = any_b ? (int)ceil_div(layer->d_out, STRIPE) : 0;
    void *arguments[] = {&table,
                         &first,
                         (void *)(uintptr_t)&p->pairs,
                         &of_x,
                         &of_g,
                         (void *)(uintptr_t)&p->mixed,
                         (void *)(uintptr_t)&p->weighted,
                         &a_stripes,
                         &b_stripes};
    if (any_a || any_b) {
      status = launch_pairs(layer, "ml_pairs_collect", true, false, (int64_t)n * (a_stripes + b_stripes), 128,
                            shared_bytes, arguments);
    }
  }
  return status;
}

/* What is left when Q is there. */
static ml_cuda_status drop_backward(const ml_layer *layer, const places *p, ml_rows x, void *grad_x, bool adds,
                                    const ml_adapter *grads) {
  ml_cuda_status status = drop_collect(layer, p, x, grads);
  return status == ML_CUDA_OK && grad_x != NULL ? drop_spread(layer, p, grad_x, adds) : status;
}

/* Whether the gradient of weights is what the shrink leaves, [T, N] in float32. */
static bool is_plain_grad_w(const ml_layer *layer) {
  return layer->share == 1 && layer->weights.dtype == ML_CUDA_F32 && layer->weights.top_k == 0;
}

static ml_cuda_status grad_weights(const ml_layer *layer, const float *per_token, void *grad_w) {
  bool own = layer->share == 1;
  int64_t numbers = layer->tokens / layer->share * layer->n_experts;
  int count = (int)(own ? layer->tokens : layer->share);
  void *arguments[] = {(void *)(uintptr_t)&layer->weights, &per_token, &grad_w, &count};
  return launch(layer, (ml_variant){ML_MIX, {layer->f16}}, own ? "ml_grad_own_weights" : "ml_grad_weights",
                (ml_launch){.grid = (unsigned)(own ? ceil_div(numbers, 256) : numbers), .block = 256}, arguments);
}

/* ---- forward and backward ---- */

ml_cuda_status ml_layer_forward(const ml_layer *layer, ml_rows x, void *y, void *hidden, void *workspace) {
  ml_way way = ml_layer_way(layer, false);
  places p = places_in(layer, workspace, false);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = hidden;
  if (way == ML_BY_TORCH || !are_rows(x.data, x.row, layer->d_in)) {
    return ML_CUDA_UNSUPPORTED;
  }
  if (way == ML_BY_GROUPED) {
    pair_places of_pairs = pair_places_in(layer, workspace, false);
    ml_cuda_status status = arrange(layer, &of_pairs, NULL);
    if (status == ML_CUDA_OK) {
      ml_pair_side side = {.mixed = of_pairs.mixed, .hidden = hidden, .columns = layer->columns};
      status = pairs_shrink(layer, &of_pairs, x, side, false);
    }
    return status == ML_CUDA_OK ? pairs_spread(layer, &of_pairs, x, y, false) : status;
  }
  if (way == ML_BY_DECODE) {
    ml_cuda_status status = few(layer, x, p.mixed, hidden);
    return status == ML_CUDA_OK ? decode(layer, x, p.mixed, y) : status;
  }
  ml_cuda_status status = prepare(layer, &p);
  if (status == ML_CUDA_OK && layer->drops) {
    status = drop_project(layer, &p, narrow, x);
  } else if (status == ML_CUDA_OK && (way == ML_BY_DUAL || way == ML_BY_ADDMM)) {
    status = project(layer, &p, narrow, x, false);
  }
  return status == ML_CUDA_OK && way != ML_BY_ADDMM ? wide_side(layer, way, &p, narrow, x, y, false) : status;
}

static ml_cuda_status grouped_backward(const ml_layer *layer, ml_rows x, ml_rows grad_y, const void *hidden,
                                       void *grad_x, void *grad_w, const ml_adapter *grads, void *workspace) {
  pair_places p = pair_places_in(layer, workspace, true);
  ml_pair_side side = {.mixed = p.mixed,
                       .weighted = hidden != NULL ? p.weighted : NULL,
                       .hidden = (void *)(uintptr_t)hidden,
                       .grad_w = grad_w,
                       .columns = layer->columns,
                       .weights_dtype = layer->weights.dtype};
  ml_cuda_status status = arrange(layer, &p, grad_w);
  if (status == ML_CUDA_OK) {
    status = pairs_shrink(layer, &p, grad_y, side, true);
  }
  if (status == ML_CUDA_OK) {
    status = pairs_collect(layer, &p, x, grad_y, grads);
  }
  return status == ML_CUDA_OK && grad_x != NULL ? pairs_spread(layer, &p, grad_y, grad_x, true) : status;
}

ml_cuda_status ml_layer_backward(const ml_layer *layer, ml_rows x, ml_rows grad_y, const void *hidden, void *grad_x,
                                 bool adds, void *grad_w, const ml_adapter *grads, void *workspace) {
  ml_way way = ml_layer_way(layer, true);
  places p = places_in(layer, workspace, true);
  ml_narrow narrow = narrow_of(&p);
  if (!ml_layer_has_kernels(layer) || (grad_x != NULL && way == ML_BY_ADDMM && !layer->drops) ||
      !are_rows(grad_y.data, grad_y.row, layer->d_out) || (x.data != NULL && !are_rows(x.data, x.row, layer->d_in))) {
    return ML_CUDA_UNSUPPORTED;
  }
  if (backward_groups(layer)) {
    return grouped_backward(layer, x, grad_y, hidden, grad_x, grad_w, grads, workspace);
  }
  narrow.hidden = (void *)(uintptr_t)hidden;
  narrow.weighted = hidden != NULL ? p.weighted : NULL;
  narrow.grad_w = grad_w == NULL ? NULL : is_plain_grad_w(layer) ? grad_w : p.grad_w;
  ml_adapter undropped[ML_TABLE_EXPERTS];
  for (int e = 0; e < layer->n_experts; e++) {
    undropped[e] = (ml_adapter){.a = layer->drops ? NULL : grads[e].a, .b = grads[e].b};
  }
  ml_cuda_status status = prepare(layer, &p);
  if (status == ML_CUDA_OK && (grad_x == NULL || way == ML_BY_DUAL || layer->drops)) {
    status = project(layer, &p, narrow, grad_y, true);
  }
  if (status == ML_CUDA_OK && grad_x != NULL && !layer->drops) {
    status = wide_side(layer, way, &p, narrow, grad_y, grad_x, true);
  }
  if (status == ML_CUDA_OK) {
    status = collect(layer, &p, x, grad_y, undropped);
  }
  if (status == ML_CUDA_OK && layer->drops) {
    status = drop_backward(layer, &p, x, grad_x, adds, grads);
  }
  if (status == ML_CUDA_OK && narrow.grad_w != grad_w) {
    status = grad_weights(layer, p.grad_w, grad_w);
  }
  return status;
}

/* ---- between torch's products ---- */

ml_cuda_status ml_layer_prepare(const ml_layer *layer, void *workspace) {
  places p = places_in(layer, workspace, true);
  return prepare(layer, &p);
}

ml_cuda_status ml_layer_shrink(const ml_layer *layer, ml_rows x, void *hidden, void *workspace) {
  places p = places_in(layer, workspace, false);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = hidden;
  return layer->drops && can_drop(x) ? drop_project(layer, &p, narrow, x) : ML_CUDA_UNSUPPORTED;
}

ml_cuda_status ml_layer_mix(const ml_layer *layer, const void *hidden, void *workspace) {
  places p = places_in(layer, workspace, true);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = (void *)(uintptr_t)hidden;
  void *arguments[] = {&narrow};
  return launch(layer, (ml_variant){ML_MIX, {layer->f16}}, "ml_mix",
                (ml_launch){.grid = (unsigned)ceil_div(layer->tokens * layer->columns / 8, 256), .block = 256},
                arguments);
}

ml_cuda_status ml_layer_mix_backward(const ml_layer *layer, const void *hidden, void *grad_w, void *workspace) {
  places p = places_in(layer, workspace, true);
  ml_narrow narrow = narrow_of(&p);
  narrow.hidden = (void *)(uintptr_t)hidden;
  narrow.weighted = hidden != NULL ? p.weighted : NULL;
  narrow.grad_w = grad_w == NULL ? NULL : is_plain_grad_w(layer) ? grad_w : p.grad_w;
  void *arguments[] = {(void *)(uintptr_t)&layer->adapters, &narrow};
  ml_cuda_status status =
      launch(layer, (ml_variant){ML_MIX, {layer->f16}}, "ml_mix_backward",
             (ml_launch){.grid = (unsigned)ceil_div(layer->tokens * layer->n_experts, 256), .block = 256}, arguments);
  return status == ML_CUDA_OK && narrow.grad_w != grad_w ? grad_weights(layer, p.grad_w, grad_w) : status;
}

ml_cuda_status ml_layer_drop_backward(const ml_layer *layer, ml_rows x, void *grad_x, bool adds,
                                      const ml_adapter *grads, void *workspace) {
  places p = places_in(layer, workspace, true);
  return layer->drops && can_drop(x) && is_aligned(grad_x) ? drop_backward(layer, &p, x, grad_x, adds, grads)
                                                           : ML_CUDA_UNSUPPORTED;
}
