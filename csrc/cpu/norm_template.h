/*
 * norm_template.h - LayerNorm of a block of rows, and its gradients. A sum over a row runs in four vectors
 * side by side, which are then added up in a fixed tree; a sum over rows runs in row order, in blocks of
 * NORM_BLOCK rows that are then added to the gradient one after the other.
 */
#ifndef GD_CPU_NORM_TEMPLATE_H
#define GD_CPU_NORM_TEMPLATE_H

#include <math.h>

#include "kernels.h"
#include "vec.h"

enum { NORM_BLOCK = 64, NORM_SUMS = 4 };

GD_INLINE float norm_sum(const vf *s)
{
    return vf_sum((s[0] + s[1]) + (s[2] + s[3]));
}

GD_INLINE float norm_mean(const float *x, int64_t width)
{
    vf sum[NORM_SUMS] = {{0}};
    for (int64_t i = 0; i < width; i += NORM_SUMS * VL)
        for (int s = 0; s < NORM_SUMS; s++)
            sum[s] += vf_load_left(x + i + s * VL, width - i - s * VL);
    return norm_sum(sum) / (float)width;
}

GD_INLINE float norm_variance(const float *x, int64_t width, float mean)
{
    vf sum[NORM_SUMS] = {{0}};
    for (int64_t i = 0; i < width; i += NORM_SUMS * VL)
        for (int s = 0; s < NORM_SUMS; s++) {
            int64_t at = i + s * VL;
            vf d = vf_keep_left(vf_load_left(x + at, width - at) - mean, width - at);
            sum[s] += d * d;
        }
    return norm_sum(sum) / (float)width;
}

/* Rows begin .. end - 1. */
static void layer_norm(const struct gd_layer_norm *n, int64_t begin, int64_t end)
{
    int64_t width = n->width;
    for (int64_t r = begin; r < end; r++) {
        const float *x = n->x + r * n->ldx, *add = n->add ? n->add + r * n->ldadd : NULL;
        float *y = n->y + r * n->ldy;
        float mean = norm_mean(x, width);
        float rstd = 1.0f / sqrtf(norm_variance(x, width, mean) + n->eps);
        for (int64_t i = 0; i < width; i += VL) {
            int64_t left = width - i;
            vf v = (vf_load_left(x + i, left) - mean) * rstd;
            v = v * vf_load_left(n->gamma + i, left) + vf_load_left(n->beta + i, left);
            if (add)
                v += vf_load_left(add + i, left);
            vf_store_left(y + i, v, left);
        }
        if (n->stats) {
            n->stats[2 * r] = mean;
            n->stats[2 * r + 1] = rstd;
        }
    }
}

/* With u = (x - mean) rstd and du = dy gamma: dx = rstd (du - mean(du) - u mean(du u)), rows begin .. end - 1. */
static void layer_norm_backward(const struct gd_layer_norm_backward *n, int64_t begin, int64_t end)
{
    int64_t width = n->width;
    for (int64_t r = begin; r < end; r++) {
        const float *x = n->x + r * n->ldx, *dy = n->dy + r * n->lddy;
        float *dx = n->dx + r * n->lddx, mean = n->stats[2 * r], rstd = n->stats[2 * r + 1];
        vf sum[NORM_SUMS] = {{0}}, product[NORM_SUMS] = {{0}};
        for (int64_t i = 0; i < width; i += NORM_SUMS * VL)
            for (int s = 0; s < NORM_SUMS; s++) {
                int64_t at = i + s * VL, left = width - at;
                vf du = vf_load_left(dy + at, left) * vf_load_left(n->gamma + at, left);
                sum[s] += du;
                product[s] += du * ((vf_load_left(x + at, left) - mean) * rstd);
            }
        float mean_du = norm_sum(sum) / (float)width, mean_product = norm_sum(product) / (float)width;
        for (int64_t i = 0; i < width; i += VL) {
            int64_t left = width - i;
            vf u = (vf_load_left(x + i, left) - mean) * rstd;
            vf du = vf_load_left(dy + i, left) * vf_load_left(n->gamma + i, left);
            vf_store_left(dx + i, (du - mean_du - u * mean_product) * rstd, left);
        }
    }
}

/* dgamma += sum of dy u, dbeta += sum of dy, over all rows; columns begin .. end - 1. */
static void layer_norm_backward_params(const struct gd_layer_norm_backward *n, int64_t begin, int64_t end)
{
    enum { COLUMNS = 4 };
    for (int64_t i = begin; i < end; i += COLUMNS * VL)
        for (int64_t block = 0; block < n->rows; block += NORM_BLOCK) {
            int64_t stop = block + NORM_BLOCK < n->rows ? block + NORM_BLOCK : n->rows;
            vf dgamma[COLUMNS] = {{0}}, dbeta[COLUMNS] = {{0}};
            for (int64_t r = block; r < stop; r++)
                for (int c = 0; c < COLUMNS; c++) {
                    int64_t at = i + c * VL, left = end - at;
                    vf u = (vf_load_left(n->x + r * n->ldx + at, left) - n->stats[2 * r]) * n->stats[2 * r + 1];
                    vf dy = vf_load_left(n->dy + r * n->lddy + at, left);
                    dgamma[c] += dy * u;
                    dbeta[c] += dy;
                }
            for (int c = 0; c < COLUMNS; c++) {
                int64_t at = i + c * VL, left = end - at;
                vf_store_left(n->dgamma + at, vf_load_left(n->dgamma + at, left) + dgamma[c], left);
                vf_store_left(n->dbeta + at, vf_load_left(n->dbeta + at, left) + dbeta[c], left);
            }
        }
}

#endif
