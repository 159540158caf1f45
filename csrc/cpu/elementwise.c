/*
 * elementwise.c - operations on rows or flat arrays without neighbours, divided by rows or by blocks.
 */
#include "ops.h"

#include <string.h>

#include "../philox.h"

enum { FLOATS_A_TASK = 16384 };

static int64_t rows_a_task(int64_t width)
{
    return width >= FLOATS_A_TASK ? 1 : FLOATS_A_TASK / (width > 0 ? width : 1);
}

/* The arguments of one operation on rows; a task takes `step` of them. */
struct rows_task {
    const struct gd_kernels *kernels;
    int64_t rows, step, width;
    enum gd_activation activation;
    float alpha, beta;
    const float *x, *dy;
    int64_t ldx, lddy;
    float *y;
    int64_t ldy;
};

static void run_rows(gd_context *context, gd_task *task, struct rows_task *t)
{
    t->kernels = gd_cpu_kernels(context);
    t->step = rows_a_task(t->width);
    gd_cpu_run(context, gd_divide_up(t->rows, t->step), task, t);
}

static void activate_rows(void *argument, int64_t index, int slot)
{
    const struct rows_task *t = argument;
    (void)slot;
    for (int64_t r = index * t->step; r < gd_smaller(t->rows, (index + 1) * t->step); r++)
        t->kernels->activate(t->activation, t->width, t->x + r * t->ldx, t->y + r * t->ldy);
}

void gd_cpu_activate(gd_context *context, enum gd_activation activation, int64_t rows, int64_t width, const float *z,
                     int64_t ldz, float *y, int64_t ldy)
{
    struct rows_task t = {.rows = rows, .width = width, .activation = activation, .x = z, .ldx = ldz, .y = y,
                          .ldy = ldy};
    if (!gd_refuses_activation(context, activation))
        run_rows(context, activate_rows, &t);
}

static void activate_backward_rows(void *argument, int64_t index, int slot)
{
    const struct rows_task *t = argument;
    (void)slot;
    for (int64_t r = index * t->step; r < gd_smaller(t->rows, (index + 1) * t->step); r++)
        t->kernels->activate_backward(t->activation, t->width, t->x + r * t->ldx, t->dy + r * t->lddy,
                                      t->y + r * t->ldy);
}

void gd_cpu_activate_backward(gd_context *context, enum gd_activation activation, int64_t rows, int64_t width,
                              const float *z, int64_t ldz, const float *dy, int64_t lddy, float *dz, int64_t lddz)
{
    struct rows_task t = {.rows = rows, .width = width, .activation = activation, .x = z, .ldx = ldz, .dy = dy,
                          .lddy = lddy, .y = dz, .ldy = lddz};
    if (!gd_refuses_activation(context, activation))
        run_rows(context, activate_backward_rows, &t);
}

/* The same, of operations with rows in bfloat16. */
struct bfloat16_task {
    struct rows_task rows; /* first, so that a pointer to it is one to the whole */
    const uint16_t *from;
    uint16_t *to;
    int64_t ld;
    float *z;
    int64_t ldz;
};

static void round_rows(void *argument, int64_t index, int slot)
{
    const struct bfloat16_task *t = argument;
    const struct rows_task *rows = &t->rows;
    (void)slot;
    for (int64_t r = index * rows->step; r < gd_smaller(rows->rows, (index + 1) * rows->step); r++)
        rows->kernels->round_row(rows->width, rows->x + r * rows->ldx, t->to + r * t->ld);
}

void gd_cpu_round_rows(gd_context *context, int64_t rows, int64_t width, const float *x, int64_t ldx, uint16_t *to,
                       int64_t ldto)
{
    struct bfloat16_task t = {.rows = {.rows = rows, .width = width, .x = x, .ldx = ldx}, .to = to, .ld = ldto};
    run_rows(context, round_rows, &t.rows);
}

static void widen_rows(void *argument, int64_t index, int slot)
{
    const struct bfloat16_task *t = argument;
    const struct rows_task *rows = &t->rows;
    (void)slot;
    for (int64_t r = index * rows->step; r < gd_smaller(rows->rows, (index + 1) * rows->step); r++)
        rows->kernels->widen_row(rows->activation, rows->width, t->from + r * t->ld, t->z + r * t->ldz,
                                 rows->y != NULL ? rows->y + r * rows->ldy : NULL);
}

void gd_cpu_widen_rows(gd_context *context, enum gd_activation activation, int64_t rows, int64_t width,
                       const uint16_t *from, int64_t ldfrom, float *z, int64_t ldz, float *y, int64_t ldy)
{
    struct bfloat16_task t = {.rows = {.rows = rows, .width = width, .activation = activation, .y = y, .ldy = ldy},
                              .from = from, .ld = ldfrom, .z = z, .ldz = ldz};
    if (!gd_refuses_activation(context, activation))
        run_rows(context, widen_rows, &t.rows);
}

