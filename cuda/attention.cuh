/*
 * attention.cuh - what attention's kernels share. A block of GD_ATTENTION_THREADS threads takes GD_TILE_ROWS rows (of
 * queries, or of keys in the gradients by them) against GD_BLOCK_COLUMNS of the other side at a time. Thread
 * (group, lane) of (8, 16) owns rows 4 group .. + 3 and columns 4 lane .. + 3 of such a tile, be they keys of the
 * logits or the head's columns of an output: 4 x 4 sums in its registers, and the 16 lanes of a row are half a warp.
 *
 * Operands are staged in shared memory by rows of GD_DEPTH columns; wider heads go by in pieces. Sums run over columns
 * or keys in ascending order, so that a row's bits depend neither on the batch nor on its place in a tile.
 */
#ifndef GD_CUDA_ATTENTION_CUH
#define GD_CUDA_ATTENTION_CUH

#include "../csrc/philox.h"
#include "kernel.cuh"

enum {
    GD_ATTENTION_THREADS = 128,
    GD_TILE_ROWS = 32,
    GD_BLOCK_COLUMNS = 64,
    GD_DEPTH = 64,
    GD_ROW_QUADS = GD_DEPTH / 4 + 1, /* odd, so that the rows that a warp reads lie in different banks */
    GD_WEIGHT_QUADS = GD_TILE_ROWS / 4 + 1,
    GD_UTTERANCES = 64, /* of one launch: its arguments are at most 4 kB */
};

/* What shared memory is read and written by. */
struct alignas(16) gd_quad {
    float at[4];
};

/* The operation for some of the batch's utterances. */
struct gd_attention_call {
    struct gd_attention a; /* whose host pointers are not read */
    int64_t longest, count, most_rows; /* of the batch; utterances, and most rows of one of them, here */
    int64_t first[GD_UTTERANCES + 1], valid[GD_UTTERANCES];
    struct gd_dropout_row mask; /* its line is the first utterance's, head 0 */
    int dropout;
};

/* Takes utterances from number `from` on, at most GD_UTTERANCES and, but for the first, `most_rows` rows. */
static inline void gd_take_utterances(struct gd_attention_call *call, const struct gd_attention *a, int64_t from,
                                      int64_t most_rows)
{
    const struct gd_rows *rows = a->rows;
    call->a = *a;
    call->longest = rows->longest;
    call->count = call->most_rows = 0;
    for (int64_t b = from; b < rows->batch && call->count < GD_UTTERANCES; b++) {
        const int64_t length = rows->first[b + 1] - rows->first[b];
        if (b > from && rows->first[b + 1] - rows->first[from] > most_rows)
            break;
        call->first[call->count] = rows->first[b];
        call->valid[call->count] = rows->valid[b];
        call->first[++call->count] = rows->first[b + 1];
        call->most_rows = length > call->most_rows ? length : call->most_rows;
    }
    call->dropout = a->seed != NULL && a->dropout > 0;
    if (call->dropout) {
        call->mask = gd_dropout_row(a->dropout, a->seed, a->site);
        call->mask.line = (uint32_t)((a->seed->first_utterance + from) * a->heads);
    }
}

/* ---- One utterance and head ------------------------------------------------------------------------------ */

struct gd_attention_head {
    int64_t begin, rows, keys; /* the utterance's first row in the batch */
    int64_t number, column;    /* the head's first column */
    struct gd_dropout_row mask;
};

__device__ inline struct gd_attention_head gd_open_head(const struct gd_attention_call &call, int64_t utterance,
                                                        int64_t number)
{
    struct gd_attention_head head = {};
    head.begin = call.first[utterance];
    head.rows = call.first[utterance + 1] - head.begin;
    head.keys = call.valid[utterance];
    head.number = number;
    head.column = number * call.a.head_dim;
    if (call.dropout) {
        head.mask = call.mask;
        head.mask.line += (uint32_t)(utterance * call.a.heads + number);
    }
    return head;
}

/* near[3 + x] = the bias of offset + x, |x| <= 3, for that of key and query 4 lane and 4 group; 0 where there is
 * none. */
__device__ inline void gd_load_bias(float (&near)[7], const struct gd_attention_call &call,
                                    const struct gd_attention_head &head, int64_t offset)
{
    const int64_t width = 2 * call.longest - 1, at = offset - 3 + call.longest - 1;
    for (int x = 0; x < 7; x++)
        near[x] = call.a.bias && at + x >= 0 && at + x < width ? call.a.bias[head.number * width + at + x] : 0.0f;
}

__device__ inline float gd_load_gate(const struct gd_attention_call &call, const struct gd_attention_head &head,
                                     int64_t row)
{
    return call.a.gate ? call.a.gate[(head.begin + row) * call.a.heads + head.number] : 1.0f;
}

