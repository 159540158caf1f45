/*
 * ops_state.h - what ops_test.c and main.c share.
 */
#ifndef OPS_STATE_H
#define OPS_STATE_H

#include "ops_test.h"

#define OPS_BLOCKS 96

/* An operand, or any memory of a case. */
struct ops_block {
    char *mapping, *area, *device; /* the mapping with its guards; what may be accessed; where the operand starts */
    size_t mapped, area_bytes, bytes;
    void *host;
    int read_only;
    struct ops_mat mat;
    struct gd_rows rows;
};

struct ops_state {
    uint64_t random;
    int guard_before; /* operands touch the page before them */
    int exact;        /* operands are whole allocations of the backend's, which guards them itself */
    int num_blocks;
    struct ops_block blocks[OPS_BLOCKS];

    int unsupported; /* the backend has not got the operation: nothing is checked */
    int failed;
    char failure[256];
    double worst; /* largest share of a bound that an error took */
    uint64_t digest;
    int repeated; /* a further run of a case: its outputs need the first one's bits, and no reference */
    int settled;  /* the bits of all outputs are in the digest */

    int benchmarking, calls;
    double first_seconds, call_seconds, best_seconds;
};

/* Checks what lies around the operands and frees them. */
void ops_finish_case(struct ops_test *test);

#endif
