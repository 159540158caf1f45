/*
 * extractor.cu - the first convolution's norm over time as an affine map, from the moments of its input; and the
 * normalisation of an utterance. Statistics are float64. A sum over time runs in as many chains as a block or a grid
 * has threads, a number that follows from the sum's length alone; the chains are added up in a tree.
 */
#include "kernel.cuh"

enum { THREADS = GD_WARP * GD_BLOCK_ROWS };

static __device__ inline int thread_number()
{
    return (int)(threadIdx.y * GD_WARP + threadIdx.x);
}

/* The sum over the threads of a block of (GD_WARP, GD_BLOCK_ROWS), in each of them. */
static __device__ inline double block_sum(double value)
{
    GD_SHARED(double, part, [GD_BLOCK_ROWS]);
    value = gd_warp_sum(value);
    if (threadIdx.x == 0)
        part[threadIdx.y] = value;
    __syncthreads();
    double total = 0;
    for (int i = 0; i < GD_BLOCK_ROWS; i++)
        total += part[i];
    __syncthreads(); /* part is the next sum's */
    return total;
}

/* ---- moments -------------------------------------------------------------------------------------------- */

/* The mean of x_t[k] over the frames, in each of the block's threads. */
static __device__ double mean_over_frames(const struct gd_moments &m, int64_t k)
{
    double sum = 0;
    for (int64_t t = thread_number(); t < m.frames; t += THREADS)
        sum += m.x[t * m.stride + k];
    return block_sum(sum) / (double)m.frames;
}

/* A block takes covariance (k, l), which is also (l, k). With the frames before:
 * n R = n1 R1 + n2 R2 + n1 n2 / n (m2 - m1) (m2 - m1)^T, m2 being the new frames' means. */
__global__ void covariances(struct gd_moments m)
{
    const int64_t k = blockIdx.x, l = blockIdx.y;
    if (l < k) /* the whole block */
        return;
    const double mean_k = mean_over_frames(m, k), mean_l = mean_over_frames(m, l);
    double sum = 0;
    for (int64_t t = thread_number(); t < m.frames; t += THREADS) {
        const float *x = m.x + t * m.stride;
        sum += (x[k] - mean_k) * (x[l] - mean_l);
    }
    sum = block_sum(sum);
    if (thread_number() > 0)
        return;
    double *covariance = m.moments + m.kernel;
    double frames = (double)m.frames;
    if (m.before) {
        const double before = (double)m.before, both = before + frames;
        sum += before * covariance[k * m.kernel + l];
        sum += before * frames / both * (mean_k - m.moments[k]) * (mean_l - m.moments[l]);
        frames = both;
    }
    covariance[k * m.kernel + l] = covariance[l * m.kernel + k] = sum / frames;
}

/* After covariances(), which need the means of the frames before. */
__global__ void means(struct gd_moments m)
{
    const double mean = mean_over_frames(m, blockIdx.x);
    if (thread_number() > 0)
        return;
    const double before = m.before ? m.moments[blockIdx.x] : 0;
    m.moments[blockIdx.x] = before + (mean - before) * ((double)m.frames / (double)(m.before + m.frames));
}

void gd_cuda_moments(gd_context *context, const struct gd_moments *m)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || m->frames <= 0)
        return;
    const dim3 block(GD_WARP, GD_BLOCK_ROWS);
    gd_cuda_check(context, GD_LAUNCH(covariances, dim3((unsigned)m->kernel, (unsigned)m->kernel), block, 0,
                                     cuda->stream, *m), "moments");
    gd_cuda_check(context, GD_LAUNCH(means, dim3((unsigned)m->kernel), block, 0, cuda->stream, *m), "moments");
}

/* ---- norm_fold: a warp takes a channel, a lane every 32nd tap -------------------------------------------- */

static __device__ inline int64_t channel_of_warp()
{
    return (int64_t)blockIdx.x * GD_BLOCK_ROWS + threadIdx.y;
}

/* (R w)[k] */
static __device__ double covariance_times(const struct gd_norm_fold &n, const float *w, int64_t k)
{
    const double *row = n.moments + n.kernel + k * n.kernel;
    double product = 0;
    for (int64_t l = 0; l < n.kernel; l++)
        product += row[l] * w[l];
    return product;
}

/* Mean and standard deviation over time of w . x_t: w . m and sqrt(w^T R w + eps). */
static __device__ void channel_statistics(const struct gd_norm_fold &n, const float *w, double *mean, double *sigma)
{
    double product = 0, variance = 0;
    for (int64_t k = threadIdx.x; k < n.kernel; k += GD_WARP) {
        product += w[k] * n.moments[k];
        variance += w[k] * covariance_times(n, w, k);
    }
    *mean = gd_warp_sum(product);
    variance = gd_warp_sum(variance);
    *sigma = sqrt((variance > 0 ? variance : 0) + n.eps);
}

__global__ void fold_channels(struct gd_norm_fold n)
{
    const int64_t c = channel_of_warp();
    if (c >= n.dim) /* the whole warp */
        return;
    const float *w = n.w + c * n.kernel;
    double mean, sigma;
    channel_statistics(n, w, &mean, &sigma);
    const double scale = n.gamma[c] / sigma;
    for (int64_t k = threadIdx.x; k < n.kernel; k += GD_WARP)
        n.weight[c * n.kernel + k] = (float)(scale * w[k]);
    if (threadIdx.x == 0)
        n.bias[c] = (float)(n.beta[c] - scale * mean);
}

