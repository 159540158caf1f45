/*
 * reduced.c - see reduced.h.
 */
#include "reduced.h"

#include <math.h>

#include "../../csrc/bfloat16.h"
#include "../../csrc/int8.h"

/* Elements of int8 whose products are summed before they are brought to float32. */
#define CHAIN_INT8 1024

/* In place: the values of float32 numbers in the precision that products take them in, the left factor's row by row,
 * the right factor's output by output. The integers are counted off as the kernels do it, in float32. */
static void round_row(enum gd_precision precision, int left, double *x, int64_t count)
{
    double low = 0, high = 0;
    for (int64_t i = 0; i < count; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        if (precision == GD_BFLOAT16)
            x[i] = gd_float_from_bfloat16(gd_bfloat16_from_float((float)x[i]));
    }
    if (precision != GD_INT8)
        return;
    const float range = (float)high - (float)low;
    const float scale = left ? range / 255.0f : gd_int8_scale((float)(high > -low ? high : -low));
    const float inverse = scale == 0 ? 0 : left ? 255.0f / range : 1 / scale;
    volatile float zero = -(float)low * inverse; /* volatile: rounded to float32 before it is rounded to an integer */
    for (int64_t i = 0; i < count; i++) {
        volatile float steps = (float)x[i] * inverse;
        double q = rint(steps);
        if (left)
            q = fmin(fmax(rint(steps + rint(zero)), 0), 255) - rint(zero);
        x[i] = scale * q;
    }
}

double *ops_rounded(struct ops_test *test, const struct ops_mat *mat, enum gd_precision precision, int left)
{
    double *values = ops_doubles(test, mat->rows * mat->width);
    for (int64_t r = 0; r < mat->rows; r++) {
        for (int64_t c = 0; c < mat->width; c++)
            values[r * mat->width + c] = mat->host[r * mat->ld + c];
        round_row(precision, left, values + r * mat->width, mat->width);
    }
    return values;
}

/* Di of group g in float32, as csrc/cpu has their bits, to rows of d that are `matrix` apart. */
static void filter_points(const struct ops_mat *x, int64_t g, int64_t rows, double *d, int64_t matrix)
{
    for (int64_t c = 0; c < x->width; c++) {
        volatile float e[5], t[9]; /* volatile: each sum is rounded */
        for (int j = 0; j < 5; j++)
            e[j] = 4 * g + j <= rows ? x->host[(4 * g + j) * 2 * x->ld + c] : 0;
        t[0] = e[1] - e[2];
        t[1] = e[3] - e[2];
        t[2] = e[3] - e[1];
        t[3] = e[0] - e[3];
        t[4] = 1.5f * t[0];
        t[5] = e[1] + e[3];
        t[6] = t[5] + 2 * e[2];
        t[7] = e[4] - e[1];
        t[8] = 1.5f * t[1];
        const float points[5] = {t[3] + t[4], t[6] + e[2] / 2, t[2] - t[0], t[2] + t[1], t[7] + t[8]};
        for (int i = 0; i < 5; i++)
            d[i * matrix + c] = points[i];
    }
}

/* U0 .. U4 and w1 of an output, (6, in), from its weights (in, 3). int8 has those of weights that were rounded, and
 * rounds U1 .. U3 again. */
static void filter_weights(enum gd_precision precision, int64_t in, const float *w, double *rounded, double *u)
{
    for (int64_t i = 0; i < 3 * in; i++)
        rounded[i] = w[i];
    if (precision == GD_INT8)
        round_row(precision, 0, rounded, 3 * in);
    for (int64_t c = 0; c < in; c++) {
        const float g0 = (float)rounded[3 * c], g1 = (float)rounded[3 * c + 2];
        volatile float sum = g0 + g1, first = 2 * g0 - g1, last = 2 * g1 - g0;
        const float values[6] = {g0, sum * (2 / 9.0f), first * (4 / 9.0f), last * (4 / 9.0f), g1,
                                 (float)rounded[3 * c + 1]};
        for (int i = 0; i < 6; i++)
            u[i * in + c] = values[i];
    }
    for (int i = 0; i < 6; i++)
        if (precision != GD_INT8 || (i >= 1 && i <= 3))
            round_row(precision, 0, u + i * in, in);
}

struct ops_filtered ops_filtered(struct ops_test *test, const struct ops_mat *x, const struct ops_mat *w,
                                 enum gd_precision precision)
{
    const int64_t rows = (x->rows - 1) / 2, groups = (rows + 3) / 4, in = x->width;
    struct ops_filtered f = {precision, in, groups, ops_doubles(test, 5 * groups * in), ops_doubles(test, rows * in),
                             ops_doubles(test, w->rows * 6 * in)};
    double *rounded = ops_doubles(test, 3 * in);
    for (int64_t g = 0; g < groups; g++)
        filter_points(x, g, rows, f.points + g * in, groups * in);
    for (int64_t r = 0; r < 5 * groups; r++)
        round_row(precision, 1, f.points + r * in, in);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < in; c++)
            f.odd[r * in + c] = x->host[(2 * r + 1) * x->ld + c];
        round_row(precision, 1, f.odd + r * in, in);
    }
    for (int64_t n = 0; n < w->rows; n++)
        filter_weights(precision, in, w->host + n * w->ld, rounded, f.weights + n * 6 * in);
    return f;
}

double ops_dot(enum gd_precision precision, int64_t count, const double *a, const double *b,
               int64_t stride, double *size)
{
    double sum = 0, chain = 0;
    for (int64_t c = 0; c < count; c++) {
        const double product = a[c] * b[c * stride];
        chain += product;
        *size += precision == GD_INT8 ? 0 : fabs(product);
        if ((c + 1) % CHAIN_INT8 == 0 || c == count - 1) {
            *size += precision == GD_INT8 ? fabs(chain) : 0;
            sum += chain;
            chain = 0;
        }
    }
    return sum;
}

double ops_filtered_sum(const struct ops_filtered *f, int64_t r, int64_t n, double *size)
{
    static const double outputs[4][5] = {{1, 1, 1, 0.125, 0}, {0, 1, -0.5, -0.25, 0},
                                         {0, 1, 0.25, 0.5, 0}, {0, 1, -0.125, -1, 1}};
    const double *u = f->weights + n * 6 * f->in;
    double sum = ops_dot(f->precision, f->in, f->odd + r * f->in, u + 5 * f->in, 1, size);
    for (int i = 0; i < 5; i++) {
        double own = 0;
        const double product = ops_dot(f->precision, f->in, f->points + (i * f->groups + r / 4) * f->in,
                                       u + i * f->in, 1, &own);
        sum += outputs[r % 4][i] * product;
        *size += fabs(outputs[r % 4][i]) * own;
    }
    return sum;
}
