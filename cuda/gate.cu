/*
 * gate.cu - WavLM's gate of the position bias, and its gradients. An item is one row's head; a warp takes it. The four
 * rows of grep_linear that a sum takes together are added first.
 */
#include "kernel.cuh"

enum { SLAB_ROWS = 32 }; /* whose parameter gradients are added up before all slabs' are */

__device__ inline float gate_weight(const struct gd_gate &g, int half, int64_t d)
{
    const float *w = g.weight + half * 4 * g.head_dim + d;
    return (w[0] + w[g.head_dim]) + (w[2 * g.head_dim] + w[3 * g.head_dim]);
}

__device__ inline const float *gate_input(const struct gd_gate &g, int64_t item)
{
    return g.x + item / g.heads * g.ldx + item % g.heads * g.head_dim;
}

/* The item's two sums through the sigmoid, in each of a warp's lanes. */
__device__ inline void gate_sigmoids(const struct gd_gate &g, int64_t item, float (&s)[2])
{
    const float *x = gate_input(g, item);
    for (int half = 0; half < 2; half++) {
        const float *b = g.bias + half * 4;
        float sum = 0;
        for (int64_t d = threadIdx.x; d < g.head_dim; d += GD_WARP)
            sum += x[d] * gate_weight(g, half, d);
        s[half] = 1.0f / (1.0f + expf(-(gd_warp_sum(sum) + ((b[0] + b[1]) + (b[2] + b[3])))));
    }
}

__global__ void gate_items(struct gd_gate g)
{
    const int64_t item = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
    if (item >= g.rows * g.heads) /* the whole warp */
        return;
    float s[2];
    gate_sigmoids(g, item, s);
    if (threadIdx.x == 0)
        g.gate[item] = s[0] * (s[1] * g.grep_a[item % g.heads] - 1.0f) + 2.0f;
}

void gd_cuda_gate(gd_context *context, const struct gd_gate *g)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || g->rows <= 0)
        return;
    gd_cuda_check(context, GD_LAUNCH(gate_items, dim3((unsigned)gd_divide_up(g->rows * g->heads, GD_BLOCK_ROWS)),
                                     dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, *g), "gate");
}

/* ---- Backward ----------------------------------------------------------------------------------------------- */

/* In the scratch: of each item the gradients by its two sums and by grep_a, and for each slab those by the two folded
 * weights and, as column head_dim, biases. */
struct gate_gradients {
    float *sums;  /* (items, 2) */
    float *a;     /* (rows, heads) */
    float *slabs; /* (slabs, 2, head_dim + 1) */
};

