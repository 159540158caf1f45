/*
 * pos_conv.cu - the grouped convolution over time that tells the encoder where a frame stands, and its weights'
 * gradient.
 *
 * Both are correlations s[i, o] = sum over j of x[i + j] w[j, o]: in pos_conv() i is an output frame, j a tap, summed
 * up over the channels of x too; in the gradient i is a tap, j a frame and w is dz, for one channel of x. A block has
 * TILE_ROWS values of i and up to TILE_COLS of o, a thread ROWS by COLS of them. Neighbours in i and in j share x: a
 * thread keeps a window of it in registers and moves it along, so that what is read from shared memory is used often.
 * Sums run in chains of at most 64 products, then the chains in ascending order.
 */
#include "kernel.cuh"

enum { ROWS = 8, COLS = 4, TILE_ROWS = 128, TILE_COLS = 64 };

/* Four floats that are read at once. */
struct alignas(16) quad {
    float at[COLS];
};

static __device__ inline void load(const float *from, float *to)
{
    const quad four = *reinterpret_cast<const quad *>(from);
#pragma unroll
    for (int i = 0; i < COLS; i++)
        to[i] = four.at[i];
}

/* correlate() for count <= ROWS: `window` holds x[0] .. x[ROWS - 1], and ROWS floats later ones afterwards. */
static __device__ inline void slide(int count, const float *x, const float *w, float window[2 * ROWS],
                                    float sums[ROWS][COLS])
{
    load(x + ROWS, window + ROWS);
    load(x + ROWS + COLS, window + ROWS + COLS);
#pragma unroll
    for (int j = 0; j < ROWS; j++) {
        float row[COLS];
        if (j == count)
            break;
        load(w + j * TILE_COLS, row);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int c = 0; c < COLS; c++)
                sums[r][c] += window[r + j] * row[c];
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        window[r] = window[r + ROWS];
}

/* sums[r, c] += sum over j < count of x[r + j] w[j, c]; w's rows are TILE_COLS apart. x has ROWS floats more than
 * `count` rounded up to a multiple of ROWS; both are aligned as a quad. */
static __device__ inline void correlate(int count, const float *x, const float *w, float sums[ROWS][COLS])
{
    float window[2 * ROWS];
    int j = 0;
    load(x, window);
    load(x + COLS, window + COLS);
    for (; j + ROWS <= count; j += ROWS)
        slide(ROWS, x + j, w + j * TILE_COLS, window, sums);
    if (j < count)
        slide(count - j, x + j, w + j * TILE_COLS, window, sums);
}

static __device__ inline void add(const float part[ROWS][COLS], float sums[ROWS][COLS])
{
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < COLS; c++)
            sums[r][c] += part[r][c];
}

/* ---- What both kernels share ---------------------------------------------------------------------------- */

/* Some utterances of a batch, as a kernel's argument: struct gd_rows lies on the host. */
enum { MOST_UTTERANCES = 32 };

struct utterances {
    int64_t count, first[MOST_UTTERANCES + 1], valid[MOST_UTTERANCES];
};

/* Those from `begin` on; returns the most rows that one of them has. */
static int64_t take_utterances(const struct gd_rows *rows, int64_t begin, struct utterances *u)
{
    const int64_t left = rows->batch - begin;
    int64_t longest = 0;
    u->count = left < MOST_UTTERANCES ? left : (int64_t)MOST_UTTERANCES;
    u->first[0] = rows->first[begin];
    for (int64_t b = 0; b < u->count; b++) {
        u->first[b + 1] = rows->first[begin + b + 1];
        u->valid[b] = rows->valid[begin + b];
        longest = longest < u->first[b + 1] - u->first[b] ? u->first[b + 1] - u->first[b] : longest;
    }
    return longest;
}

/* Outputs of a group in packed weights: whole quads. */
static int64_t padded_outputs(int64_t n)
{
    return gd_round_up(n, COLS);
}

static dim3 tile_of_threads(int64_t n)
{
    const int64_t outputs = padded_outputs(n);
    return dim3((unsigned)(outputs < TILE_COLS ? outputs : (int64_t)TILE_COLS) / COLS, TILE_ROWS / ROWS);
}

static __device__ inline int thread_number()
{
    return (int)(threadIdx.y * blockDim.x + threadIdx.x);
}

static __device__ inline int num_threads()
{
    return (int)(blockDim.x * blockDim.y);
}

static __device__ inline int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Do rows start .. start + count - 1 lie outside of an utterance's `read` rows, where x counts as zero? */
static __device__ inline bool all_outside(int64_t start, int64_t count, int64_t read)
{
    return start >= read || start + count <= 0;
}

/* ---- pos_conv ------------------------------------------------------------------------------------------- */

/* Channels and taps of x that are in shared memory at once; a channel's window lies so that four rows of four channels
 * are in different banks. */
