/*
 * layer_norm.cu - LayerNorm and its gradients. A warp takes a row: each lane sums every 32nd element, then the
 * lanes' sums are added up in a tree. Sums over rows: gd_column_total().
 */
#include "kernel.cuh"

/* ---- Forward -------------------------------------------------------------------------------------------- */

__global__ void layer_norm_rows(struct gd_layer_norm n)
{
    const int64_t row = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    const int lane = (int)threadIdx.x;
    if (row >= n.rows) /* the whole warp */
        return;
    const float *x = n.x + row * n.ldx;
    float sum = 0, squares = 0;
    for (int64_t i = lane; i < n.width; i += GD_WARP)
        sum += x[i];
    const float mean = gd_warp_sum(sum) / (float)n.width;
    for (int64_t i = lane; i < n.width; i += GD_WARP)
        squares += (x[i] - mean) * (x[i] - mean);
    const float rstd = 1.0f / sqrtf(gd_warp_sum(squares) / (float)n.width + n.eps);
    for (int64_t i = lane; i < n.width; i += GD_WARP) {
        float y = (x[i] - mean) * rstd * n.gamma[i] + n.beta[i];
        if (n.add)
            y += n.add[row * n.ldadd + i];
        n.y[row * n.ldy + i] = y;
    }
    if (n.stats && lane == 0) {
        n.stats[2 * row] = mean;
        n.stats[2 * row + 1] = rstd;
    }
}

void gd_cuda_layer_norm(gd_context *context, const struct gd_layer_norm *n)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || n->rows <= 0 || n->width <= 0)
        return;
    gd_cuda_check(context, GD_LAUNCH(layer_norm_rows, dim3((unsigned)gd_divide_up(n->rows, GD_BLOCK_ROWS)),
                                     dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, *n), "layer_norm");
}

/* ---- Backward ------------------------------------------------------------------------------------------- */

/* With u = (x - mean) rstd and du = dy gamma: dx = rstd (du - mean(du) - u mean(du u)). A lane writes only what it
 * alone reads, so dx may be dy. */
__global__ void layer_norm_backward_rows(struct gd_layer_norm_backward n)
{
    const int64_t row = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    const int lane = (int)threadIdx.x;
    if (row >= n.rows)
        return;
    const float *x = n.x + row * n.ldx, *dy = n.dy + row * n.lddy;
    float *dx = n.dx + row * n.lddx;
    const float mean = n.stats[2 * row], rstd = n.stats[2 * row + 1];
    float sum = 0, product = 0;
    for (int64_t i = lane; i < n.width; i += GD_WARP) {
        const float du = dy[i] * n.gamma[i];
        sum += du;
        product += du * ((x[i] - mean) * rstd);
    }
    const float mean_du = gd_warp_sum(sum) / (float)n.width, mean_product = gd_warp_sum(product) / (float)n.width;
    for (int64_t i = lane; i < n.width; i += GD_WARP)
        dx[i] = (dy[i] * n.gamma[i] - mean_du - (x[i] - mean) * rstd * mean_product) * rstd;
}

/* dgamma += sum over rows of dy u, dbeta += sum of dy. */
__global__ void layer_norm_backward_params(struct gd_layer_norm_backward n)
{
    const int64_t column = (int64_t)blockIdx.x * GD_WARP + threadIdx.x;
    float dgamma = 0, dbeta = 0;
    for (int64_t r = threadIdx.y; r < n.rows && column < n.width; r += GD_BLOCK_ROWS) {
        const float dy = n.dy[r * n.lddy + column];
        dgamma += dy * ((n.x[r * n.ldx + column] - n.stats[2 * r]) * n.stats[2 * r + 1]);
        dbeta += dy;
    }
    dgamma = gd_column_total(dgamma);
    dbeta = gd_column_total(dbeta);
    if (threadIdx.y == 0 && column < n.width) {
        n.dgamma[column] += dgamma;
        n.dbeta[column] += dbeta;
    }
}

void gd_cuda_layer_norm_backward(gd_context *context, const struct gd_layer_norm_backward *n)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || n->rows <= 0 || n->width <= 0)
        return;
    const dim3 block(GD_WARP, GD_BLOCK_ROWS);
    /* Parameters first: dx may be dy. */
    gd_cuda_check(context, GD_LAUNCH(layer_norm_backward_params, dim3((unsigned)gd_divide_up(n->width, GD_WARP)),
                                     block, 0, cuda->stream, *n), "layer_norm_backward");
    gd_cuda_check(context, GD_LAUNCH(layer_norm_backward_rows, dim3((unsigned)gd_divide_up(n->rows, GD_BLOCK_ROWS)),
                                     block, 0, cuda->stream, *n), "layer_norm_backward");
}
