/*
 * backend_cpu.c - the CPU as a gd_backend: the table of its operations (ops.h), and its memory.
 */
#include "ops.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define HUGE_PAGE ((size_t)2 << 20)

/* Large buffers ask for huge pages: a matrix product walks through more small ones than the processor's table of
 * pages holds. */
gd_status gd_cpu_allocate(gd_context *context, size_t bytes, void **memory)
{
    size_t alignment = bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : 64;
    if (posix_memalign(memory, alignment, bytes > 0 ? bytes : alignment) != 0) {
        *memory = NULL;
        return gd_fail(context, GD_ENOMEM, "out of memory: %zu bytes wanted", bytes);
    }
#ifdef MADV_HUGEPAGE
    if (alignment == HUGE_PAGE)
        madvise(*memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
#endif
    return GD_OK;
}

void gd_cpu_release(gd_context *context, void *memory)
{
    (void)context;
    free(memory);
}

void gd_cpu_upload(gd_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    memcpy(to, from, bytes);
}

void gd_cpu_download(gd_context *context, void *to, const void *from, size_t bytes)
{
    (void)context;
    memcpy(to, from, bytes);
}

void gd_cpu_zero(gd_context *context, void *memory, size_t bytes)
{
    (void)context;
    memset(memory, 0, bytes);
}

gd_status gd_cpu_synchronize(gd_context *context)
{
    gd_status status = context->status;
    context->status = GD_OK;
    return status;
}

static size_t largest(size_t a, size_t b)
{
    return a > b ? a : b;
}

size_t gd_cpu_scratch_size(const gd_context *context, const gd_config *config, int64_t longest, int training)
{
    size_t bytes = gd_cpu_gemm_scratch(context, config);
    bytes = largest(bytes, gd_cpu_pos_conv_scratch(context, config, longest, training));
    bytes = largest(bytes, gd_cpu_attention_scratch(context, config, longest, training));
    bytes = largest(bytes, gd_cpu_gate_scratch(config->encoder_embed_dim));
    /* An odd number of cache lines: slots' scratch then differs in its L1 sets from the rest. */
    return ((bytes + 63) / 64 | 1) * 64;
}

void gd_cpu_close(gd_context *context)
{
    struct gd_cpu *cpu = context->device;
    if (cpu == NULL)
        return;
    gd_threads_free(cpu->threads);
    free(cpu);
    context->device = NULL;
}

static const struct gd_backend backend_cpu = {
    .name = "cpu",
    .shares_memory = 1,
    .precisions = 1 << GD_FLOAT32 | 1 << GD_BFLOAT16 | 1 << GD_INT8,
    .tile_frames = 50,
    .block_rows = 96,
    .allocate = gd_cpu_allocate,
    .release = gd_cpu_release,
    .upload = gd_cpu_upload,
    .download = gd_cpu_download,
    .zero = gd_cpu_zero,
    .synchronize = gd_cpu_synchronize,
    .for_each = gd_cpu_run,
    .scratch_size = gd_cpu_scratch_size,
    .packed_size = gd_cpu_packed_size,
    .pack = gd_cpu_pack,
    .linear = gd_cpu_linear,
    .gemm = gd_cpu_gemm,
    .bias_backward = gd_cpu_bias_backward,
    .layer_norm = gd_cpu_layer_norm,
    .layer_norm_backward = gd_cpu_layer_norm_backward,
    .activate = gd_cpu_activate,
    .activate_backward = gd_cpu_activate_backward,
    .round_rows = gd_cpu_round_rows,
    .widen_rows = gd_cpu_widen_rows,
    .axpby = gd_cpu_axpby,
    .dropout = gd_cpu_dropout,
    .moments = gd_cpu_moments,
    .norm_fold = gd_cpu_norm_fold,
    .norm_fold_backward = gd_cpu_norm_fold_backward,
    .normalize = gd_cpu_normalize,
    .conv_taps_size = gd_cpu_conv_taps_size,
    .split_taps = gd_cpu_split_taps,
    .merge_taps = gd_cpu_merge_taps,
    .conv_backward_scratch = gd_cpu_conv_backward_scratch,
    .conv_backward = gd_cpu_conv_backward,
    .weight_norm = gd_cpu_weight_norm,
    .weight_norm_backward = gd_cpu_weight_norm_backward,
    .packed_pos_conv_size = gd_cpu_packed_pos_conv_size,
    .pack_pos_conv = gd_cpu_pack_pos_conv,
    .pos_conv = gd_cpu_pos_conv,
    .pos_conv_backward_weight = gd_cpu_pos_conv_backward_weight,
    .position_bias = gd_cpu_position_bias,
    .position_bias_backward = gd_cpu_position_bias_backward,
    .gate = gd_cpu_gate,
    .gate_backward = gd_cpu_gate_backward,
    .attention = gd_cpu_attention,
    .attention_backward = gd_cpu_attention_backward,
    .scatter_rows = gd_cpu_scatter_rows,
    .gather_rows = gd_cpu_gather_rows,
    .loss_rows = gd_cpu_loss_rows,
    .sum_squares = gd_cpu_sum_squares,
    .adamw = gd_cpu_adamw,
    .close = gd_cpu_close,
};

gd_status gd_backend_cpu_open(gd_context *context)
{
    struct gd_cpu *cpu = malloc(sizeof *cpu);
    if (cpu == NULL)
        return gd_fail(context, GD_ENOMEM, "out of memory");
    cpu->kernels = gd_kernels_select();
    gd_status status = gd_threads_create(context->num_threads, &cpu->threads);
    if (status != GD_OK) {
        free(cpu);
        return gd_fail(context, status, "num_threads: expected 1 to %d, got %d", GD_MAX_THREADS, context->num_threads);
    }
    context->backend = &backend_cpu;
    context->device = cpu;
    return GD_OK;
}
