/*
 * threads.h - a fixed crew of threads that runs numbered tasks. The caller is one of the crew, in slot 0.
 */
#ifndef GD_CPU_THREADS_H
#define GD_CPU_THREADS_H

#include "../backend.h"

#define GD_MAX_THREADS 1024

struct gd_threads;

/* count: 1 .. GD_MAX_THREADS, the caller included. Threads start at the first run, and again in a child
 * process after fork(). */
gd_status gd_threads_create(int count, struct gd_threads **threads);
void gd_threads_free(struct gd_threads *threads);

/* Changes the size of the crew, between runs. Allocates nothing. */
void gd_threads_resize(struct gd_threads *threads, int count);

/* Calls task(argument, i, slot) once for each i < count and returns when all are done. From within a task
 * it runs them one after the other in the caller's slot. Where the system refuses a thread, the others do
 * its work. Threads of the crew take no signals but those of their own faults. */
void gd_threads_run(struct gd_threads *threads, int64_t count, gd_task *task, void *argument);

/* Slot of the calling thread: 0 outside of any task. */
int gd_threads_slot(void);

/* 1 within a task, where runs are not divided. */
int gd_threads_in_task(void);

#endif
