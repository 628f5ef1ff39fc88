/* Routing: logits [T, N] to mixture weights [T, N], and back.
 *
 *   p = softmax(logits / temperature)                 per token
 *   K = the k largest p, ties to the lower index      all of them where top_k == 0
 *   w = p on K and 0 elsewhere, divided by the sum of p over K where asked
 *   counts_i = unmasked tokens with i in K;  prob_sums_i = sum of p_i over unmasked tokens
 *
 * Both dtypes are computed in double and rounded once, when they are stored: f32 and f64 logits of equal value pick the
 * same experts, and p differs wherever logits do, save where it underflows.
 *
 * A NaN or +inf logit makes its whole row NaN, as does a row of nothing but -inf. Such a row picks its first k experts;
 * their weights are NaN, those of the others 0. A -inf logit beside finite ones is an expert of weight 0.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "compiler.h"
#include "moelora.h"
#include "threads.h"

/* Tokens are cut into tasks by the shape alone, so that sums do not depend on the threads. A task below this many
 * logits is not worth another thread, and a task for each thread is all that can run at once. */
enum { MIN_TASK_LOGITS = 8192, MAX_TASKS = ML_MAX_THREADS };

typedef struct {
  int64_t n_tasks, tokens_per_task;
  int64_t width; /* N rounded up to whole cache lines: tasks must not share one */
} plan;

static plan make_plan(const ml_route_params *p) {
  int64_t least = (MIN_TASK_LOGITS - 1) / p->n_experts + 1;
  int64_t share = (p->n_tokens + MAX_TASKS - 1) / MAX_TASKS;
  plan cut = {.tokens_per_task = share > least ? share : least, .width = (p->n_experts + 7) / 8 * 8};
  cut.n_tasks = p->n_tokens > 0 ? (p->n_tokens - 1) / cut.tokens_per_task + 1 : 1;
  return cut;
}

static int64_t first_token(const plan *cut, int64_t task) { return task * cut->tokens_per_task; }

static int64_t end_token(const plan *cut, const ml_route_params *p, int64_t task) {
  int64_t end = first_token(cut, task) + cut->tokens_per_task;
  return end < p->n_tokens ? end : p->n_tokens;
}

/* A workspace of `rows` arrays of `width` doubles for each task, zeroed. */
static double *make_workspace(const plan *cut, int64_t rows) {
  return calloc((size_t)(cut->n_tasks * rows), (size_t)cut->width * sizeof(double));
}

static ml_status check(const ml_route_params *p, const int64_t *indices) {
  int64_t logits;
  if (p->dtype != ML_F32 && p->dtype != ML_F64) return ML_ERR_DTYPE;
  if (p->n_tokens < 0 || p->n_experts < 1) return ML_ERR_SHAPE;
  if (p->top_k < 0 || p->top_k > p->n_experts) return ML_ERR_TOP_K;
  if (!(p->temperature > 0 && p->temperature <= DBL_MAX)) return ML_ERR_VALUE;
  if (ML_MUL_OVERFLOWS(p->n_tokens, p->n_experts, &logits)) return ML_ERR_OVERFLOW;
  if (logits > PTRDIFF_MAX / 8 || p->n_experts > PTRDIFF_MAX / (64 * MAX_TASKS)) return ML_ERR_OVERFLOW;
  if (p->n_tokens > 0 && (!p->logits.data || (p->top_k > 0 && !indices))) return ML_ERR_NULL;
  return ML_OK;
}

static double element(ml_dtype dtype, const void *data, int64_t at) {
  return dtype == ML_F64 ? ((const double *)data)[at] : (double)((const float *)data)[at];
}

/* row [n] = data[at + j * stride] */
static void load(ml_dtype dtype, const void *data, int64_t at, int64_t stride, int64_t n, double *row) {
  if (dtype == ML_F64)
    for (int64_t j = 0; j < n; j++) row[j] = ((const double *)data)[at + j * stride];
  else
    for (int64_t j = 0; j < n; j++) row[j] = (double)((const float *)data)[at + j * stride];
}

/* data[at + j] = row [n] */
static void store(ml_dtype dtype, void *data, int64_t at, int64_t n, const double *row) {
  if (dtype == ML_F64)
    memcpy((double *)data + at, row, (size_t)n * sizeof(double));
  else
    for (int64_t j = 0; j < n; j++) ((float *)data)[at + j] = (float)row[j];
}

static bool counted(const ml_route_params *p, int64_t token) {
  return !p->mask || p->mask[token * p->mask_stride] != 0;
}

