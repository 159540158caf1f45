/*
 * threads_test.c - the crew of csrc/cpu/threads.h. Prints what failed; the exit status is 0 if nothing did.
 */
#include "../../csrc/cpu/threads.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CREW 3
#define TASKS 1000

static atomic_int failures;

static void expect(int condition, const char *what)
{
    if (!condition) {
        printf("FAILED: %s\n", what);
        atomic_fetch_add(&failures, 1);
    }
}

static struct gd_threads *new_crew(int count)
{
    struct gd_threads *crew = NULL;
    if (gd_threads_create(count, &crew) != GD_OK) {
        puts("FAILED: gd_threads_create");
        exit(1);
    }
    return crew;
}

struct counts {
    struct gd_threads *crew;
    atomic_int ran[TASKS];
    atomic_int in_slot[GD_MAX_THREADS]; /* tasks that run now */
    atomic_int wrong_slot, inner;
    int crew_count;
};

static void count_task(void *argument, int64_t index, int slot)
{
    struct counts *counts = argument;
    atomic_fetch_add(&counts->ran[index], 1);
    if (slot < 0 || slot >= counts->crew_count || slot != gd_threads_slot() ||
        atomic_fetch_add(&counts->in_slot[slot], 1) != 0)
        atomic_fetch_add(&counts->wrong_slot, 1);
    for (volatile int i = 0; i < 100; i++)
        ;
    atomic_fetch_sub(&counts->in_slot[slot], 1);
}

/* Every task once, one at a time in a slot. */
static void check_run(struct gd_threads *crew, int crew_count, int64_t tasks, const char *what)
{
    struct counts *counts = calloc(1, sizeof *counts);
    counts->crew_count = crew_count;
    gd_threads_run(crew, tasks, count_task, counts);
    int right = atomic_load(&counts->wrong_slot) == 0;
    for (int64_t i = 0; i < TASKS; i++)
        right = right && atomic_load(&counts->ran[i]) == (i < tasks);
    expect(right, what);
    expect(gd_threads_slot() == 0, "the caller's slot is 0 after a run");
    free(counts);
}

static void test_runs(void)
{
    struct gd_threads *crew = new_crew(CREW), *idle = new_crew(CREW);
    for (int64_t tasks = 0; tasks < 20; tasks++)
        check_run(crew, CREW, tasks, "few tasks");
    check_run(crew, CREW, TASKS, "many tasks");
    for (int i = 0; i < 2000; i++)
        check_run(crew, CREW, 2 + i % 5, "run after run");
    for (int i = 0; i < 20; i++) {
        usleep(1000); /* the workers sleep */
        check_run(crew, CREW, 7, "a run after sleep");
    }
    for (int count = 1; count < 6; count++) {
        gd_threads_resize(crew, count % 4 + 1);
        check_run(crew, count % 4 + 1, 50, "a run after a change of size");
    }
    gd_threads_free(crew);
    gd_threads_free(idle);
    gd_threads_free(NULL);
}

struct meeting {
    atomic_int here, late;
};

static void meet_task(void *argument, int64_t index, int slot)
{
    struct meeting *meeting = argument;
    (void)index, (void)slot;
    atomic_fetch_add(&meeting->here, 1);
    for (int i = 0; i < 10000 && atomic_load(&meeting->here) < CREW; i++)
        usleep(1000);
    if (atomic_load(&meeting->here) < CREW)
        atomic_store(&meeting->late, 1);
}

static void test_at_once(void)
{
    struct gd_threads *crew = new_crew(1);
    struct meeting meeting = {0};
    gd_threads_resize(crew, CREW);
    gd_threads_run(crew, CREW, meet_task, &meeting);
    expect(atomic_load(&meeting.late) == 0, "as many tasks as threads run at once");
    gd_threads_free(crew);
}

static void inner_task(void *argument, int64_t index, int slot)
{
    struct counts *counts = argument;
    (void)index;
    if (slot == gd_threads_slot())
        atomic_fetch_add(&counts->inner, 1);
}

static void outer_task(void *argument, int64_t index, int slot)
{
    struct counts *counts = argument;
    gd_threads_run(counts->crew, 3, inner_task, counts);
    if (slot != gd_threads_slot())
        atomic_fetch_add(&counts->wrong_slot, 1);
    atomic_fetch_add(&counts->ran[index], 1);
}

