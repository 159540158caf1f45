/*
 * filter_template.h - minimal filtering: a convolution of kernel 3 and stride 2 in 9 products for every 4 outputs in
 * place of 12.
 *
 *     y[j] = w0 e[j] + w2 e[j + 1] + w1 o[j]        e, o: the even and the odd rows of x
 *
 * The part over even rows has two taps and stride 1, and four of its outputs need five products (Winograd, Arithmetic
 * Complexity of Computations, 1980: F(4, 2)). With evaluation points 0, 1, -1/2, -2 and infinity, chosen among small
 * fractions for the least rounding error, and g = (w0, w2), d = e[4 g] .. e[4 g + 4]:
 *
 *     D0 = d0 - d3 + 3/2 (d1 - d2)        U0 = g0                  y0 = P0 + P1 + P2 + P3 / 8
 *     D1 = d1 + d3 + 5/2 d2               U1 = (2 g0 + 2 g1) / 9   y1 = P1 - P2 / 2 - P3 / 4
 *     D2 = d3 + d2 - 2 d1                 U2 = (8 g0 - 4 g1) / 9   y2 = P1 + P2 / 4 + P3 / 2
 *     D3 = 2 d3 - d2 - d1                 U3 = (8 g1 - 4 g0) / 9   y3 = P1 - P2 / 8 - P3 + P4
 *     D4 = d4 - d1 + 3/2 (d3 - d2)        U4 = g1                  Pi = Di Ui
 *
 * In bfloat16 and int8 the Di and Ui are rounded, in place of x and w. The error of y is that of 12 rounded products,
 * of GELU's results and random weights, times 1.8 in bfloat16 and 1.6 in int8.
 *
 * Rows beyond the last output's window are taken for zeros, so an output's bits depend on its place in its group and
 * on how many outputs of the group there are.
 */
#include "gemm_template.h"

/* Di of a group, a row each, where `left` outputs are left; ranges: of each Di, or NULL. No product but by a power of
 * two: every instruction set has the same bits, with and without fused multiply-add, and so rounds them to the same
 * words. */
GD_INLINE void filter_input_group(int64_t left, int64_t in, const float *e, int64_t ldx, float *to, int64_t matrix,
                                  struct gd_range *ranges)
{
    static const float zeros[VL];
    struct extremes extremes[FILTER_POINTS] = {0};
    for (int64_t c = 0; c < in; c += VL) {
        const int64_t n = in - c;
        vf d[FILTER_OUTPUTS + 1];
        for (int i = 0; i <= FILTER_OUTPUTS; i++)
            d[i] = i <= left ? vf_load_left(e + 2 * i * ldx + c, n) : vf_load(zeros);
        const vf fall = d[1] - d[2], rise = d[3] - d[2], across = d[3] - d[1];
        const vf points[FILTER_POINTS] = {
            d[0] - d[3] + (fall + fall * 0.5f), d[1] + d[3] + d[2] * 2.0f + d[2] * 0.5f, across - fall, across + rise,
            d[4] - d[1] + (rise + rise * 0.5f),
        };
#pragma GCC unroll 5
        for (int i = 0; i < FILTER_POINTS; i++) {
            vf_store_left(to + i * matrix + c, points[i], n);
            if (ranges != NULL)
                extremes_add(&extremes[i], points[i]);
        }
        /* Rows of the next group: each is a stream too short for the processor to foresee. */
#pragma GCC unroll 8
        for (int i = 1; i <= 2 * FILTER_OUTPUTS; i++)
            __builtin_prefetch(e + (2 * FILTER_OUTPUTS + i) * ldx + c, 0, 2);
    }
    if (ranges != NULL)
#pragma GCC unroll 5
        for (int i = 0; i < FILTER_POINTS; i++)
            ranges[i] = extremes_range(extremes[i]);
}

/* Of the groups of `rows` outputs; ranges: FILTER_POINTS a group, or NULL. */
static void filter_input(int64_t rows, int64_t in, const float *x, int64_t ldx, struct gd_points points,
                         struct gd_range *ranges)
{
    for (int64_t g = 0; g * FILTER_OUTPUTS < rows; g++) {
        const int64_t left = rows - g * FILTER_OUTPUTS;
        const float *e = x + g * FILTER_OUTPUTS * 2 * ldx;
        float *to = points.data + g * points.ld;
        if (ranges != NULL)
            filter_input_group(left, in, e, ldx, to, points.matrix, ranges + g * FILTER_POINTS);
        else
            filter_input_group(left, in, e, ldx, to, points.matrix, NULL);
    }
}

