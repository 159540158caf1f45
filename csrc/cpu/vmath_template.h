/*
 * vmath_template.h - exp, sigmoid, activations and their derivatives of one vector of float32.
 *
 * A function works lane by lane, so an element has the same result in a full vector and in a partial one.
 * NaN gives NaN. Coefficients: minimax fits by reweighted least squares in Chebyshev points, in float64,
 * rounded to float32. tests/ops/vmath_cases.c holds the errors stated here against float64, for every
 * instruction set; they include rounding, with and without fused multiply-add.
 */
#ifndef GD_CPU_VMATH_TEMPLATE_H
#define GD_CPU_VMATH_TEMPLATE_H

#include "vec.h"

/* p = c[n - 1]; p = p x + c[i] */
GD_INLINE vf vf_polynomial(vf x, const float *c, int n)
{
    vf p = vf_set(c[n - 1]);
    for (int i = n - 2; i >= 0; i--)
        p = p * x + c[i];
    return p;
}

/* e^x, 1.2 ulp. x > 88.72 gives Inf; x < -86.98, whose exponential is below 1.7e-38, gives 0.
 *
 * x = n ln 2 + r, |r| <= ln(2) / 2; 2 e^r = 2 + 2 r + r^2 q(r), q of degree 4, relative error 3.1e-9. The
 * result is 2 e^r times 2^(n - 1), whose exponent field takes every n from -126 (then it is a zero) to 128. */
GD_INLINE vf vf_exp(vf x)
{
    static const float q[] = {0.999999869f, 0.333330404f, 0.0833367788f, 0.0167375467f, 0.00276293925f};
    const float round = 0x1.8p23f; /* adding it leaves the nearest integer in the low bits */
    vf clamped = vf_max(vf_set(-87.5f), vf_min(vf_set(89.0f), x));
    vf shifted = clamped * 0x1.715476p+0f + round; /* log2(e) */
    vf n = shifted - round;
    vf r = clamped - n * 0x1.62e4p-1f; /* ln 2 in two parts: the first has 14 bits, so n times it is exact */
    r = r - n * 0x1.7f7d1cp-20f;
    vf e = r * (r * vf_polynomial(r, q, 5) + 2.0f) + 2.0f;
    return e * (vf)(((vi)shifted << 23) + (126 << 23));
}

/* 1 / (1 + e^-x), 2.5 ulp down to 1.7e-38, and 0 below. */
GD_INLINE vf vf_sigmoid(vf x)
{
    return 1.0f / (1.0f + vf_exp(-x));
}

/* erf(x / sqrt 2) / 2, absolute error 1.2e-7; exactly +-0.5 from |x| = 5.3 on. x times a polynomial of degree 14
 * in x^2, brought from [0, 5.2^2] to [-1, 1] so that its terms do not cancel; error of the fit 1.3e-8. */
GD_INLINE vf vf_half_erf(vf x)
{
    static const float c[] = {0.135949978f,   -0.0677438059f,   0.050026111f,    -0.0399253863f,   0.0319622992f,
                              -0.0247635571f, 0.0181341081f,    -0.0123529242f,  0.00800942807f,   -0.00506821299f,
                              0.00266362414f, -0.000977738114f, 0.000599734103f, -0.000562562658f, 0.00020273386f};
    const float limit = 5.2f * 5.2f;
    vf s = vf_min(x * x, vf_set(limit)) * (2.0f / limit) - 1.0f;
    vf h = x * vf_polynomial(s, c, 15);
    return vf_max(vf_set(-0.5f), vf_min(vf_set(0.5f), h));
}

/* x (1 + erf(x / sqrt 2)) / 2, absolute error 2e-7 |x|; x itself from 5.3 on, and zero below -5.3. */
GD_INLINE vf vf_gelu(vf x)
{
    return x * (vf_half_erf(x) + 0.5f);
}

/* The same for results that are rounded to bfloat16 or int8: max(x, 0) - u q(u), u = min(|x|, 4.05), q near
 * (1 - erf(u / sqrt 2)) / 2. Absolute error 4.6e-5 |x|, and 2.2e-4 at most; infinity gives NaN: x - x is
 * zero or NaN. */
GD_INLINE vf vf_gelu_reduced(vf x)
{
    static const float c[] = {-0.499972105f,   0.398199409f,  0.00289814011f,   -0.0685731471f,   -0.00519407447f,
                              0.0204882007f, -0.00764028449f, 0.00118926517f, -7.00543605e-05f};
    const vf u = vf_min(vf_set(4.05f), vf_abs(x));
    return u * vf_polynomial(u, c, 9) + vf_max(x, x - x);
}

/* gelu'(x) = (1 + erf(x / sqrt 2)) / 2 + x e^(-x^2 / 2) / sqrt(2 pi), absolute error 3.5e-7. 1/2 plus an odd function:
 * x times a polynomial of degree 17 in x^2 on |x| <= 6 (error of the fit 6.4e-8), constant beyond. */
GD_INLINE vf vf_gelu_derivative(vf x)
{
    static const float c[] = {0.117897774f,   -0.0593426637f, 0.0460554599f,  -0.0423733115f,   0.0446196462f,
                              -0.0508165684f, 0.0579957038f,  -0.0651323355f, 0.0706656559f,    -0.0627908109f,
                              0.0428738885f,  -0.0423696993f, 0.0520429659f,  -0.0260103509f,   -0.00537262243f,
                              -0.00260842702f, 0.0138302757f, -0.00583125209f};
    const float limit = 6.0f;
    vf clamped = vf_max(vf_set(-limit), vf_min(vf_set(limit), x));
    vf s = clamped * clamped * (2.0f / (limit * limit)) - 1.0f;
    return clamped * vf_polynomial(s, c, 18) + 0.5f;
}

/* act(x) and act'(x). No other value comes here: gd_refuses_activation(). */
GD_INLINE vf vf_activate(const enum gd_activation activation, vf x)
{
    switch (activation) {
    case GD_NONE:
        return x;
    case GD_GELU:
        return vf_gelu(x);
    case GD_GELU_REDUCED:
        return vf_gelu_reduced(x);
    }
    __builtin_unreachable();
}

GD_INLINE vf vf_activation_derivative(const enum gd_activation activation, vf x)
{
    switch (activation) {
    case GD_NONE:
        return vf_set(1);
    case GD_GELU:
    case GD_GELU_REDUCED:
        return vf_gelu_derivative(x);
    }
    __builtin_unreachable();
}

#endif
