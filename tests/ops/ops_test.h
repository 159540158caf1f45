/*
 * ops_test.h - a test bench for the operations of struct gd_backend.
 *
 * A family is one operation with a table of cases, each a row of integers. Its run() makes the operands,
 * calls the operation inside OPS_RUN(), computes the same in float64 and compares. Everything else is the
 * bench's business:
 *   - every case runs with 1, 2 and 3 threads, and the outputs must have the same bits each time: the first run's
 *     are compared with the reference;
 *   - operands lie against inaccessible pages, after them in one run and before them in the next (on a
 *     device without shared memory: between canaries), so that a stray access is a crash or a failure;
 *   - margins of rows (width .. ld) hold NaN and must hold it afterwards; read-only operands must be as
 *     they were; an output that was not written is a NaN;
 *   - with --bench the cases of `bench` are timed, and nothing is checked.
 * A crash names the case that ran.
 */
#ifndef OPS_TEST_H
#define OPS_TEST_H

#include "../../csrc/backend.h"

#define OPS_ARGS 8
#define OPS_COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

struct ops_test {
    gd_context *context;
    const struct gd_backend *backend;
    struct ops_state *state; /* the bench's own */
};

struct ops_family {
    const char *name;       /* the operation's */
    const char *args;       /* what a case's integers are, e.g. "rows width" */
    void (*run)(struct ops_test *test, const int64_t *args);
    const int64_t (*cases)[OPS_ARGS];
    int num_cases;
    const int64_t (*bench)[OPS_ARGS];
    int num_bench;
    double (*flops)(const int64_t *args); /* of one call; NULL: only its time is shown */
    enum gd_precision (*precision)(const int64_t *args); /* of a case's products; NULL: float32 */
    double (*bytes)(const int64_t *args); /* read and written by one call; or NULL */
};

/* Calls the operation: once in a test, many times in a benchmark. `break` and `continue` do not belong in it. */
#define OPS_RUN(test) for (ops_begin(test); ops_again(test);)

/* ---- Operands: freed after the case. `device` goes to the operation --------------------------------- */

struct ops_mat {
    int64_t rows, width, ld; /* (rows - 1) * ld + width floats */
    float *device;
    float *host; /* what it holds before the operation; change it, then ops_upload() */
};

/* Of random numbers, N(0, scale^2), and read only; of NaN, to be written; random, to be added to or changed in
 * place. */
struct ops_mat *ops_input(struct ops_test *test, int64_t rows, int64_t width, int64_t ld, double scale);
struct ops_mat *ops_output(struct ops_test *test, int64_t rows, int64_t width, int64_t ld);
struct ops_mat *ops_update(struct ops_test *test, int64_t rows, int64_t width, int64_t ld, double scale);
void ops_upload(struct ops_test *test, struct ops_mat *mat);

/* Device memory of unspecified content, such as packed weights or scratch: only what lies around it is checked. */
void *ops_memory(struct ops_test *test, size_t bytes);

/* Zeroed host memory. */
double *ops_doubles(struct ops_test *test, int64_t count);

/* Utterances of rows[b] rows of which valid[b] are real; valid NULL: all. */
const struct gd_rows *ops_rows(struct ops_test *test, int64_t batch, const int64_t *rows, const int64_t *valid);

/* Gives the context the scratch that scratch_size() asks for; without it: for an empty config. */
void ops_scratch(struct ops_test *test, const gd_config *config, int64_t longest, int training);

/* Random numbers that follow from the case's name: uniform in [0, 1), and normal. */
double ops_uniform(struct ops_test *test);
double ops_normal(struct ops_test *test);

/* ---- Checks ----------------------------------------------------------------------------------------- */

/* |output - reference| <= absolute + relative |reference|; reference is (rows, width). Where it is NaN, nothing
 * is compared (references too costly to compute whole). */
void ops_check(struct ops_test *test, const struct ops_mat *mat, const double *reference, double absolute,
               double relative);
/* The same with a bound for each element. */
void ops_check_each(struct ops_test *test, const struct ops_mat *mat, const double *reference, const double *bound);

/* What a matrix holds after the operation, (rows - 1) * ld + width floats. */
const float *ops_result(struct ops_test *test, const struct ops_mat *mat);
/* Bytes that the operation wrote to host memory; they must be the same for every number of threads. Before
 * ops_settled(). */
void ops_digest(struct ops_test *test, const void *bytes, size_t count);

/* Fails the case, with a message, where the condition does not hold. */
void ops_expect(struct ops_test *test, int condition, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* gradient[i] = d f / d x[i] by central differences of f(argument), which reads x; +- step. */
void ops_gradient(double (*f)(void *argument), void *argument, double *x, int64_t count, double step,
                  double *gradient);

/* Whether the backend has the operation; where it has not, the case counts as one that is not supported. */
int ops_has(struct ops_test *test, int condition);

int ops_benchmarking(const struct ops_test *test);

/* Where run() has the operation behind it, and what it computes next is the reference: 1 where that is not wanted, in a
 * benchmark and where the bits are enough. Takes the bits of all operands but the read-only ones. */
int ops_settled(struct ops_test *test);

/* For OPS_RUN. */
void ops_begin(struct ops_test *test);
int ops_again(struct ops_test *test);

/* ---- Families: defined in *_cases.c, listed in main.c ------------------------------------------------ */

extern const struct ops_family ops_linear, ops_linear_reduced, ops_gemm, ops_gemm_reduced; /* gemm_cases.c */
extern const struct ops_family ops_bias_backward; /* bias_cases.c */
extern const struct ops_family ops_pos_conv, ops_pos_conv_backward_weight; /* pos_conv_cases.c */
extern const struct ops_family ops_conv_backward; /* conv_cases.c */
extern const struct ops_family ops_weight_norm, ops_weight_norm_backward; /* weights_cases.c */
extern const struct ops_family ops_layer_norm, ops_layer_norm_backward; /* norm_cases.c */
/* elementwise_cases.c */
extern const struct ops_family ops_activate, ops_activate_backward, ops_no_activation, ops_round_rows, ops_widen_rows;
extern const struct ops_family ops_axpby, ops_scatter_rows, ops_gather_rows;
/* vmath_cases.c */
extern const struct ops_family ops_gelu_range, ops_gelu_reduced_range, ops_gelu_derivative_range, ops_exp_range;
extern const struct ops_family ops_philox, ops_dropout, ops_dropout_masks; /* dropout_cases.c */
extern const struct ops_family ops_sum_squares, ops_adamw; /* optimizer_cases.c */
/* extractor_cases.c */
extern const struct ops_family ops_moments, ops_norm_fold, ops_norm_fold_backward, ops_normalize;
/* position_cases.c */
extern const struct ops_family ops_position_bias, ops_position_bias_backward, ops_gate, ops_gate_backward;
extern const struct ops_family ops_attention, ops_attention_reduced, ops_attention_backward; /* attention_cases.c */
extern const struct ops_family ops_loss_rows; /* loss_cases.c */

#endif
