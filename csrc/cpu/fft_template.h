/*
 * fft_template.h - real FFTs over the rows of a matrix, and the products of their spectra, for convolutions
 * over time.
 *
 * A lane is a channel, so that no element ever changes its lane. size real rows are taken as size / 2 complex
 * ones (rows 2 m and 2 m + 1); forward goes by decimation in frequency and leaves them in bit-reversed order,
 * inverse by decimation in time starts from it. Neither scales: inverse(forward(x)) is 2 size x.
 */
#include "gemm_template.h"
#include "kernels.h"
#include "rounding_template.h"
#include "vec.h"

struct vc {
    vf re, im;
};

GD_INLINE struct vc vc_load(const float *work, int64_t m)
{
    return (struct vc){vf_load(work + 2 * m * VL), vf_load(work + (2 * m + 1) * VL)};
}

GD_INLINE void vc_store(float *work, int64_t m, struct vc a)
{
    vf_store(work + 2 * m * VL, a.re);
    vf_store(work + (2 * m + 1) * VL, a.im);
}

GD_INLINE struct vc vc_add(struct vc a, struct vc b) { return (struct vc){a.re + b.re, a.im + b.im}; }
GD_INLINE struct vc vc_sub(struct vc a, struct vc b) { return (struct vc){a.re - b.re, a.im - b.im}; }
GD_INLINE struct vc vc_times_i(struct vc a) { return (struct vc){-a.im, a.re}; }

/* a w and a conj(w), w = turn[0] + i turn[1]. */
GD_INLINE struct vc vc_turn(struct vc a, const float *turn)
{
    vf re = vf_set(turn[0]), im = vf_set(turn[1]);
    return (struct vc){a.re * re - a.im * im, a.re * im + a.im * re};
}

GD_INLINE struct vc vc_turn_back(struct vc a, const float *turn)
{
    vf re = vf_set(turn[0]), im = vf_set(turn[1]);
    return (struct vc){a.re * re + a.im * im, a.im * re - a.re * im};
}

/* Two steps of radix 2: a[0..3] a quarter of the transform's length apart. */
GD_INLINE void fft_four(struct vc *a)
{
    struct vc s = vc_add(a[0], a[2]), d = vc_sub(a[0], a[2]), t = vc_add(a[1], a[3]);
    struct vc e = vc_times_i(vc_sub(a[1], a[3]));
    a[0] = vc_add(s, t);
    a[1] = vc_sub(s, t);
    a[2] = vc_sub(d, e);
    a[3] = vc_add(d, e);
}

GD_INLINE void fft_four_back(struct vc *a)
{
    struct vc s = vc_add(a[0], a[1]), d = vc_sub(a[0], a[1]), t = vc_add(a[2], a[3]);
    struct vc e = vc_times_i(vc_sub(a[2], a[3]));
    a[0] = vc_add(s, t);
    a[1] = vc_add(d, e);
    a[2] = vc_sub(s, t);
    a[3] = vc_sub(d, e);
}

/* One pass over `half` complex rows, transforms of `length`: its turns are those of fft->turns from `turn` on. */
GD_INLINE void fft_pass(int64_t half, int64_t length, const float *turn, const int back, float *work)
{
    int64_t quarter = length / 4;
    for (int64_t j = 0; j < quarter; j++, turn += 6)
        for (int64_t m = j; m < half; m += length) {
            struct vc a[4];
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
                a[q] = vc_load(work, m + q * quarter);
            if (back) {
                a[1] = vc_turn_back(a[1], turn + 2);
                a[2] = vc_turn_back(a[2], turn);
                a[3] = vc_turn_back(a[3], turn + 4);
                fft_four_back(a);
            } else {
                fft_four(a);
                a[1] = vc_turn(a[1], turn + 2);
                a[2] = vc_turn(a[2], turn);
                a[3] = vc_turn(a[3], turn + 4);
            }
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++)
                vc_store(work, m + q * quarter, a[q]);
        }
}

