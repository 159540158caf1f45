/*
 * reduced.c - see reduced.h.
 */
#include "reduced.h"

#include <math.h>

#include "../../csrc/bfloat16.h"
#include "../../csrc/int8.h"

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

double ops_filtered_sum(const struct ops_mat *x, const float *w, int64_t r, int64_t rows, double *size,
                        double *largest)
{
    static const double points[5][5] = {
        {1, 2, -1, -2, 0}, {0, 1, 3, 2, 0}, {0, 1, 1, -2, 0}, {0, -1, 0, 1, 0}, {0, -0.5, -1, 0.5, 1}};
    static const double outputs[4][5] = {{1, 1, 1, 1, 0}, {0, 1, -1, -0.5, 0}, {0, 1, 1, 0.25, 0},
                                         {0, 1, -1, -0.125, 1}};
    const int64_t first = r - r % 4, in = x->width;
    double sum = 0;
    *size = *largest = 0;
    for (int64_t c = 0; c < in; c++) {
        const float *v = x->host + 2 * first * x->ld + c, g0 = w[3 * c], g1 = w[3 * c + 2];
        const float u[5] = {g0, (g0 + g1) / 6, (g0 - g1) / 2, (8 * g0 - 4 * g1) / 3, g1};
        double odd[] = {x->host[(2 * r + 1) * x->ld + c], w[3 * c + 1]};
        round_row(GD_BFLOAT16, 1, odd, 2);
        sum += odd[0] * odd[1];
        *size += fabs(odd[0] * odd[1]);
        for (int i = 0; i < 5; i++) {
            double pair[2] = {0, u[i]};
            for (int j = 0; j < 5 && first + j <= rows; j++)
                pair[0] += points[i][j] * v[2 * j * x->ld];
            round_row(GD_BFLOAT16, 1, pair, 2);
            const double product = outputs[r % 4][i] * pair[0] * pair[1];
            sum += product;
            *size += fabs(product);
            *largest = fmax(*largest, fabs(product));
        }
    }
    return sum;
}
