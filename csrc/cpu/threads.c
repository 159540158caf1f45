/*
 * threads.c - the crew. A job is a word of 64 bits: its number, and how many of its tasks nobody has taken
 * yet. Whoever takes a task does so by compare-and-swap on that word, so a worker that is late (asleep, or
 * preempted by another program) is not waited for: the others take its share.
 */
#define _GNU_SOURCE /* pthread_setname_np() */
#include "threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

/* Longest that an idle thread spins before it sleeps: longer than the gaps between the operations of one
 * forward pass, shorter than anything that a user would notice as load. */
#define SPIN_NANOSECONDS 40000

#define TASKS_LEFT(word) ((uint32_t)(word))
#define MOST_TASKS ((int64_t)1 << 30)

struct worker {
    pthread_t thread;
    struct gd_threads *crew;
    int slot;
};

struct gd_threads {
    int count;   /* the caller and its workers */
    int started; /* workers that run */
    pid_t pid;   /* process that they run in */
    struct worker workers[GD_MAX_THREADS - 1];

    /* The job: constant from the store to `word` until `unfinished` is 0. */
    gd_task *task;
    void *argument;
    int64_t base;
    uint32_t tasks;

    _Alignas(64) atomic_uint_least64_t word; /* job number << 32 | tasks not taken */
    _Alignas(64) atomic_uint_least32_t unfinished;
    atomic_int sleepers; /* workers that wait for `work` */
    atomic_int waiting;  /* the caller waits for `done` */
    atomic_int stop;
    pthread_mutex_t mutex;
    pthread_cond_t work, done;
};

static _Thread_local int thread_slot;
static _Thread_local int thread_in_task;

int gd_threads_slot(void)
{
    return thread_slot;
}

int gd_threads_in_task(void)
{
    return thread_in_task;
}

static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Runs tasks until none is left to take. */
static void work_on(struct gd_threads *crew, int slot)
{
    uint64_t word = atomic_load(&crew->word);
    while (TASKS_LEFT(word) != 0) {
        if (!atomic_compare_exchange_weak(&crew->word, &word, word - 1))
            continue;
        int64_t index = crew->base + (int64_t)(crew->tasks - TASKS_LEFT(word));
        thread_in_task = 1;
        crew->task(crew->argument, index, slot);
        thread_in_task = 0;
        if (atomic_fetch_sub(&crew->unfinished, 1) == 1 && atomic_load(&crew->waiting)) {
            pthread_mutex_lock(&crew->mutex);
            pthread_cond_signal(&crew->done);
            pthread_mutex_unlock(&crew->mutex);
        }
        word = atomic_load(&crew->word);
    }
}

/* Something to do: the sleeper counts itself before it looks, whoever brings work looks for sleepers after. */
static int called(struct gd_threads *crew)
{
    return TASKS_LEFT(atomic_load(&crew->word)) != 0 || atomic_load(&crew->stop);
}

static void *worker_main(void *argument)
{
    struct worker *worker = argument;
    struct gd_threads *crew = worker->crew;
    thread_slot = worker->slot;
    while (!atomic_load(&crew->stop)) {
        work_on(crew, worker->slot);
        for (int64_t end = nanoseconds() + SPIN_NANOSECONDS; !called(crew) && nanoseconds() < end;)
            for (int i = 0; i < 16 && !called(crew); i++)
                relax();
        if (called(crew))
            continue;
        pthread_mutex_lock(&crew->mutex);
        atomic_fetch_add(&crew->sleepers, 1);
        while (!called(crew))
            pthread_cond_wait(&crew->work, &crew->mutex);
        atomic_fetch_sub(&crew->sleepers, 1);
        pthread_mutex_unlock(&crew->mutex);
    }
    return NULL;
}

static void wake(struct gd_threads *crew)
{
    if (atomic_load(&crew->sleepers) == 0)
        return;
    pthread_mutex_lock(&crew->mutex);
    pthread_cond_broadcast(&crew->work);
    pthread_mutex_unlock(&crew->mutex);
}

/* State of a crew without workers. In a child of fork() the mutex may have been copied while locked. */
static void reset(struct gd_threads *crew)
{
    crew->started = 0;
    crew->pid = getpid();
    atomic_store(&crew->word, 0);
    atomic_store(&crew->unfinished, 0);
    atomic_store(&crew->sleepers, 0);
    atomic_store(&crew->waiting, 0);
    atomic_store(&crew->stop, 0);
    pthread_mutex_init(&crew->mutex, NULL);
    pthread_cond_init(&crew->work, NULL);
    pthread_cond_init(&crew->done, NULL);
}

