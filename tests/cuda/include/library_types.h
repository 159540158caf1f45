/* library_types.h - the types of numbers that the backend has products of. See cuda_runtime_api.h. */
#ifndef EMULATED_LIBRARY_TYPES_H
#define EMULATED_LIBRARY_TYPES_H

typedef enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 } cudaDataType;

#endif
