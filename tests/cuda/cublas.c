/*
 * cublas.c - a stand-in for libcublas.so.13: the functions of cuda/cublas_api.h on the emulator's device memory. It
 * refuses what cuBLAS refuses (leading dimensions that are too short) and what it can't (operands that are not whole
 * within device memory, no stream, another math mode than float32's, other types than two factors of float32 or of
 * bfloat16 with float32 sums). GD_EMULATOR="fail_gemm=N": the N-th product fails.
 */
#include "../../csrc/bfloat16.h"
#include "../../cuda/cublas_api.h"
#include "emulator_state.h"

#include <stdlib.h>
#include <string.h>

enum { NOT_SUPPORTED = 15, INVALID_VALUE = 7, EXECUTION_FAILED = 13, LANES = 16 };

struct cublasContext {
    struct emulated_stream *stream;
    int math_mode, products;
};

/* A matrix of `cols` columns of `rows` numbers, `ld` apart. */
struct matrix {
    const void *at;
    cudaDataType type;
    int64_t rows, cols, ld;
};

/* c (m, n) = op(a) op(b) alpha + beta c, column-major. */
struct product {
    int transposed_a, transposed_b;
    int64_t m, n, k;
    float alpha, beta;
    struct matrix a, b;
    float *c;
    int64_t ldc;
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

static float element(const struct matrix *x, int64_t row, int64_t col)
{
    const int64_t at = col * x->ld + row;
    return x->type == CUDA_R_32F ? ((const float *)x->at)[at] : gd_float_from_bfloat16(((const uint16_t *)x->at)[at]);
}

/* A copy in float32, without gaps. */
static float *widen(const struct matrix *x)
{
    float *copy = malloc((size_t)(x->rows * x->cols + 1) * sizeof *copy);
    for (int64_t col = 0; col < x->cols && copy; col++)
        for (int64_t row = 0; row < x->rows; row++)
            copy[col * x->rows + row] = element(x, row, col);
    return copy;
}

/* One column of c from op(b)'s; `a` without gaps. */
static void multiply_column(const struct product *p, const float *a, const float *column, float *sums, float *c)
{
    for (int64_t i = 0; i < p->m; i++)
        sums[i] = p->transposed_a ? dot(p->k, a + i * p->a.rows, column) : 0;
    for (int64_t l = 0; l < p->k && !p->transposed_a; l++)
        for (int64_t i = 0; i < p->m; i++)
            sums[i] += a[l * p->a.rows + i] * column[l];
    for (int64_t i = 0; i < p->m; i++)
        c[i] = p->alpha * sums[i] + (p->beta != 0 ? p->beta * c[i] : 0);
}

static void run(void *argument)
{
    struct product *p = argument;
    float *a = widen(&p->a), *column = malloc((size_t)(p->k + p->m + 1) * sizeof *column);
    for (int64_t j = 0; j < p->n && a && column; j++) {
        for (int64_t l = 0; l < p->k; l++)
            column[l] = p->transposed_b ? element(&p->b, j, l) : element(&p->b, l, j);
        multiply_column(p, a, column, column + p->k, p->c + j * p->ldc);
    }
    free(a);
    free(column);
    free(p);
}

static int lies_in_device_memory(struct emulated_stream *stream, const struct matrix *x)
{
    const size_t size = x->type == CUDA_R_32F ? sizeof(float) : sizeof(uint16_t);
    return x->rows == 0 || x->cols == 0 ||
           stream->holds(stream, x->at, (size_t)((x->cols - 1) * x->ld + x->rows) * size);
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

cublasStatus_t cublasGemmEx_64(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int64_t m,
                               int64_t n, int64_t k, const void *alpha, const void *a, cudaDataType type_a, int64_t lda,
                               const void *b, cudaDataType type_b, int64_t ldb, const void *beta, void *c,
                               cudaDataType type_c, int64_t ldc, cublasComputeType_t sums, cublasGemmAlgo_t algorithm)
{
    const int ta = op_a == CUBLAS_OP_T, tb = op_b == CUBLAS_OP_T;
    const struct matrix from_a = {a, type_a, ta ? k : m, ta ? m : k, lda}, to = {c, type_c, m, n, ldc};
    const struct matrix from_b = {b, type_b, tb ? n : k, tb ? k : n, ldb};
    if (m < 0 || n < 0 || k < 0 || lda < 1 || ldb < 1 || ldc < 1 || lda < from_a.rows || ldb < from_b.rows || ldc < m)
        return INVALID_VALUE;
    if (!handle->stream || handle->math_mode != CUBLAS_DEFAULT_MATH || sums != CUBLAS_COMPUTE_32F ||
        algorithm != CUBLAS_GEMM_DEFAULT || type_a != type_b || (type_a != CUDA_R_32F && type_a != CUDA_R_16BF) ||
        type_c != CUDA_R_32F)
        return NOT_SUPPORTED;
    if (wants_failure(handle) || !lies_in_device_memory(handle->stream, &from_a) ||
        !lies_in_device_memory(handle->stream, &from_b) || !lies_in_device_memory(handle->stream, &to))
        return EXECUTION_FAILED;
    struct product *p = malloc(sizeof *p);
    if (!p)
        return CUBLAS_STATUS_ALLOC_FAILED;
    *p = (struct product){ta, tb, m, n, k, *(const float *)alpha, *(const float *)beta, from_a, from_b, c, ldc};
    handle->stream->enqueue(handle->stream, run, p);
    return CUBLAS_STATUS_SUCCESS;
}
