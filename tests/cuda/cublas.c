/*
 * cublas.c - a stand-in for libcublas.so.13: the functions of cuda/cublas_api.h on the emulator's device memory. It
 * refuses what cuBLAS refuses (leading dimensions that are too short) and what it can't (operands that are not whole
 * within device memory, no stream, another math mode than float32's). GD_EMULATOR="fail_gemm=N": the N-th product
 * fails.
 */
#include "../../cuda/cublas_api.h"
#include "emulator_state.h"

#include <stdlib.h>
#include <string.h>

enum { NOT_SUPPORTED = 15, INVALID_VALUE = 7, EXECUTION_FAILED = 13, LANES = 16 };

struct cublasContext {
    struct emulated_stream *stream;
    int math_mode, products;
};

/* c (m, n) = op(a) op(b) alpha + beta c, column-major. */
struct product {
    int transposed_a, transposed_b;
    int64_t m, n, k;
    float alpha, beta;
    const float *a, *b;
    float *c;
    int64_t lda, ldb, ldc;
};

static float dot(int64_t count, const float *a, const float *b)
{
    float sums[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int lane = 0; lane < LANES; lane++)
            sums[lane] += a[i + lane] * b[i + lane];
    for (; i < count; i++)
        sum += a[i] * b[i];
    for (int lane = 0; lane < LANES; lane++)
        sum += sums[lane];
    return sum;
}

/* One column of c from op(b)'s. */
static void multiply_column(const struct product *p, const float *column, float *sums, float *c)
{
    for (int64_t i = 0; i < p->m; i++)
        sums[i] = p->transposed_a ? dot(p->k, p->a + i * p->lda, column) : 0;
    for (int64_t l = 0; l < p->k && !p->transposed_a; l++)
        for (int64_t i = 0; i < p->m; i++)
            sums[i] += p->a[l * p->lda + i] * column[l];
    for (int64_t i = 0; i < p->m; i++)
        c[i] = p->alpha * sums[i] + (p->beta != 0 ? p->beta * c[i] : 0);
}

static void run(void *argument)
{
    struct product *p = argument;
    float *column = malloc((size_t)(p->k + p->m + 1) * sizeof *column);
    for (int64_t j = 0; j < p->n && column; j++) {
        for (int64_t l = 0; l < p->k; l++)
            column[l] = p->transposed_b ? p->b[l * p->ldb + j] : p->b[j * p->ldb + l];
        multiply_column(p, column, column + p->k, p->c + j * p->ldc);
    }
    free(column);
    free(p);
}

/* A matrix of `cols` columns of `rows` floats, `ld` apart. */
static int lies_in_device_memory(struct emulated_stream *stream, const float *x, int64_t rows, int64_t cols, int64_t ld)
{
    return rows == 0 || cols == 0 || stream->holds(stream, x, (size_t)((cols - 1) * ld + rows) * sizeof *x);
}

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle)
{
    *handle = calloc(1, sizeof **handle);
    return *handle ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream)
{
    handle->stream = (struct emulated_stream *)stream;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode)
{
    handle->math_mode = mode;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusString(cublasStatus_t status)
{
    switch ((int)status) {
    case NOT_SUPPORTED:
        return "the functionality is not supported";
    case INVALID_VALUE:
        return "an invalid value was passed";
    case EXECUTION_FAILED:
        return "the function failed to launch on the GPU";
    }
    return "unknown status";
}

static int wants_failure(struct cublasContext *handle)
{
    const char *settings = getenv("GD_EMULATOR"), *found = settings ? strstr(settings, "fail_gemm=") : NULL;
    return ++handle->products == (found ? atoi(found + strlen("fail_gemm=")) : 0);
}

cublasStatus_t cublasSgemm_v2_64(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int64_t m,
                                 int64_t n, int64_t k, const float *alpha, const float *a, int64_t lda, const float *b,
                                 int64_t ldb, const float *beta, float *c, int64_t ldc)
{
    const int ta = op_a == CUBLAS_OP_T, tb = op_b == CUBLAS_OP_T;
    const int64_t a_rows = ta ? k : m, b_rows = tb ? n : k;
    if (m < 0 || n < 0 || k < 0 || lda < 1 || ldb < 1 || ldc < 1 || lda < a_rows || ldb < b_rows || ldc < m)
        return INVALID_VALUE;
    if (!handle->stream || handle->math_mode != CUBLAS_DEFAULT_MATH)
        return NOT_SUPPORTED;
    if (wants_failure(handle) || !lies_in_device_memory(handle->stream, a, a_rows, ta ? m : k, lda) ||
        !lies_in_device_memory(handle->stream, b, b_rows, tb ? k : n, ldb) ||
        !lies_in_device_memory(handle->stream, c, m, n, ldc))
        return EXECUTION_FAILED;
    struct product *p = malloc(sizeof *p);
    if (!p)
        return CUBLAS_STATUS_ALLOC_FAILED;
    *p = (struct product){ta, tb, m, n, k, *alpha, *beta, a, b, c, lda, ldb, ldc};
    handle->stream->enqueue(handle->stream, run, p);
    return CUBLAS_STATUS_SUCCESS;
}