/* The transforms of length 8 of an even power of two's, or 4 of an odd one's, which need no table. */
GD_INLINE void fft_last_eight(int64_t half, const int back, float *work)
{
    static const float turn[] = {0x1.6a09e6p-1f, -0x1.6a09e6p-1f, -0x1.6a09e6p-1f, -0x1.6a09e6p-1f};
    for (int64_t m = 0; m < half; m += 8) {
        struct vc even[4], odd[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            struct vc a = vc_load(work, m + 2 * q), b = vc_load(work, m + 2 * q + 1);
            even[q] = back ? vc_add(a, b) : a;
            odd[q] = back ? vc_sub(a, b) : b;
        }
        if (back) {
            odd[1] = vc_times_i(odd[1]);
            odd[2] = vc_turn_back(odd[2], turn);
            odd[3] = vc_turn_back(odd[3], turn + 2);
            fft_four_back(even);
            fft_four_back(odd);
        } else {
            fft_four(even);
            fft_four(odd);
            odd[1] = (struct vc){odd[1].im, -odd[1].re};
            odd[2] = vc_turn(odd[2], turn);
            odd[3] = vc_turn(odd[3], turn + 2);
        }
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            vc_store(work, m + 2 * q, back ? even[q] : vc_add(even[q], odd[q]));
            vc_store(work, m + 2 * q + 1, back ? odd[q] : vc_sub(even[q], odd[q]));
        }
    }
}

GD_INLINE void fft_last_four(int64_t half, const int back, float *work)
{
    for (int64_t m = 0; m < half; m += 4) {
        struct vc a[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
            a[q] = vc_load(work, m + q);
        if (back)
            fft_four_back(a);
        else
            fft_four(a);
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++)
            vc_store(work, m + q, a[q]);
    }
}

static void fft_complex(const struct gd_fft *fft, float *work)
{
    int64_t half = fft->size / 2, length = half;
    const float *turn = fft->turns;
    for (; length > 8; turn += length / 4 * 6, length /= 4)
        fft_pass(half, length, turn, 0, work);
    if (length == 8)
        fft_last_eight(half, 0, work);
    else
        fft_last_four(half, 0, work);
}

static void fft_complex_back(const struct gd_fft *fft, float *work)
{
    int64_t half = fft->size / 2, length = fft->last;
    const float *turn = fft->turns + fft->num_turns;
    if (length == 8)
        fft_last_eight(half, 1, work);
    else
        fft_last_four(half, 1, work);
    for (length *= 4; length <= half; length *= 4) {
        turn -= length / 4 * 6;
        fft_pass(half, length, turn, 1, work);
    }
}

/* Spectra of `channels` columns: window row r is x[r - begin] for begin <= r < end, and zero elsewhere. Frequency
 * k <= size / 2 of channel c goes to to[k * stride + c] and, its imaginary part, `imaginary` floats further; columns
 * are filled up to whole vectors with zeros. Twice the transform. */
static void fft_forward(const struct gd_fft *fft, const float *x, int64_t ldx, int64_t begin, int64_t end,
                        int64_t channels, float *to, int64_t stride, int64_t imaginary)
{
    _Alignas(64) float work[FFT_MOST * VL];
    int64_t half = fft->size / 2;
    for (int64_t c = 0; c < channels; c += VL, x += VL, to += VL) {
        int64_t left = channels - c;
        for (int64_t r = 0; r < fft->size; r++)
            vf_store(work + r * VL, r >= begin && r < end ? vf_load_left(x + (r - begin) * ldx, left) : (vf){0});
        fft_complex(fft, work);

        struct vc a = vc_load(work, 0), b;
        vf_store(to, 2 * (a.re + a.im));
        vf_store(to + imaginary, (vf){0});
        vf_store(to + half * stride, 2 * (a.re - a.im));
        vf_store(to + half * stride + imaginary, (vf){0});
        /* (a + conj b) -+ i w^k (a - conj b): frequency k, and the conjugate of half - k. */
        for (int64_t k = 1; k <= half / 2; k++) {
            a = vc_load(work, fft->place[k]);
            b = vc_load(work, fft->place[half - k]);
            b.im = -b.im;
            struct vc even = vc_add(a, b), odd = vc_times_i(vc_turn(vc_sub(a, b), fft->split + 2 * k));
            a = vc_sub(even, odd);
            b = vc_add(even, odd);
            float *low = to + k * stride, *high = to + (half - k) * stride;
            vf_store(high, b.re);
            vf_store(high + imaginary, -b.im);
            vf_store(low, a.re);
            vf_store(low + imaginary, a.im);
        }
    }
}

