/*
 * ops_test.c - operands between guards, random numbers, checks and the clock of the bench.
 */
#include "ops_state.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CANARY 0xa5
#define MARGIN 4096 /* bytes of canary on either side where pages cannot guard */
#define BENCH_SECONDS 0.25

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* ---- Random numbers ----------------------------------------------------------------------------------- */

static uint64_t next_random(struct ops_state *state)
{
    uint64_t z = state->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double ops_uniform(struct ops_test *test)
{
    return (double)(next_random(test->state) >> 11) * 0x1p-53;
}

/* The sum of eight uniform numbers of 16 bits, which is near enough to normal; within 4.9 in size. */
double ops_normal(struct ops_test *test)
{
    int64_t sum = 0;
    for (int i = 0; i < 2; i++) {
        uint64_t bits = next_random(test->state);
        sum += (int64_t)((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
    }
    return ((double)sum - 4 * 65535.0) * (1.224744871391589 / 65536);
}

/* ---- Memory ------------------------------------------------------------------------------------------- */

void ops_expect(struct ops_test *test, int condition, const char *format, ...)
{
    struct ops_state *state = test->state;
    if (condition || state->unsupported || state->failed++ > 0)
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(state->failure, sizeof state->failure, format, arguments);
    va_end(arguments);
}

static void out_of_memory(void)
{
    fputs("ops: out of memory\n", stderr);
    exit(2);
}

static struct ops_block *new_block(struct ops_state *state)
{
    if (state->num_blocks == OPS_BLOCKS) {
        fputs("ops: too many operands in a case\n", stderr);
        exit(2);
    }
    struct ops_block *block = &state->blocks[state->num_blocks++];
    memset(block, 0, sizeof *block);
    return block;
}

/* On a device that shares memory: whole pages with an inaccessible one on either side; the block touches the
 * one behind it, or the one before it. The rest of its pages is canary. */
static void map_guarded(struct ops_state *state, struct ops_block *block)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), pages = (block->bytes + page - 1) / page * page;
    char *base = mmap(NULL, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED || (pages > 0 && mprotect(base + page, pages, PROT_READ | PROT_WRITE) != 0))
        out_of_memory();
    block->mapping = base;
    block->mapped = pages + 2 * page;
    block->area = base + page;
    block->area_bytes = pages;
    memset(block->area, CANARY, pages);
    block->device = state->guard_before ? block->area : block->area + pages - block->bytes;
}

static void allocate_between_canaries(struct ops_test *test, struct ops_block *block)
{
    void *memory;
    size_t margin = test->state->exact ? 0 : MARGIN;
    block->area_bytes = block->bytes + 2 * margin;
    if (test->backend->allocate(test->context, block->area_bytes, &memory) != GD_OK)
        out_of_memory();
    block->area = memory;
    block->device = block->area + margin;
    char *canary = malloc(block->area_bytes + 1);
    if (canary == NULL)
        out_of_memory();
    memset(canary, CANARY, block->area_bytes);
    test->backend->upload(test->context, block->area, canary, block->area_bytes);
    free(canary);
}

static struct ops_block *new_device_block(struct ops_test *test, size_t bytes)
{
    struct ops_block *block = new_block(test->state);
    block->bytes = bytes;
    if (test->backend->shares_memory && !test->state->benchmarking)
        map_guarded(test->state, block);
    else
        allocate_between_canaries(test, block);
    return block;
}

void *ops_memory(struct ops_test *test, size_t bytes)
{
    return new_device_block(test, (bytes + 63) / 64 * 64)->device;
}

double *ops_doubles(struct ops_test *test, int64_t count)
{
    struct ops_block *block = new_block(test->state);
    block->host = calloc((size_t)count + 1, sizeof(double));
    if (block->host == NULL)
        out_of_memory();
    return block->host;
}

enum kind { INPUT, OUTPUT, UPDATE };

static struct ops_mat *new_mat(struct ops_test *test, enum kind kind, int64_t rows, int64_t width, int64_t ld,
                               double scale)
{
    int64_t count = rows > 0 && width > 0 ? (rows - 1) * ld + width : 0;
    struct ops_block *block = new_device_block(test, (size_t)count * sizeof(float));
    float *host = malloc((size_t)count * sizeof(float) + 1);
    if (host == NULL)
        out_of_memory();
    for (int64_t i = 0; i < count; i++)
        host[i] = kind == OUTPUT || i % ld >= width ? NAN : (float)(scale * ops_normal(test));
    block->host = host;
    block->read_only = kind == INPUT;
    block->mat = (struct ops_mat){rows, width, ld, (float *)block->device, host};
    ops_upload(test, &block->mat);
    return &block->mat;
}

struct ops_mat *ops_input(struct ops_test *test, int64_t rows, int64_t width, int64_t ld, double scale)
{
    return new_mat(test, INPUT, rows, width, ld, scale);
}

struct ops_mat *ops_output(struct ops_test *test, int64_t rows, int64_t width, int64_t ld)
{
    return new_mat(test, OUTPUT, rows, width, ld, 0);
}

struct ops_mat *ops_update(struct ops_test *test, int64_t rows, int64_t width, int64_t ld, double scale)
{
    return new_mat(test, UPDATE, rows, width, ld, scale);
}

static size_t mat_bytes(const struct ops_mat *mat)
{
    return mat->rows > 0 && mat->width > 0 ? (size_t)((mat->rows - 1) * mat->ld + mat->width) * sizeof(float) : 0;
}

void ops_upload(struct ops_test *test, struct ops_mat *mat)
{
    test->backend->upload(test->context, mat->device, mat->host, mat_bytes(mat));
}

const struct gd_rows *ops_rows(struct ops_test *test, int64_t batch, const int64_t *rows, const int64_t *valid)
{
    struct ops_block *block = new_block(test->state);
    int64_t *numbers = malloc((size_t)(2 * batch + 1) * sizeof *numbers);
    if (numbers == NULL)
        out_of_memory();
    int64_t *first = numbers, *real = numbers + batch + 1, longest = 0;
    first[0] = 0;
    for (int64_t b = 0; b < batch; b++) {
        first[b + 1] = first[b] + rows[b];
        real[b] = valid != NULL ? valid[b] : rows[b];
        longest = rows[b] > longest ? rows[b] : longest;
    }
    block->host = numbers;
    block->rows = (struct gd_rows){batch, first[batch], longest, first, real};
    return &block->rows;
}

void ops_scratch(struct ops_test *test, const gd_config *config, int64_t longest, int training)
{
    gd_context *context = test->context;
    context->scratch_stride = test->backend->scratch_size(context, config, longest, training);
    context->scratch = ops_memory(test, context->scratch_stride * (size_t)context->num_threads);
}

/* ---- Checks ------------------------------------------------------------------------------------------- */

int ops_benchmarking(const struct ops_test *test)
{
    return test->state->benchmarking;
}

void ops_digest(struct ops_test *test, const void *bytes, size_t count)
{
    const unsigned char *p = bytes;
    uint64_t digest = test->state->digest;
    for (size_t i = 0; i < count; i++)
        digest = (digest ^ p[i]) * 0x100000001b3u;
    test->state->digest = digest ^ count;
}

int ops_settled(struct ops_test *test)
{
    struct ops_state *state = test->state;
    if (state->benchmarking)
        return 1;
    const int num_blocks = state->num_blocks;
    for (int i = 0; i < num_blocks; i++) {
        const struct ops_mat *mat = &state->blocks[i].mat;
        if (mat->device != NULL && !state->blocks[i].read_only)
            ops_digest(test, ops_result(test, mat), mat_bytes(mat));
    }
    state->settled = 1;
    return state->repeated;
}

const float *ops_result(struct ops_test *test, const struct ops_mat *mat)
{
    struct ops_block *block = new_block(test->state);
    block->host = malloc(mat_bytes(mat) + 1);
    if (block->host == NULL)
        out_of_memory();
    test->backend->download(test->context, block->host, mat->device, mat_bytes(mat));
    return block->host;
}

static void check(struct ops_test *test, const struct ops_mat *mat, const double *reference, double absolute,
                  double relative, const double *bound)
{
    if (test->state->benchmarking)
        return;
    const float *got = ops_result(test, mat);
    int64_t compared = 0;
    if (!test->state->settled)
        ops_digest(test, got, mat_bytes(mat));
    for (int64_t r = 0; r < mat->rows; r++)
        for (int64_t c = 0; c < mat->width; c++) {
            int64_t i = r * mat->width + c;
            float x = got[r * mat->ld + c];
            double wanted = reference[i];
            double limit = bound != NULL ? bound[i] : absolute + relative * fabs(wanted);
            ops_expect(test, !isnan(x), "row %lld, column %lld: NaN (not written, or read beyond an operand)",
                       (long long)r, (long long)c);
            if (isnan(wanted))
                continue;
            compared++;
            ops_expect(test, fabs(x - wanted) <= limit,
                       "row %lld, column %lld: %.9g, expected %.9g within %.2g, off by %.2g", (long long)r,
                       (long long)c, x, wanted, limit, fabs(x - wanted));
            if (limit > 0 && fabs(x - wanted) > test->state->worst * limit)
                test->state->worst = fabs(x - wanted) / limit;
        }
    ops_expect(test, compared > 0 || mat->rows * mat->width == 0, "nothing was compared");
}

void ops_check(struct ops_test *test, const struct ops_mat *mat, const double *reference, double absolute,
               double relative)
{
    check(test, mat, reference, absolute, relative, NULL);
}

void ops_check_each(struct ops_test *test, const struct ops_mat *mat, const double *reference, const double *bound)
{
    check(test, mat, reference, 0, 0, bound);
}

void ops_gradient(double (*f)(void *argument), void *argument, double *x, int64_t count, double step, double *gradient)
{
    for (int64_t i = 0; i < count; i++) {
        double kept = x[i];
        x[i] = kept + step;
        double above = f(argument);
        x[i] = kept - step;
        double below = f(argument);
        x[i] = kept;
        gradient[i] = (above - below) / (2 * step);
    }
}

/* Margins of rows and read-only operands as they were; canaries whole. */
static void check_block(struct ops_test *test, const struct ops_block *block, int number)
{
    char *area = block->area, *copy = NULL;
    if (!test->backend->shares_memory) {
        copy = malloc(block->area_bytes + 1);
        if (copy == NULL)
            out_of_memory();
        test->backend->download(test->context, copy, block->area, block->area_bytes);
        area = copy;
    }
    const char *begin = area + (block->device - block->area), *end = begin + block->bytes;
    for (const char *p = area; p < area + block->area_bytes; p++) {
        if (p == begin)
            p = end;
        if (p < area + block->area_bytes && *p != (char)CANARY) {
            ops_expect(test, 0, "operand %d: written %lld bytes %s it", number,
                       (long long)(p < begin ? begin - p : p - end + 1), p < begin ? "before" : "after");
            break;
        }
    }
    const struct ops_mat *mat = &block->mat;
    for (int64_t r = 0; mat->host != NULL && block->bytes > 0 && r < mat->rows; r++) {
        int64_t from = block->read_only ? 0 : mat->width, to = r < mat->rows - 1 ? mat->ld : mat->width;
        const float *now = (const float *)begin + r * mat->ld, *before = mat->host + r * mat->ld;
        if (memcmp(now + from, before + from, (size_t)(to - from) * sizeof(float)) != 0) {
            ops_expect(test, 0, "operand %d: row %lld was written where it is no output", number, (long long)r);
            break;
        }
    }
    free(copy);
}

void ops_finish_case(struct ops_test *test)
{
    struct ops_state *state = test->state;
    for (int i = 0; i < state->num_blocks; i++) {
        struct ops_block *block = &state->blocks[i];
        if (block->area != NULL) {
            if (!state->benchmarking)
                check_block(test, block, i);
            if (block->mapping != NULL)
                munmap(block->mapping, block->mapped);
            else
                test->backend->release(test->context, block->area);
        }
        free(block->host);
    }
    state->num_blocks = 0;
    test->context->scratch = NULL;
    test->context->scratch_stride = 0;
}

int ops_has(struct ops_test *test, int condition)
{
    test->state->unsupported |= !condition;
    return condition;
}

/* ---- The clock ---------------------------------------------------------------------------------------- */

void ops_begin(struct ops_test *test)
{
    struct ops_state *state = test->state;
    state->calls = 0;
    state->best_seconds = INFINITY;
}

int ops_again(struct ops_test *test)
{
    struct ops_state *state = test->state;
    gd_status status = test->backend->synchronize(test->context);
    double now = seconds();
    state->unsupported |= status == GD_EUNSUPPORTED;
    ops_expect(test, status == GD_OK, "the device failed: %s", test->context->message);
    if (!state->benchmarking)
        return state->calls++ == 0;
    if (state->calls == 0)
        state->first_seconds = now;
    else if (now - state->call_seconds < state->best_seconds)
        state->best_seconds = now - state->call_seconds;
    if (state->calls >= 3 && now - state->first_seconds > BENCH_SECONDS)
        return 0;
    state->calls++;
    state->call_seconds = seconds();
    return 1;
}
