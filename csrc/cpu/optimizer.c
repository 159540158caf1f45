/*
 * optimizer.c - operations on the flat parameters: the gradient's norm and the update.
 */
#include "ops.h"

enum { ADAMW_BLOCK = 32768, SUM_BLOCKS = 64 };

struct flat_task {
    const struct gd_kernels *kernels;
    size_t count, block;
    const float *x;
    double *sums;
    const struct gd_adamw_update *update;
};

static void square_block(void *argument, int64_t index, int slot)
{
    const struct flat_task *t = argument;
    size_t begin = (size_t)index * t->block, left = t->count - begin;
    (void)slot;
    t->sums[index] = t->kernels->sum_squares(left < t->block ? left : t->block, t->x + begin);
}

/* In at most SUM_BLOCKS blocks, whose bounds follow from the count alone, then in their order. */
double gd_cpu_sum_squares(gd_context *context, size_t count, const float *x)
{
    double sums[SUM_BLOCKS], sum = 0;
    struct flat_task t = {.kernels = gd_cpu_kernels(context), .count = count, .x = x, .sums = sums};
    t.block = (count + SUM_BLOCKS - 1) / SUM_BLOCKS;
    if (count == 0)
        return 0;
    int64_t blocks = (int64_t)((count + t.block - 1) / t.block);
    gd_cpu_run(context, blocks, square_block, &t);
    for (int64_t i = 0; i < blocks; i++)
        sum += sums[i];
    return sum;
}

static void update_block(void *argument, int64_t index, int slot)
{
    const struct flat_task *t = argument;
    size_t begin = (size_t)index * t->block, left = t->count - begin;
    (void)slot;
    t->kernels->adamw(t->update, begin, begin + (left < t->block ? left : t->block));
}

void gd_cpu_adamw(gd_context *context, const struct gd_adamw_update *update)
{
    struct flat_task t = {
        .kernels = gd_cpu_kernels(context), .count = update->count, .block = ADAMW_BLOCK, .update = update};
    gd_cpu_run(context, (int64_t)((update->count + t.block - 1) / t.block), update_block, &t);
}
