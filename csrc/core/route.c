/* Routing: logits [T, N] to mixture weights [T, N], and back.
 *
 *   p = softmax(logits / temperature)                 per token
 *   K = the k largest logits, ties to the lower index; all of them where top_k == 0
 *   w = p on K and 0 elsewhere, divided by the sum of p over K where asked
 *   counts_i = unmasked tokens with i in K;  prob_sums_i = sum of p_i over unmasked tokens
 *
 * All of it is computed in the logits' own dtype, save that prob_sums come from sums in double. p is good to a few ULP
 * and as many more as the logit lies below its row's largest in units of the temperature. Experts are picked by their
 * logits, which no rounding has touched: f32 and f64 logits of equal value pick the same experts, with every
 * temperature and instruction set.
 *
 * A NaN or +inf logit makes its whole row NaN, as does a row of nothing but -inf. Such a row picks its first k experts;
 * their weights are NaN, those of the others 0. A -inf logit beside finite ones is an expert of weight 0.
 *
 * Here tokens are shared out; what is done with them is in kernels/routing.h.
 */
#include <float.h>
#include <stdlib.h>
#include <string.h>

#include "compiler.h"
#include "kernels/kernels.h"
#include "moelora.h"
#include "threads.h"

/* Tokens are cut into tasks by the shape alone, so that sums do not depend on the threads. A task below this many
 * logits is not worth another thread, and a task for each thread is all that can run at once. Vectors are full in all
 * tasks but the last. */
enum { MIN_TASK_LOGITS = 16384, MAX_TASKS = ML_MAX_THREADS, WIDEST_VECTOR = 16 };

/* What a call may keep on the stack: enough for a task of 256 experts. */
enum { ROOM = 40 * 1024, CACHE_LINE = 64 };

typedef struct {
  const ml_routing *kernels;
  int64_t n_tasks, tokens_per_task;
  int64_t width;   /* N rounded up to whole cache lines: tasks must not share one */
  int64_t scratch; /* bytes of a thread */
  int n_threads;
} plan;

static int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static plan make_plan(const ml_route_params *p) {
  int64_t n = p->n_experts, least = (MIN_TASK_LOGITS - 1) / n + 1, share = (p->n_tokens + MAX_TASKS - 1) / MAX_TASKS;
  plan cut = {.kernels = ml_active_kernels()->routing[p->dtype], .width = round_up(n, CACHE_LINE / 8)};
  cut.tokens_per_task = round_up(share > least ? share : least, WIDEST_VECTOR);
  cut.n_tasks = p->n_tokens > 0 ? (p->n_tokens - 1) / cut.tokens_per_task + 1 : 1;
  cut.n_threads = ml_thread_bound(p->n_threads, cut.n_tasks);
  cut.scratch = round_up(n * cut.kernels->scratch, CACHE_LINE);
  return cut;
}

static int64_t first_token(const plan *cut, int64_t task) { return task * cut->tokens_per_task; }

static int64_t end_token(const plan *cut, const ml_route_params *p, int64_t task) {
  int64_t end = first_token(cut, task) + cut->tokens_per_task;
  return end < p->n_tokens ? end : p->n_tokens;
}

/* rows: the logits, or what takes their place. */
static ml_status check(const ml_route_params *p, ml_matrix rows, const int64_t *indices) {
  int64_t logits;
  if (p->dtype != ML_F32 && p->dtype != ML_F64) return ML_ERR_DTYPE;
  if (p->n_tokens < 0 || p->n_experts < 1) return ML_ERR_SHAPE;
  if (p->top_k < 0 || p->top_k > p->n_experts) return ML_ERR_TOP_K;
  if (!(p->temperature > 0 && p->temperature <= DBL_MAX)) return ML_ERR_VALUE;
  if (ML_MUL_OVERFLOWS(p->n_tokens, p->n_experts, &logits)) return ML_ERR_OVERFLOW;
  if (logits > PTRDIFF_MAX / 8 || p->n_experts > PTRDIFF_MAX / (512 * MAX_TASKS)) return ML_ERR_OVERFLOW;
  if (p->n_tokens > 0 && (!rows.data || (p->top_k > 0 && !indices))) return ML_ERR_NULL;
  return ML_OK;
}

/* ---- forward ---- */

