/*
 * norm.c - LayerNorm: rows are divided for outputs and input gradients, columns for parameter gradients.
 */
#include "ops.h"

enum { FLOATS_A_TASK = 16384, COLUMNS_A_TASK = 64 };

static int64_t rows_a_task(int64_t width)
{
    return width >= FLOATS_A_TASK ? 1 : FLOATS_A_TASK / width;
}

struct norm_task {
    const struct gd_kernels *kernels;
    const void *op;
    int64_t count, step; /* rows or columns in all, and a task */
};

static void run(gd_context *context, gd_task *task, const void *op, int64_t count, int64_t step)
{
    struct norm_task t = {gd_cpu_kernels(context), op, count, step};
    gd_cpu_run(context, gd_divide_up(count, step), task, &t);
}

static void rows_forward(void *argument, int64_t index, int slot)
{
    const struct norm_task *t = argument;
    (void)slot;
    t->kernels->layer_norm(t->op, index * t->step, gd_smaller(t->count, (index + 1) * t->step));
}

static void rows_backward(void *argument, int64_t index, int slot)
{
    const struct norm_task *t = argument;
    (void)slot;
    t->kernels->layer_norm_backward(t->op, index * t->step, gd_smaller(t->count, (index + 1) * t->step));
}

static void columns_backward(void *argument, int64_t index, int slot)
{
    const struct norm_task *t = argument;
    (void)slot;
    t->kernels->layer_norm_backward_params(t->op, index * t->step, gd_smaller(t->count, (index + 1) * t->step));
}

void gd_cpu_layer_norm(gd_context *context, const struct gd_layer_norm *n)
{
    run(context, rows_forward, n, n->rows, rows_a_task(n->width));
}

void gd_cpu_layer_norm_backward(gd_context *context, const struct gd_layer_norm_backward *n)
{
    /* Parameters first: dx may be dy. */
    run(context, columns_backward, n, n->width, COLUMNS_A_TASK);
    run(context, rows_backward, n, n->rows, rows_a_task(n->width));
}
