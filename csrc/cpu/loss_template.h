/*
 * loss_template.h - the distillation loss of one frame and its gradient.
 */
#ifndef GD_CPU_LOSS_TEMPLATE_H
#define GD_CPU_LOSS_TEMPLATE_H

#include <math.h>

#include "kernels.h"
#include "vec.h"

/* The terms of row r as struct gd_loss_rows states them. With n = max(|p|, eps), m = max(|t|, eps):
 * d similarity / d p = t / (n m) - similarity p / (n |p|), the second part absent at p = 0: torch clamps the norms
 * where autograd does not see it. d cos / d similarity = -sigmoid(-similarity). */
static void loss_row(const struct gd_loss_rows *l, int64_t r)
{
    const double eps = 1e-8;
    const float *pred = l->pred + r * l->ldpred, *target = l->target + r * l->ldtarget;
    int64_t dim = l->dim;
    vf distance[2] = {{0}}, dot[2] = {{0}}, pred2[2] = {{0}}, target2[2] = {{0}};
    for (int64_t i = 0; i < dim; i += 2 * VL)
        for (int s = 0; s < 2; s++) {
            int64_t at = i + s * VL, left = dim - at;
            vf p = vf_load_left(pred + at, left), t = vf_load_left(target + at, left);
            distance[s] += l->squared ? (p - t) * (p - t) : vf_abs(p - t);
            dot[s] += p * t;
            pred2[s] += p * p;
            target2[s] += t * t;
        }
    double norm = sqrt((double)vf_sum(pred2[0] + pred2[1]));
    double target_norm = sqrt((double)vf_sum(target2[0] + target2[1]));
    double n = fmax(norm, eps), m = fmax(target_norm, eps);
    double similarity = (double)vf_sum(dot[0] + dot[1]) / (n * m);
    l->terms[3 * r] = (double)vf_sum(distance[0] + distance[1]) / (double)dim;
    l->terms[3 * r + 1] = log1p(exp(-similarity));
    l->terms[3 * r + 2] = similarity;
    if (l->dpred == NULL)
        return;
    double slope = -(double)l->lam * l->grad_scale / (1 + exp(similarity));
    float by_target = (float)(slope / (n * m)), by_pred = norm > 0 ? (float)(-slope * similarity / (n * norm)) : 0;
    vf step = vf_set(l->grad_scale / (float)dim);
    float *dpred = l->dpred + r * l->lddpred;
    for (int64_t i = 0; i < dim; i += VL) {
        int64_t left = dim - i;
        vf p = vf_load_left(pred + i, left), t = vf_load_left(target + i, left);
        vf slant = l->squared ? 2 * step * (p - t) : vf_select(p > t, step, vf_select(p < t, -step, (vf){0}));
        vf_store_left(dpred + i, slant + by_target * t + by_pred * p, left);
    }
}

#endif
