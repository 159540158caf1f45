/*
 * main.c - runs the operations' cases: [--backend cpu] [--list] [--bench] [--threads N] [--exact] [-v] [FILTER ...]
 * A filter is a part of the case's name. The last line is "N passed, N failed", and how many cases are of operations
 * that the backend has not got; the exit status is 0 only if some passed and none failed. --exact: a device's operands
 * are whole allocations, without canaries around them, for a backend that guards its memory itself.
 */
#include "ops_state.h"
#include "peak.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct ops_family *const families[] = {
    &ops_linear,
    &ops_linear_reduced,
    &ops_gemm,
    &ops_gemm_reduced,
    &ops_bias_backward,
    &ops_conv_backward,
    &ops_pos_conv,
    &ops_pos_conv_backward_weight,
    &ops_weight_norm,
    &ops_weight_norm_backward,
    &ops_layer_norm,
    &ops_layer_norm_backward,
    &ops_activate,
    &ops_activate_backward,
    &ops_no_activation,
    &ops_round_rows,
    &ops_widen_rows,
    &ops_axpby,
    &ops_scatter_rows,
    &ops_gather_rows,
    &ops_gelu_range,
    &ops_gelu_reduced_range,
    &ops_gelu_derivative_range,
    &ops_exp_range,
    &ops_philox,
    &ops_dropout,
    &ops_dropout_masks,
    &ops_sum_squares,
    &ops_adamw,
    &ops_moments,
    &ops_norm_fold,
    &ops_norm_fold_backward,
    &ops_normalize,
    &ops_position_bias,
    &ops_position_bias_backward,
    &ops_gate,
    &ops_gate_backward,
    &ops_attention,
    &ops_attention_reduced,
    &ops_attention_backward,
    &ops_loss_rows,
};

static char case_name[256];

static void name_case(const struct ops_family *family, const int64_t *args)
{
    size_t length = (size_t)snprintf(case_name, sizeof case_name, "%s", family->name);
    const char *word = family->args;
    for (int i = 0; i < OPS_ARGS && *word != '\0'; i++) {
        int letters = (int)strcspn(word, " ");
        length += (size_t)snprintf(case_name + length, sizeof case_name - length, " %.*s=%lld", letters, word,
                                   (long long)args[i]);
        word += letters + (word[letters] == ' ');
    }
}

static int wanted(int num_filters, char **filters)
{
    for (int i = 0; i < num_filters; i++)
        if (strstr(case_name, filters[i]) != NULL)
            return 1;
    return num_filters == 0;
}

static void on_crash(int number)
{
    static const char text[] = "\ncrashed in: ";
    ssize_t ignored = write(1, text, sizeof text - 1);
    ignored += write(1, case_name, strlen(case_name));
    ignored += write(1, "\n", 1);
    (void)ignored;
    signal(number, SIG_DFL);
    raise(number);
}

static uint64_t hash(const char *text)
{
    uint64_t value = 0xcbf29ce484222325u;
    for (; *text != '\0'; text++)
        value = (value ^ (unsigned char)*text) * 0x100000001b3u;
    return value;
}

#if defined(__x86_64__)
#include <immintrin.h>

/* 1 where this thread's tile registers are in use, which an operation should leave as it found them. */
__attribute__((target("amx-tile"))) static int tiles_in_use(void)
{
    uint8_t config[64] = {0};
    if (strstr(gd_cpu_features(), " amx_") != NULL)
        _tile_storeconfig(config);
    return config[0] != 0;
}
#else
static int tiles_in_use(void)
{
    return 0;
}
#endif

static void run_once(struct ops_test *test, const struct ops_family *family, const int64_t *args, int threads)
{
    static const gd_config empty;
    struct ops_state *state = test->state;
    state->random = hash(case_name);
    state->digest = 0xcbf29ce484222325u;
    state->guard_before = threads % 2 == 0;
    state->settled = 0;
    gd_context_set_num_threads(test->context, threads);
    ops_scratch(test, &empty, 1, 1);
    family->run(test, args);
    ops_finish_case(test);
    gd_status status = test->backend->synchronize(test->context);
    ops_expect(test, status == GD_OK, "the device failed after the operation: %s", test->context->message);
    ops_expect(test, !tiles_in_use(), "the operation left tile registers in use");
}

enum outcome { PASSED, FAILED, UNSUPPORTED, OUTCOMES };

static enum outcome test_case(struct ops_test *test, const struct ops_family *family, const int64_t *args, int verbose)
{
    struct ops_state *state = test->state;
    uint64_t digest = 0;
    state->failed = state->unsupported = 0;
    state->worst = 0;
    for (int threads = 1; threads <= 3 && state->failed == 0 && !state->unsupported; threads++) {
        state->repeated = threads > 1;
        run_once(test, family, args, threads);
        if (threads == 1)
            digest = state->digest;
        ops_expect(test, digest == state->digest, "%d threads give other bits than 1", threads);
    }
    if (state->unsupported)
        return UNSUPPORTED;
    if (state->failed > 0)
        printf("FAILED %s: %s (%d checks failed)\n", case_name, state->failure, state->failed);
    else if (verbose)
        printf("ok     %s (%.0f %% of the bound)\n", case_name, 100 * state->worst);
    return state->failed == 0 ? PASSED : FAILED;
}