/* Signals that a thread brings on itself, by a fault: blocked, they would end the process without its handler. */
static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT};

/* Workers inherit the mask of the thread that starts them. They block what is sent to the process: its handlers run in
 * threads that the host started, and a signal that the host blocks, to wait for it, finds no way around that. */
static void start_workers(struct gd_threads *crew)
{
    sigset_t blocked, former;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&blocked, faults[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &former);
    while (crew->started < crew->count - 1) {
        struct worker *worker = &crew->workers[crew->started];
        worker->crew = crew;
        worker->slot = crew->started + 1;
        if (pthread_create(&worker->thread, NULL, worker_main, worker) != 0)
            break;
#ifdef __linux__
        pthread_setname_np(worker->thread, "gendistiller"); /* in debuggers and profilers */
#endif
        crew->started++;
    }
    pthread_sigmask(SIG_SETMASK, &former, NULL);
}

static void start(struct gd_threads *crew)
{
    if (crew->pid != getpid())
        reset(crew);
    if (crew->started < crew->count - 1)
        start_workers(crew);
}

static void stop(struct gd_threads *crew)
{
    if (crew->pid != getpid()) {
        reset(crew);
        return;
    }
    atomic_store(&crew->stop, 1);
    wake(crew);
    for (int i = 0; i < crew->started; i++)
        pthread_join(crew->workers[i].thread, NULL);
    crew->started = 0;
    atomic_store(&crew->stop, 0);
}

gd_status gd_threads_create(int count, struct gd_threads **threads)
{
    struct gd_threads *crew = NULL;
    void *memory;
    if (count < 1 || count > GD_MAX_THREADS)
        return GD_EINVAL;
    if (posix_memalign(&memory, 64, sizeof *crew) != 0)
        return GD_ENOMEM;
    crew = memory;
    crew->count = count;
    reset(crew);
    *threads = crew;
    return GD_OK;
}

void gd_threads_free(struct gd_threads *crew)
{
    if (crew == NULL)
        return;
    stop(crew);
    pthread_cond_destroy(&crew->done);
    pthread_cond_destroy(&crew->work);
    pthread_mutex_destroy(&crew->mutex);
    free(crew);
}

void gd_threads_resize(struct gd_threads *crew, int count)
{
    count = count < 1 ? 1 : count > GD_MAX_THREADS ? GD_MAX_THREADS : count;
    if (count == crew->count)
        return;
    if (count < crew->count)
        stop(crew);
    crew->count = count;
}

static void wait_until_done(struct gd_threads *crew)
{
    int64_t end = nanoseconds() + SPIN_NANOSECONDS;
    while (atomic_load(&crew->unfinished) != 0 && nanoseconds() < end)
        for (int i = 0; i < 16 && atomic_load(&crew->unfinished) != 0; i++)
            relax();
    if (atomic_load(&crew->unfinished) == 0)
        return;
    pthread_mutex_lock(&crew->mutex);
    atomic_store(&crew->waiting, 1);
    while (atomic_load(&crew->unfinished) != 0)
        pthread_cond_wait(&crew->done, &crew->mutex);
    atomic_store(&crew->waiting, 0);
    pthread_mutex_unlock(&crew->mutex);
}

void gd_threads_run(struct gd_threads *crew, int64_t count, gd_task *task, void *argument)
{
    if (thread_in_task || count < 2 || crew->count < 2) {
        int outer = thread_in_task;
        thread_in_task = 1;
        for (int64_t i = 0; i < count; i++)
            task(argument, i, thread_slot);
        thread_in_task = outer;
        return;
    }
    start(crew);
    crew->task = task;
    crew->argument = argument;
    for (int64_t base = 0; base < count; base += MOST_TASKS) {
        uint32_t tasks = (uint32_t)(count - base < MOST_TASKS ? count - base : MOST_TASKS);
        uint64_t number = (atomic_load(&crew->word) >> 32) + 1;
        crew->base = base;
        crew->tasks = tasks;
        atomic_store(&crew->unfinished, tasks);
        atomic_store(&crew->word, number << 32 | tasks);
        wake(crew);
        work_on(crew, 0);
        wait_until_done(crew);
    }
}