/* From spectra laid out as fft_forward() leaves them to window rows `first` and on, which are the sums of panel's
 * rows, x and b apart; the first `added` of these have the residual. */
static void fft_inverse(const struct gd_fft *fft, const float *from, int64_t stride, int64_t imaginary, int64_t first,
                        int64_t added, const struct gd_panel *all)
{
    _Alignas(64) float work[FFT_MOST * VL];
    int64_t half = fft->size / 2;
    struct gd_panel panel = *all;
    for (int64_t c = 0; c < all->cols; c += VL, from += VL) {
        vf zero = vf_load(from), top = vf_load(from + half * stride);
        vc_store(work, 0, (struct vc){zero + top, zero - top});
        for (int64_t k = 1; k <= half / 2; k++) {
            const float *low = from + k * stride, *high = from + (half - k) * stride;
            struct vc a = {vf_load(low), vf_load(low + imaginary)}, b = {vf_load(high), -vf_load(high + imaginary)};
            struct vc even = vc_add(a, b), odd = vc_times_i(vc_turn_back(vc_sub(a, b), fft->split + 2 * k));
            a = vc_add(even, odd);
            b = vc_sub(even, odd);
            b.im = -b.im;
            vc_store(work, fft->place[half - k], b);
            vc_store(work, fft->place[k], a);
        }
        fft_complex_back(fft, work);

        panel.cols = all->cols - c < VL ? (int)(all->cols - c) : VL;
        panel.bias = all->bias != NULL ? all->bias + c : NULL;
        panel.residual = all->residual != NULL ? all->residual + c : NULL;
        panel.pre = all->pre != NULL ? all->pre + c : NULL;
        panel.y = all->y + c;
        for (int64_t r = 0; r < all->rows; r++) {
            if (r == added)
                panel.residual = NULL;
            gemm_finish_rows(&panel, r, 1, work + (first + r) * VL, NULL);
        }
    }
}

/* ---- Products --------------------------------------------------------------------------------------------- */

/* Registers: 2 FFT_MR * FFT_NV sums, 2 FFT_NV of the weights, two of x. */
#if VL == 16
#define FFT_MR 4
#define FFT_NV 3
#else
#define FFT_MR 2
#define FFT_NV 2
#endif

/* Floats of a vector of weights: one of real parts and one of imaginary ones; or, rounded, words of both as bfloat16,
 * the real one in the lower half. */
GD_INLINE int64_t fft_weight_floats(const int rounded) { return rounded ? VL : 2 * VL; }

GD_INLINE struct vc fft_load_weight(const int rounded, const float *w)
{
    if (!rounded)
        return vc_load(w, 0);
    const vu word = (vu)vf_load(w);
    return (struct vc){(vf)(word << 16), (vf)(word & 0xffff0000)};
}

GD_INLINE void fft_store_weight(const int rounded, float *w, struct vc a)
{
    if (rounded)
        vf_store(w, (vf)(bfloat16_word(a.re) >> 16 | bfloat16_word(a.im)));
    else
        vc_store(w, 0, a);
}