/* dPi of the groups of `rows` outputs. */
static void filter_output_backward(int64_t rows, int64_t out, const float *dz, int64_t lddz, struct gd_points points)
{
    static const float zeros[VL];
    for (int64_t g = 0; g * FILTER_OUTPUTS < rows; g++) {
        const int64_t left = rows - g * FILTER_OUTPUTS;
        const float *from = dz + g * FILTER_OUTPUTS * lddz;
        float *to = points.data + g * points.ld;
        for (int64_t c = 0; c < out; c += VL) {
            const int64_t n = out - c;
            vf y[FILTER_OUTPUTS];
            for (int i = 0; i < FILTER_OUTPUTS; i++)
                y[i] = i < left ? vf_load_left(from + i * lddz + c, n) : vf_load(zeros);
            vf_store_left(to + c, y[0], n);
            vf_store_left(to + points.matrix + c, y[0] + y[2] + (y[1] + y[3]), n);
            vf_store_left(to + 2 * points.matrix + c, y[0] - y[1] * 0.5f + (y[2] * 0.25f - y[3] * 0.125f), n);
            vf_store_left(to + 3 * points.matrix + c, y[0] * 0.125f - y[1] * 0.25f + (y[2] * 0.5f - y[3]), n);
            vf_store_left(to + 4 * points.matrix + c, y[3], n);
        }
    }
}

/* u: the matrices U0 .. U4 behind one another, of which U0 and U4 are there; count floats each. Bits as Di's. */
static void filter_weights(int64_t count, float *u)
{
    for (int64_t i = 0; i < count; i += VL) {
        const int64_t n = count - i;
        const vf g0 = vf_load_left(u + i, n), g1 = vf_load_left(u + 4 * count + i, n);
        vf_store_left(u + count + i, (g0 + g1) * (2 / 9.0f), n);
        vf_store_left(u + 2 * count + i, (g0 + g0 - g1) * (4 / 9.0f), n);
        vf_store_left(u + 3 * count + i, (g1 + g1 - g0) * (4 / 9.0f), n);
    }
}

/* The gradient by g0 and g1, written, from that by U0 .. U4. */
static void filter_weights_backward(int64_t count, const float *du, float *dg0, float *dg1)
{
    for (int64_t i = 0; i < count; i += VL) {
        const int64_t n = count - i;
        const vf u1 = vf_load_left(du + count + i, n) * (2 / 9.0f),
            u2 = vf_load_left(du + 2 * count + i, n) * (4 / 9.0f);
        const vf u3 = vf_load_left(du + 3 * count + i, n) * (4 / 9.0f);
        vf_store_left(dg0 + i, vf_load_left(du + i, n) + (u1 - u3) + (u2 + u2), n);
        vf_store_left(dg1 + i, vf_load_left(du + 4 * count + i, n) + (u1 - u2) + (u3 + u3), n);
    }
}

/* Words of a column of each of a packed panel's matrices. */
GD_INLINE int64_t filter_depth(const struct gd_panel *panel, const int int8)
{
    return panel->in + (int8 ? gd_divide_up(panel->in, GEMM_KC) + 1 : 0);
}

/* The products of a panel of nv vectors of columns: of each group's points, and of the odd rows; with int8 they are yet
 * to be multiplied by their columns' scales. forward: rows of y are the odd rows'. Returns the number of groups. */
GD_INLINE int64_t filter_products(const struct gd_panel *panel, const int int8, const int forward,
                                  struct gd_points points, int nv, float (*products)[FILTER_GROUPS * GEMM_NR],
                                  float *odd)
{
    const int64_t groups = gd_divide_up(panel->rows, FILTER_OUTPUTS), matrix = filter_depth(panel, int8) * nv * VL;
    for (int i = 0; i < FILTER_POINTS; i++)
        gemm_block(panel->gemm, int8, groups, panel->in, points.data + i * points.matrix, points.ld,
                   panel->b + i * matrix, nv, products[i], NULL);
    gemm_block(panel->gemm, int8, panel->rows, panel->in, panel->x, panel->step, panel->b + FILTER_POINTS * matrix, nv,
               odd, forward ? panel : NULL);
    return groups;
}

/* One vector of columns of a panel, from c on: the groups' outputs from the products of their points and of the odd
 * rows. scales: of the columns of each matrix, `matrix` floats apart, or NULL. */
