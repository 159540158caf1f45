/*
 * loss.cu - the distillation loss of each frame and its gradient. A warp takes a row.
 */
#include "kernel.cuh"

/* As ../csrc/cpu/loss_template.h has it: n = max(|p|, eps), m = max(|t|, eps),
 * d similarity / d p = t / (n m) - similarity p / (n |p|), the second part absent at p = 0. */
__global__ void loss_terms(struct gd_loss_rows l)
{
    const int64_t row = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    const int lane = (int)threadIdx.x;
    if (row >= l.rows) /* the whole warp */
        return;
    const double eps = 1e-8;
    const float *pred = l.pred + row * l.ldpred, *target = l.target + row * l.ldtarget;
    float distance = 0, dot = 0, pred2 = 0, target2 = 0;
    for (int64_t i = lane; i < l.dim; i += GD_WARP) {
        const float p = pred[i], t = target[i];
        distance += l.squared ? (p - t) * (p - t) : fabsf(p - t);
        dot += p * t;
        pred2 += p * p;
        target2 += t * t;
    }
    const double norm = sqrt((double)gd_warp_sum(pred2)), target_norm = sqrt((double)gd_warp_sum(target2));
    const double n = fmax(norm, eps), m = fmax(target_norm, eps);
    const double similarity = (double)gd_warp_sum(dot) / (n * m);
    distance = gd_warp_sum(distance);
    if (lane == 0) {
        l.terms[3 * row] = (double)distance / (double)l.dim;
        l.terms[3 * row + 1] = log1p(exp(-similarity));
        l.terms[3 * row + 2] = similarity;
    }
    if (!l.dpred)
        return;
    const double slope = -(double)l.lam * l.grad_scale / (1 + exp(similarity));
    const float by_target = (float)(slope / (n * m));
    const float by_pred = norm > 0 ? (float)(-slope * similarity / (n * norm)) : 0;
    const float step = l.grad_scale / (float)l.dim;
    float *dpred = l.dpred + row * l.lddpred;
    for (int64_t i = lane; i < l.dim; i += GD_WARP) {
        const float p = pred[i], t = target[i];
        const float slant = l.squared ? 2 * step * (p - t) : p > t ? step : p < t ? -step : 0.0f;
        dpred[i] = slant + by_target * t + by_pred * p;
    }
}

/* sums[term] += the rows' terms, in row order: a thread a term. */
__global__ void add_terms(int64_t rows, const double *terms, double *sums)
{
    double sum = sums[threadIdx.x];
    for (int64_t r = 0; r < rows; r++)
        sum += terms[3 * r + threadIdx.x];
    sums[threadIdx.x] = sum;
}

void gd_cuda_loss_rows(gd_context *context, const struct gd_loss_rows *l)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || l->rows <= 0)
        return;
    gd_cuda_check(context, GD_LAUNCH(loss_terms, dim3((unsigned)gd_divide_up(l->rows, GD_BLOCK_ROWS)),
                                     dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, *l), "loss_rows");
    gd_cuda_check(context, GD_LAUNCH(add_terms, dim3(1), dim3(3), 0, cuda->stream, l->rows, l->terms, l->sums),
                  "loss_rows");
}
