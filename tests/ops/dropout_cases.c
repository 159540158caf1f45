/*
 * dropout_cases.c - dropout, its random words against the published ones, and its statistics.
 */
#include "doubles.h"

#include <math.h>

#include "../../csrc/philox.h"

/* ---- Philox 4x32-10: the known answers that Random123 publishes (kat_vectors) ------------------------------ */

static const int64_t philox_cases[][OPS_ARGS] = {{0}, {1}, {2}};

static const struct known_answer {
    uint32_t counter[4], key[2], words[4];
} known_answers[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
     {0xffffffff, 0xffffffff},
     {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
     {0xa4093822, 0x299f31d0},
     {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

static void run_philox(struct ops_test *test, const int64_t *args)
{
    const struct known_answer *answer = &known_answers[args[0]];
    uint32_t words[4];
    gd_philox(answer->counter, answer->key, words);
    for (int i = 0; i < 4; i++)
        ops_expect(test, words[i] == answer->words[i], "word %d is %08x, not %08x", i, words[i], answer->words[i]);
}

const struct ops_family ops_philox = {
    .name = "philox", .args = "vector", .run = run_philox, .cases = philox_cases, .num_cases = OPS_COUNT(philox_cases)};

/* ---- dropout ---------------------------------------------------------------------------------------------- */

/* width, rows of the first utterance (then 1, then as many again), 1e6 p, seed, step, first utterance, site.
 * p 0: the first element's own word / 2^32, by which it is just kept; p -1: half a step more, by which it is not. */
static const int64_t cases[][OPS_ARGS] = {
    {1, 1, 100000, 0, 0, 0, 0},
    {3, 2, 500000, 1, 0, 0, 32},
    {4, 1, 0, 3, 9, 1, 64},
    {4, 1, -1, 3, 9, 1, 64},
    {15, 3, 100000, 7, 123456, 24, 65},
    {64, 2, 1, 7, 123456, 24, 65},
    {65, 9, 900000, -1, 1 << 20, 1 << 30, 161},
    {66, 5, 999999, 1LL << 40, 1LL << 33, 3, 31},
    {768, 99, 100000, 42, 199999, 100, 64},
    {3072, 20, 100000, 42, 199999, 100, 96},
};
static const int64_t bench[][OPS_ARGS] = {{768, 375, 100000, 1, 2, 3, 4}};

static void run_dropout(struct ops_test *test, const int64_t *args)
{
    int64_t width = args[0], counts[] = {args[1], 1, args[1]};
    double p = 1e-6 * (double)args[2];
    const struct gd_rows *rows = ops_rows(test, 3, counts, NULL);
    const gd_dropout_seed seed = {(uint64_t)args[3], (uint64_t)args[4], args[5]};
    uint32_t site = (uint32_t)args[6];
    const uint32_t key[2] = {(uint32_t)(seed.seed ^ seed.step >> 32), (uint32_t)(seed.step ^ seed.seed >> 32)};
    struct ops_mat *x = ops_update(test, rows->total, width, width + 3, 1);
    if (p <= 0) {
        const uint32_t counter[4] = {0, 0, (uint32_t)seed.first_utterance, site};
        uint32_t words[4];
        gd_philox(counter, key, words);
        p = (words[0] + (args[2] < 0 ? 0.5 : 0)) / 4294967296.0;
    }
    /* In two tiles, the border amid the last utterance. */
    const int64_t border = rows->total - (args[1] + 1) / 2;
    OPS_RUN(test) {
        test->backend->dropout(test->context, rows, 0, border, width, x->device, x->ld, p, &seed, site);
        test->backend->dropout(test->context, rows, border, rows->total - border, width, x->device + border * x->ld,
                               x->ld, p, &seed, site);
    }
    if (ops_settled(test))
        return;
    double *reference = ops_host_doubles(test, x);
    double threshold = p * 4294967296.0, kept = 0, count = (double)(rows->total * width);
    for (int64_t b = 0; b < 3; b++)
        for (int64_t t = 0; t < counts[b]; t++)
            for (int64_t c = 0; c < width; c++) {
                const uint32_t counter[4] = {(uint32_t)c / 4, (uint32_t)t, (uint32_t)(seed.first_utterance + b), site};
                uint32_t words[4];
                gd_philox(counter, key, words);
                int keep = (double)words[c % 4] >= threshold;
                reference[(rows->first[b] + t) * width + c] *= keep ? 1 / (1 - p) : 0;
                kept += keep;
            }
    ops_check(test, x, reference, 0, 2e-7);
    /* The share of kept elements within five deviations of 1 - p. */
    ops_expect(test, fabs(kept / count - (1 - p)) <= 5 * sqrt(p * (1 - p) / count) + 1 / count,
               "%.6f of the elements are kept, p is %g", kept / count, p);
}

const struct ops_family ops_dropout = {
    .name = "dropout", .args = "width rows p_1e6 seed step first site", .run = run_dropout, .cases = cases,
    .num_cases = OPS_COUNT(cases), .bench = bench, .num_bench = OPS_COUNT(bench)};

/* ---- Masks of neighbours are independent ------------------------------------------------------------------ */

/* What differs from the first mask: 0 seed, 1 step, 2 utterance, 3 site, 4 frame, 5 column */
static const int64_t mask_cases[][OPS_ARGS] = {{0}, {1}, {2}, {3}, {4}, {5}};

enum { MASK_ROWS = 64, MASK_WIDTH = 1024 };

/* Products of what two masks keep, less its mean: their covariance, in deviations of what chance gives. */
static void run_dropout_masks(struct ops_test *test, const int64_t *args)
{
    const double p = 0.25;
    int64_t counts[] = {MASK_ROWS}, which = args[0];
    const struct gd_rows *rows = ops_rows(test, 1, counts, NULL);
    struct ops_mat *x = ops_update(test, MASK_ROWS, MASK_WIDTH, MASK_WIDTH, 1);
    struct ops_mat *y = ops_update(test, MASK_ROWS, MASK_WIDTH, MASK_WIDTH, 1);
    for (int64_t i = 0; i < MASK_ROWS * MASK_WIDTH; i++)
        x->host[i] = y->host[i] = 1;
    ops_upload(test, x);
    ops_upload(test, y);
    gd_dropout_seed seed = {5, 17, 3}, other = {5 + (which == 0), 17 + (which == 1), 3 + (which == 2)};
    test->backend->dropout(test->context, rows, 0, rows->total, MASK_WIDTH, x->device, x->ld, p, &seed, 32);
    OPS_RUN(test)
        test->backend->dropout(test->context, rows, 0, rows->total, MASK_WIDTH, y->device, y->ld, p, &other,
                               32 + (which == 3));
    const float *first = ops_result(test, x), *second = ops_result(test, y);
    double sum = 0, squares = 0, count = 0;
    int64_t shift = which == 4 ? MASK_WIDTH : which == 5 ? 1 : 0;
    for (int64_t i = 0; i + shift < MASK_ROWS * MASK_WIDTH; i++, count++) {
        double product = (first[i] * (1 - p) - (1 - p)) * (second[i + shift] * (1 - p) - (1 - p));
        sum += product;
        squares += product * product;
    }
    ops_expect(test, fabs(sum) < 5 * sqrt(squares), "masks are correlated: %.2f deviations", sum / sqrt(squares));
    ops_expect(test, squares > 0.5 * count * p * p * (1 - p) * (1 - p), "masks are not random");
}

const struct ops_family ops_dropout_masks = {
    .name = "dropout_masks", .args = "differs", .run = run_dropout_masks, .cases = mask_cases,
    .num_cases = OPS_COUNT(mask_cases)};
