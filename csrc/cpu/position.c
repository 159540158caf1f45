/*
 * position.c - WavLM's relative position bias and its gate.
 */
#include "../position.h"
#include "ops.h"

enum { ROWS_A_TASK = 32 };

void gd_cpu_position_bias(gd_context *context, const gd_config *config, int64_t longest, const float *table,
                          float *bias)
{
    int64_t heads = config->encoder_attention_heads, width = 2 * longest - 1;
    (void)context;
    for (int64_t d = 1 - longest; d < longest; d++) {
        const float *row = table + gd_position_bucket(config, d) * heads;
        for (int64_t h = 0; h < heads; h++)
            bias[h * width + d + longest - 1] = row[h];
    }
}

/* Offsets that share a bucket are neighbours: their sum runs in float64, in ascending order. */
void gd_cpu_position_bias_backward(gd_context *context, const gd_config *config, int64_t longest,
                                   const float *dbias, float *dtable)
{
    int64_t heads = config->encoder_attention_heads, width = 2 * longest - 1;
    (void)context;
    for (int64_t begin = 1 - longest, end; begin < longest; begin = end) {
        int64_t row = gd_position_bucket(config, begin);
        for (end = begin + 1; end < longest && gd_position_bucket(config, end) == row; end++)
            continue;
        for (int64_t h = 0; h < heads; h++) {
            double sum = 0;
            for (int64_t d = begin; d < end; d++)
                sum += dbias[h * width + d + longest - 1];
            dtable[row * heads + h] += (float)sum;
        }
    }
}

size_t gd_cpu_gate_scratch(int64_t head_dim) { return (size_t)(4 * head_dim) * sizeof(float); }

struct gate_task {
    gd_context *context;
    const struct gd_gate *gate;
};

static float *gate_scratch(const gd_context *context, const struct gd_gate *gate)
{
    return gd_cpu_scratch(context, gd_cpu_gate_scratch(gate->head_dim));
}

static void gate_rows(void *argument, int64_t index, int slot)
{
    const struct gate_task *t = argument;
    int64_t begin = index * ROWS_A_TASK, end = begin + ROWS_A_TASK;
    (void)slot;
    gd_cpu_kernels(t->context)
        ->gate(t->gate, begin, end < t->gate->rows ? end : t->gate->rows, gate_scratch(t->context, t->gate));
}

void gd_cpu_gate(gd_context *context, const struct gd_gate *gate)
{
    struct gate_task t = {context, gate};
    gd_cpu_run(context, gd_divide_up(gate->rows, ROWS_A_TASK), gate_rows, &t);
}

/* Undivided: its sums run over rows and heads, and it is short. */
void gd_cpu_gate_backward(gd_context *context, const struct gd_gate_backward *gate)
{
    gd_cpu_kernels(context)->gate_backward(gate, gate_scratch(context, &gate->forward));
}
