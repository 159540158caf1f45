/*
 * ops.h - the CUDA backend's operations, one for each member of struct gd_backend (../csrc/backend.h says what
 * they compute), and what they share: the device's state and how failures are kept.
 *
 * An operation is started on the context's one stream and not waited for. The first failure is kept in the
 * context until synchronize() reports it; until then nothing more is started, since its operands were not
 * computed. What this backend has not got, products in int8, fails the same way.
 */
#ifndef GD_CUDA_OPS_H
#define GD_CUDA_OPS_H

#ifdef __cplusplus
extern "C" {
#endif

#include "../csrc/backend.h"
#include "cublas_api.h"

/* context->device */
struct gd_cuda {
    struct gd_backend backend; /* the table, with the precisions that this device has products in */
    int device;
    cudaStream_t stream;
    struct gd_cublas cublas; /* NULL pointers until the first product */
    cublasHandle_t handle;
};

/* What every operation starts with: the device becomes the calling thread's. NULL after a failure. */
struct gd_cuda *gd_cuda_begin(gd_context *context);

/* Keep a failure, if it is the first. `what` is the operation's name. */
void gd_cuda_keep_failure(gd_context *context, gd_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Whether there are no products in this precision, which is a failure then. */
int gd_cuda_lacks(gd_context *context, enum gd_precision precision);
void gd_cuda_check(gd_context *context, cudaError_t error, const char *what);
void gd_cuda_check_cublas(gd_context *context, cublasStatus_t status, const char *what);

/* cublas.c: opens cuBLAS for this context if it is not open yet; 0 where that fails. */
int gd_cuda_open_cublas(gd_context *context, struct gd_cuda *cuda);
void gd_cuda_close_cublas(struct gd_cuda *cuda);

/* The scratch: bytes that it has at least, and rows of a config's widest layer that a half of it holds in bfloat16,
 * enough to occupy a device. A half is for a factor in bfloat16, the second one also for sums that linear() cannot make
 * in an output; attention's and the gate's gradients have the whole. */
enum { GD_CUDA_SCRATCH = 1 << 20, GD_CUDA_FACTOR_ROWS = 1 << 12 };

/* Rows as a factor of products: (rows, ld) of float32, or of bfloat16 in 16 bits. */
struct gd_cuda_factor {
    enum gd_precision precision;
    const void *at;
    int64_t ld;
};

static inline size_t gd_cuda_element(enum gd_precision precision)
{
    return precision == GD_BFLOAT16 ? sizeof(uint16_t) : sizeof(float);
}

/* For gd_cuda_multiply(), which has the pointer's true type from the precision. */
static inline const float *gd_cuda_row(struct gd_cuda_factor factor, int64_t row)
{
    return (const float *)((const char *)factor.at + (size_t)(row * factor.ld) * gd_cuda_element(factor.precision));
}

/* gemm.c */
size_t gd_cuda_factor_scratch(const gd_config *); /* bytes */
/* Output rows of which a half of the scratch holds the input, and their gradients, in the weight's precision; 0 after a
 * failure. */
int64_t gd_cuda_rows_at_once(gd_context *, const struct gd_weight *);
/* x itself in float32; in bfloat16 a rounded copy in a half of the scratch, 0 or 1, that has to hold it. */
struct gd_cuda_factor gd_cuda_factor(gd_context *, enum gd_precision, int half, int64_t rows, int64_t width,
                                     const float *x, int64_t ld);
/* gemm() of factors that have its precision already; in bfloat16 their lines don't overlap. */
void gd_cuda_multiply(gd_context *, const struct gd_gemm *);
size_t gd_cuda_packed_size(const gd_context *, const struct gd_weight *);
void gd_cuda_linear(gd_context *, const struct gd_linear *);
void gd_cuda_gemm(gd_context *, const struct gd_gemm *);

/* linear.cu */
void gd_cuda_pack(gd_context *, const struct gd_weight *, const float *w, int64_t w_out, int64_t w_tap, int64_t w_in,
                  void *packed);
/* With z = sum[r, n] + bias[n], which is kept in `pre`: y = act(z) + residual. `sum`: (rows, out), may be pre or y. */
void gd_cuda_finish_linear(gd_context *, const struct gd_linear *, const float *sum, int64_t ldsum);
void gd_cuda_bias_backward(gd_context *, int64_t rows, int64_t width, const float *dy, int64_t lddy, float *dbias);

/* layer_norm.cu */
void gd_cuda_layer_norm(gd_context *, const struct gd_layer_norm *);
void gd_cuda_layer_norm_backward(gd_context *, const struct gd_layer_norm_backward *);

/* elementwise.cu */
void gd_cuda_activate(gd_context *, enum gd_activation, int64_t rows, int64_t width, const float *z, int64_t ldz,
                      float *y, int64_t ldy);
void gd_cuda_activate_backward(gd_context *, enum gd_activation, int64_t rows, int64_t width, const float *z,
                               int64_t ldz, const float *dy, int64_t lddy, float *dz, int64_t lddz);
void gd_cuda_round_rows(gd_context *, int64_t rows, int64_t width, const float *x, int64_t ldx, uint16_t *to,
                        int64_t ldto);
void gd_cuda_widen_rows(gd_context *, enum gd_activation, int64_t rows, int64_t width, const uint16_t *from,
                        int64_t ldfrom, float *z, int64_t ldz, float *y, int64_t ldy);
void gd_cuda_axpby(gd_context *, int64_t rows, int64_t width, float alpha, const float *x, int64_t ldx, float beta,
                   float *y, int64_t ldy);

/* attention.cu, attention_backward.cu */
void gd_cuda_attention(gd_context *, const struct gd_attention *);
void gd_cuda_attention_backward(gd_context *, const struct gd_attention_backward *);
size_t gd_cuda_attention_backward_scratch(const gd_config *, int64_t longest); /* bytes, at least */

/* gate.cu */
void gd_cuda_gate(gd_context *, const struct gd_gate *);
void gd_cuda_gate_backward(gd_context *, const struct gd_gate_backward *);
size_t gd_cuda_gate_backward_scratch(const gd_config *);

/* position_bias.cu */
void gd_cuda_position_bias(gd_context *, const gd_config *, int64_t longest, const float *table, float *bias);
void gd_cuda_position_bias_backward(gd_context *, const gd_config *, int64_t longest, const float *dbias,
                                    float *dtable);

/* rows.cu */
void gd_cuda_dropout(gd_context *, const struct gd_rows *, int64_t first, int64_t count, int64_t width, float *x,
                     int64_t ldx, double p, const gd_dropout_seed *, uint32_t site);
void gd_cuda_scatter_rows(gd_context *, const struct gd_rows *, int64_t width, const float *x, int64_t ldx,
                          int64_t frames_max, float *padded);
void gd_cuda_gather_rows(gd_context *, const struct gd_rows *, int64_t width, const float *padded, int64_t frames_max,
                         float *x, int64_t ldx);

/* loss.cu */
void gd_cuda_loss_rows(gd_context *, const struct gd_loss_rows *);

/* extractor.cu */
void gd_cuda_moments(gd_context *, const struct gd_moments *);
void gd_cuda_norm_fold(gd_context *, const struct gd_norm_fold *);
void gd_cuda_norm_fold_backward(gd_context *, const struct gd_norm_fold_backward *);
void gd_cuda_normalize(gd_context *, int64_t samples, float *x, const double *statistics, float eps);

/* weights.cu */
void gd_cuda_split_taps(gd_context *, const struct gd_weight *, const float *w, float *w_taps);
void gd_cuda_merge_taps(gd_context *, const struct gd_weight *, const float *dw_taps, float *dw);
void gd_cuda_weight_norm(gd_context *, int64_t out, int64_t in, int64_t kernel, const float *g, const float *v,
                         float *w);
void gd_cuda_weight_norm_backward(gd_context *, int64_t out, int64_t in, int64_t kernel, const float *g,
                                  const float *v, const float *dw, float *dg, float *dv);

/* conv_backward.c */
size_t gd_cuda_conv_taps_size(const gd_context *, const struct gd_weight *);
size_t gd_cuda_conv_backward_scratch(const gd_context *, const struct gd_weight *);
void gd_cuda_conv_backward(gd_context *, const struct gd_conv_backward *);

/* pos_conv.cu */
size_t gd_cuda_packed_pos_conv_size(const gd_context *, const struct gd_pos_conv *);
void gd_cuda_pack_pos_conv(gd_context *, const struct gd_pos_conv *, const float *w, void *packed);
void gd_cuda_pos_conv(gd_context *, const struct gd_pos_conv *);
void gd_cuda_pos_conv_backward_weight(gd_context *, const struct gd_pos_conv *, const float *dz, int64_t lddz,
                                      float *dw);

#ifdef __cplusplus
}
#endif

#endif
