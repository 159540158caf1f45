/*
 * filter_template.h - minimal filtering: a convolution of kernel 3 and stride 2 in 9 products for every 4 outputs in
 * place of 12.
 *
 *     y[j] = w0 e[j] + w2 e[j + 1] + w1 o[j]        e, o: the even and the odd rows of x
 *
 * The part over even rows has two taps and stride 1, and four of its outputs need five products (Winograd, Arithmetic
 * Complexity of Computations, 1980: F(4, 2)). With evaluation points 0, 1, -1, -1/2 and infinity, chosen among small
 * fractions for the least rounding error, and g = (w0, w2), d = e[4 g] .. e[4 g + 4]:
 *
 *     D0 = d0 - d2 + 2 (d1 - d3)          U0 = g0                  y0 = P0 + P1 + P2 + P3
 *     D1 = d1 + 3 d2 + 2 d3               U1 = (g0 + g1) / 6       y1 = P1 - P2 - P3 / 2
 *     D2 = d1 + d2 - 2 d3                 U2 = (g0 - g1) / 2       y2 = P1 + P2 + P3 / 4
 *     D3 = d3 - d1                        U3 = (8 g0 - 4 g1) / 3   y3 = P1 - P2 - P3 / 8 + P4
 *     D4 = d4 - d2 + (d3 - d1) / 2        U4 = g1                  Pi = Di Ui
 *
 * Rows beyond the last output's window are taken for zeros, so an output's bits depend on its place in its group and
 * on how many outputs of the group there are.
 */
#include "gemm_template.h"

/* points[i, g] = Di of group g; matrices of FILTER_GROUPS rows, ldp floats from row to row. */
static void filter_input(int64_t rows, int64_t in, const float *x, int64_t ldx, float *points, int64_t ldp)
{
    static const float zeros[VL];
    const int64_t matrix = FILTER_GROUPS * ldp;
    for (int64_t g = 0; g * FILTER_OUTPUTS < rows; g++) {
        const int64_t left = rows - g * FILTER_OUTPUTS;
        const float *e = x + g * FILTER_OUTPUTS * 2 * ldx;
        float *to = points + g * ldp;
        for (int64_t c = 0; c < in; c += VL) {
            const int64_t n = in - c;
            vf d[FILTER_OUTPUTS + 1];
            for (int i = 0; i <= FILTER_OUTPUTS; i++)
                d[i] = i <= left ? vf_load_left(e + 2 * i * ldx + c, n) : vf_load(zeros);
            const vf difference = d[3] - d[1], twice = d[3] + d[3];
            vf_store_left(to + c, d[0] - d[2] - (difference + difference), n);
            vf_store_left(to + matrix + c, d[2] * 3.0f + (d[1] + twice), n);
            vf_store_left(to + 2 * matrix + c, d[1] + d[2] - twice, n);
            vf_store_left(to + 3 * matrix + c, difference, n);
            vf_store_left(to + 4 * matrix + c, difference * 0.5f + (d[4] - d[2]), n);
        }
    }
}

/* u: the packed matrices U0 .. U4, of which U0 and U4 are there; count floats each. */
static void filter_weights(size_t count, float *u)
{
    for (size_t i = 0; i < count; i += VL) {
        const vf g0 = vf_load(u + i), g1 = vf_load(u + 4 * count + i);
        vf_store(u + count + i, (g0 + g1) * (1 / 6.0f));
        vf_store(u + 2 * count + i, (g0 - g1) * 0.5f);
        vf_store(u + 3 * count + i, g0 * (8 / 3.0f) - g1 * (4 / 3.0f));
    }
}

/* panel->x, step: the odd rows; panel->b: U0 .. U4 and w1, (in, cols in whole vectors) each. */
static void filter_panel(const struct gd_panel *panel, const float *points, int64_t ldp)
{
    _Alignas(64) float sums[GEMM_ROWS * GEMM_NR], products[FILTER_POINTS][FILTER_GROUPS * GEMM_NR];
    const int nv = panel->cols <= VL ? 1 : 2;
    const int64_t groups = (panel->rows + FILTER_OUTPUTS - 1) / FILTER_OUTPUTS, matrix = panel->in * nv * VL;
    for (int i = 0; i < FILTER_POINTS; i++)
        gemm_block(groups, panel->in, points + i * FILTER_GROUPS * ldp, ldp, panel->b + i * matrix, nv, products[i]);
    gemm_block(panel->rows, panel->in, panel->x, panel->step, panel->b + FILTER_POINTS * matrix, nv, sums);
    for (int64_t g = 0; g < groups; g++) {
        float *t = sums + g * FILTER_OUTPUTS * GEMM_NR;
        const int64_t from = g * GEMM_NR;
        for (int c = 0; c < nv * VL; c += VL) {
            const vf p0 = vf_load(products[0] + from + c), p1 = vf_load(products[1] + from + c);
            const vf p2 = vf_load(products[2] + from + c), p3 = vf_load(products[3] + from + c);
            const vf p4 = vf_load(products[4] + from + c), sum = p1 + p2, difference = p1 - p2;
            vf_store(t + c, vf_load(t + c) + (sum + (p0 + p3)));
            vf_store(t + GEMM_NR + c, vf_load(t + GEMM_NR + c) + (difference - p3 * 0.5f));
            vf_store(t + 2 * GEMM_NR + c, vf_load(t + 2 * GEMM_NR + c) + (sum + p3 * 0.25f));
            vf_store(t + 3 * GEMM_NR + c, vf_load(t + 3 * GEMM_NR + c) + (difference - p3 * 0.125f + p4));
        }
        for (int64_t r = g * FILTER_OUTPUTS; r < panel->rows && r < (g + 1) * FILTER_OUTPUTS; r++)
            gemm_finish_row(panel, r, sums + r * GEMM_NR);
    }
}