static void test_nested(void)
{
    struct counts *counts = calloc(1, sizeof *counts);
    counts->crew = new_crew(CREW);
    gd_threads_run(counts->crew, 100, outer_task, counts);
    expect(atomic_load(&counts->inner) == 300, "tasks of runs within tasks");
    expect(atomic_load(&counts->wrong_slot) == 0, "a run within a task keeps its slot");
    gd_threads_free(counts->crew);
    free(counts);
}

static void *run_own_crew(void *argument)
{
    struct gd_threads *crew = new_crew(2);
    (void)argument;
    for (int i = 0; i < 500; i++)
        check_run(crew, 2, 3 + i % 7, "two crews at once");
    gd_threads_free(crew);
    return NULL;
}

static void test_two_crews(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, run_own_crew, NULL);
    run_own_crew(NULL);
    pthread_join(thread, NULL);
}

static atomic_int signals, signals_in_workers;
static pthread_t host;

static void count_signal(int number)
{
    (void)number;
    atomic_fetch_add(&signals, 1);
    if (!pthread_equal(pthread_self(), host))
        atomic_fetch_add(&signals_in_workers, 1);
}

/* A signal to the process that the host's thread blocks waits for it, though workers that don't are there; and of a
 * storm of them none is handled by a worker. */
static void test_signals(void)
{
    struct gd_threads *crew = new_crew(CREW);
    struct sigaction action = {.sa_handler = count_signal, .sa_flags = SA_RESTART}, former[2];
    const int numbers[] = {SIGUSR1, SIGALRM};
    const struct itimerval every = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
    sigset_t both, mask, pending;
    sigemptyset(&both);
    for (int i = 0; i < 2; i++) {
        sigaddset(&both, numbers[i]);
        sigaction(numbers[i], &action, &former[i]);
    }
    host = pthread_self();
    pthread_sigmask(SIG_UNBLOCK, &both, &mask);
    check_run(crew, CREW, TASKS, "a run that starts the workers");
    sigset_t after;
    pthread_sigmask(SIG_BLOCK, &both, &after);
    expect(!sigismember(&after, SIGUSR1), "the caller's mask is what it was");
    kill(getpid(), SIGUSR1);
    usleep(20000);
    sigpending(&pending);
    expect(sigismember(&pending, SIGUSR1) && atomic_load(&signals) == 0, "a blocked signal waits for the host");
    pthread_sigmask(SIG_UNBLOCK, &both, NULL);
    expect(atomic_load(&signals) == 1, "and comes to it");

    setitimer(ITIMER_REAL, &every, NULL);
    for (int i = 0; i < 500 || (i < 100000 && atomic_load(&signals) < 20); i++) {
        kill(getpid(), SIGUSR1);
        check_run(crew, CREW, 50, "a run in a storm of signals");
    }
    setitimer(ITIMER_REAL, &never, NULL);
    expect(atomic_load(&signals) >= 20, "signals were handled");
    expect(atomic_load(&signals_in_workers) == 0, "no worker handles a signal");
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    for (int i = 0; i < 2; i++)
        sigaction(numbers[i], &former[i], NULL);
    gd_threads_free(crew);
}

/* A child process has none of its parent's threads, and starts its own. (Which ThreadSanitizer cannot follow.) */
__attribute__((unused)) static void test_fork(void)
{
    struct gd_threads *crew = new_crew(CREW);
    check_run(crew, CREW, TASKS, "before fork");
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        alarm(20);
        check_run(crew, CREW, TASKS, "in the child of fork");
        gd_threads_resize(crew, 2);
        check_run(crew, 2, TASKS, "in the child of fork, after a change of size");
        gd_threads_free(crew);
        fflush(stdout);
        _exit(atomic_load(&failures) != 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child of fork");
    check_run(crew, CREW, TASKS, "in the parent after fork");

    fflush(stdout);
    child = fork();
    if (child == 0) {
        alarm(20);
        gd_threads_free(crew); /* of threads that are not there */
        _exit(0);
    }
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "freeing a crew in the child of fork");
    gd_threads_free(crew);
}

int main(void)
{
    struct gd_threads *crew;
    expect(gd_threads_create(0, &crew) == GD_EINVAL, "no threads are refused");
    expect(gd_threads_create(GD_MAX_THREADS + 1, &crew) == GD_EINVAL, "too many threads are refused");
    test_runs();
    test_at_once();
    test_nested();
    test_two_crews();
    test_signals();
#ifndef __SANITIZE_THREAD__
    test_fork();
#endif
    puts(atomic_load(&failures) == 0 ? "passed" : "failed");
    return atomic_load(&failures) != 0;
}