typedef struct {
  const ml_route_params *p;
  plan cut;
  void *weights;
  int64_t *indices;
  double *sums;    /* [n_tasks, width] */
  int64_t *counts; /* [n_tasks, width] */
  char *scratch;   /* of each thread */
} forward_job;

static void forward_tokens(void *context, int64_t task, int thread) {
  const forward_job *job = context;
  const plan *cut = &job->cut;
  cut->kernels->route(job->p, first_token(cut, task), end_token(cut, job->p, task), job->weights, job->indices,
                      job->counts + task * cut->width, job->sums + task * cut->width,
                      job->scratch + thread * cut->scratch);
}

ml_status ml_route(const ml_route_params *p, void *weights, int64_t *indices, int64_t *counts, void *prob_sums) {
  if (!p || !counts || !prob_sums || (p->n_tokens > 0 && !weights)) return ML_ERR_NULL;
  ml_status status = check(p, p->logits, indices);
  if (status != ML_OK) return status;

  forward_job job = {.p = p, .cut = make_plan(p), .weights = weights, .indices = indices};
  int64_t tasks = job.cut.n_tasks, width = job.cut.width, n = p->n_experts;
  size_t row_bytes = (size_t)(tasks * width) * 8, bytes = 2 * row_bytes + (size_t)(job.cut.n_threads * job.cut.scratch);
  _Alignas(CACHE_LINE) char room[ROOM];
  char *workspace = bytes <= ROOM ? room : malloc(bytes);
  if (!workspace) return ML_ERR_NO_MEMORY;
  memset(workspace, 0, 2 * row_bytes);
  job.sums = (double *)workspace;
  job.counts = (int64_t *)(workspace + row_bytes);
  job.scratch = workspace + 2 * row_bytes;
  ml_parallel_for(p->n_threads, tasks, forward_tokens, &job);

  for (int64_t task = 1; task < tasks; task++) {
    for (int64_t j = 0; j < n; j++) {
      job.sums[j] += job.sums[task * width + j];
      job.counts[j] += job.counts[task * width + j];
    }
  }
  memcpy(counts, job.counts, (size_t)n * sizeof *counts);
  if (p->dtype == ML_F64)
    memcpy(prob_sums, job.sums, (size_t)n * sizeof(double));
  else
    for (int64_t j = 0; j < n; j++) ((float *)prob_sums)[j] = (float)job.sums[j];
  if (workspace != room) free(workspace);
  return ML_OK;
}

/* ---- backward ---- */

typedef struct {
  const ml_route_params *p;
  plan cut;
  void *grad_logits;
  ml_matrix grad_weights;
  const int64_t *indices;
  const void *grad_sums;
  char *scratch; /* of each thread */
} backward_job;

static void backward_tokens(void *context, int64_t task, int thread) {
  const backward_job *job = context;
  const plan *cut = &job->cut;
  cut->kernels->route_backward(job->p, first_token(cut, task), end_token(cut, job->p, task), job->grad_logits,
                               job->grad_weights, job->indices, job->grad_sums, job->scratch + thread * cut->scratch);
}

ml_status ml_route_backward(const ml_route_params *p, void *grad_logits, ml_matrix grad_weights, const int64_t *indices,
                            const void *grad_prob_sums) {
  if (!p || (p->n_tokens > 0 && (!grad_logits || !grad_weights.data))) return ML_ERR_NULL;
  ml_status status = check(p, p->probs.data ? p->probs : p->logits, indices);
  if (status != ML_OK) return status;
  if (p->probs.data && p->top_k > 0) return ML_ERR_TOP_K;
  for (int64_t i = 0; i < p->n_tokens * p->top_k; i++)
    if (indices[i] < 0 || indices[i] >= p->n_experts) return ML_ERR_VALUE;

  backward_job job = {.p = p,
                      .cut = make_plan(p),
                      .grad_logits = grad_logits,
                      .grad_weights = grad_weights,
                      .indices = indices,
                      .grad_sums = grad_prob_sums};
  size_t bytes = (size_t)(job.cut.n_threads * job.cut.scratch);
  _Alignas(CACHE_LINE) char room[ROOM];
  job.scratch = bytes <= ROOM ? room : malloc(bytes);
  if (!job.scratch) return ML_ERR_NO_MEMORY;
  ml_parallel_for(p->n_threads, job.cut.n_tasks, backward_tokens, &job);
  if (job.scratch != room) free(job.scratch);
  return ML_OK;
}
