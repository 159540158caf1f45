/*
 * cublas_api.h - the part of cuBLAS that this backend calls, as <cublas_v2.h> declares it since version 12. The
 * toolkit may be installed without that header, and the library itself is opened when it is first needed: see
 * cublas.c. Where GD_CUBLAS_HEADER is defined the real header's types are used, so that a test can hold the
 * functions and constants below against it.
 */
#ifndef GD_CUBLAS_API_H
#define GD_CUBLAS_API_H

#include <cuda_runtime_api.h>
#include <library_types.h>
#include <stdint.h>

#define GD_CUBLAS_CONSTANTS(X) \
    X(CUBLAS_STATUS_SUCCESS, 0) \
    X(CUBLAS_STATUS_ALLOC_FAILED, 3) \
    X(CUBLAS_OP_N, 0) \
    X(CUBLAS_OP_T, 1) \
    X(CUBLAS_DEFAULT_MATH, 0) /* float32 products stay float32: TF32 has to be asked for */ \
    X(CUBLAS_COMPUTE_32F, 68) /* sums in float32 */ \
    X(CUBLAS_GEMM_DEFAULT, -1)

#ifdef GD_CUBLAS_HEADER
#include GD_CUBLAS_HEADER
#else
typedef struct cublasContext *cublasHandle_t;
typedef int cublasStatus_t, cublasOperation_t, cublasMath_t, cublasComputeType_t, cublasGemmAlgo_t; /* enums */
#define GD_CUBLAS_CONSTANT(name, value) name = value,
enum { GD_CUBLAS_CONSTANTS(GD_CUBLAS_CONSTANT) };
#endif

/* X(member of struct gd_cublas, symbol, result, arguments). Matrices are column-major:
 * c (m, n) = alpha op(a) op(b) + beta c. */
#define GD_CUBLAS_FUNCTIONS(X) \
    X(create, cublasCreate_v2, cublasStatus_t, (cublasHandle_t *)) \
    X(destroy, cublasDestroy_v2, cublasStatus_t, (cublasHandle_t)) \
    X(set_stream, cublasSetStream_v2, cublasStatus_t, (cublasHandle_t, cudaStream_t)) \
    X(set_math_mode, cublasSetMathMode, cublasStatus_t, (cublasHandle_t, cublasMath_t)) \
    X(status_string, cublasGetStatusString, const char *, (cublasStatus_t)) \
    X(gemm, cublasGemmEx_64, cublasStatus_t, \
      (cublasHandle_t, cublasOperation_t op_a, cublasOperation_t op_b, int64_t m, int64_t n, int64_t k, \
       const void *alpha, const void *a, cudaDataType type_a, int64_t lda, const void *b, cudaDataType type_b, \
       int64_t ldb, const void *beta, void *c, cudaDataType type_c, int64_t ldc, cublasComputeType_t, \
       cublasGemmAlgo_t))

#define GD_CUBLAS_POINTER(member, symbol, result, arguments) result (*member) arguments;
struct gd_cublas {
    GD_CUBLAS_FUNCTIONS(GD_CUBLAS_POINTER)
};

#endif
