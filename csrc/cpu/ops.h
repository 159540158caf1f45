/*
 * ops.h - the CPU backend's operations, one for each member of struct gd_backend (backend.h says what they
 * compute), and what they share: the device's state, the crew of threads, a slot's scratch.
 *
 * An operation divides its outputs into tasks, hands them to gd_cpu_run(), and calls the kernels of the
 * chosen instruction set from within the tasks. Called from within a task of for_each(), gd_cpu_run() runs
 * the tasks one after the other in the caller's slot, so that operations need not know where they run.
 */
#ifndef GD_CPU_OPS_H
#define GD_CPU_OPS_H

#include <assert.h>

#include "../backend.h"
#include "kernels.h"
#include "threads.h"

/* context->device */
struct gd_cpu {
    const struct gd_kernels *kernels;
    struct gd_threads *threads;
};

static inline const struct gd_kernels *gd_cpu_kernels(const gd_context *context)
{
    return ((const struct gd_cpu *)context->device)->kernels;
}

/* for_each(): task(argument, i, slot) once for each i < count (tasks.c). */
void gd_cpu_run(gd_context *context, int64_t count, gd_task *task, void *argument);

/* `bytes` of the calling thread's scratch, 64-byte aligned, wholly the running operation's: at most what
 * gd_cpu_scratch_size() said. gemm() and linear() use it too, so an operation that calls these from its tasks keeps
 * nothing there. */
static inline void *gd_cpu_scratch(const gd_context *context, size_t bytes)
{
    assert(bytes <= context->scratch_stride);
    (void)bytes;
    return context->scratch + (size_t)gd_threads_slot() * context->scratch_stride;
}

/* Bytes that one slot needs, by operation: gd_cpu_scratch_size() is the largest. */
size_t gd_cpu_gemm_scratch(const gd_context *context, const gd_config *config);
size_t gd_cpu_pos_conv_scratch(const gd_context *context, const gd_config *config, int64_t longest, int training);
size_t gd_cpu_gate_scratch(int64_t head_dim);
size_t gd_cpu_attention_scratch(const gd_context *context, const gd_config *config, int64_t longest, int training);

/* backend_cpu.c */
gd_status gd_cpu_allocate(gd_context *, size_t bytes, void **memory);
void gd_cpu_release(gd_context *, void *memory);
void gd_cpu_upload(gd_context *, void *to, const void *from, size_t bytes);
void gd_cpu_download(gd_context *, void *to, const void *from, size_t bytes);
void gd_cpu_zero(gd_context *, void *memory, size_t bytes);
gd_status gd_cpu_synchronize(gd_context *);
size_t gd_cpu_scratch_size(const gd_context *, const gd_config *, int64_t longest, int training);
void gd_cpu_close(gd_context *);

/* Convolutions that are computed by minimal filtering (filter_template.h). */
static inline int gd_cpu_filtered(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    return kernels->gemm[weight->precision].filtered && weight->taps == 3 && weight->stride == 2 && weight->in >= 16;
}

/* Matrices (in, out) that a weight is made into: U0 .. U4 and the odd rows' tap, or the taps in order; and which of
 * them tap k is. */
static inline int64_t gd_cpu_matrices(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    return gd_cpu_filtered(kernels, weight) ? FILTER_POINTS + 1 : weight->taps;
}

static inline int64_t gd_cpu_tap_matrix(const struct gd_kernels *kernels, const struct gd_weight *weight, int64_t k)
{
    static const int filtered[] = {0, FILTER_POINTS, FILTER_POINTS - 1};
    return gd_cpu_filtered(kernels, weight) ? filtered[k] : k;
}

/* gemm.c */
size_t gd_cpu_packed_size(const gd_context *, const struct gd_weight *);
void gd_cpu_pack(gd_context *, const struct gd_weight *, const float *w, int64_t w_out, int64_t w_tap, int64_t w_in,
                 void *packed);
void gd_cpu_linear(gd_context *, const struct gd_linear *);
void gd_cpu_gemm(gd_context *, const struct gd_gemm *);
void gd_cpu_bias_backward(gd_context *, int64_t rows, int64_t width, const float *dy, int64_t lddy, float *dbias);

/* weights.c */
void gd_cpu_weight_norm(gd_context *, int64_t out, int64_t in, int64_t kernel, const float *g, const float *v,
                        float *w);