enum { CHANNELS = 4, TAPS = 16, WINDOW = TILE_ROWS + TAPS + 8 };

/* packed[group, c, k, o], o padded with zeros to whole quads; r counts (group, c, k). */
struct pack_pos_conv {
    int64_t n, kernel, padded;
    const float *w;
    int transposed;
    float *packed;

    __device__ void operator()(int64_t r, int64_t o) const
    {
        const int64_t group = r / kernel / n, c = r / kernel % n, k = r % kernel;
        const int64_t from = transposed ? ((group * n + c) * n + o) * kernel + kernel - 1 - k
                                        : ((group * n + o) * n + c) * kernel + k;
        packed[r * padded + o] = o < n ? w[from] : 0;
    }
};

size_t gd_cuda_packed_pos_conv_size(const gd_context *context, const struct gd_pos_conv *conv)
{
    (void)context;
    return (size_t)(conv->width * conv->kernel * padded_outputs(conv->width / conv->groups)) * sizeof(float);
}

void gd_cuda_pack_pos_conv(gd_context *context, const struct gd_pos_conv *conv, const float *w, void *packed)
{
    const int64_t n = conv->width / conv->groups, padded = padded_outputs(n);
    gd_for_elements(context, conv->width * conv->kernel, padded,
                    pack_pos_conv{n, conv->kernel, padded, w, conv->transposed, (float *)packed}, "pack_pos_conv");
}

/* Row t of the utterance, which is the batch's row `row`. Rows from `added` on have no residual. */
static __device__ inline void finish_output(const struct gd_pos_conv &p, int64_t row, int64_t column, bool added,
                                            float z)
{
    if (p.bias)
        z += p.bias[column];
    if (p.pre)
        p.pre[row * p.ldpre + column] = z;
    z = gd_activated(p.activation, z);
    if (p.residual && added)
        z += p.residual[row * p.ldresidual + column];
    p.y[row * p.ldy + column] = z;
}

/* Block (group and columns of it, rows, utterance). p.rows is the host's. */
__global__ void pos_conv_tile(struct gd_pos_conv p, struct utterances u, int64_t padded)
{
    GD_SHARED(quad, shared_x, [CHANNELS][WINDOW / COLS]);
    GD_SHARED(quad, shared_w, [CHANNELS][TAPS][TILE_COLS / COLS]);
    const int64_t n = p.width / p.groups, across = (n + TILE_COLS - 1) / TILE_COLS;
    const int64_t group = blockIdx.x / across, column = blockIdx.x % across * TILE_COLS + threadIdx.x * COLS;
    const int64_t row = u.first[blockIdx.z], rows = u.first[blockIdx.z + 1] - row, valid = u.valid[blockIdx.z];
    const int64_t read = p.transposed ? rows : valid, summed = p.transposed ? valid : rows;
    const int64_t tile = (int64_t)blockIdx.y * TILE_ROWS, t = tile + threadIdx.y * ROWS;
    if (tile >= rows) /* the whole block */
        return;
    const float *x = p.x + row * p.ldx + group * n;
    const float *weight = (const float *)p.weight + group * n * p.kernel * padded;
    float sums[ROWS][COLS] = {{0}};
    for (int64_t c0 = 0; c0 < n && tile < summed; c0 += CHANNELS)
        for (int64_t k0 = 0; k0 < p.kernel; k0 += TAPS) {
            const int64_t start = tile + k0 - p.pad;
            const int channels = (int)smaller(n - c0, CHANNELS), taps = (int)smaller(p.kernel - k0, TAPS);
            if (all_outside(start, TILE_ROWS + TAPS, read))
                continue;
            for (int i = thread_number(); i < CHANNELS * (TILE_ROWS + TAPS); i += num_threads()) {
                const int c = i % CHANNELS, r = i / CHANNELS;
                const bool there = start + r >= 0 && start + r < read && c < channels;
                shared_x[c][r / COLS].at[r % COLS] = there ? x[(start + r) * p.ldx + c0 + c] : 0;
            }
            for (int i = threadIdx.y; i < CHANNELS * TAPS; i += TILE_ROWS / ROWS) {
                const int c = i / TAPS, k = i % TAPS;
                if (c < channels && k < taps && column < n)
                    shared_w[c][k][threadIdx.x] = *reinterpret_cast<const quad *>(
                        weight + ((c0 + c) * p.kernel + k0 + k) * padded + column);
            }
            __syncthreads();
            float part[ROWS][COLS] = {{0}};
            for (int c = 0; c < channels && t < summed && column < n; c++)
                correlate(taps, shared_x[c][threadIdx.y * (ROWS / COLS)].at, shared_w[c][0][threadIdx.x].at, part);
            add(part, sums);
            __syncthreads();
        }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int c = 0; c < COLS; c++)
            if (t + r < rows && column + c < n)
                finish_output(p, row + t + r, group * n + column + c, t + r < read, t + r < summed ? sums[r][c] : 0);
}

