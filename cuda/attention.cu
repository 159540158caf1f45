/*
 * attention.cu - attention by utterance, head and tile of queries, with an online softmax: a row keeps its maximum m
 * and its sum l of e^(logit - m) so far, and rescales both and its output when a block of keys raises m. In bfloat16
 * the factors, e^(logit - m) among them, are rounded, and multiplied as float32.
 */
#include "attention.cuh"

/* Shared memory that every device has: what the static arrays leave of it holds a tile's queries whole, since the
 * output may take their place. */
enum {
    SHARED_BYTES = 48 * 1024,
    QUERY_QUADS = SHARED_BYTES / (int)sizeof(struct gd_quad) - GD_BLOCK_COLUMNS * (GD_ROW_QUADS + GD_WEIGHT_QUADS),
};

/* logits[r][i] become e^(logit - m'), m' = max(m, logits); l and the output follow. */
__device__ inline void softmax_block(float (&logits)[4][4], float (&m)[4], float (&l)[4], float (&out)[4][4])
{
    for (int r = 0; r < 4; r++) {
        float top = fmaxf(fmaxf(logits[r][0], logits[r][1]), fmaxf(logits[r][2], logits[r][3])), sum = 0;
        top = fmaxf(m[r], gd_lanes_max(top));
        const float shrink = expf(m[r] - top);
        for (int i = 0; i < 4; i++)
            sum += logits[r][i] = expf(logits[r][i] - top);
        l[r] = l[r] * shrink + gd_lanes_sum(sum);
        m[r] = top;
        for (int c = 0; c < 4; c++)
            out[r][c] *= shrink;
    }
}

/* Blocks: tile_rows queries each, by heads, by utterances. The head's columns go by in pieces of GD_DEPTH, for each of
 * which the probabilities are computed anew. */
__global__ void attention_tiles(struct gd_attention_call call, int tiles, int tile_rows, int stride)
{
    GD_SHARED(struct gd_quad, block, [GD_BLOCK_COLUMNS * GD_ROW_QUADS]); /* of K, then of V */
    GD_SHARED(struct gd_quad, weights, [GD_BLOCK_COLUMNS * GD_WEIGHT_QUADS]);
    GD_DYNAMIC_SHARED(struct gd_quad, queries); /* scaled, (tile_rows, stride) */
    const struct gd_attention &a = call.a;
    const struct gd_attention_head head = gd_open_head(call, blockIdx.y, blockIdx.x / (unsigned)tiles);
    const int64_t first = (int64_t)(blockIdx.x % (unsigned)tiles) * tile_rows;
    if (first >= head.rows) /* the whole block */
        return;
    const int group = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;
    for (int at = (int)threadIdx.x; at < tile_rows * stride * 4; at += GD_ATTENTION_THREADS) {
        const int64_t row = first + at / (4 * stride), d = at % (4 * stride);
        const float *q = a.q + (head.begin + row) * a.ldq + head.column + d;
        queries[at / 4].at[at % 4] = gd_rounded(a.precision, row < head.rows && d < a.head_dim ? *q * a.scale : 0.0f);
    }
    int places[4]; /* rows past the tile compute what its last one does */
    float gate[4];
    for (int r = 0; r < 4; r++) {
        const int row = 4 * group + r < tile_rows ? 4 * group + r : tile_rows - 1;
        places[r] = row * stride;
        gate[r] = first + row < head.rows ? gd_load_gate(call, head, first + row) : 1.0f;
    }

    for (int64_t column = 0; column < a.head_dim; column += GD_DEPTH) {
        float out[4][4] = {}, m[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY}, l[4] = {};
        for (int64_t key = 0; key < head.keys; key += GD_BLOCK_COLUMNS) {
            float p[4][4] = {}, bias[7];
            for (int64_t from = 0; from < a.head_dim; from += GD_DEPTH) {
                __syncthreads();
                gd_stage<GD_BLOCK_COLUMNS>(block, call, head, a.k, a.ldk, key, head.keys, from, 1.0f);
                __syncthreads();
                gd_add_products(p, queries + from / 4, places, block, lane, gd_staged_quads(a.head_dim, from));
            }
            gd_load_bias(bias, call, head, key + 4 * lane - (first + 4 * group));
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 4; i++)
                    p[r][i] = key + 4 * lane + i < head.keys ? p[r][i] + gate[r] * bias[3 + i - r] : -INFINITY;
            softmax_block(p, m, l, out);
            for (int r = 0; r < 4 && call.dropout; r++) {
                float factor[4];
                gd_dropout_factors(factor, call, head, first + 4 * group + r, key + 4 * lane);
                for (int i = 0; i < 4; i++)
                    p[r][i] *= factor[i];
            }
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 4; i++)
                    p[r][i] = gd_rounded(a.precision, p[r][i]);
            __syncthreads(); /* K was read */
            gd_store_weights(weights, p, group, lane);
            gd_stage<GD_BLOCK_COLUMNS>(block, call, head, a.v, a.ldv, key, head.keys, column, 1.0f);
            __syncthreads();
            gd_add_weighted(out, weights, block, group, lane, head.keys - key);
        }
        for (int r = 0; r < 4; r++) {
            const int64_t row = first + 4 * group + r;
            if (4 * group + r >= tile_rows || row >= head.rows)
                continue;
            float *to = a.out + (head.begin + row) * a.ldout + head.column + column + 4 * lane;
            for (int c = 0; c < 4; c++)
                if (column + 4 * lane + c < a.head_dim)
                    to[c] = out[r][c] / l[r];
            if (a.lse && lane == 0 && column == 0)
                a.lse[(head.begin + row) * a.heads + head.number] = m[r] + logf(l[r]);
        }
    }
}

void gd_cuda_attention(gd_context *context, const struct gd_attention *a)
{
    if (gd_cuda_lacks(context, a->precision))
        return;
    const int64_t stride = (a->head_dim + 3) / 4 | 1; /* quads of a query, odd in number for the banks' sake */
    if (stride > QUERY_QUADS) {
        gd_cuda_keep_failure(context, GD_EUNSUPPORTED,
                             "device: attention: expected heads of at most %d columns, got %lld", 4 * QUERY_QUADS - 4,
                             (long long)a->head_dim);
        return;
    }
    const int64_t most = QUERY_QUADS / stride, tile_rows = most < GD_TILE_ROWS ? most : (int64_t)GD_TILE_ROWS;
    struct gd_cuda *cuda = gd_cuda_begin(context);
    struct gd_attention_call call = {};
    for (int64_t b = 0; cuda && b < a->rows->batch; b += call.count) {
        gd_take_utterances(&call, a, b, a->rows->total);
        const int64_t tiles = gd_divide_up(call.most_rows, tile_rows);
        const dim3 grid((unsigned)(tiles * a->heads), (unsigned)call.count);
        gd_cuda_check(context, GD_LAUNCH(attention_tiles, grid, dim3(GD_ATTENTION_THREADS),
                                         (size_t)(tile_rows * stride) * sizeof(struct gd_quad), cuda->stream, call,
                                         (int)tiles, (int)tile_rows, (int)stride), "attention");
    }
}