void gd_cpu_weight_norm_backward(gd_context *, int64_t out, int64_t in, int64_t kernel, const float *g,
                                 const float *v, const float *dw, float *dg, float *dv);

/* conv_backward.c */
size_t gd_cpu_conv_taps_size(const gd_context *, const struct gd_weight *);
void gd_cpu_split_taps(gd_context *, const struct gd_weight *, const float *w, float *w_taps);
void gd_cpu_merge_taps(gd_context *, const struct gd_weight *, const float *dw_taps, float *dw);
size_t gd_cpu_conv_backward_scratch(const gd_context *, const struct gd_weight *);
void gd_cpu_conv_backward(gd_context *, const struct gd_conv_backward *);

/* pos_conv.c */
size_t gd_cpu_packed_pos_conv_size(const gd_context *, const struct gd_pos_conv *);
void gd_cpu_pack_pos_conv(gd_context *, const struct gd_pos_conv *, const float *w, void *packed);
void gd_cpu_pos_conv(gd_context *, const struct gd_pos_conv *);
void gd_cpu_pos_conv_backward_weight(gd_context *, const struct gd_pos_conv *, const float *dz, int64_t lddz,
                                     float *dw);

/* norm.c */
void gd_cpu_layer_norm(gd_context *, const struct gd_layer_norm *);
void gd_cpu_layer_norm_backward(gd_context *, const struct gd_layer_norm_backward *);

/* elementwise.c */
void gd_cpu_activate(gd_context *, enum gd_activation, int64_t rows, int64_t width, const float *z, int64_t ldz,
                     float *y, int64_t ldy);
void gd_cpu_activate_backward(gd_context *, enum gd_activation, int64_t rows, int64_t width, const float *z,
                              int64_t ldz, const float *dy, int64_t lddy, float *dz, int64_t lddz);
void gd_cpu_round_rows(gd_context *, int64_t rows, int64_t width, const float *x, int64_t ldx, uint16_t *to,
                       int64_t ldto);
void gd_cpu_widen_rows(gd_context *, enum gd_activation, int64_t rows, int64_t width, const uint16_t *from,
                       int64_t ldfrom, float *z, int64_t ldz, float *y, int64_t ldy);
void gd_cpu_axpby(gd_context *, int64_t rows, int64_t width, float alpha, const float *x, int64_t ldx, float beta,
                  float *y, int64_t ldy);
void gd_cpu_dropout(gd_context *, const struct gd_rows *, int64_t first, int64_t count, int64_t width, float *x,
                    int64_t ldx, double p, const gd_dropout_seed *, uint32_t site);
void gd_cpu_scatter_rows(gd_context *, const struct gd_rows *, int64_t width, const float *x, int64_t ldx,
                         int64_t frames_max, float *padded);
void gd_cpu_gather_rows(gd_context *, const struct gd_rows *, int64_t width, const float *padded, int64_t frames_max,
                        float *x, int64_t ldx);

/* optimizer.c */
double gd_cpu_sum_squares(gd_context *, size_t count, const float *x);
void gd_cpu_adamw(gd_context *, const struct gd_adamw_update *);

/* extractor_ops.c */
void gd_cpu_moments(gd_context *, const struct gd_moments *);
void gd_cpu_norm_fold(gd_context *, const struct gd_norm_fold *);
void gd_cpu_norm_fold_backward(gd_context *, const struct gd_norm_fold_backward *);
void gd_cpu_normalize(gd_context *, int64_t samples, float *x, const double *statistics, float eps);

/* position.c */
void gd_cpu_position_bias(gd_context *, const gd_config *, int64_t longest, const float *table, float *bias);
void gd_cpu_position_bias_backward(gd_context *, const gd_config *, int64_t longest, const float *dbias,
                                   float *dtable);
void gd_cpu_gate(gd_context *, const struct gd_gate *);
void gd_cpu_gate_backward(gd_context *, const struct gd_gate_backward *);

/* attention.c */
void gd_cpu_attention(gd_context *, const struct gd_attention *);
void gd_cpu_attention_backward(gd_context *, const struct gd_attention_backward *);

/* loss.c */
void gd_cpu_loss_rows(gd_context *, const struct gd_loss_rows *);

#endif
