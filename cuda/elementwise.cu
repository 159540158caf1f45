/*
 * elementwise.cu - activations and their gradients, rows in bfloat16, and the scaled addition.
 */
#include "kernel.cuh"

struct activate {
    enum gd_activation activation;
    const float *z;
    int64_t ldz;
    float *y;
    int64_t ldy;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        y[r * ldy + c] = gd_activated(activation, z[r * ldz + c]);
    }
};

void gd_cuda_activate(gd_context *context, enum gd_activation activation, int64_t rows, int64_t width, const float *z,
                      int64_t ldz, float *y, int64_t ldy)
{
    if (!gd_refuses_activation(context, activation))
        gd_for_elements(context, rows, width, activate{activation, z, ldz, y, ldy}, "activate");
}

struct activate_backward {
    enum gd_activation activation;
    const float *z;
    int64_t ldz;
    const float *dy;
    int64_t lddy;
    float *dz;
    int64_t lddz;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        dz[r * lddz + c] = dy[r * lddy + c] * gd_activation_derivative(activation, z[r * ldz + c]);
    }
};

void gd_cuda_activate_backward(gd_context *context, enum gd_activation activation, int64_t rows, int64_t width,
                               const float *z, int64_t ldz, const float *dy, int64_t lddy, float *dz, int64_t lddz)
{
    if (!gd_refuses_activation(context, activation))
        gd_for_elements(context, rows, width, activate_backward{activation, z, ldz, dy, lddy, dz, lddz},
                        "activate_backward");
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

struct widen_rows {
    enum gd_activation activation;
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
            y[r * ldy + c] = gd_activated(activation, x);
    }
};

void gd_cuda_widen_rows(gd_context *context, enum gd_activation activation, int64_t rows, int64_t width,
                        const uint16_t *from, int64_t ldfrom, float *z, int64_t ldz, float *y, int64_t ldy)
{
    if (!gd_refuses_activation(context, activation))
        gd_for_elements(context, rows, width, widen_rows{activation, from, ldfrom, z, ldz, y, ldy}, "widen_rows");
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
