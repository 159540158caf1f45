/*
 * backend.h - what a device must be able to do: whole-tensor operations that the stages are written in.
 *
 * A matrix is a pointer and a row stride in floats (ld), rows being frames; widths and strides are in
 * floats. Row strides come from gd_row_stride(). All pointers are the device's unless a field says host.
 * Operations return nothing: arguments were validated before, and a device's failure is kept in the
 * context and reported by synchronize(). Unless an argument says `+=`, outputs are written, not added to.
 *
 * Exactness: an output element is computed by the same sequence of operations wherever its row lies in
 * the batch (of linear() see GD_ROW_GROUP), whatever the other rows hold and however many threads run. So a
 * sum runs in an order that depends on its length alone, and threads split outputs, never a sum.
 */
#ifndef GD_BACKEND_H
#define GD_BACKEND_H

#include "gendistiller.h"

/* Rows of a ragged batch: utterance b owns rows first[b] .. first[b + 1] - 1, of which the leading
 * valid[b] are real frames (all of them, unless padding is S3PRL's). Host arrays. */
struct gd_rows {
    int64_t batch, total, longest; /* longest: most rows of one utterance */
    const int64_t *first;          /* (batch + 1) */
    const int64_t *valid;          /* (batch) */
};

/* GD_GELU_REDUCED: GELU within 5e-5 |x|, where the products around it are in bfloat16 or int8; a device may take the
 * exact one. Its derivative is GELU's. Operations with an activation refuse other values: gd_refuses_activation(). */
enum gd_activation { GD_NONE, GD_GELU, GD_GELU_REDUCED };

/* Weights w[n, t, c] as linear() reads them: of a convolution over time whose output rows are `stride` input rows
 * apart, or of a linear layer with taps and stride 1. */
struct gd_weight {
    int64_t out, taps, in, stride;
    enum gd_precision precision; /* of both factors of the products */
    const void *packed;          /* written by pack() */
};

/* Rows of a convolution of kernel 3 and stride 2 may be computed in groups of so many, from the first on: the bits
 * of a row then depend on its place in its group and on how many rows the group has. */
#define GD_ROW_GROUP 4

/* y[r, n] = act(sum over taps t and channels c of x[r * stride + t, c] w[n, t, c] + bias[n]) + residual[r, n] */
struct gd_linear {
    int64_t rows;
    const struct gd_weight *weight;
    const float *x;
    int64_t ldx;
    const float *bias;  /* (out) or NULL */
    enum gd_activation activation;
    const float *residual; /* (rows, out) or NULL; may be y */
    int64_t ldresidual;
    float *pre; /* kept pre-activation (rows, out), or NULL */
    int64_t ldpre;
    float *y;
    int64_t ldy;
};

/* Backward of linear() without activation for a convolution's rows of a tile: with dz = d loss / d y (rows, out),
 * dw_taps += and dx = d loss / d x, rows 0 .. dx_rows - 1 written, at least those that the output depends on. */
struct gd_conv_backward {
    int64_t rows;
    const struct gd_weight *weight; /* packed is not read; its precision is that of the products here */
    const float *x, *dz;
    int64_t ldx, lddz;
    const float *w_taps; /* written by split_taps() */
    float *dw_taps;      /* to be read by merge_taps() */
    float *dx;           /* NULL: not wanted, nor is w_taps then */
    int64_t lddx, dx_rows;
    float *scratch; /* conv_backward_scratch() floats */
};

/* c[i, j] = or += sum over p of a[i, p] b[p, j], by strides: a[i * a_row + p * a_col] and so on. One of
 * a's strides and one of b's is 1, or the matrix has a single column that way. */
struct gd_gemm {
    int64_t m, n, k;
    const float *a;
    int64_t a_row, a_col;
    const float *b;
    int64_t b_row, b_col;
    float *c;
    int64_t ldc;
    int accumulate;
    enum gd_precision precision; /* of both factors: GD_FLOAT32 or GD_BFLOAT16 */
};

