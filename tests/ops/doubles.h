/*
 * doubles.h - operands as float64 matrices without margins, for references.
 */
#ifndef OPS_DOUBLES_H
#define OPS_DOUBLES_H

#include "ops_test.h"

/* (rows, width), as the operand is before the operation. */
static inline double *ops_host_doubles(struct ops_test *test, const struct ops_mat *mat)
{
    double *copy = ops_doubles(test, mat->rows * mat->width);
    for (int64_t i = 0; i < mat->rows * mat->width; i++)
        copy[i] = mat->host[i / mat->width * mat->ld + i % mat->width];
    return copy;
}

/* What `gradient` becomes in an operand that it is added to. */
static inline void ops_add_initial(double *gradient, const struct ops_mat *mat)
{
    for (int64_t i = 0; i < mat->rows * mat->width; i++)
        gradient[i] += mat->host[i / mat->width * mat->ld + i % mat->width];
}

#endif
