/*
 * loss.c - the distillation loss: rows are divided, their terms then added up in row order.
 */
#include "ops.h"

enum { ROWS_A_TASK = 16 };

struct loss_task {
    const struct gd_kernels *kernels;
    const struct gd_loss_rows *loss;
};

static void loss_block(void *argument, int64_t index, int slot)
{
    const struct loss_task *t = argument;
    int64_t end = (index + 1) * ROWS_A_TASK;
    (void)slot;
    for (int64_t r = index * ROWS_A_TASK; r < (end < t->loss->rows ? end : t->loss->rows); r++)
        t->kernels->loss_row(t->loss, r);
}

void gd_cpu_loss_rows(gd_context *context, const struct gd_loss_rows *loss)
{
    struct loss_task t = {gd_cpu_kernels(context), loss};
    gd_cpu_run(context, gd_divide_up(loss->rows, ROWS_A_TASK), loss_block, &t);
    for (int64_t r = 0; r < loss->rows; r++)
        for (int term = 0; term < 3; term++)
            loss->sums[term] += loss->terms[3 * r + term];
}