__global__ void gate_backward_items(struct gd_gate_backward b, struct gate_gradients to)
{
    const struct gd_gate &g = b.forward;
    const int64_t item = (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y, h = item % g.heads;
    if (item >= g.rows * g.heads) /* the whole warp */
        return;
    float s[2];
    gate_sigmoids(g, item, s);
    const float dgate = b.dgate[item], a = g.grep_a[h];
    const float ds0 = dgate * (s[1] * a - 1.0f) * s[0] * (1.0f - s[0]), ds1 = dgate * s[0] * a * s[1] * (1.0f - s[1]);
    float *dx = b.dx + item / g.heads * b.lddx + h * g.head_dim;
    for (int64_t d = threadIdx.x; d < g.head_dim; d += GD_WARP)
        dx[d] += ds0 * gate_weight(g, 0, d) + ds1 * gate_weight(g, 1, d);
    if (threadIdx.x == 0) {
        to.sums[2 * item] = ds0;
        to.sums[2 * item + 1] = ds1;
        to.a[item] = dgate * s[0] * s[1];
    }
}

__global__ void gate_backward_slabs(struct gd_gate g, struct gate_gradients to)
{
    const int64_t slab = blockIdx.x, column = (int64_t)blockIdx.y * GD_WARP + threadIdx.x, columns = g.head_dim + 1;
    const int64_t end = (slab + 1) * SLAB_ROWS < g.rows ? (slab + 1) * SLAB_ROWS : g.rows;
    float sum[2] = {};
    for (int64_t item = slab * SLAB_ROWS * g.heads + threadIdx.y; item < end * g.heads && column < columns;
         item += GD_BLOCK_ROWS) {
        const float x = column < g.head_dim ? gate_input(g, item)[column] : 1.0f;
        sum[0] += to.sums[2 * item] * x;
        sum[1] += to.sums[2 * item + 1] * x;
    }
    for (int half = 0; half < 2; half++) {
        const float total = gd_column_total(sum[half]);
        if (threadIdx.y == 0 && column < columns)
            to.slabs[(slab * 2 + half) * columns + column] = total;
    }
}

/* dweight and dbias += the slabs' sums, four rows alike. */
__global__ void gate_backward_weights(struct gd_gate_backward b, struct gate_gradients from)
{
    const int64_t dim = b.forward.head_dim, columns = 2 * (dim + 1);
    const int64_t slabs = (b.forward.rows + SLAB_ROWS - 1) / SLAB_ROWS;
    const int64_t column = (int64_t)blockIdx.x * GD_WARP + threadIdx.x;
    const int64_t half = column / (dim + 1), d = column % (dim + 1);
    float sum = 0;
    for (int64_t slab = threadIdx.y; slab < slabs && column < columns; slab += GD_BLOCK_ROWS)
        sum += from.slabs[slab * columns + column];
    sum = gd_column_total(sum);
    if (threadIdx.y > 0 || column >= columns)
        return;
    for (int64_t o = 4 * half; o < 4 * half + 4; o++)
        if (d < dim)
            b.dweight[o * dim + d] += sum;
        else
            b.dbias[o] += sum;
}

/* dgrep_a[h] += the sum over rows. */
__global__ void gate_backward_grep_a(struct gd_gate_backward b, struct gate_gradients from)
{
    const int64_t h = (int64_t)blockIdx.x * GD_WARP + threadIdx.x, heads = b.forward.heads;
    float sum = 0;
    for (int64_t r = threadIdx.y; r < b.forward.rows && h < heads; r += GD_BLOCK_ROWS)
        sum += from.a[r * heads + h];
    sum = gd_column_total(sum);
    if (threadIdx.y == 0 && h < heads)
        b.dgrep_a[h] += sum;
}

/* Floats that a slab takes of the scratch. */
static int64_t slab_floats(int64_t heads, int64_t head_dim)
{
    return SLAB_ROWS * heads * 3 + 2 * (head_dim + 1);
}

size_t gd_cuda_gate_backward_scratch(const gd_config *config)
{
    const int64_t heads = config->encoder_attention_heads;
    return heads > 0 ? (size_t)slab_floats(heads, config->encoder_embed_dim / heads) * sizeof(float) : 0;
}

void gd_cuda_gate_backward(gd_context *context, const struct gd_gate_backward *b)
{
    const struct gd_gate *g = &b->forward;
    const int64_t floats = (int64_t)(context->scratch_stride / sizeof(float));
    const int64_t slabs = floats / slab_floats(g->heads, g->head_dim), rows = slabs * SLAB_ROWS;
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (cuda && slabs < 1)
        gd_cuda_keep_failure(context, GD_EUNSUPPORTED, "device: gate_backward: %lld heads are too many for the scratch",
                             (long long)g->heads);
    const dim3 block(GD_WARP, GD_BLOCK_ROWS);
    for (int64_t first = 0; cuda && slabs > 0 && first < g->rows; first += rows) {
        struct gd_gate_backward part = *b;
        part.forward.rows = g->rows - first < rows ? g->rows - first : rows;
        part.forward.x += first * g->ldx;
        part.dgate += first * g->heads;
        part.dx += first * b->lddx;
        struct gate_gradients scratch = {};
        scratch.sums = (float *)context->scratch;
        scratch.a = scratch.sums + 2 * part.forward.rows * g->heads;
        scratch.slabs = scratch.a + part.forward.rows * g->heads;
        const dim3 items((unsigned)gd_divide_up(part.forward.rows * g->heads, GD_BLOCK_ROWS));
        const dim3 pieces((unsigned)gd_divide_up(part.forward.rows, SLAB_ROWS),
                          (unsigned)gd_divide_up(g->head_dim + 1, GD_WARP));
        gd_cuda_check(context, GD_LAUNCH(gate_backward_items, items, block, 0, cuda->stream, part, scratch),
                      "gate_backward");
        gd_cuda_check(context, GD_LAUNCH(gate_backward_slabs, pieces, block, 0, cuda->stream, part.forward, scratch),
                      "gate_backward");
        const dim3 weights((unsigned)gd_divide_up(2 * (g->head_dim + 1), GD_WARP));
        gd_cuda_check(context, GD_LAUNCH(gate_backward_weights, weights, block, 0, cuda->stream, part, scratch),
                      "gate_backward");
        const dim3 heads((unsigned)gd_divide_up(g->heads, GD_WARP));
        gd_cuda_check(context, GD_LAUNCH(gate_backward_grep_a, heads, block, 0, cuda->stream, part, scratch),
                      "gate_backward");
    }
}