/* Rows x[r], y[r] = (x[r] - mean) rstd gamma + beta (+ add[r]); mean and variance over the width. */
struct gd_layer_norm {
    int64_t rows, width;
    float eps;
    const float *x;
    int64_t ldx;
    const float *gamma, *beta; /* (width) */
    const float *add;          /* (rows, width) or NULL */
    int64_t ldadd;
    float *y;
    int64_t ldy;
    float *stats; /* (rows, 2): mean, rstd; or NULL */
};

/* dx[r] = gradient through the normalisation (written; dx may be dy); dgamma, dbeta +=. */
struct gd_layer_norm_backward {
    int64_t rows, width;
    const float *x, *dy;
    int64_t ldx, lddy;
    const float *gamma, *stats;
    float *dx;
    int64_t lddx;
    float *dgamma, *dbeta;
};

/* Grouped convolution over time of a ragged batch, zero beyond each utterance's ends:
 * y[t, g n + o] = act(bias + sum over tap k, channel c of x[t + k - pad, g n + c] w[k, c, o]) (+ residual),
 * n = width / groups. Rows past valid[] of x and residual count as zeros, and those of y are written like all
 * others. transposed, for the gradient by x, it is the other way round: all rows of x and residual count, and the
 * sums of y's rows past valid[] are zero. */
struct gd_pos_conv {
    const struct gd_rows *rows;
    int64_t width, groups, kernel, pad;
    const float *x;
    int64_t ldx;
    const void *weight; /* packed by pack_pos_conv(), for the same `transposed` and precision */
    int transposed;     /* no bias, activation and pre then */
    const float *bias;  /* (width) or NULL */
    enum gd_activation activation;
    const float *residual; /* (rows, width) or NULL */
    int64_t ldresidual;
    float *pre; /* or NULL */
    int64_t ldpre;
    float *y;
    int64_t ldy;
    /* In bfloat16 and int8 a backend may round packed weights to bfloat16; pos_conv_backward_weight() rounds its
     * factors, and takes no int8. */
    enum gd_precision precision;
};

/* softmax over keys j of (scale q k^T + gate bias), times v, for each utterance and head. Head h's columns
 * are h * head_dim .. of q, k, v and out. Keys past valid[] are left out. */
struct gd_attention {
    const struct gd_rows *rows;
    int64_t heads, head_dim;
    float scale;
    const float *q, *k, *v;
    int64_t ldq, ldk, ldv;
    const float *gate; /* (rows, heads) or NULL for 1 */
    const float *bias; /* (heads, 2 longest - 1): at j - i + longest - 1; or NULL */
    float *out; /* may be q */
    int64_t ldout;
    float *lse; /* (rows, heads): log of the softmax's denominator, for backward; or NULL */
    enum gd_precision precision; /* of both products: GD_FLOAT32, or without lse GD_BFLOAT16 */
    double dropout;
    const gd_dropout_seed *seed; /* NULL: no dropout */
    uint32_t site;               /* site * 32 + generation step */
};

struct gd_attention_backward {
    struct gd_attention forward; /* lse given; out as it was written */
    const float *dout;
    int64_t lddout;
    float *dq, *dk, *dv; /* written */
    int64_t lddq, lddk, lddv;
    float *dgate; /* (rows, heads), written; or NULL */
    float *dbias; /* (heads, 2 longest - 1) +=; or NULL */
};

/* WavLM's gate: with (s0, s1) = sigmoid of the two sums over four of x_head grep_weight^T + grep_bias,
 * gate[r, h] = s0 (s1 grep_a[h] - 1) + 2. */
struct gd_gate {
    int64_t rows, heads, head_dim;
    const float *x;
    int64_t ldx;
    const float *weight, *bias, *grep_a; /* (8, head_dim), (8), (heads) */
    float *gate;                         /* (rows, heads) */
};

struct gd_gate_backward {
    struct gd_gate forward;
    const float *dgate;
    float *dx; /* += */
    int64_t lddx;
    float *dweight, *dbias, *dgrep_a; /* += */
};

/* Frames of one utterance as conv 0 sees them, x[t * stride .. + kernel - 1], t < frames: their mean and
 * centred second moments over time, float64: moments = kernel means, then kernel x kernel covariances.
 * With `before` above 0 moments hold those of as many frames, and get those of all. */
struct gd_moments {
    int64_t before, frames, kernel, stride;
    const float *x;
    double *moments; /* (kernel + kernel^2) */
};

