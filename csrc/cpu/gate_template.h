/*
 * gate_template.h - WavLM's gate of the position bias, and its gradients. The four rows of grep_linear that a sum
 * takes together are added first: weights[2][head_dim], in the scratch, and two biases.
 */
#ifndef GD_CPU_GATE_TEMPLATE_H
#define GD_CPU_GATE_TEMPLATE_H

#include "kernels.h"
#include "vec.h"
#include "vmath_template.h"

GD_INLINE void gate_fold(const struct gd_gate *g, float *weights, float biases[2])
{
    for (int half = 0; half < 2; half++) {
        const float *w = g->weight + half * 4 * g->head_dim, *b = g->bias + half * 4;
        for (int64_t d = 0; d < g->head_dim; d++)
            weights[half * g->head_dim + d] =
                (w[d] + w[g->head_dim + d]) + (w[2 * g->head_dim + d] + w[3 * g->head_dim + d]);
        biases[half] = (b[0] + b[1]) + (b[2] + b[3]);
    }
}

/* The two sums of heads h .. h + VL - 1 (as far as there are any) of a row x, through the sigmoid. */
GD_INLINE void gate_sigmoids(const struct gd_gate *g, const float *weights, const float biases[2], const float *x,
                             int64_t h, vf s[2])
{
    s[0] = s[1] = (vf){0};
    for (int i = 0; i < VL && h + i < g->heads; i++) {
        const float *head = x + (h + i) * g->head_dim;
        vf sum[2] = {{0}};
        for (int64_t d = 0; d < g->head_dim; d += VL) {
            int64_t left = g->head_dim - d;
            vf v = vf_load_left(head + d, left);
            sum[0] += v * vf_load_left(weights + d, left);
            sum[1] += v * vf_load_left(weights + g->head_dim + d, left);
        }
        s[0][i] = vf_sum(sum[0]) + biases[0];
        s[1][i] = vf_sum(sum[1]) + biases[1];
    }
    s[0] = vf_sigmoid(s[0]);
    s[1] = vf_sigmoid(s[1]);
}

/* Rows begin .. end - 1; scratch: 2 head_dim floats. */
static void gate(const struct gd_gate *g, int64_t begin, int64_t end, float *scratch)
{
    float biases[2];
    gate_fold(g, scratch, biases);
    for (int64_t r = begin; r < end; r++)
        for (int64_t h = 0; h < g->heads; h += VL) {
            vf s[2];
            gate_sigmoids(g, scratch, biases, g->x + r * g->ldx, h, s);
            vf a = vf_load_left(g->grep_a + h, g->heads - h);
            vf_store_left(g->gate + r * g->heads + h, s[0] * (s[1] * a - 1.0f) + 2.0f, g->heads - h);
        }
}

/* All rows; scratch: 4 head_dim floats. Gradients of the parameters add up in blocks of GATE_BLOCK rows. */
static void gate_backward(const struct gd_gate_backward *b, float *scratch)
{
    enum { GATE_BLOCK = 32 };
    const struct gd_gate *g = &b->forward;
    int64_t dim = g->head_dim;
    float biases[2], *weights = scratch, *dweights = scratch + 2 * dim;
    gate_fold(g, weights, biases);
    for (int64_t block = 0; block < g->rows; block += GATE_BLOCK) {
        int64_t stop = block + GATE_BLOCK < g->rows ? block + GATE_BLOCK : g->rows;
        float dbias[2] = {0};
        memset(dweights, 0, (size_t)(2 * dim) * sizeof(float));
        for (int64_t h = 0; h < g->heads; h += VL) {
            vf dgrep_a = {0}, a = vf_load_left(g->grep_a + h, g->heads - h);
            for (int64_t r = block; r < stop; r++) {
                vf s[2], ds[2], dgate = vf_load_left(b->dgate + r * g->heads + h, g->heads - h);
                gate_sigmoids(g, weights, biases, g->x + r * g->ldx, h, s);
                dgrep_a += dgate * s[0] * s[1];
                ds[0] = dgate * (s[1] * a - 1.0f) * s[0] * (1.0f - s[0]);
                ds[1] = dgate * s[0] * a * s[1] * (1.0f - s[1]);
                for (int half = 0; half < 2; half++)
                    dbias[half] += vf_sum(ds[half]);
                for (int i = 0; i < VL && h + i < g->heads; i++) {
                    const float *x = g->x + r * g->ldx + (h + i) * dim;
                    float *dx = b->dx + r * b->lddx + (h + i) * dim;
                    float ds0 = ds[0][i], ds1 = ds[1][i];
                    for (int64_t d = 0; d < dim; d += VL) {
                        int64_t left = dim - d;
                        vf v = vf_load_left(x + d, left);
                        vf w0 = vf_load_left(weights + d, left), w1 = vf_load_left(weights + dim + d, left);
                        vf_store_left(dx + d, vf_load_left(dx + d, left) + ds0 * w0 + ds1 * w1, left);
                        vf_store_left(dweights + d, vf_load_left(dweights + d, left) + ds0 * v, left);
                        vf_store_left(dweights + dim + d, vf_load_left(dweights + dim + d, left) + ds1 * v, left);
                    }
                }
            }
            vf_store_left(b->dgrep_a + h, vf_load_left(b->dgrep_a + h, g->heads - h) + dgrep_a, g->heads - h);
        }
        for (int o = 0; o < 8; o++) {
            b->dbias[o] += dbias[o / 4];
            for (int64_t d = 0; d < dim; d++)
                b->dweight[o * dim + d] += dweights[o / 4 * dim + d];
        }
    }
}

#endif