static void axpby_rows(void *argument, int64_t index, int slot)
{
    const struct rows_task *t = argument;
    (void)slot;
    for (int64_t r = index * t->step; r < gd_smaller(t->rows, (index + 1) * t->step); r++)
        t->kernels->axpby(t->width, t->alpha, t->x + r * t->ldx, t->beta, t->y + r * t->ldy);
}

void gd_cpu_axpby(gd_context *context, int64_t rows, int64_t width, float alpha, const float *x, int64_t ldx,
                  float beta, float *y, int64_t ldy)
{
    struct rows_task t = {
        .rows = rows, .width = width, .alpha = alpha, .beta = beta, .x = x, .ldx = ldx, .y = y, .ldy = ldy};
    run_rows(context, axpby_rows, &t);
}

struct ragged_task {
    const struct gd_kernels *kernels;
    const struct gd_rows *rows;
    int64_t first, count, width, step;
    float *x;
    int64_t ldx;
    struct gd_dropout_row mask;
    uint32_t first_line;
};

static void dropout_rows(void *argument, int64_t index, int slot)
{
    const struct ragged_task *t = argument;
    int64_t b = 0;
    (void)slot;
    for (int64_t r = index * t->step; r < gd_smaller(t->count, (index + 1) * t->step); r++) {
        while (t->first + r >= t->rows->first[b + 1])
            b++;
        struct gd_dropout_row mask = t->mask;
        mask.frame = (uint32_t)(t->first + r - t->rows->first[b]);
        mask.line = t->first_line + (uint32_t)b;
        t->kernels->dropout(&mask, 0, t->width, t->x + r * t->ldx);
    }
}

void gd_cpu_dropout(gd_context *context, const struct gd_rows *rows, int64_t first, int64_t count, int64_t width,
                    float *x, int64_t ldx, double p, const gd_dropout_seed *seed, uint32_t site)
{
    struct ragged_task t = {gd_cpu_kernels(context), rows, first, count, width, rows_a_task(width), x, ldx,
                            gd_dropout_row(p, seed, site), (uint32_t)seed->first_utterance};
    gd_cpu_run(context, gd_divide_up(count, t.step), dropout_rows, &t);
}

/* A task copies `step` frames of one utterance of (B, T, width). */
struct padded_task {
    const struct gd_rows *rows;
    int64_t width, step, frames_max, tasks_each;
    const float *from;
    float *to;
    int64_t ld; /* of the ragged side */
};

static void run_padded(gd_context *context, gd_task *task, struct padded_task *t, int64_t longest)
{
    t->step = rows_a_task(t->width);
    t->tasks_each = gd_divide_up(longest, t->step);
    gd_cpu_run(context, t->rows->batch * t->tasks_each, task, t);
}

static void scatter(void *argument, int64_t index, int slot)
{
    const struct padded_task *t = argument;
    int64_t b = index / t->tasks_each, begin = index % t->tasks_each * t->step;
    size_t bytes = (size_t)t->width * sizeof(float);
    (void)slot;
    for (int64_t i = begin; i < gd_smaller(t->frames_max, begin + t->step); i++) {
        float *to = t->to + (b * t->frames_max + i) * t->width;
        if (i < t->rows->valid[b])
            memcpy(to, t->from + (t->rows->first[b] + i) * t->ld, bytes);
        else
            memset(to, 0, bytes);
    }
}

void gd_cpu_scatter_rows(gd_context *context, const struct gd_rows *rows, int64_t width, const float *x, int64_t ldx,
                         int64_t frames_max, float *padded)
{
    struct padded_task t = {.rows = rows, .width = width, .frames_max = frames_max, .from = x, .to = padded, .ld = ldx};
    run_padded(context, scatter, &t, frames_max);
}

static void gather(void *argument, int64_t index, int slot)
{
    const struct padded_task *t = argument;
    int64_t b = index / t->tasks_each, begin = index % t->tasks_each * t->step;
    int64_t own = t->rows->first[b + 1] - t->rows->first[b];
    size_t bytes = (size_t)t->width * sizeof(float);
    (void)slot;
    for (int64_t i = begin; i < gd_smaller(own, begin + t->step); i++) {
        float *to = t->to + (t->rows->first[b] + i) * t->ld;
        if (i < t->frames_max)
            memcpy(to, t->from + (b * t->frames_max + i) * t->width, bytes);
        else
            memset(to, 0, bytes);
    }
}

void gd_cpu_gather_rows(gd_context *context, const struct gd_rows *rows, int64_t width, const float *padded,
                        int64_t frames_max, float *x, int64_t ldx)
{
    struct padded_task t = {.rows = rows, .width = width, .frames_max = frames_max, .from = padded, .to = x, .ld = ldx};
    run_padded(context, gather, &t, rows->longest);
}