__global__ void fold_channels_backward(struct gd_norm_fold_backward n)
{
    const struct gd_norm_fold &f = n.forward;
    const int64_t c = channel_of_warp();
    if (c >= f.dim)
        return;
    const float *w = f.w + c * f.kernel, *g = n.g + c * f.kernel;
    double mean, sigma, s = n.s[c], s2 = 0;
    channel_statistics(f, w, &mean, &sigma);
    for (int64_t k = threadIdx.x; k < f.kernel; k += GD_WARP)
        s2 += (double)w[k] * g[k];
    s2 = (gd_warp_sum(s2) - mean * s) / sigma;
    for (int64_t k = threadIdx.x; k < f.kernel; k += GD_WARP)
        n.dw[c * f.kernel + k] +=
            (float)(f.gamma[c] / sigma * (g[k] - s * f.moments[k] - s2 / sigma * covariance_times(f, w, k)));
    if (threadIdx.x == 0) {
        n.dgamma[c] += (float)s2;
        n.dbeta[c] += (float)s;
    }
}

void gd_cuda_norm_fold(gd_context *context, const struct gd_norm_fold *n)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || n->dim <= 0)
        return;
    gd_cuda_check(context, GD_LAUNCH(fold_channels, dim3((unsigned)gd_divide_up(n->dim, GD_BLOCK_ROWS)),
                                     dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, *n), "norm_fold");
}

void gd_cuda_norm_fold_backward(gd_context *context, const struct gd_norm_fold_backward *n)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || n->forward.dim <= 0)
        return;
    gd_cuda_check(context, GD_LAUNCH(fold_channels_backward,
                                     dim3((unsigned)gd_divide_up(n->forward.dim, GD_BLOCK_ROWS)),
                                     dim3(GD_WARP, GD_BLOCK_ROWS), 0, cuda->stream, *n), "norm_fold_backward");
}

/* ---- normalize ------------------------------------------------------------------------------------------ */

/* Samples that a thread should have, and the most blocks: one's sum for each thread to read. */
enum { SAMPLES_EACH = 16, MOST_BLOCKS = THREADS };

struct samples {
    int64_t count;
    float *x;
    double *sums, *squares; /* of each block */
    float eps;
    int given;
    double mean, variance; /* where they are given */
};

/* The sum over all blocks, in each thread. */
static __device__ double grid_sum(const double *of_blocks)
{
    return block_sum(thread_number() < (int)gridDim.x ? of_blocks[thread_number()] : 0);
}

static __device__ inline int64_t first_sample()
{
    return (int64_t)blockIdx.x * THREADS + thread_number();
}

static __device__ inline int64_t sample_step()
{
    return (int64_t)gridDim.x * THREADS;
}

__global__ void sum_samples(struct samples s)
{
    double sum = 0;
    for (int64_t i = first_sample(); i < s.count; i += sample_step())
        sum += s.x[i];
    sum = block_sum(sum);
    if (thread_number() == 0)
        s.sums[blockIdx.x] = sum;
}

__global__ void sum_centred_squares(struct samples s)
{
    const double mean = grid_sum(s.sums) / (double)s.count;
    double sum = 0;
    for (int64_t i = first_sample(); i < s.count; i += sample_step())
        sum += (s.x[i] - mean) * (s.x[i] - mean);
    sum = block_sum(sum);
    if (thread_number() == 0)
        s.squares[blockIdx.x] = sum;
}

__global__ void normalize_samples(struct samples s)
{
    const double mean = s.given ? s.mean : grid_sum(s.sums) / (double)s.count;
    const double variance = s.given ? s.variance : grid_sum(s.squares) / (double)s.count;
    const float centre = (float)mean, scale = (float)(1 / sqrt(variance + (double)s.eps));
    for (int64_t i = first_sample(); i < s.count; i += sample_step())
        s.x[i] = (s.x[i] - centre) * scale;
}

void gd_cuda_normalize(gd_context *context, int64_t count, float *x, const double *statistics, float eps)
{
    struct gd_cuda *cuda = gd_cuda_begin(context);
    if (!cuda || count <= 0)
        return;
    double *sums = (double *)context->scratch;
    const struct samples s = {count, x, sums, sums + MOST_BLOCKS, eps, statistics != NULL,
                              statistics ? statistics[0] : 0, statistics ? statistics[1] : 0};
    const int64_t blocks = gd_divide_up(count, THREADS * SAMPLES_EACH);
    const dim3 grid((unsigned)(blocks < MOST_BLOCKS ? blocks : (int64_t)MOST_BLOCKS)), block(GD_WARP, GD_BLOCK_ROWS);
    if (!statistics) {
        gd_cuda_check(context, GD_LAUNCH(sum_samples, grid, block, 0, cuda->stream, s), "normalize");
        gd_cuda_check(context, GD_LAUNCH(sum_centred_squares, grid, block, 0, cuda->stream, s), "normalize");
    }
    gd_cuda_check(context, GD_LAUNCH(normalize_samples, grid, block, 0, cuda->stream, s), "normalize");
}