/* prob [N] = softmax(logits[token] / temperature) */
static void softmax(const ml_route_params *p, int64_t token, double *prob) {
  int64_t n = p->n_experts;
  load(p->dtype, p->logits.data, token * p->logits.row, p->logits.col, n, prob);
  double largest = prob[0], sum = 0;
  for (int64_t j = 1; j < n; j++) largest = prob[j] > largest ? prob[j] : largest;
  /* the difference first: dividing first would overflow for small temperatures */
  for (int64_t j = 0; j < n; j++) {
    prob[j] = exp((prob[j] - largest) / p->temperature);
    sum += prob[j];
  }
  for (int64_t j = 0; j < n; j++) prob[j] /= sum;
}

/* A total order on the experts of a token: larger p first, then the lower index, which also decides among NaN. */
static bool comes_after(const double *prob, int64_t a, int64_t b) {
  return prob[a] < prob[b] || (!(prob[a] > prob[b]) && a > b);
}

/* Restores the heap order of heap [k], where each expert comes after its children, from `at` downwards. */
static void sift_down(const double *prob, int64_t *heap, int64_t k, int64_t at) {
  int64_t moved = heap[at];
  for (int64_t child = 2 * at + 1; child < k; child = 2 * at + 1) {
    if (child + 1 < k && comes_after(prob, heap[child + 1], heap[child])) child++;
    if (!comes_after(prob, heap[child], moved)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

/* kept [k] = the k first of prob [n], in order. A heap whose root is the last of those kept: O(n log k) at worst, and
 * one comparison for an expert that is not kept. */
static void select_top(const double *prob, int64_t n, int64_t k, int64_t *kept) {
  for (int64_t i = 0; i < k; i++) kept[i] = i;
  for (int64_t i = k / 2 - 1; i >= 0; i--) sift_down(prob, kept, k, i);
  for (int64_t i = k; i < n; i++) {
    if (!comes_after(prob, kept[0], i)) continue;
    kept[0] = i;
    sift_down(prob, kept, k, 0);
  }
  for (int64_t left = k - 1; left > 0; left--) {
    int64_t last = kept[0];
    kept[0] = kept[left];
    kept[left] = last;
    sift_down(prob, kept, left, 0);
  }
}

/* ---- forward ---- */

typedef struct {
  const ml_route_params *p;
  plan cut;
  void *weights;
  int64_t *indices;
  double *prob;    /* [n_tasks, width] scratch */
  double *sums;    /* [n_tasks, width] prob_sums of each task */
  int64_t *counts; /* [n_tasks, width] */
} forward_job;

static void forward_tokens(void *context, int64_t task, int thread) {
  const forward_job *job = context;
  const ml_route_params *p = job->p;
  int64_t n = p->n_experts, k = p->top_k;
  double *prob = job->prob + task * job->cut.width;
  double *sums = job->sums + task * job->cut.width;
  int64_t *counts = job->counts + task * job->cut.width;
  (void)thread;

  for (int64_t t = first_token(&job->cut, task); t < end_token(&job->cut, p, task); t++) {
    softmax(p, t, prob);
    if (counted(p, t)) {
      for (int64_t j = 0; j < n; j++) sums[j] += prob[j];
      if (k == 0)
        for (int64_t j = 0; j < n; j++) counts[j]++;
    }
    if (k > 0) {
      int64_t *kept = job->indices + t * k;
      select_top(prob, n, k, kept);
      double norm = 1;
      if (p->renormalize) {
        norm = 0;
        for (int64_t i = 0; i < k; i++) norm += prob[kept[i]];
      }
      size_t size = p->dtype == ML_F64 ? sizeof(double) : sizeof(float);
      memset((char *)job->weights + (size_t)(t * n) * size, 0, (size_t)n * size);
      for (int64_t i = 0; i < k; i++) {
        double w = prob[kept[i]] / norm;
        store(p->dtype, job->weights, t * n + kept[i], 1, &w);
        if (counted(p, t)) counts[kept[i]]++;
      }
    } else {
      store(p->dtype, job->weights, t * n, n, prob);
    }
  }
}

ml_status ml_route(const ml_route_params *p, void *weights, int64_t *indices, int64_t *counts, void *prob_sums) {
  if (!p || !counts || !prob_sums || (p->n_tokens > 0 && !weights)) return ML_ERR_NULL;
  ml_status status = check(p, indices);
  if (status != ML_OK) return status;

  forward_job job = {.p = p, .cut = make_plan(p), .weights = weights, .indices = indices};
  int64_t rows = job.cut.n_tasks, width = job.cut.width, n = p->n_experts;
  double *workspace = make_workspace(&job.cut, 2);
  job.counts = calloc((size_t)rows, (size_t)width * sizeof(int64_t));
  if (!workspace || !job.counts) {
    status = ML_ERR_NO_MEMORY;
    goto done;
  }
  job.prob = workspace;
  job.sums = workspace + rows * width;
  ml_parallel_for(p->n_threads, rows, forward_tokens, &job);

  for (int64_t task = 1; task < rows; task++) {
    for (int64_t j = 0; j < n; j++) {
      job.sums[j] += job.sums[task * width + j];
      job.counts[j] += job.counts[task * width + j];
    }
  }
  store(p->dtype, prob_sums, 0, n, job.sums);
  memcpy(counts, job.counts, (size_t)n * sizeof(int64_t));
done:
  free(workspace);
  free(job.counts);
  return status;
}

/* ---- backward ---- */

typedef struct {
  const ml_route_params *p;
  plan cut;
  void *grad_logits;
  ml_matrix grad_weights;
  const int64_t *indices;
  const double *grad_sums; /* [N]; NULL: none */
  double *prob, *grad;     /* [n_tasks, width] scratch */
} backward_job;

/* With g = dL/dp, first through the renormalisation w_i = p_i / S, S = sum of p over K, then through the softmax:
 *
 *   g_i       = (grad_w_i - sum_K grad_w w) / S     on K, 0 elsewhere; grad_w_i where nothing is renormalised
 *   g_i      += grad_prob_sums_i                    unmasked tokens
 *   grad_logits_i = p_i (g_i - sum g p) / temperature
 */
static void backward_tokens(void *context, int64_t task, int thread) {
  const backward_job *job = context;
  const ml_route_params *p = job->p;
  int64_t n = p->n_experts, k = p->top_k;
  double *prob = job->prob + task * job->cut.width;
  double *grad = job->grad + task * job->cut.width;
  (void)thread;

  for (int64_t t = first_token(&job->cut, task); t < end_token(&job->cut, p, task); t++) {
    int64_t row = t * job->grad_weights.row, col = job->grad_weights.col;
    softmax(p, t, prob);
    if (k == 0) {
      load(p->dtype, job->grad_weights.data, row, col, n, grad);
    } else {
      const int64_t *kept = job->indices + t * k;
      double norm = 0, mean = 0;
      memset(grad, 0, (size_t)n * sizeof *grad);
      for (int64_t i = 0; i < k; i++) {
        grad[kept[i]] = element(p->dtype, job->grad_weights.data, row + kept[i] * col);
        norm += prob[kept[i]];
      }
      if (p->renormalize) {
        for (int64_t i = 0; i < k; i++) mean += grad[kept[i]] * (prob[kept[i]] / norm);
        for (int64_t i = 0; i < k; i++) grad[kept[i]] = (grad[kept[i]] - mean) / norm;
      }
    }
    if (job->grad_sums && counted(p, t))
      for (int64_t j = 0; j < n; j++) grad[j] += job->grad_sums[j];
    double mean = 0;
    for (int64_t j = 0; j < n; j++) mean += grad[j] * prob[j];
    for (int64_t j = 0; j < n; j++) grad[j] = prob[j] * (grad[j] - mean) / p->temperature;
    store(p->dtype, job->grad_logits, t * n, n, grad);
  }
}

ml_status ml_route_backward(const ml_route_params *p, void *grad_logits, ml_matrix grad_weights, const int64_t *indices,
                            const void *grad_prob_sums) {
  if (!p || (p->n_tokens > 0 && (!grad_logits || !grad_weights.data))) return ML_ERR_NULL;
  ml_status status = check(p, indices);
  if (status != ML_OK) return status;
  for (int64_t i = 0; i < p->n_tokens * p->top_k; i++)
    if (indices[i] < 0 || indices[i] >= p->n_experts) return ML_ERR_VALUE;

  backward_job job = {
      .p = p, .cut = make_plan(p), .grad_logits = grad_logits, .grad_weights = grad_weights, .indices = indices};
  int64_t rows = job.cut.n_tasks, width = job.cut.width;
  double *workspace = make_workspace(&job.cut, 3); /* a row for grad_prob_sums too */
  if (!workspace) return ML_ERR_NO_MEMORY;
  job.prob = workspace;
  job.grad = workspace + rows * width;
  if (grad_prob_sums) {
    double *grad_sums = workspace + 2 * rows * width;
    load(p->dtype, grad_prob_sums, 0, 1, p->n_experts, grad_sums);
    job.grad_sums = grad_sums;
  }
  ml_parallel_for(p->n_threads, rows, backward_tokens, &job);
  free(workspace);
  return ML_OK;
}
