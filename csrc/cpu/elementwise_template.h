/*
 * elementwise_template.h - kernels without neighbours: activations, scaled addition, AdamW; and the sum of squares.
 */
#ifndef GD_CPU_ELEMENTWISE_TEMPLATE_H
#define GD_CPU_ELEMENTWISE_TEMPLATE_H

#include <math.h>

#include "kernels.h"
#include "rounding_template.h"
#include "vec.h"
#include "vmath_template.h"

static void activate(const enum gd_activation activation, int64_t width, const float *z, float *y)
{
    for (int64_t i = 0; i < width; i += VL)
        vf_store_left(y + i, vf_activate(activation, vf_load_left(z + i, width - i)), width - i);
}

static void activate_backward(const enum gd_activation activation, int64_t width, const float *z, const float *dy,
                              float *dz)
{
    for (int64_t i = 0; i < width; i += VL) {
        int64_t left = width - i;
        const vf derivative = vf_activation_derivative(activation, vf_load_left(z + i, left));
        vf_store_left(dz + i, vf_load_left(dy + i, left) * derivative, left);
    }
}

typedef uint16_t half_words __attribute__((vector_size(VL * 2), aligned(2), may_alias));

static void round_row(int64_t width, const float *x, uint16_t *to)
{
    for (int64_t i = 0; i < width; i += VL) {
        const int64_t left = width - i;
        const half_words words = __builtin_convertvector(bfloat16_word(vf_load_left(x + i, left)) >> 16, half_words);
        if (left >= VL)
            *(half_words *)(to + i) = words;
        else
            memcpy(to + i, &words, (size_t)left * sizeof *to);
    }
}

static void widen_row(const enum gd_activation activation, int64_t width, const uint16_t *from, float *z, float *y)
{
    for (int64_t i = 0; i < width; i += VL) {
        const int64_t left = width - i;
        half_words words = {0};
        if (left >= VL)
            words = *(const half_words *)(from + i);
        else
            memcpy(&words, from + i, (size_t)left * sizeof *from);
        const vf v = (vf)(__builtin_convertvector(words, vu) << 16);
        vf_store_left(z + i, v, left);
        if (y != NULL)
            vf_store_left(y + i, vf_activate(activation, v), left);
    }
}

/* y = alpha x + beta y; y is not read where beta is 0. */
static void axpby(int64_t width, float alpha, const float *x, float beta, float *y)
{
    for (int64_t i = 0; i < width; i += VL) {
        int64_t left = width - i;
        vf v = alpha * vf_load_left(x + i, left);
        if (beta != 0)
            v += beta * vf_load_left(y + i, left);
        vf_store_left(y + i, v, left);
    }
}

static double sum_squares(size_t count, const float *x)
{
    vd sum[4] = {{0}};
    double rest = 0;
    size_t i = 0;
    for (; i + 4 * VDL <= count; i += 4 * VDL)
        for (int s = 0; s < 4; s++) {
            vd v = vd_widen(x + i + s * VDL);
            sum[s] += v * v;
        }
    for (; i < count; i++)
        rest += (double)x[i] * x[i];
    return vd_sum((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

/* Elements begin .. end - 1. The scalars are rounded to float32 once; so torch's CPU kernels do it. */
static void adamw(const struct gd_adamw_update *u, size_t begin, size_t end)
{
    double correction1 = 1 - pow(u->beta1, (double)u->step), correction2 = 1 - pow(u->beta2, (double)u->step);
    const float g_scale = (float)u->grad_scale, beta1 = (float)u->beta1, beta2 = (float)u->beta2;
    const float new1 = (float)(1 - u->beta1), new2 = (float)(1 - u->beta2), eps = (float)u->eps;
    const float decay = (float)u->decay, keep = (float)(1 - u->lr * u->decay), root2 = (float)sqrt(correction2);
    const float rate = (float)(u->lr / correction1), rate_s3prl = (float)(u->lr * sqrt(correction2) / correction1);
    for (size_t i = begin; i < end; i += VL) {
        int64_t left = (int64_t)(end - i);
        vf p = vf_load_left(u->p + i, left), g = vf_load_left(u->g + i, left) * g_scale;
        vf m = vf_load_left(u->m + i, left) * beta1 + g * new1;
        vf v = vf_load_left(u->v + i, left) * beta2 + g * g * new2;
        if (u->s3prl)
            p = p - rate_s3prl * (m / (vf_sqrt(v) + eps) + decay * p);
        else
            p = p * keep - rate * m / (vf_sqrt(v) / root2 + eps);
        vf_store_left(u->p + i, p, left);
        vf_store_left(u->m + i, m, left);
        vf_store_left(u->v + i, v, left);
    }
}

#endif