/* conv 0 (no bias), GroupNorm of one channel a group and its affine map as one affine map:
 * sigma^2 = w^T R w + eps, weight = w gamma / sigma, bias = beta - gamma (w . m) / sigma. */
struct gd_norm_fold {
    int64_t dim, kernel;
    double eps;
    const double *moments;
    const float *w, *gamma, *beta; /* (dim, kernel), (dim), (dim) */
    float *weight, *bias;
};

/* From G[c, k] = sum over t of dz[t, c] x_t[k] and S[c] = sum over t of dz[t, c], z the folded map's output:
 * S2 = (w . G - mu S) / sigma; dw += gamma / sigma (G - S m - S2 / sigma R w); dgamma += S2; dbeta += S. */
struct gd_norm_fold_backward {
    struct gd_norm_fold forward; /* weight and bias are not read */
    const float *g, *s;          /* (dim, kernel), (dim) */
    float *dw, *dgamma, *dbeta;
};

/* For each of `rows` rows: l1 = |p - t|_1 / dim, or |p - t|_2^2 / dim where `squared`; similarity =
 * p . t / (max(|p|, 1e-8) max(|t|, 1e-8)) as torch.nn.functional.cosine_similarity has it, whose gradient ignores the
 * clamps; cos = -log sigmoid(similarity). sums[0..2] += their sums over rows, in row order.
 * dpred = grad_scale d(l1 + lam cos)/dp, or NULL. */
struct gd_loss_rows {
    int64_t rows, dim;
    const float *pred, *target;
    int64_t ldpred, ldtarget;
    float lam, grad_scale;
    int squared;
    float *dpred;
    int64_t lddpred;
    double *terms; /* scratch (rows, 3) */
    double *sums;
};

/* torch's AdamW (s3prl 0): p -= lr decay p; m, v; p -= lr m^ / (sqrt(v^) + eps), gradients scaled first.
 * S3PRL's (s3prl 1): u = m / (sqrt(v) + eps) + decay p; p -= lr sqrt(1 - b2^t) / (1 - b1^t) u. */
struct gd_adamw_update {
    size_t count;
    float *p, *m, *v;
    const float *g;
    double lr, beta1, beta2, eps, decay, grad_scale;
    int64_t step; /* t, from 1 */
    int s3prl;
};

typedef void gd_task(void *argument, int64_t index, int slot);

struct gd_backend {
    const char *name;
    int shares_memory;   /* device pointers are host pointers */
    unsigned precisions; /* of products: bits 1 << enum gd_precision */
    int64_t tile_frames; /* frames a task of the extractor's loop should hold; 0: a whole utterance */
    int64_t block_rows;  /* rows of the second convolution, in whole groups, that follow at once on those of the first
                            that they read; 0: a task's */

    /* Memory. allocate() gives 64-byte aligned memory. upload and download copy from and to the host. */
    gd_status (*allocate)(gd_context *, size_t bytes, void **memory);
    void (*release)(gd_context *, void *memory);
    void (*upload)(gd_context *, void *to, const void *from, size_t bytes);
    void (*download)(gd_context *, void *to, const void *from, size_t bytes);
    void (*zero)(gd_context *, void *memory, size_t bytes);
    gd_status (*synchronize)(gd_context *);

    /* Calls task(argument, i, slot) for i < count, several at once in different slots < gd_slots().
     * Operations called from within a task run in it, undivided. */
    void (*for_each)(gd_context *, int64_t count, gd_task *task, void *argument);

    /* Scratch that one thread's operations need, in bytes, for utterances of at most `longest` rows. */
    size_t (*scratch_size)(const gd_context *, const gd_config *, int64_t longest, int training);

    /* pack() brings w[n, t, c] = w[n * w_out + t * w_tap + c * w_in] into linear()'s own layout, packed_size()
     * bytes, 64-byte aligned; the weight's other fields are set already. */
    size_t (*packed_size)(const gd_context *, const struct gd_weight *);
    void (*pack)(gd_context *, const struct gd_weight *, const float *w, int64_t w_out, int64_t w_tap, int64_t w_in,
                 void *packed);
    void (*linear)(gd_context *, const struct gd_linear *);
    void (*gemm)(gd_context *, const struct gd_gemm *);
    void (*bias_backward)(gd_context *, int64_t rows, int64_t width, const float *dy, int64_t lddy, float *dbias);

