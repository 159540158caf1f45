/*
 * linear.cu - what a linear layer needs besides its products (gemm.c): packing, what follows the sum, and the
 * gradient of the bias.
 */
#include "kernel.cuh"

/* packed[t, n, c] = w[n * w_out + t * w_tap + c * w_in]: a row is one output of one tap. */
struct pack {
    struct gd_weight weight;
    const float *w;
    int64_t w_out, w_tap, w_in;
    void *packed;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        const float value = w[r % weight.out * w_out + r / weight.out * w_tap + c * w_in];
        gd_store_factor(weight.precision, packed, r * weight.in + c, value);
    }
};

void gd_cuda_pack(gd_context *context, const struct gd_weight *weight, const float *w, int64_t w_out, int64_t w_tap,
                  int64_t w_in, void *packed)
{
    if (gd_cuda_lacks(context, weight->precision))
        return;
    gd_for_elements(context, weight->taps * weight->out, weight->in,
                    pack{*weight, w, w_out, w_tap, w_in, packed}, "pack");
}

struct finish_linear {
    struct gd_linear l;
    const float *sum;
    int64_t ldsum;

    __device__ void operator()(int64_t r, int64_t n) const
    {
        float z = sum[r * ldsum + n];
        if (l.bias)
            z += l.bias[n];
        if (l.pre)
            l.pre[r * l.ldpre + n] = z;
        z = gd_activated(l.activation, z);
        if (l.residual)
            z += l.residual[r * l.ldresidual + n];
        l.y[r * l.ldy + n] = z;
    }
};

void gd_cuda_finish_linear(gd_context *context, const struct gd_linear *l, const float *sum, int64_t ldsum)
{
    if (sum == l->y && !l->bias && !l->residual && l->activation == GD_NONE)
        return;
    gd_for_elements(context, l->rows, l->weight->out, finish_linear{*l, sum, ldsum}, "linear");
}

/* dbias[c] += sum over r of dy[r, c] */
__global__ void add_bias_gradient(int64_t rows, int64_t width, const float *dy, int64_t lddy, float *dbias)
{
    const int64_t column = (int64_t)blockIdx.x * GD_WARP + threadIdx.x;
    float sum = 0;
    for (int64_t r = threadIdx.y; r < rows && column < width; r += GD_BLOCK_ROWS)
        sum += dy[r * lddy + column];
    sum = gd_column_total(sum);
    if (threadIdx.y == 0 && column < width)
        dbias[column] += sum;
}

void gd_cuda_bias_backward(gd_context *context, int64_t rows, int64_t width, const float *dy, int64_t lddy,
                           float *dbias)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || rows <= 0 || width <= 0)
        return;
    gd_cuda_check(context, GD_LAUNCH(add_bias_gradient, dim3((unsigned)gd_divide_up(width, GD_WARP)),
                                     dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, rows, width, dy, lddy, dbias),
                  "bias_backward");
}