GD_INLINE void filter_finish_column(const struct gd_panel *panel, int64_t groups, int c,
                                    float (*products)[FILTER_GROUPS * GEMM_NR], const float *odd,
                                    const float *scales, int64_t matrix, const int plain)
{
    const vf bias = gemm_bias(panel, c);
    vf scale[FILTER_POINTS + 1];
    for (int i = 0; scales != NULL && i <= FILTER_POINTS; i++)
        scale[i] = vf_load(scales + i * matrix);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t r = g * FILTER_OUTPUTS, left = panel->rows - r;
        vf p[FILTER_POINTS], y[FILTER_OUTPUTS];
        for (int i = 0; i < FILTER_POINTS; i++) {
            p[i] = vf_load(products[i] + g * GEMM_NR + c);
            if (scales != NULL)
                p[i] *= scale[i];
        }
        for (int i = 0; i < FILTER_OUTPUTS; i++) {
            y[i] = vf_load(odd + (r + i) * GEMM_NR + c);
            if (scales != NULL)
                y[i] *= scale[FILTER_POINTS];
        }
        y[0] += p[0] + p[1] + (p[2] + p[3] * 0.125f);
        y[1] += p[1] - p[2] * 0.5f - p[3] * 0.25f;
        y[2] += p[1] + p[2] * 0.25f + p[3] * 0.5f;
        y[3] += p[1] - p[2] * 0.125f + (p[4] - p[3]);
#pragma GCC unroll 4
        for (int i = 0; i < FILTER_OUTPUTS; i++)
            if (i < left)
                gemm_finish_vector(panel, r + i, c, y[i] + bias, plain);
    }
}

GD_INLINE void filter_panel_of(const struct gd_panel *panel, const int int8, struct gd_points points)
{
    _Alignas(64) float odd[GEMM_ROWS * GEMM_NR], products[FILTER_POINTS][FILTER_GROUPS * GEMM_NR];
    const int nv = panel->cols <= VL ? 1 : 2;
    const int64_t groups = filter_products(panel, int8, 1, points, nv, products, odd);
    const int64_t depth = filter_depth(panel, int8), matrix = depth * nv * VL;
    for (int c = 0; c < panel->cols; c += VL) {
        const float *scales = int8 ? panel->b + matrix - nv * VL + c : NULL; /* the last row of each matrix */
        if (gemm_is_plain(panel) && panel->cols - c >= VL)
            filter_finish_column(panel, groups, c, products, odd, scales, matrix, 1);
        else
            filter_finish_column(panel, groups, c, products, odd, scales, matrix, 0);
    }
}

/* panel->x, step: the odd rows; panel->b: U0 .. U4 and w1, (in, cols in whole vectors) each; with int8 as reduced.c
 * says. */
static void filter_panel(const struct gd_panel *panel, struct gd_points points)
{
    if (gd_gemm_is_int8(panel->gemm))
        filter_panel_of(panel, 1, points);
    else
        filter_panel_of(panel, 0, points);
}

/* dx of a panel's columns. panel->x, step: dz, whose rows are the odd rows' left factor; points: dPi; panel->b:
 * U0 .. U4 and w1 from outputs to inputs; panel->y: dx from the first group's first row on. Groups share an even row
 * with the next: `first` says that row 0 is not to be added to. */
static void filter_input_panel(const struct gd_panel *panel, struct gd_points points, int first)
{
    _Alignas(64) float odd[GEMM_ROWS * GEMM_NR], products[FILTER_POINTS][FILTER_GROUPS * GEMM_NR];
    const int nv = panel->cols <= VL ? 1 : 2;
    const int64_t groups = filter_products(panel, 0, 0, points, nv, products, odd);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t left = panel->rows - g * FILTER_OUTPUTS;
        float *to = panel->y + g * FILTER_OUTPUTS * 2 * panel->ldy;
        for (int c = 0; c < nv * VL; c += VL) {
            const int64_t n = panel->cols - c;
            vf d[FILTER_POINTS], e[FILTER_OUTPUTS + 1];
            for (int i = 0; i < FILTER_POINTS; i++)
                d[i] = vf_load(products[i] + g * GEMM_NR + c);
            e[0] = g == 0 && first ? d[0] : vf_load_left(to + c, n) + d[0];
            e[1] = d[0] * 1.5f + (d[1] - d[2] * 2.0f) - (d[3] + d[4]);
            e[2] = d[1] * 2.5f + (d[2] - d[3]) - (d[0] + d[4]) * 1.5f;
            e[3] = d[4] * 1.5f + (d[1] + d[3] * 2.0f) + (d[2] - d[0]);
            e[4] = d[4];
            for (int i = 0; i <= FILTER_OUTPUTS && i <= left; i++)
                vf_store_left(to + 2 * i * panel->ldy + c, e[i], n);
            for (int i = 0; i < FILTER_OUTPUTS && i < left; i++)
                vf_store_left(to + (2 * i + 1) * panel->ldy + c,
                              vf_load(odd + (g * FILTER_OUTPUTS + i) * GEMM_NR + c), n);
        }
    }
}
