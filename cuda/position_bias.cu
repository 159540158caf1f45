/*
 * position_bias.cu - WavLM's relative position bias from its table, and the table's gradient. Offsets that share a
 * bucket are neighbours: the host finds these runs, since it has the logarithm that decides on their ends, and gives
 * them to the kernels as arguments.
 */
#include "../csrc/position.h"
#include "kernel.cuh"

enum { RUNS = 160 }; /* of one launch: its arguments are at most 4 kB */

/* Run k: offsets begin[k] .. begin[k + 1] - 1 have row row[k] of the table. */
struct runs {
    int64_t begin[RUNS + 1];
    int row[RUNS];
    int count;
};

/* Runs from offset `begin` on, below `longest`. */
static struct runs find_runs(const gd_config *config, int64_t longest, int64_t begin)
{
    struct runs runs = {};
    while (begin < longest && runs.count < RUNS) {
        const int64_t row = gd_position_bucket(config, begin);
        int64_t last = begin, beyond = begin <= 0 ? 1 : longest;
        while (beyond - last > 1) {
            const int64_t middle = last + (beyond - last) / 2;
            if (gd_position_bucket(config, middle) == row)
                last = middle;
            else
                beyond = middle;
        }
        runs.begin[runs.count] = begin;
        runs.row[runs.count++] = (int)row;
        begin = beyond;
    }
    runs.begin[runs.count] = begin;
    return runs;
}

/* A warp for each run and head. */
__global__ void position_bias_runs(struct runs runs, int64_t heads, int64_t longest, const float *table, float *bias)
{
    const int64_t h = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    const int run = (int)blockIdx.y;
    if (h >= heads)
        return;
    const float value = table[runs.row[run] * heads + h];
    float *const to = bias + h * (2 * longest - 1) + longest - 1;
    for (int64_t d = runs.begin[run] + threadIdx.x; d < runs.begin[run + 1]; d += GD_WARP)
        to[d] = value;
}

/* The same for the gradient: sums in float64, of every 32nd offset in each lane and then of the lanes. */
__global__ void position_bias_backward_runs(struct runs runs, int64_t heads, int64_t longest, const float *dbias,
                                            float *dtable)
{
    const int64_t h = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    const int run = (int)blockIdx.y;
    if (h >= heads) /* the whole warp */
        return;
    const float *const from = dbias + h * (2 * longest - 1) + longest - 1;
    double sum = 0;
    for (int64_t d = runs.begin[run] + threadIdx.x; d < runs.begin[run + 1]; d += GD_WARP)
        sum += from[d];
    sum = gd_warp_sum(sum);
    if (threadIdx.x == 0)
        dtable[runs.row[run] * heads + h] += (float)sum;
}

/* launch(grid, block, stream, runs), a cudaError_t, for all offsets, RUNS runs at a time. */
template <class Launch>
static void for_runs(gd_context *context, const gd_config *config, int64_t longest, Launch launch, const char *what)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    const int64_t across = gd_divide_up(config->encoder_attention_heads, GD_BLOCK_ROWS);
    struct runs runs;
    for (int64_t begin = 1 - longest; cuda && begin < longest; begin = runs.begin[runs.count]) {
        runs = find_runs(config, longest, begin);
        const dim3 grid((unsigned)across, (unsigned)runs.count), block(GD_WARP, GD_BLOCK_ROWS);
        gd_cuda_check(context, launch(grid, block, cuda->stream, runs), what);
    }
}

void gd_cuda_position_bias(gd_context *context, const gd_config *config, int64_t longest, const float *table,
                           float *bias)
{
    const int64_t heads = config->encoder_attention_heads;
    for_runs(context, config, longest, [=](dim3 grid, dim3 block, cudaStream_t stream, const struct runs &runs) {
        return GD_LAUNCH(position_bias_runs, grid, block, 0, stream, runs, heads, longest, table, bias);
    }, "position_bias");
}

void gd_cuda_position_bias_backward(gd_context *context, const gd_config *config, int64_t longest, const float *dbias,
                                    float *dtable)
{
    const int64_t heads = config->encoder_attention_heads;
    for_runs(context, config, longest, [=](dim3 grid, dim3 block, cudaStream_t stream, const struct runs &runs) {
        return GD_LAUNCH(position_bias_backward_runs, grid, block, 0, stream, runs, heads, longest, dbias, dtable);
    }, "position_bias_backward");
}
