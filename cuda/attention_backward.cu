/*
 * attention_backward.cu - attention's gradients from the kept log-sums: with p = e^(logit - lse), f the dropout factors
 * and D = sum over j of p f (dout v^T) = dout . out,
 *
 *     dlogit = p (f dout v^T - D)          dv = (p f)^T dout
 *     dq = scale dlogit k                  dk = scale dlogit^T q
 *     dgate = sum over j of dlogit bias    dbias[j - i] += dlogit gate
 *
 * Sums over keys (dq, dgate), over queries (dk, dv) and along diagonals (dbias) each have a kernel, which computes the
 * probabilities that it needs anew: no sum is divided among blocks.
 */
#include "attention.cuh"

/* ---- D: a warp for each row and head ---------------------------------------------------------------------- */

__global__ void attention_deltas(struct gd_attention_backward b, int64_t begin, int64_t rows, float *deltas)
{
    const struct gd_attention &a = b.forward;
    const int64_t item = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    if (item >= rows * a.heads) /* the whole warp */
        return;
    const int64_t row = begin + item / a.heads, column = item % a.heads * a.head_dim;
    const float *dout = b.dout + row * b.lddout + column, *out = a.out + row * a.ldout + column;
    float sum = 0;
    for (int64_t d = threadIdx.x; d < a.head_dim; d += GD_WARP)
        sum += dout[d] * out[d];
    sum = gd_warp_sum(sum);
    if (threadIdx.x == 0)
        deltas[item] = sum;
}

/* ---- Of the logits ---------------------------------------------------------------------------------------- */

struct query {
    bool real; /* or past the utterance's end */
    float gate, lse, delta;
};

__device__ inline void load_queries(struct query (&queries)[4], const struct gd_attention_call &call,
                                    const struct gd_attention_head &head, const float *deltas, int64_t first)
{
    for (int q = 0; q < 4; q++) {
        const int64_t item = (head.begin + first + q) * call.a.heads + head.number;
        queries[q].real = first + q < head.rows;
        queries[q].gate = queries[q].real ? gd_load_gate(call, head, first + q) : 0.0f;
        queries[q].lse = queries[q].real ? call.a.lse[item] : 0.0f;
        queries[q].delta = queries[q].real ? deltas[item - call.first[0] * call.a.heads] : 0.0f;
    }
}

/* sum[r][i] += rows of a tile times rows of a block over all of the head's columns, x and y being staged in pieces, of
 * which the last stays. A tile that is `kept` is there already, if it is a single piece. */
struct operand {
    const float *x;
    int64_t ld, first, rows;
    float scale;
};

__device__ inline void multiply(float (&sum)[4][4], const struct gd_attention_call &call,
                                const struct gd_attention_head &head, struct gd_quad *tile, const struct operand &x,
                                bool kept, struct gd_quad *block, const struct operand &y)
{
    const int64_t dim = call.a.head_dim;
    const int group = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;
    int places[4];
    for (int r = 0; r < 4; r++)
        places[r] = (4 * group + r) * GD_ROW_QUADS;
    for (int64_t from = 0; from < dim; from += GD_DEPTH) {
        __syncthreads(); /* what was there was read */
        if (!kept || dim > GD_DEPTH)
            gd_stage<GD_TILE_ROWS>(tile, call, head, x.x, x.ld, x.first, x.rows, from, x.scale);
        gd_stage<GD_BLOCK_COLUMNS>(block, call, head, y.x, y.ld, y.first, y.rows, from, y.scale);
        __syncthreads();
        gd_add_products(sum, tile, places, block, lane, gd_staged_quads(dim, from));
    }
}

/* Products q . k become p f, and dout . v become dlogits, of queries `first` + q and keys `key` + k, four by four: at
 * [q][k], or at [k][q] where a tile's rows are keys. bias: of key - first + x at 3 + x. */
template <bool ROWS_ARE_KEYS>
__device__ inline void logit_gradients(float (&p)[4][4], float (&dlogit)[4][4], const struct gd_attention_call &call,
                                       const struct gd_attention_head &head, const struct query (&queries)[4],
                                       const float (&bias)[7], int64_t first, int64_t key)
{
    for (int q = 0; q < 4; q++) {
        float factor[4];
        gd_dropout_factors(factor, call, head, first + q, key);
        for (int k = 0; k < 4; k++) {
            float &logit = ROWS_ARE_KEYS ? p[k][q] : p[q][k], &d = ROWS_ARE_KEYS ? dlogit[k][q] : dlogit[q][k];
            const bool real = queries[q].real && key + k >= 0 && key + k < head.keys;
            const float probability = real ? expf(logit + queries[q].gate * bias[3 + k - q] - queries[q].lse) : 0.0f;
            logit = probability * factor[k];
            d = probability * (d * factor[k] - queries[q].delta);
        }
    }
}

