/*
 * attention.c - attention by utterance, head and block of queries; its gradients by head, and by utterance too
 * where the bias, which all utterances share, has none.
 */
#include "ops.h"

/* A task packs the head's keys and values: so many queries make that a small part of it. */
enum { QUERIES_A_TASK = 192, TASKS_A_THREAD = 3 };

size_t gd_cpu_attention_scratch(const gd_context *context, const gd_config *config, int64_t longest, int training)
{
    int64_t heads = config->encoder_attention_heads;
    int64_t head_dim = heads > 0 ? config->encoder_embed_dim / heads : 0;
    return gd_cpu_kernels(context)->attention_scratch(head_dim, longest, training);
}

static float *scratch_of(const gd_context *context, const struct gd_attention *a, int backward)
{
    return gd_cpu_scratch(context, gd_cpu_kernels(context)->attention_scratch(a->head_dim, a->rows->longest, backward));
}

struct attention_task {
    gd_context *context;
    const void *op;
    int64_t heads, blocks, block_rows;
};

static void forward_block(void *argument, int64_t index, int slot)
{
    const struct attention_task *t = argument;
    const struct gd_attention *a = t->op;
    int64_t block = index % t->blocks, head = index / t->blocks % t->heads, b = index / t->blocks / t->heads;
    int64_t rows = a->rows->first[b + 1] - a->rows->first[b], begin = block * t->block_rows;
    int64_t end = gd_smaller(begin + t->block_rows, rows);
    const struct gd_kernels *kernels = gd_cpu_kernels(t->context);
    const struct gd_gemm_kernels *products = a->precision == GD_FLOAT32 ? NULL : &kernels->gemm[a->precision];
    (void)slot;
    if (begin < end)
        kernels->attention(a, products, b, head, begin, end, scratch_of(t->context, a, 0));
}

void gd_cpu_attention(gd_context *context, const struct gd_attention *a)
{
    struct attention_task t = {context, a, a->heads, 1, a->rows->longest};
    int64_t wanted = (int64_t)TASKS_A_THREAD * gd_context_num_threads(context);
    int64_t most = gd_divide_up(a->rows->longest, QUERIES_A_TASK);
    t.blocks = gd_smaller(gd_divide_up(wanted, a->rows->batch * a->heads), most);
    t.block_rows = gd_divide_up(a->rows->longest, t.blocks);
    gd_cpu_run(context, a->rows->batch * a->heads * t.blocks, forward_block, &t);
}

static void backward_head(void *argument, int64_t index, int slot)
{
    const struct attention_task *t = argument;
    const struct gd_attention_backward *b = t->op;
    (void)slot;
    for (int64_t u = 0; u < b->forward.rows->batch; u++)
        gd_cpu_kernels(t->context)->attention_backward(b, u, index, scratch_of(t->context, &b->forward, 1));
}

static void backward_utterance(void *argument, int64_t index, int slot)
{
    const struct attention_task *t = argument;
    const struct gd_attention_backward *b = t->op;
    (void)slot;
    gd_cpu_kernels(t->context)
        ->attention_backward(b, index / t->heads, index % t->heads, scratch_of(t->context, &b->forward, 1));
}

void gd_cpu_attention_backward(gd_context *context, const struct gd_attention_backward *b)
{
    int64_t heads = b->forward.heads;
    struct attention_task t = {.context = context, .op = b, .heads = heads};
    if (b->dbias)
        gd_cpu_run(context, heads, backward_head, &t);
    else
        gd_cpu_run(context, heads * b->forward.rows->batch, backward_utterance, &t);
}
