/*
 * reduced.h - the factors of bfloat16 and int8 products, rounded as csrc/cpu does it, in float64.
 */
#ifndef OPS_REDUCED_H
#define OPS_REDUCED_H

#include "ops_test.h"

/* (rows, width): a matrix as products take it, as their left factor or as the right one (outputs by rows). */
double *ops_rounded(struct ops_test *test, const struct ops_mat *mat, enum gd_precision precision, int left);

/* The sum of output r's products by minimal filtering in bfloat16 (csrc/cpu/filter_template.h), whose transformed
 * factors are what is rounded; x is (2 rows + 1, in), w (in, 3). *size: the sum of their magnitudes; *largest: the
 * largest. A factor that lies in the middle may be rounded the other way, 2^-7 of it off: a bound allows for two. */
double ops_filtered_sum(const struct ops_mat *x, const float *w, int64_t r, int64_t rows, double *size,
                        double *largest);

#endif
