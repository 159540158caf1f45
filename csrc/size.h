/* size.h - sums and products of sizes that stay at SIZE_MAX, which no allocation grants, where they would pass it. */
#ifndef GD_SIZE_H
#define GD_SIZE_H

#include <stddef.h>
#include <stdint.h>

static inline size_t gd_plus(size_t a, size_t b)
{
    size_t sum;
    return __builtin_add_overflow(a, b, &sum) ? SIZE_MAX : sum;
}

static inline size_t gd_times(size_t a, size_t b)
{
    size_t product;
    return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

/* Up to whole cache lines. */
static inline size_t gd_whole_lines(size_t bytes) { return bytes > SIZE_MAX - 63 ? SIZE_MAX : (bytes + 63) / 64 * 64; }

#endif