    void (*layer_norm)(gd_context *, const struct gd_layer_norm *);
    void (*layer_norm_backward)(gd_context *, const struct gd_layer_norm_backward *);
    /* y = act(z); y may be z. Backward: dz = dy act'(z); dz may be dy. */
    void (*activate)(gd_context *, enum gd_activation, int64_t rows, int64_t width, const float *z, int64_t ldz,
                     float *y, int64_t ldy);
    void (*activate_backward)(gd_context *, enum gd_activation, int64_t rows, int64_t width, const float *z,
                              int64_t ldz, const float *dy, int64_t lddy, float *dz, int64_t lddz);
    /* Rows kept in bfloat16: to = x rounded to the nearest; and back, z = from, y = act(z), where y is not NULL. */
    void (*round_rows)(gd_context *, int64_t rows, int64_t width, const float *x, int64_t ldx, uint16_t *to,
                       int64_t ldto);
    void (*widen_rows)(gd_context *, enum gd_activation, int64_t rows, int64_t width, const uint16_t *from,
                       int64_t ldfrom, float *z, int64_t ldz, float *y, int64_t ldy);
    /* y = alpha x + beta y; y is not read where beta is 0. */
    void (*axpby)(gd_context *, int64_t rows, int64_t width, float alpha, const float *x, int64_t ldx, float beta,
                  float *y, int64_t ldy);
    /* Rows first .. first + count - 1 of a ragged batch, x being the first of them: x *= mask / (1 - p), Philox bits
     * of (seed, site, utterance, row in it, column). */
    void (*dropout)(gd_context *, const struct gd_rows *, int64_t first, int64_t count, int64_t width, float *x,
                    int64_t ldx, double p, const gd_dropout_seed *, uint32_t site);

    void (*moments)(gd_context *, const struct gd_moments *);
    void (*norm_fold)(gd_context *, const struct gd_norm_fold *);
    void (*norm_fold_backward)(gd_context *, const struct gd_norm_fold_backward *);
    /* x = (x - mean) / sqrt(variance + eps), in place; statistics: mean and variance, or NULL for the samples' own. */
    void (*normalize)(gd_context *, int64_t samples, float *x, const double *statistics, float eps);

    /* A convolution's weight (out, in, taps) to the form that conv_backward() reads, conv_taps_size() floats, and,
     * for its gradient, back: dw += dw_taps. The gradient's form is (out, taps, in) where in or taps is 1. */
    size_t (*conv_taps_size)(const gd_context *, const struct gd_weight *);
    void (*split_taps)(gd_context *, const struct gd_weight *, const float *w, float *w_taps);
    void (*merge_taps)(gd_context *, const struct gd_weight *, const float *dw_taps, float *dw);
    size_t (*conv_backward_scratch)(const gd_context *, const struct gd_weight *);
    void (*conv_backward)(gd_context *, const struct gd_conv_backward *);

    /* w[o, c, k] = g[k] v[o, c, k] / |v[., ., k]|; backward: dg, dv += from dw (out, in, kernel). */
    void (*weight_norm)(gd_context *, int64_t out, int64_t in, int64_t kernel, const float *g, const float *v,
                        float *w);
    void (*weight_norm_backward)(gd_context *, int64_t out, int64_t in, int64_t kernel, const float *g,
                                 const float *v, const float *dw, float *dg, float *dv);
    /* w: (width, width / groups, kernel). transposed: the weights of the gradient by x, which is a transposed
     * pos_conv() with pad kernel - 1 - pad on dz. Of the struct, width, groups, kernel, transposed and precision are
     * used. */
    size_t (*packed_pos_conv_size)(const gd_context *, const struct gd_pos_conv *);
    void (*pack_pos_conv)(gd_context *, const struct gd_pos_conv *, const float *w, void *packed);
    void (*pos_conv)(gd_context *, const struct gd_pos_conv *);
    /* dw[o, c, k] += sum over all rows t of dz[t, o] x[t + k - pad, c]; uses rows, width .. ldx and precision
     * of the forward. */
    void (*pos_conv_backward_weight)(gd_context *, const struct gd_pos_conv *forward, const float *dz, int64_t lddz,
                                     float *dw);

