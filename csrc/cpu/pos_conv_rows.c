/* pos_conv_rows.c - what the two ways to compute pos_conv() do with some rows of an utterance. */
#include "pos_conv.h"

#include <string.h>

/* How many of `rows` rows lie among the `most` that begin at t. */
static int64_t within(int64_t rows, int64_t t, int64_t most)
{
    return rows <= t ? 0 : gd_smaller(rows - t, most);
}

struct gd_pos_conv_rows gd_cpu_pos_conv_rows(const struct gd_pos_conv *c, int64_t b, int64_t t, int64_t most)
{
    int64_t first = c->rows->first[b], rows = c->rows->first[b + 1] - first, valid = c->rows->valid[b];
    int64_t read = c->transposed ? rows : valid, summed = c->transposed ? valid : rows;
    return (struct gd_pos_conv_rows){
        .row = first + t,
        .read = read,
        .rows = within(rows, t, most),
        .summed = within(summed, t, most),
        .added = within(read, t, most),
    };
}

struct gd_panel gd_cpu_pos_conv_panel(const struct gd_pos_conv *c, int64_t row, int64_t column, int64_t cols)
{
    return (struct gd_panel){
        .cols = (int)cols,
        .bias = c->bias != NULL ? c->bias + column : NULL,
        .activation = c->activation,
        .residual = c->residual != NULL ? c->residual + row * c->ldresidual + column : NULL,
        .ldresidual = c->ldresidual,
        .pre = c->pre != NULL ? c->pre + row * c->ldpre + column : NULL,
        .ldpre = c->ldpre,
        .y = c->y + row * c->ldy + column,
        .ldy = c->ldy,
    };
}

void gd_cpu_pos_conv_fill(const struct gd_pos_conv *c, const struct gd_pos_conv_rows *some, int64_t column,
                          int64_t cols)
{
    for (int64_t r = some->row + some->summed; r < some->row + some->rows; r++) {
        float *y = c->y + r * c->ldy + column;
        if (c->residual != NULL)
            memmove(y, c->residual + r * c->ldresidual + column, (size_t)cols * sizeof(float));
        else
            memset(y, 0, (size_t)cols * sizeof(float));
    }
}
