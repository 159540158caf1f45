/*
 * elementwise.cu - GELU and its gradient, rows in bfloat16, and the scaled addition.
 */
#include "kernel.cuh"

struct gelu {
    const float *z;
    int64_t ldz;
    float *y;
    int64_t ldy;

    __device__ void operator()(int64_t r, int64_t c) const { y[r * ldy + c] = gd_gelu(z[r * ldz + c]); }
};

void gd_cuda_gelu(gd_context *context, int64_t rows, int64_t width, const float *z, int64_t ldz, float *y, int64_t ldy)
{
    gd_for_elements(context, rows, width, gelu{z, ldz, y, ldy}, "gelu");
}

/* gelu'(z) = (1 + erf(z / sqrt 2)) / 2 + z e^(-z^2 / 2) / sqrt(2 pi) */
struct gelu_backward {
    const float *z;
    int64_t ldz;
    const float *dy;
    int64_t lddy;
    float *dz;
    int64_t lddz;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        const float x = z[r * ldz + c];
        /* Past 14 the exponential is 0, and the square of what is beyond could be infinite. */
        const float bounded = fminf(fmaxf(x, -14.0f), 14.0f);
        const float density = bounded * 0.398942280f * expf(-0.5f * bounded * bounded);
        const float derivative = 0.5f * (1.0f + erff(x * 0.707106781f)) + density;
        dz[r * lddz + c] = dy[r * lddy + c] * derivative;
    }
};

void gd_cuda_gelu_backward(gd_context *context, int64_t rows, int64_t width, const float *z, int64_t ldz,
                           const float *dy, int64_t lddy, float *dz, int64_t lddz)
{
    gd_for_elements(context, rows, width, gelu_backward{z, ldz, dy, lddy, dz, lddz}, "gelu_backward");
}

struct round_rows {
    const float *x;
    int64_t ldx;
    uint16_t *to;
    int64_t ldto;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        to[r * ldto + c] = gd_bfloat16_from_float(x[r * ldx + c]);
    }
};

void gd_cuda_round_rows(gd_context *context, int64_t rows, int64_t width, const float *x, int64_t ldx, uint16_t *to,
                        int64_t ldto)
{
    gd_for_elements(context, rows, width, round_rows{x, ldx, to, ldto}, "round_rows");
}

struct widen_gelu {
    const uint16_t *from;
    int64_t ldfrom;
    float *z;
    int64_t ldz;
    float *y; /* or NULL */
    int64_t ldy;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        const float x = gd_float_from_bfloat16(from[r * ldfrom + c]);
        z[r * ldz + c] = x;
        if (y)
            y[r * ldy + c] = gd_gelu(x);
    }
};

void gd_cuda_widen_gelu(gd_context *context, int64_t rows, int64_t width, const uint16_t *from, int64_t ldfrom,
                        float *z, int64_t ldz, float *y, int64_t ldy)
{
    gd_for_elements(context, rows, width, widen_gelu{from, ldfrom, z, ldz, y, ldy}, "widen_gelu");
}

struct axpby {
    float alpha;
    const float *x;
    int64_t ldx;
    float beta;
    float *y;
    int64_t ldy;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        float *to = y + r * ldy + c;
        *to = alpha * x[r * ldx + c] + (beta != 0 ? beta * *to : 0.0f);
    }
};

void gd_cuda_axpby(gd_context *context, int64_t rows, int64_t width, float alpha, const float *x, int64_t ldx,
                   float beta, float *y, int64_t ldy)
{
    gd_for_elements(context, rows, width, axpby{alpha, x, ldx, beta, y, ldy}, "axpby");
}