    /* bias[h, d + longest - 1] = table[bucket(d), h], |d| < longest; backward: dtable += */
    void (*position_bias)(gd_context *, const gd_config *, int64_t longest, const float *table, float *bias);
    void (*position_bias_backward)(gd_context *, const gd_config *, int64_t longest, const float *dbias, float *dtable);
    void (*gate)(gd_context *, const struct gd_gate *);
    void (*gate_backward)(gd_context *, const struct gd_gate_backward *);
    void (*attention)(gd_context *, const struct gd_attention *);
    void (*attention_backward)(gd_context *, const struct gd_attention_backward *);

    /* Ragged rows to (B, T, width) and back: scatter fills rows past valid[] with zeros; gather reads rows
     * past T as zeros. */
    void (*scatter_rows)(gd_context *, const struct gd_rows *, int64_t width, const float *x, int64_t ldx,
                         int64_t frames_max, float *padded);
    void (*gather_rows)(gd_context *, const struct gd_rows *, int64_t width, const float *padded, int64_t frames_max,
                        float *x, int64_t ldx);

    void (*loss_rows)(gd_context *, const struct gd_loss_rows *);

    /* Of the parameters and their moments, which are the host's: called with gd_context_host(), NULL where memory is
     * not shared. */
    double (*sum_squares)(gd_context *, size_t count, const float *x); /* float64, fixed order */
    void (*adamw)(gd_context *, const struct gd_adamw_update *);

    void (*close)(gd_context *); /* frees context->device */
};

/* The smaller of two counts; a / b, and a to a multiple of b, rounded up. */
static inline int64_t gd_smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t gd_divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t gd_round_up(int64_t a, int64_t b) { return gd_divide_up(a, b) * b; }

#define GD_CACHE_LINE_FLOATS 16

/* Row stride of activations: whole cache lines, an odd number of them, so that the rows of a register
 * tile never fall into the same few sets of the L1 cache. */
static inline int64_t gd_row_stride(int64_t width)
{
    return (gd_divide_up(width, GD_CACHE_LINE_FLOATS) | 1) * GD_CACHE_LINE_FLOATS;
}

struct gd_context {
    const struct gd_backend *backend;
    void *device;          /* the backend's own state */
    gd_context *host;      /* gd_context_host()'s, once it was asked for */
    int num_threads;
    char *scratch;         /* gd_slots() * scratch_stride bytes, set by the workspace in use */
    size_t scratch_stride; /* bytes */
    gd_status status;      /* first failure since the last synchronize() */
    char message[512];
};

/* Slots of for_each(), each with scratch and buffers of its own. */
static inline int gd_slots(const gd_context *context)
{
    return context->backend->shares_memory ? context->num_threads : 1;
}

/* Sets the context's message (printf format) and returns `status`. */
gd_status gd_fail(gd_context *context, gd_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* Whether this is no activation: GD_EINVAL then, which synchronize() reports. What computes one begins with it, so that
 * a value without a branch of its own never gets as far as one. */
static inline int gd_refuses_activation(gd_context *context, enum gd_activation activation)
{
    switch (activation) {
    case GD_NONE:
    case GD_GELU:
    case GD_GELU_REDUCED:
        return 0;
    }
    gd_status status = gd_fail(context, GD_EINVAL, "activation: expected one of enum gd_activation, got %d",
                               (int)activation);
    context->status = context->status == GD_OK ? status : context->status;
    return 1;
}

/* The context of operations on the host's own memory: this one on the CPU, else one of the CPU that is made at the
 * first call. NULL, with a message in `context`, where that fails. */
gd_context *gd_context_host(gd_context *context);

/* Backends: set context->backend and context->device. On failure both stay as they were and the message says why. */
gd_status gd_backend_cpu_open(gd_context *context);
gd_status gd_backend_cuda_open(gd_context *context, int device);

/* See build_text.h. */
#ifdef GD_EMBED_HEADER
GD_EMBED_HEADER(__FILE__)
#endif

#endif
