/* Three ways to run a parallel loop, the first that applies:
 *
 *   torch's libgomp   when libtorch_cpu is loaded: a second runtime's threads fight with torch's for the cores
 *   an own pool       workers spin briefly, then sleep; one loop at a time, a second caller meanwhile runs alone
 *   the caller alone  in a forked child, where neither of the above has its threads any more
 */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "compiler.h"

#ifndef _WIN32
#include <dlfcn.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <link.h>
#endif

/* ---- settings ---- */

static atomic_int requested_threads; /* 0: the default */
static atomic_int default_threads;   /* 0: not yet read */
static atomic_bool forked;

static int threads_from_environment(void) {
  static const char *const names[] = {"MOELORA_NUM_THREADS", "OMP_NUM_THREADS"};
  for (int i = 0; i < 2; i++) {
    const char *text = getenv(names[i]);
    char *end = NULL;
    long n = text ? strtol(text, &end, 10) : 0;
    if (text && end != text && n > 0) return n < ML_MAX_THREADS ? (int)n : ML_MAX_THREADS;
  }
  return 0;
}

static int usable_cpus(void) {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
#ifndef _WIN32
  long n = sysconf(_SC_NPROCESSORS_ONLN);
  if (n > 0) return n < ML_MAX_THREADS ? (int)n : ML_MAX_THREADS;
#endif
  return 1;
}

void ml_set_num_threads(int n) {
  if (n > ML_MAX_THREADS) n = ML_MAX_THREADS;
  atomic_store(&requested_threads, n > 0 ? n : 0);
}

int ml_get_num_threads(void) {
  int n = atomic_load(&requested_threads);
  if (n == 0) n = atomic_load(&default_threads);
  if (n == 0) {
    n = threads_from_environment();
    if (n == 0) n = usable_cpus();
    if (n > ML_MAX_THREADS) n = ML_MAX_THREADS;
    atomic_store(&default_threads, n);
  }
  return n;
}

int ml_thread_bound(int n_threads, int64_t n_tasks) {
  if (n_threads <= 0) n_threads = ml_get_num_threads();
  if (n_threads > ML_MAX_THREADS) n_threads = ML_MAX_THREADS;
  if (atomic_load(&forked)) n_threads = 1;
  if (n_tasks < n_threads) n_threads = (int)n_tasks;
  return n_threads > 1 ? n_threads : 1;
}

/* ---- the loop that every thread runs ---- */

/* Tasks of one thread, which it starts with: what it read and wrote in the last loop is in its own cache. */
typedef struct {
  _Alignas(64) _Atomic int64_t next;
  int64_t end;
} share;

typedef struct {
  ml_task *task;
  void *context;
  share *shares; /* [n_threads] */
  int n_threads;
  atomic_int next_thread;
} loop;

static void run_loop(void *argument) {
  loop *l = argument;
  int thread = atomic_fetch_add(&l->next_thread, 1);
  for (int i = 0; i < l->n_threads; i++) { /* its own share, then what others have not come to */
    share *s = &l->shares[(thread + i) % l->n_threads];
    for (;;) {
      int64_t task = atomic_fetch_add(&s->next, 1);
      if (task >= s->end) break;
      l->task(l->context, task, thread);
    }
  }
}

/* ---- torch's libgomp ---- */

typedef void gomp_parallel(void (*body)(void *), void *data, unsigned n_threads, unsigned flags);
static _Atomic(gomp_parallel *) torch_gomp;

#if defined(__linux__)
static int read_loads(struct dl_phdr_info *info, size_t size, void *loads) {
  (void)size;
  *(unsigned long long *)loads = info->dlpi_adds;
  return 1; /* the first entry will do */
}
#endif

static gomp_parallel *find_torch_gomp(void) {
  gomp_parallel *found = atomic_load(&torch_gomp);
#if defined(__linux__)
  static _Atomic unsigned long long
      looked; /* libraries loaded so far when torch was looked for, which takes its time */
  unsigned long long loads = 0;
  if (!found) dl_iterate_phdr(read_loads, &loads);
  if (!found && atomic_load(&looked) != loads) {
    void *torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY); /* kept: torch is never unloaded */
    if (torch) {
      void *symbol = dlsym(torch, "GOMP_parallel");
      __builtin_memcpy(&found, &symbol, sizeof found); /* ISO C has no cast from void * to a function */
      if (found) atomic_store(&torch_gomp, found);
    }
    atomic_store(&looked, loads);
  }
#endif
  return found;
}

/* ---- the own pool ---- */

enum {
  SPINS = 4000,  /* before a thread sleeps, or lets others run: longer than the gap between two loops of one call */
  IN_STATE = 128 /* more than the workers there can be */
};