static void bench_case(struct ops_test *test, const struct ops_family *family, const int64_t *args, int threads,
                       const double *peaks)
{
    run_once(test, family, args, threads);
    double time = test->state->best_seconds;
    double peak = peaks[family->precision != NULL ? family->precision(args) : GD_FLOAT32];
    printf("%-72s %d thread%s %10.1f us", case_name, threads, threads == 1 ? " " : "s", 1e6 * time);
    if (family->flops != NULL)
        printf(" %8.1f GFLOP/s %5.1f %% of peak", 1e-9 * family->flops(args) / time,
               100 * family->flops(args) / time / (peak * threads));
    if (family->bytes != NULL)
        printf(" %8.1f GB/s", 1e-9 * family->bytes(args) / time);
    printf("\n");
    fflush(stdout);
}

struct options {
    const char *backend;
    int list, bench, threads, exact, verbose, num_filters;
    char **filters;
};

static int parse(int argc, char **argv, struct options *options)
{
    *options = (struct options){.backend = "cpu", .filters = argv + 1};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--backend") == 0 && i + 1 < argc)
            options->backend = argv[++i];
        else if (strcmp(argv[i], "--threads") == 0 && i + 1 < argc)
            options->threads = atoi(argv[++i]);
        else if (strcmp(argv[i], "--list") == 0)
            options->list = 1;
        else if (strcmp(argv[i], "--bench") == 0)
            options->bench = 1;
        else if (strcmp(argv[i], "--exact") == 0)
            options->exact = 1;
        else if (strcmp(argv[i], "-v") == 0)
            options->verbose = 1;
        else if (argv[i][0] == '-')
            return 0;
        else
            options->filters[options->num_filters++] = argv[i];
    }
    return 1;
}

static const char *const precisions[] = {"float32", "bfloat16", "int8"};

/* Visits every case that was asked for. */
static int run_all(struct ops_test *test, const struct options *options)
{
    int count_of[OUTCOMES] = {0};
    double peaks[GD_INT8 + 1] = {0};
    if (!options->list)
        printf("%s: %s\n", test->backend->name, gd_cpu_features());
    for (int precision = GD_FLOAT32; options->bench && precision <= GD_INT8; precision++) {
        peaks[precision] = peak_flops(precisions[precision]);
        printf("peak, %s: %.1f GFLOP/s a thread, multiply-adds in registers\n", precisions[precision],
               1e-9 * peaks[precision]);
    }
    for (int f = 0; f < OPS_COUNT(families); f++) {
        const struct ops_family *family = families[f];
        int count = options->bench ? family->num_bench : family->num_cases, unsupported[GD_INT8 + 1] = {0};
        for (int i = 0; i < count; i++) {
            const int64_t *args = options->bench ? family->bench[i] : family->cases[i];
            name_case(family, args);
            if (!wanted(options->num_filters, options->filters))
                continue;
            if (options->list)
                printf("%s\n", case_name);
            else if (options->bench)
                for (int threads = options->threads ? options->threads : 1;
                     threads <= (options->threads ? options->threads : 2); threads++)
                    bench_case(test, family, args, threads, peaks);
            else {
                /* One case tells for the operation in its precision. */
                int *lacking = &unsupported[family->precision != NULL ? family->precision(args) : GD_FLOAT32];
                enum outcome outcome = *lacking ? UNSUPPORTED : test_case(test, family, args, options->verbose);
                *lacking = outcome == UNSUPPORTED;
                count_of[outcome]++;
            }
        }
        for (int precision = GD_FLOAT32; precision <= GD_INT8; precision++)
            if (unsupported[precision])
                printf("unsupported: %s, %s\n", family->name, precisions[precision]);
    }
    if (options->list || options->bench)
        return 0;
    printf("%d passed, %d failed", count_of[PASSED], count_of[FAILED]);
    printf(count_of[UNSUPPORTED] > 0 ? ", %d unsupported\n" : "\n", count_of[UNSUPPORTED]);
    return count_of[FAILED] > 0 || count_of[PASSED] == 0;
}

int main(int argc, char **argv)
{
    static struct ops_state state;
    struct ops_test test = {.state = &state};
    struct options options;
    char message[512];
    if (!parse(argc, argv, &options)) {
        fputs("usage: ops_test [--backend cpu] [--list] [--bench] [--threads N] [--exact] [-v] [FILTER ...]\n", stderr);
        return 2;
    }
    if (gd_context_create(options.backend, 1, &test.context, message, sizeof message) != GD_OK) {
        fprintf(stderr, "ops: %s\n", message);
        return 2;
    }
    test.backend = test.context->backend;
    state.benchmarking = options.bench;
    state.exact = options.exact;
    signal(SIGSEGV, on_crash);
    signal(SIGBUS, on_crash);
    signal(SIGFPE, on_crash);
    int failed = run_all(&test, &options);
    gd_context_free(test.context);
    return failed;
}
