/* Parallel loops over tasks whose number and content depend on the problem's shape alone, never on the threads. */
#ifndef MOELORA_THREADS_H
#define MOELORA_THREADS_H

#include "moelora.h"

typedef void ml_task(void *context, int64_t task, int thread);

/* Runs task(context, i, thread) once for each i in [0, n_tasks), on at most n_threads threads (0: ml_get_num_threads())
 * and never more than ML_MAX_THREADS; `thread` is in [0, threads in use) and no two tasks run with the same one at once.
 * Returns when all are done. */
void ml_parallel_for(int n_threads, int64_t n_tasks, ml_task *task, void *context);

/* A loop yet to run. */
typedef struct {
  ml_task *task;
  void *context;
  int64_t n_tasks;
  int n_threads;
} ml_loop;

/* Runs loops that don't depend on each other as one, on as many threads as the widest of them may have: threads meet once,
 * at the end of all. */
void ml_parallel_loops(int n_loops, const ml_loop *loops);

/* How many threads ml_parallel_for uses at most for these arguments: the bound of `thread`, for workspaces. */
int ml_thread_bound(int n_threads, int64_t n_tasks);

/* Watches for forks; part of ml_init. */
void ml_threads_init(void);

#endif
