/* tasks.c - what every operation hands its tasks to. */
#include "ops.h"

struct run {
    const struct gd_kernels *kernels;
    gd_task *task;
    void *argument;
};

/* Leaves the processor as it was: the next task on this thread may be another library's. */
static void run_task(void *argument, int64_t index, int slot)
{
    const struct run *run = argument;
    run->task(run->argument, index, slot);
    for (int precision = GD_FLOAT32; precision <= GD_INT8; precision++)
        if (run->kernels->gemm[precision].release != NULL)
            run->kernels->gemm[precision].release();
}

void gd_cpu_run(gd_context *context, int64_t count, gd_task *task, void *argument)
{
    struct gd_cpu *cpu = context->device;
    struct run run = {cpu->kernels, task, argument};
    gd_threads_resize(cpu->threads, context->num_threads);
    gd_threads_run(cpu->threads, count, run_task, &run);
}