void gd_cuda_pos_conv(gd_context *context, const struct gd_pos_conv *p)
{
    struct gd_cuda *cuda = gd_refuses_activation(context, p->activation) ? NULL : gd_cuda_begin(context);
    const int64_t n = p->width / p->groups, across = gd_divide_up(n, TILE_COLS);
    struct utterances u;
    for (int64_t b = 0; cuda && b < p->rows->batch; b += u.count) {
        const int64_t longest = take_utterances(p->rows, b, &u);
        const dim3 grid((unsigned)(p->groups * across), (unsigned)gd_divide_up(longest, TILE_ROWS), (unsigned)u.count);
        gd_cuda_check(context, GD_LAUNCH(pos_conv_tile, grid, tile_of_threads(n), 0, cuda->stream, *p, u,
                                         padded_outputs(n)), "pos_conv");
    }
}

/* ---- Gradient by the weights ---------------------------------------------------------------------------- */

/* Frames of dz that are in shared memory at once. */
enum { FRAMES = 64 };

/* Block (channel of x, taps, outputs of the channel's group): dw[o, c, k] += sum over all frames t of
 * dz[t, o] x[t + k - pad, c], of rounded factors in bfloat16. */
__global__ void pos_conv_weight_gradient(struct gd_pos_conv p, struct utterances u, const float *dz, int64_t lddz,
                                         float *dw)
{
    GD_SHARED(quad, shared_x, [(TILE_ROWS + FRAMES) / COLS]);
    GD_SHARED(quad, shared_dz, [FRAMES][TILE_COLS / COLS]);
    const int64_t n = p.width / p.groups, channel = blockIdx.x, group = channel / n;
    const int64_t tile = (int64_t)blockIdx.y * TILE_ROWS, k = tile + threadIdx.y * ROWS;
    const int64_t columns = (int64_t)blockIdx.z * TILE_COLS, column = columns + threadIdx.x * COLS;
    float sums[ROWS][COLS] = {{0}};
    for (int64_t b = 0; b < u.count; b++) {
        const int64_t rows = u.first[b + 1] - u.first[b], valid = u.valid[b];
        const float *x = p.x + u.first[b] * p.ldx + channel;
        const float *from = dz + u.first[b] * lddz + group * n + columns;
        for (int64_t t = 0; t < rows; t += FRAMES) {
            const int64_t start = t + tile - p.pad;
            const int frames = (int)smaller(rows - t, FRAMES), width = (int)blockDim.x * COLS;
            if (all_outside(start, TILE_ROWS + FRAMES, valid))
                continue;
            for (int r = thread_number(); r < TILE_ROWS + FRAMES; r += num_threads())
                shared_x[r / COLS].at[r % COLS] = gd_rounded(
                    p.precision, start + r >= 0 && start + r < valid ? x[(start + r) * p.ldx] : 0);
            for (int i = thread_number(); i < frames * width; i += num_threads()) {
                const int f = i / width, c = i % width;
                shared_dz[f][c / COLS].at[c % COLS] =
                    gd_rounded(p.precision, columns + c < n ? from[(t + f) * lddz + c] : 0);
            }
            __syncthreads();
            float part[ROWS][COLS] = {{0}};
            if (k < p.kernel && column < n)
                correlate(frames, shared_x[threadIdx.y * (ROWS / COLS)].at, shared_dz[0][threadIdx.x].at, part);
            add(part, sums);
            __syncthreads();
        }
    }
#pragma unroll
    for (int c = 0; c < COLS; c++)
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (k + r < p.kernel && column + c < n)
                dw[((group * n + column + c) * n + channel % n) * p.kernel + k + r] += sums[r][c];
}

void gd_cuda_pos_conv_backward_weight(gd_context *context, const struct gd_pos_conv *p, const float *dz, int64_t lddz,
                                      float *dw)
{
    if (gd_cuda_lacks(context, p->precision))
        return;
    struct gd_cuda *cuda = gd_cuda_begin(context);
    const int64_t n = p->width / p->groups;
    struct utterances u;
    for (int64_t b = 0; cuda && b < p->rows->batch; b += u.count) {
        take_utterances(p->rows, b, &u);
        const dim3 grid((unsigned)p->width, (unsigned)gd_divide_up(p->kernel, TILE_ROWS),
                        (unsigned)gd_divide_up(n, TILE_COLS));
        gd_cuda_check(context, GD_LAUNCH(pos_conv_weight_gradient, grid, tile_of_threads(n), 0, cuda->stream, *p, u, dz,
                                         lddz, dw), "pos_conv_backward_weight");
    }
}
