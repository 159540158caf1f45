/*
 * reduced.h - the factors of bfloat16 and int8 products, rounded as csrc/cpu does it, in float64.
 */
#ifndef OPS_REDUCED_H
#define OPS_REDUCED_H

#include "ops_test.h"

/* (rows, width): a matrix as products take it, as their left factor or as the right one (outputs by rows). */
double *ops_rounded(struct ops_test *test, const struct ops_mat *mat, enum gd_precision precision, int left);

/* The sum of a[c] b[c stride], c < count. *size += what its error grows with: the magnitudes of the products, or, with
 * int8, of the exact sums of each chain. */
double ops_dot(enum gd_precision precision, int64_t count, const double *a, const double *b,
               int64_t stride, double *size);

/* The factors of minimal filtering (csrc/cpu/filter_template.h), rounded after the transform. */
struct ops_filtered {
    enum gd_precision precision;
    int64_t in, groups;
    double *points;  /* (5, groups, in) */
    double *odd;     /* (rows, in) */
    double *weights; /* (out, 6, in) */
};

/* x: (2 rows + 1, in), w: (out, in * 3) */
struct ops_filtered ops_filtered(struct ops_test *test, const struct ops_mat *x, const struct ops_mat *w,
                                 enum gd_precision precision);

/* Output n of row r; *size grows as ops_dot() has it. */
double ops_filtered_sum(const struct ops_filtered *, int64_t r, int64_t n, double *size);

#endif