/* Writes scale sum[r][c] to columns `from` + 4 lane + c of the head's rows first + 4 group + r. */
__device__ inline void store_gradient(const struct gd_attention_call &call, const struct gd_attention_head &head,
                                      float *to, int64_t ld, int64_t first, int64_t from, const float (&sum)[4][4],
                                      float scale)
{
    const int group = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;
    for (int r = 0; r < 4; r++) {
        const int64_t row = first + 4 * group + r, column = from + 4 * lane;
        for (int c = 0; c < 4; c++)
            if (row < head.rows && column + c < call.a.head_dim)
                to[(head.begin + row) * ld + head.column + column + c] = sum[r][c] * scale;
    }
}

/* ---- dq, dgate: a block for each tile of queries ------------------------------------------------------------ */

__global__ void attention_backward_queries(struct gd_attention_backward b, struct gd_attention_call call, int tiles,
                                           const float *deltas)
{
    GD_SHARED(struct gd_quad, q_tile, [GD_TILE_ROWS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, dout_tile, [GD_TILE_ROWS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, block, [GD_BLOCK_COLUMNS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, weights, [GD_BLOCK_COLUMNS * GD_WEIGHT_QUADS]);
    const struct gd_attention &a = call.a;
    const struct gd_attention_head head = gd_open_head(call, blockIdx.y, blockIdx.x / (unsigned)tiles);
    const int64_t first = (int64_t)(blockIdx.x % (unsigned)tiles) * GD_TILE_ROWS;
    if (first >= head.rows) /* the whole block */
        return;
    const int group = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;
    struct query queries[4];
    load_queries(queries, call, head, deltas, first + 4 * group);

    for (int64_t column = 0; column < a.head_dim; column += GD_DEPTH) {
        float dq[4][4] = {}, dgate[4] = {};
        for (int64_t key = 0; key < head.keys; key += GD_BLOCK_COLUMNS) {
            float p[4][4] = {}, dlogit[4][4] = {}, bias[7];
            multiply(dlogit, call, head, dout_tile, operand{b.dout, b.lddout, first, head.rows, 1.0f}, key > 0, block,
                     operand{a.v, a.ldv, key, head.keys, 1.0f});
            multiply(p, call, head, q_tile, operand{a.q, a.ldq, first, head.rows, a.scale}, key > 0, block,
                     operand{a.k, a.ldk, key, head.keys, 1.0f});
            gd_load_bias(bias, call, head, key + 4 * lane - (first + 4 * group));
            logit_gradients<false>(p, dlogit, call, head, queries, bias, first + 4 * group, key + 4 * lane);
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 4; i++)
                    dgate[r] += dlogit[r][i] * bias[3 + i - r];
            gd_store_weights(weights, dlogit, group, lane);
            if (a.head_dim > GD_DEPTH) {
                __syncthreads();
                gd_stage<GD_BLOCK_COLUMNS>(block, call, head, a.k, a.ldk, key, head.keys, column, 1.0f);
            }
            __syncthreads();
            gd_add_weighted(dq, weights, block, group, lane, head.keys - key);
        }
        store_gradient(call, head, b.dq, b.lddq, first, column, dq, a.scale);
        for (int r = 0; r < 4; r++) {
            const float sum = gd_lanes_sum(dgate[r]);
            if (b.dgate && lane == 0 && column == 0 && queries[r].real)
                b.dgate[(head.begin + first + 4 * group + r) * a.heads + head.number] = sum;
        }
    }
}

/* ---- dk, dv: a block for each tile of keys ------------------------------------------------------------------ */

__global__ void attention_backward_keys(struct gd_attention_backward b, struct gd_attention_call call, int tiles,
                                        const float *deltas)
{
    GD_SHARED(struct gd_quad, k_tile, [GD_TILE_ROWS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, v_tile, [GD_TILE_ROWS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, block, [GD_BLOCK_COLUMNS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, weights, [GD_BLOCK_COLUMNS * GD_WEIGHT_QUADS]);
    const struct gd_attention &a = call.a;
    const struct gd_attention_head head = gd_open_head(call, blockIdx.y, blockIdx.x / (unsigned)tiles);
    const int64_t key = (int64_t)(blockIdx.x % (unsigned)tiles) * GD_TILE_ROWS;
    if (key >= head.rows) /* the whole block */
        return;
    const int64_t rows = key < head.keys ? head.rows : 0; /* nobody attends to keys past valid[] */
    const int group = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;

    for (int64_t column = 0; column < a.head_dim; column += GD_DEPTH) {
        float dk[4][4] = {}, dv[4][4] = {};
        for (int64_t first = 0; first < rows; first += GD_BLOCK_COLUMNS) {
            float p[4][4] = {}, dlogit[4][4] = {}, bias[7];
            struct query queries[4];
            multiply(p, call, head, k_tile, operand{a.k, a.ldk, key, head.keys, 1.0f}, first > 0, block,
                     operand{a.q, a.ldq, first, rows, a.scale});
            multiply(dlogit, call, head, v_tile, operand{a.v, a.ldv, key, head.keys, 1.0f}, first > 0, block,
                     operand{b.dout, b.lddout, first, rows, 1.0f});
            load_queries(queries, call, head, deltas, first + 4 * lane);
            gd_load_bias(bias, call, head, key + 4 * group - (first + 4 * lane));
            logit_gradients<true>(p, dlogit, call, head, queries, bias, first + 4 * lane, key + 4 * group);
            gd_store_weights(weights, p, group, lane);
            if (a.head_dim > GD_DEPTH) {
                __syncthreads();
                gd_stage<GD_BLOCK_COLUMNS>(block, call, head, b.dout, b.lddout, first, rows, column, 1.0f);
            }
            __syncthreads();
            gd_add_weighted(dv, weights, block, group, lane, rows - first);
            __syncthreads();
            gd_store_weights(weights, dlogit, group, lane);
            gd_stage<GD_BLOCK_COLUMNS>(block, call, head, a.q, a.ldq, first, rows, column, a.scale);
            __syncthreads();
            gd_add_weighted(dk, weights, block, group, lane, rows - first);
        }
        store_gradient(call, head, b.dk, b.lddk, key, column, dk, 1.0f);
        store_gradient(call, head, b.dv, b.lddv, key, column, dv, 1.0f);
    }
}

/* ---- dbias: a block for each band of diagonals ---------------------------------------------------------------- */

/* A band: tiles of queries i0 .. + 31 by keys i0 + 64 band .. + 63, which have offsets 64 band - 31 .. 64 band + 63. */
enum { BAND_STEP = GD_BLOCK_COLUMNS, BAND_OFFSETS = GD_TILE_ROWS + GD_BLOCK_COLUMNS - 1 };

/* Bands lowest, lowest + 2, ...: every other one, so that none adds to what another one does. */
__global__ void attention_backward_bands(struct gd_attention_backward b, struct gd_attention_call call, int64_t lowest,
                                         const float *deltas)
{
    GD_SHARED(struct gd_quad, tile, [GD_TILE_ROWS * GD_ROW_QUADS]);
    GD_SHARED(struct gd_quad, block, [GD_BLOCK_COLUMNS * GD_ROW_QUADS]);
    GD_SHARED(float, diagonals, [GD_ATTENTION_THREADS][7]);
    const struct gd_attention &a = call.a;
    const int64_t offset = BAND_STEP * (lowest + 2 * (int64_t)blockIdx.y);
    const int group = (int)threadIdx.x / 16, lane = (int)threadIdx.x % 16;
    float sum[7] = {}; /* of offset + 4 lane - 4 group + x at 3 + x */
    struct gd_attention_head head = {};
    for (int64_t u = 0; u < call.count; u++) {
        head = gd_open_head(call, u, blockIdx.x);
        for (int64_t first = 0; first < head.rows; first += GD_TILE_ROWS) {
            const int64_t key = first + offset;
            if (key <= -GD_BLOCK_COLUMNS || key >= head.keys)
                continue;
            float p[4][4] = {}, dlogit[4][4] = {}, bias[7];
            struct query queries[4];
            multiply(p, call, head, tile, operand{a.q, a.ldq, first, head.rows, a.scale}, false, block,
                     operand{a.k, a.ldk, key, head.keys, 1.0f});
            multiply(dlogit, call, head, tile, operand{b.dout, b.lddout, first, head.rows, 1.0f}, false, block,
                     operand{a.v, a.ldv, key, head.keys, 1.0f});
            load_queries(queries, call, head, deltas, first + 4 * group);
            gd_load_bias(bias, call, head, key + 4 * lane - (first + 4 * group));
            logit_gradients<false>(p, dlogit, call, head, queries, bias, first + 4 * group, key + 4 * lane);
            for (int r = 0; r < 4; r++)
                for (int i = 0; i < 4; i++)
                    sum[3 + i - r] += dlogit[r][i] * queries[r].gate;
        }
    }

    for (int x = 0; x < 7; x++)
        diagonals[threadIdx.x][x] = sum[x];
    __syncthreads();
    const int at = (int)threadIdx.x; /* of the band's offsets */
    const int64_t to = offset + at - (GD_TILE_ROWS - 1) + call.longest - 1, width = 2 * call.longest - 1;
    if (at >= BAND_OFFSETS || to < 0 || to >= width)
        return;
    /* 4 (lane - group) + x - 3 = at - 31 */
    float total = 0;
    for (int g = 0; g < GD_TILE_ROWS / 4; g++)
        for (int x = at % 4; x < 7; x += 4) {
            const int l = (at - x - (GD_TILE_ROWS - 4)) / 4 + g;
            if (l >= 0 && l < 16)
                total += diagonals[16 * g + l][x];
        }
    b.dbias[head.number * width + to] += total;
}

/* ---- Launchers ------------------------------------------------------------------------------------------------ */

size_t gd_cuda_attention_backward_scratch(const gd_config *config, int64_t longest)
{
    return (size_t)(longest * config->encoder_attention_heads) * sizeof(float);
}

static void add_bias_gradients(gd_context *context, struct gd_cuda *cuda, const struct gd_attention_backward *b,
                               const struct gd_attention_call *call, const float *deltas)
{
    const int64_t lowest = -((call->most_rows + 62) / BAND_STEP), highest = (call->most_rows + 30) / BAND_STEP;
    for (int64_t band = lowest; band < lowest + 2 && band <= highest; band++)
        gd_cuda_check(context, GD_LAUNCH(attention_backward_bands,
                                         dim3((unsigned)b->forward.heads, (unsigned)((highest - band) / 2 + 1)),
                                         dim3(GD_ATTENTION_THREADS), 0, cuda->stream, *b, *call, band, deltas),
                      "attention_backward");
}

void gd_cuda_attention_backward(gd_context *context, const struct gd_attention_backward *b)
{
    const struct gd_attention *a = &b->forward;
    struct gd_cuda *cuda = gd_cuda_begin(context);
    struct gd_attention_call call = {};
    float *deltas = (float *)context->scratch;
    const int64_t most_rows = (int64_t)(context->scratch_stride / sizeof(float)) / a->heads;
    for (int64_t u = 0; cuda && u < a->rows->batch; u += call.count) {
        gd_take_utterances(&call, a, u, most_rows);
        const int64_t rows = call.first[call.count] - call.first[0], tiles = gd_divide_up(call.most_rows, GD_TILE_ROWS);
        if (rows > most_rows) {
            gd_cuda_keep_failure(context, GD_EUNSUPPORTED,
                                 "device: attention_backward: %lld rows are too many for the scratch", (long long)rows);
            return;
        }
        const dim3 grid((unsigned)(tiles * a->heads), (unsigned)call.count), block(GD_ATTENTION_THREADS);
        const dim3 items((unsigned)gd_divide_up(rows * a->heads, GD_BLOCK_ROWS));
        gd_cuda_check(context, GD_LAUNCH(attention_deltas, items, dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, *b,
                                         call.first[0], rows, deltas), "attention_backward");
        gd_cuda_check(context, GD_LAUNCH(attention_backward_queries, grid, block, 0, cuda->stream, *b, call, (int)tiles,
                                         deltas), "attention_backward");
        gd_cuda_check(context, GD_LAUNCH(attention_backward_keys, grid, block, 0, cuda->stream, *b, call, (int)tiles,
                                         deltas), "attention_backward");
        if (b->dbias)
            add_bias_gradients(context, cuda, b, &call, deltas);
    }
}