/* Dropout's factors of a query and keys key .. key + 3, a multiple of four. */
__device__ inline void gd_dropout_factors(float (&factor)[4], const struct gd_attention_call &call,
                                          const struct gd_attention_head &head, int64_t query, int64_t key)
{
    const uint32_t counter[4] = {(uint32_t)key >> 2, (uint32_t)query, head.mask.line, head.mask.site};
    uint32_t words[4] = {};
    if (call.dropout)
        gd_philox(counter, head.mask.key, words);
    for (int k = 0; k < 4; k++)
        factor[k] = !call.dropout ? 1.0f : words[k] >= head.mask.threshold ? head.mask.scale : 0.0f;
}

/* ---- Tiles ------------------------------------------------------------------------------------------------ */

/* Where row r of a block of columns is staged: rows 4 lane + i of all lanes side by side. */
__device__ inline int gd_slot(int r)
{
    return r % 4 * (GD_BLOCK_COLUMNS / 4) + r / 4;
}

/* Stages columns `from` .. + GD_DEPTH - 1 of the head's rows first .. first + ROWS - 1 of x, times `scale`, rounded to
 * the precision of the products; zeros outside of rows 0 .. rows - 1 and beyond the head. Rows of a block of columns go
 * to their slots. */
template <int ROWS>
__device__ inline void gd_stage(struct gd_quad *to, const struct gd_attention_call &call,
                                const struct gd_attention_head &head, const float *x, int64_t ld, int64_t first,
                                int64_t rows, int64_t from, float scale)
{
    const int d = (int)threadIdx.x % GD_DEPTH, step = GD_ATTENTION_THREADS / GD_DEPTH;
    const bool inside = from + d < call.a.head_dim;
    const float *const column = x + head.begin * ld + head.column + from + d;
#pragma unroll 8
    for (int r = (int)threadIdx.x / GD_DEPTH; r < ROWS; r += step) {
        const int64_t row = first + r;
        const int slot = ROWS == GD_BLOCK_COLUMNS ? gd_slot(r) : r;
        const float value = inside && row >= 0 && row < rows ? column[row * ld] * scale : 0.0f;
        to[slot * GD_ROW_QUADS + d / 4].at[d % 4] = gd_rounded(call.a.precision, value);
    }
}

/* sum[r][i] += row r of x, `rows` quads from it, times row 4 lane + i of the block y, over 4 quads columns. */
__device__ inline void gd_add_products(float (&sum)[4][4], const struct gd_quad *x, const int (&rows)[4],
                                       const struct gd_quad *y, int lane, int quads)
{
    for (int d = 0; d < quads; d++) {
        struct gd_quad a[4], b[4];
        for (int r = 0; r < 4; r++)
            a[r] = x[rows[r] + d];
        for (int i = 0; i < 4; i++)
            b[i] = y[(lane + i * (GD_BLOCK_COLUMNS / 4)) * GD_ROW_QUADS + d];
        for (int c = 0; c < 4; c++)
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 4; i++)
                    sum[r][i] += a[r].at[c] * b[i].at[c];
    }
}

/* Columns of a head from `from` on that are staged, in quads. */
__device__ inline int gd_staged_quads(int64_t head_dim, int64_t from)
{
    const int64_t left = head_dim - from;
    return left < GD_DEPTH ? (int)(left + 3) / 4 : GD_DEPTH / 4;
}

/* A tile's weights of rows 4 group + r and columns 4 lane + i, for all threads to read: a quad is four rows. */
__device__ inline void gd_store_weights(struct gd_quad *weights, const float (&w)[4][4], int group, int lane)
{
    for (int i = 0; i < 4; i++) {
        const struct gd_quad column = {{w[0][i], w[1][i], w[2][i], w[3][i]}};
        weights[(lane + i * (GD_BLOCK_COLUMNS / 4)) * GD_WEIGHT_QUADS + group] = column;
    }
}

/* sum[r][c] += weights of row 4 group + r times column 4 lane + c of the block y, over y's first `count` rows. */
__device__ inline void gd_add_weighted(float (&sum)[4][4], const struct gd_quad *weights, const struct gd_quad *y,
                                       int group, int lane, int64_t count)
{
    const int fours = count < GD_BLOCK_COLUMNS ? (int)(count + 3) / 4 : GD_BLOCK_COLUMNS / 4;
    for (int four = 0; four < fours; four++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int slot = four + i * (GD_BLOCK_COLUMNS / 4);
            const struct gd_quad w = weights[slot * GD_WEIGHT_QUADS + group], v = y[slot * GD_ROW_QUADS + lane];
            for (int r = 0; r < 4; r++)
                for (int c = 0; c < 4; c++)
                    sum[r][c] += w.at[r] * v.at[c];
        }
}

/* Over the 16 lanes of a row, in each of them. */
__device__ inline float gd_lanes_sum(float value)
{
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
        value += __shfl_xor_sync(0xffffffffu, value, distance);
    return value;
}

__device__ inline float gd_lanes_max(float value)
{
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2)
        value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
    return value;
}

#endif