static struct {
  pthread_mutex_t in_use; /* held by the caller whose loop runs */
  pthread_mutex_t lock;   /* of those who go to sleep */
  pthread_cond_t wake;
  int n_workers;
  loop *job;
  _Alignas(64) atomic_uint state; /* jobs so far * IN_STATE + workers that take part in the last: read as one */
  atomic_int sleepers;
  _Alignas(64) atomic_int running; /* workers that have not finished the job */
} pool = {.in_use = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

/* Waits until the state is another one than `seen`, and returns it. */
static unsigned wait_for_job(unsigned seen) {
  for (int s = 0; s < SPINS; s++) {
    unsigned state = atomic_load_explicit(&pool.state, memory_order_acquire);
    if (state != seen) return state;
    ML_PAUSE();
  }
  pthread_mutex_lock(&pool.lock);
  atomic_fetch_add(&pool.sleepers, 1); /* before the next look, as the caller counts before it looks for sleepers */
  while (atomic_load(&pool.state) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
  atomic_fetch_sub(&pool.sleepers, 1);
  pthread_mutex_unlock(&pool.lock);
  return atomic_load(&pool.state);
}

static void *pool_worker(void *argument) {
  unsigned index = (unsigned)(intptr_t)argument, seen = 0;
  for (;;) {
    seen = wait_for_job(seen);
    if (index >= seen % IN_STATE) continue;
    run_loop(pool.job); /* there is no next one before this worker is done */
    atomic_fetch_sub_explicit(&pool.running, 1, memory_order_release);
  }
  return NULL;
}

/* Starts workers until there are n; fewer where the system has no more to give. */
static void pool_grow(int n) {
  if (pool.n_workers >= n) return;
  pthread_attr_t attributes;
  if (pthread_attr_init(&attributes) != 0) return;
  pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
  while (pool.n_workers < n) {
    pthread_t thread;
    /* A new worker has seen state 0. It takes part in jobs from the next one on, since none runs now. */
    if (pthread_create(&thread, &attributes, pool_worker, (void *)(intptr_t)pool.n_workers) != 0) break;
    pool.n_workers++;
  }
  pthread_attr_destroy(&attributes);
}

static bool pool_run(loop *l, int n_threads) {
  if (pthread_mutex_trylock(&pool.in_use) != 0) return false;
  pool_grow(n_threads - 1);
  unsigned workers = (unsigned)(n_threads - 1 < pool.n_workers ? n_threads - 1 : pool.n_workers);
  unsigned jobs = atomic_load(&pool.state) / IN_STATE + 1;
  pool.job = l;
  atomic_store(&pool.running, (int)workers);
  atomic_store(&pool.state, jobs * IN_STATE + workers);
  if (atomic_load(&pool.sleepers)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
  }
  run_loop(l);
  for (int s = 0; atomic_load_explicit(&pool.running, memory_order_acquire) > 0; s++) {
    if (s < SPINS)
      ML_PAUSE();
    else
      sched_yield(); /* more threads than cores: spinning on would keep the worker from running */
  }
  pthread_mutex_unlock(&pool.in_use);
  return true;
}

/* ---- fork ---- */

#ifndef _WIN32
static void after_fork_in_child(void) { atomic_store(&forked, true); }
static void register_fork_handler(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }
#endif

void ml_threads_init(void) {
#ifndef _WIN32
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, register_fork_handler);
#endif
}

const char *ml_threading_layer(void) {
  if (atomic_load(&forked)) return "none (forked child)";
  return find_torch_gomp() ? "torch's libgomp" : "own pool";
}

void ml_parallel_for(int n_threads, int64_t n_tasks, ml_task *task, void *context) {
  share shares[ML_MAX_THREADS];
  n_threads = ml_thread_bound(n_threads, n_tasks);
  loop l = {.task = task, .context = context, .shares = shares, .n_threads = n_threads};
  for (int i = 0; i < n_threads; i++) {
    atomic_init(&shares[i].next, i * n_tasks / n_threads);
    shares[i].end = (i + 1) * n_tasks / n_threads;
  }
  if (n_threads > 1) {
    gomp_parallel *gomp = find_torch_gomp();
    if (gomp) {
      gomp(run_loop, &l, (unsigned)n_threads, 0);
      return;
    }
    if (pool_run(&l, n_threads)) return;
  }
  run_loop(&l);
}

typedef struct {
  int n_loops;
  const ml_loop *loops;
} several_loops;

static void run_task_of_several(void *context, int64_t task, int thread) {
  const several_loops *s = context;
  int i = 0;
  while (task >= s->loops[i].n_tasks) task -= s->loops[i++].n_tasks;
  s->loops[i].task(s->loops[i].context, task, thread);
}

void ml_parallel_loops(int n_loops, const ml_loop *loops) {
  several_loops s = {n_loops, loops};
  int64_t n_tasks = 0;
  int n_threads = 1;
  for (int i = 0; i < n_loops; i++) {
    n_tasks += loops[i].n_tasks;
    int n = ml_thread_bound(loops[i].n_threads, INT64_MAX);
    if (n > n_threads) n_threads = n;
  }
  ml_parallel_for(n_threads, n_tasks, run_task_of_several, &s);
}