/* y[r, v] = sum over c in ascending order of x[r, c] w[c, v], complex. w: rows of nv vectors. */
GD_INLINE void fft_tile(const int rounded, const int mr, const int nv, int64_t n, const float *x, const float *w,
                        float *y, int64_t row, int64_t imaginary)
{
    vf re[FFT_MR][FFT_NV], im[FFT_MR][FFT_NV];
#pragma GCC unroll 4
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            re[r][v] = im[r][v] = (vf){0};
    for (int64_t c = 0; c < n; c++, w += nv * fft_weight_floats(rounded)) {
        struct vc weight[FFT_NV];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            weight[v] = fft_load_weight(rounded, w + v * fft_weight_floats(rounded));
#pragma GCC unroll 4
        for (int r = 0; r < mr; r++) {
            vf x_re = vf_set(x[r * row + c]), x_im = vf_set(x[r * row + imaginary + c]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++) {
                re[r][v] += x_re * weight[v].re;
                im[r][v] += x_re * weight[v].im;
                re[r][v] -= x_im * weight[v].im;
                im[r][v] += x_im * weight[v].re;
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < mr; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            vf_store(y + r * row + v * VL, re[r][v]);
            vf_store(y + r * row + imaginary + v * VL, im[r][v]);
        }
}

#define FFT_ROWS(rounded, mr, nv) \
    for (; rows >= mr; rows -= mr, x += mr * row, y += mr * row) \
        fft_tile(rounded, mr, nv, n, x, w, y, row, imaginary);

typedef void fft_panel(int64_t rows, int64_t n, const float *x, const float *w, float *y, int64_t row,
                       int64_t imaginary);

/* Functions of their own, as gemm_tile()'s are. */
#define FFT_PANEL(name, rounded, nv) \
    static __attribute__((noinline)) void name(int64_t rows, int64_t n, const float *x, const float *w, float *y, \
                                               int64_t row, int64_t imaginary) \
    { \
        FFT_ROWS(rounded, FFT_MR, nv) \
        FFT_ROWS(rounded, (FFT_MR / 2), nv) \
        FFT_ROWS(rounded, 1, nv) \
    }
#define FFT_PANELS(nv) FFT_PANEL(fft_panel_##nv, 0, nv) FFT_PANEL(fft_rounded_panel_##nv, 1, nv)
#define FFT_PANEL_NAMES(nv) {fft_panel_##nv, fft_rounded_panel_##nv}
FFT_PANELS(1)
FFT_PANELS(2)
#if FFT_NV == 3
FFT_PANELS(3)
#endif

/* Vectors of the panel that begins at vector v of `vectors`. */
static int64_t fft_panel_vectors(int64_t vectors, int64_t v)
{
    int64_t panels = gd_divide_up(vectors, FFT_NV), most = gd_divide_up(vectors, panels);
    return vectors - v < most ? vectors - v : most;
}

/* One frequency of `rows` windows: y = x w, n channels in and n out, complex. A row of x or y has its real parts and,
 * `imaginary` floats after them, the others; rows lie `row` floats apart. w: panels of up to FFT_NV vectors. */
static void fft_multiply(const struct gd_fft *fft, int64_t rows, int64_t n, const float *x, const float *w, float *y,
                         int64_t row, int64_t imaginary)
{
    static fft_panel *const panels[FFT_NV][2] = {
        FFT_PANEL_NAMES(1), FFT_PANEL_NAMES(2),
#if FFT_NV == 3
        FFT_PANEL_NAMES(3),
#endif
    };
    int64_t vectors = gd_divide_up(n, VL);
    for (int64_t v = 0, nv; v < vectors; v += nv) {
        nv = fft_panel_vectors(vectors, v);
        panels[nv - 1][fft->rounded](rows, n, x, w + n * v * fft_weight_floats(fft->rounded), y + v * VL, row,
                                     imaginary);
    }
}

/* Input channel `channel`'s taps to its rows of fft_multiply()'s weights: w[o] are the taps, `kernel` of them one
 * float apart, of output o < n; last tap first if `reversed`; times scale. Frequencies lie `stride` floats apart. */
static void fft_pack(const struct gd_fft *fft, int64_t n, int64_t channel, int64_t kernel, const float *w,
                     int64_t w_out, int reversed, float scale, float *to, int64_t stride)
{
    _Alignas(64) float taps[FFT_MOST / 2 * VL], spectrum[(FFT_MOST / 2 + 1) * 2 * VL];
    const int64_t vectors = gd_divide_up(n, VL), floats = fft_weight_floats(fft->rounded);
    for (int64_t v = 0, nv; v < vectors; v += nv) {
        nv = fft_panel_vectors(vectors, v);
        float *panel = to + (n * v + channel * nv) * floats;
        for (int64_t i = 0; i < nv; i++) {
            for (int64_t lane = 0; lane < VL; lane++) {
                int64_t o = (v + i) * VL + lane;
                for (int64_t k = 0; k < kernel; k++)
                    taps[(reversed ? kernel - 1 - k : k) * VL + lane] = o < n ? scale * w[o * w_out + k] : 0;
            }
            fft_forward(fft, taps, VL, 0, kernel, VL, spectrum, 2 * VL, VL);
            for (int64_t k = 0; k <= fft->size / 2; k++)
                fft_store_weight(fft->rounded, panel + k * stride + i * floats, vc_load(spectrum, k));
        }
    }
}
