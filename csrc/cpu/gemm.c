/*
 * gemm.c - linear layers, convolutions and matrix products: packing, and the division of the outputs into
 * tasks. The arithmetic is gemm_template.h's.
 */
#include "ops.h"
#include "reduced.h"

#include <string.h>

/* gemm() packs blocks of B, this many words deep and columns wide, and blocks of A as deep, whose rows are LDA words
 * apart. */
#define BLOCK_K GEMM_CHAIN
#define BLOCK_COLS 512
#define LDA (BLOCK_K + GD_CACHE_LINE_FLOATS)
#define GEMM_SCRATCH ((BLOCK_K * BLOCK_COLS + GEMM_ROWS * LDA) * sizeof(float))

/* Columns with the padding that packing gives them. */
static int64_t padded_cols(const struct gd_kernels *kernels, int64_t cols)
{
    return gd_round_up(cols, kernels->vector);
}

size_t gd_cpu_packed_size(const gd_context *context, const struct gd_weight *weight)
{
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    return (size_t)(padded_cols(kernels, weight->out) * gd_packed_depth(kernels, weight)) * sizeof(float);
}

struct pack_job {
    const struct gd_kernels *kernels;
    const struct gd_weight *weight;
    int64_t w_out, w_tap, w_in;
    const float *w;
    float *packed;
};

/* Minimal filtering's matrices of a panel, formed in float32, some rows at a time, and then rounded to words. */
static void pack_filtered_words(const struct pack_job *job, const float *w, int64_t cols, float *to)
{
    enum { ROWS = 32, MOST_COLS = 32 };
    const struct gd_weight *weight = job->weight;
    const struct gd_gemm_kernels *gemm = job->kernels->gemm, *reduced = &gemm[weight->precision];
    const int64_t width = padded_cols(job->kernels, cols), matrix = gd_divide_up(weight->in, reduced->elements) * width;
    float exact[(FILTER_POINTS + 1) * ROWS * MOST_COLS];
    for (int64_t k = 0; k < weight->in; k += ROWS) {
        const int64_t rows = gd_smaller(weight->in - k, ROWS), size = rows * width;
        for (int64_t tap = 0; tap < weight->taps; tap++)
            gemm[GD_FLOAT32].pack_b(rows, cols, w + tap * job->w_tap + k * job->w_in, job->w_in, job->w_out, rows,
                                    exact + gd_cpu_tap_matrix(job->kernels, weight, tap) * size);
        job->kernels->filter_weights(size, exact);
        for (int64_t m = 0; m < gd_cpu_matrices(job->kernels, weight); m++)
            reduced->pack_b(rows, width, exact + m * size, width, 1, matrix / width,
                            to + m * matrix + k / reduced->elements * width);
    }
}

/* One panel of gemm_cols outputs, (panel_depth, gemm_cols); the last is as wide as it need be. */
static void pack_task(void *argument, int64_t index, int slot)
{
    const struct pack_job *job = argument;
    const struct gd_weight *weight = job->weight;
    const struct gd_gemm_kernels *gemm = &job->kernels->gemm[weight->precision];
    const int64_t n = index * job->kernels->gemm_cols, cols = gd_smaller(weight->out - n, job->kernels->gemm_cols);
    const int64_t width = padded_cols(job->kernels, cols), matrix = gd_divide_up(weight->in, gemm->elements) * width;
    const float *w = job->w + n * job->w_out;
    float *to = job->packed + n * gd_packed_depth(job->kernels, weight);
    (void)slot;
    if (weight->precision == GD_INT8) {
        gd_reduced_pack_int8(job->kernels, &(struct gd_panel_weights){
            .weight = weight, .w = w, .w_out = job->w_out, .w_tap = job->w_tap, .w_in = job->w_in,
            .cols = cols, .width = width}, to);
    } else if (gd_cpu_filtered(job->kernels, weight) && weight->precision != GD_FLOAT32) {
        pack_filtered_words(job, w, cols, to);
    } else {
        for (int64_t tap = 0; tap < weight->taps; tap++)
            gemm->pack_b(weight->in, cols, w + tap * job->w_tap, job->w_in, job->w_out, matrix / width,
                         to + gd_cpu_tap_matrix(job->kernels, weight, tap) * matrix);
        if (gd_cpu_filtered(job->kernels, weight))
            job->kernels->filter_weights(matrix, to);
    }
}

void gd_cpu_pack(gd_context *context, const struct gd_weight *weight, const float *w, int64_t w_out, int64_t w_tap,
                 int64_t w_in, void *packed)
{
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    struct pack_job job = {kernels, weight, w_out, w_tap, w_in, w, packed};
    gd_cpu_run(context, gd_divide_up(weight->out, kernels->gemm_cols), pack_task, &job);
}

/* How outputs are divided: a grid of tasks, each some register tiles high and some panels wide. */
struct grid {
    int64_t tile_rows, panels;             /* in all */
    int64_t rows_a_task, panels_a_task;    /* rows in register tiles */
    int64_t tasks_down, tasks_across;
};

/* The grid that takes least time: the busiest thread's tiles, and what each task reads again. */
static struct grid divide(const gd_context *context, int64_t rows, int64_t cols, int64_t mr)
{
    enum { MOST_ROUNDS = 4 };
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    int64_t threads = gd_threads_in_task() ? 1 : context->num_threads;
    struct grid best = {0}, grid;
    int64_t best_cost = INT64_MAX;
    grid.tile_rows = gd_divide_up(rows, mr);
    grid.panels = gd_divide_up(cols, kernels->gemm_cols);
    for (int64_t rounds = 1; rounds <= MOST_ROUNDS; rounds++)
        for (int64_t down = 1; down <= rounds * threads && down <= grid.tile_rows; down++) {
            int64_t across = gd_smaller(grid.panels, gd_divide_up(rounds * threads, down));
            grid.rows_a_task = gd_divide_up(grid.tile_rows, down);
            grid.panels_a_task = gd_divide_up(grid.panels, across);
            grid.tasks_down = gd_divide_up(grid.tile_rows, grid.rows_a_task);
            grid.tasks_across = gd_divide_up(grid.panels, grid.panels_a_task);
            int64_t busiest = gd_divide_up(grid.tasks_down * grid.tasks_across, threads);
            int64_t cost = busiest * (grid.rows_a_task + 2) * (grid.panels_a_task + 1);
            if (cost < best_cost) {
                best_cost = cost;
                best = grid;
            }
        }
    return best;
}

/* Rows and panels of one task: first .. end. */
struct area {
    int64_t row, row_end, panel, panel_end;
};

static struct area area_of(const struct grid *grid, int64_t index, int64_t rows, int64_t mr)
{
    int64_t down = index / grid->tasks_across, across = index % grid->tasks_across;
    struct area area;
    area.row = down * grid->rows_a_task * mr;
    area.row_end = gd_smaller(rows, area.row + grid->rows_a_task * mr);
    area.panel = across * grid->panels_a_task;
    area.panel_end = gd_smaller(grid->panels, area.panel + grid->panels_a_task);
    return area;
}

/* What a task reads of the left factor before it goes on to other rows: it and a panel's chains fit in a core's second
 * cache. */
#define BLOCK_BYTES (600 * 1024)

/* Bytes of the rows that `rows` output rows read, as products take them; or the filter's points, those of one group in
 * float32, and the odd rows. */
static int64_t block_bytes(const struct gd_kernels *kernels, const struct gd_weight *weight, int64_t rows)
{
    const int64_t groups = gd_divide_up(rows, FILTER_OUTPUTS), exact = gd_row_stride(weight->in);
    const int64_t row = gd_row_stride(gd_row_words(kernels, weight));
    int64_t floats = ((rows - 1) * weight->stride + weight->taps) * row;
    if (gd_cpu_filtered(kernels, weight))
        floats = (FILTER_POINTS * groups + rows) * row + FILTER_POINTS * exact;
    return floats * (int64_t)sizeof(float);
}

/* Rows that a block's are a multiple of. */
static int64_t rows_step(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    return kernels->gemm[weight->precision].rows * (gd_cpu_filtered(kernels, weight) ? FILTER_OUTPUTS : 1);
}

/* Output rows of a block. */
static int64_t block_rows(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    const int64_t step = rows_step(kernels, weight);
    int64_t rows = GEMM_ROWS / step * step;
    while (rows > step && block_bytes(kernels, weight, rows) > BLOCK_BYTES)
        rows -= step;
    return rows;
}

/* Bytes of scratch that a task takes: a block's rows as products take them. */
static int64_t linear_scratch(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    if (weight->precision != GD_FLOAT32)
        return block_bytes(kernels, weight, block_rows(kernels, weight));
    if (gd_cpu_filtered(kernels, weight))
        return FILTER_POINTS * FILTER_GROUPS * gd_row_stride(weight->in) * (int64_t)sizeof(float);
    return 0;
}

struct linear_job {
    gd_context *context;
    const struct gd_kernels *kernels;
    const struct gd_linear *linear;
    struct grid grid;
};

static void linear_task(void *argument, int64_t index, int slot)
{
    const struct linear_job *job = argument;
    const struct gd_linear *l = job->linear;
    const struct gd_weight *w = l->weight;
    const int64_t nr = job->kernels->gemm_cols, depth = gd_packed_depth(job->kernels, w), step = w->stride * l->ldx;
    const int64_t block = block_rows(job->kernels, w);
    const int filtered = gd_cpu_filtered(job->kernels, w);
    struct area area = area_of(&job->grid, index, l->rows, rows_step(job->kernels, w));
    void *scratch = gd_cpu_scratch(job->context, (size_t)linear_scratch(job->kernels, w));
    struct gd_points points = {scratch, gd_row_stride(w->in), FILTER_GROUPS * gd_row_stride(w->in)};
    (void)slot;
    for (int64_t r = area.row; r < area.row_end; r += block) {
        struct gd_panel panel = {
            .rows = gd_smaller(area.row_end - r, block),
            .taps = w->taps,
            .in = w->in,
            .gemm = &job->kernels->gemm[w->precision],
            .x = l->x + r * step,
            .step = step,
            .tap_stride = l->ldx,
            .activation = l->activation,
            .ldresidual = l->ldresidual,
            .ldpre = l->ldpre,
            .ldy = l->ldy,
        };
        if (w->precision != GD_FLOAT32) {
            gd_reduced_round(job->kernels, l, r, panel.rows, scratch, &panel, &points);
        } else if (filtered) {
            job->kernels->filter_input(panel.rows, w->in, panel.x, l->ldx, points, NULL);
            panel.x += l->ldx;
        }
        for (int64_t p = area.panel; p < area.panel_end; p++) {
            const int64_t n = p * nr;
            panel.cols = (int)gd_smaller(w->out - n, nr);
            panel.b = (const float *)w->packed + n * depth;
            panel.bias = l->bias != NULL ? l->bias + n : NULL;
            panel.residual = l->residual != NULL ? l->residual + r * l->ldresidual + n : NULL;
            panel.pre = l->pre != NULL ? l->pre + r * l->ldpre + n : NULL;
            panel.y = l->y + r * l->ldy + n;
            if (filtered)
                job->kernels->filter_panel(&panel, points);
            else
                job->kernels->gemm_panel(&panel);
        }
    }
}

void gd_cpu_linear(gd_context *context, const struct gd_linear *linear)
{
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    const struct gd_weight *weight = linear->weight;
    struct linear_job job = {context, kernels, linear,
                             divide(context, linear->rows, weight->out, rows_step(kernels, weight))};
    if (!gd_refuses_activation(context, linear->activation))
        gd_cpu_run(context, job.grid.tasks_down * job.grid.tasks_across, linear_task, &job);
}

/* The most that linear_task() takes, in any precision. */
static int64_t most_linear_scratch(const struct gd_kernels *kernels, struct gd_weight weight)
{
    int64_t most = 0;
    for (weight.precision = GD_FLOAT32; weight.precision <= GD_INT8; weight.precision++) {
        const int64_t bytes = linear_scratch(kernels, &weight);
        most = bytes > most ? bytes : most;
    }
    return most;
}

size_t gd_cpu_gemm_scratch(const gd_context *context, const gd_config *config)
{
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    const int64_t widths[] = {
        config->encoder_embed_dim, config->encoder_ffn_embed_dim,
        config->conv_feature_layers[config->num_conv_layers > 0 ? config->num_conv_layers - 1 : 0].dim};
    int64_t most = GEMM_SCRATCH, bytes;
    for (int i = 0; i < config->num_conv_layers; i++) {
        const gd_conv_layer *conv = &config->conv_feature_layers[i];
        bytes = FILTER_POINTS * FILTER_GROUPS * gd_row_stride(conv->dim) * (int64_t)sizeof(float);
        most = bytes > most ? bytes : most;
        bytes = most_linear_scratch(kernels, (struct gd_weight){
            .taps = conv->kernel, .in = i > 0 ? conv[-1].dim : 1, .stride = conv->stride});
        most = bytes > most ? bytes : most;
    }
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        bytes = most_linear_scratch(kernels, (struct gd_weight){.taps = 1, .in = widths[i], .stride = 1});
        most = bytes > most ? bytes : most;
    }
    return (size_t)most;
}

struct gemm_job {
    gd_context *context;
    const struct gd_kernels *kernels;
    const struct gd_gemm *gemm;
    struct grid grid;
};

/* Points the panel at `rows` rows of A from r on and k elements from p on, packed where they are not words already. */
static void pack_rows(const struct gemm_job *job, int64_t r, int64_t rows, int64_t p, int64_t k, float *to,
                      struct gd_panel *panel)
{
    const struct gd_gemm *g = job->gemm;
    const struct gd_gemm_kernels *gemm = &job->kernels->gemm[g->precision];
    const float *a = g->a + r * g->a_row + p * g->a_col;
    panel->x = to;
    panel->step = panel->in;
    if (g->a_col != 1) {
        gemm->pack_a(k, rows, a, g->a_col, panel->in, to);
        panel->packed = 1;
    } else if (g->precision != GD_FLOAT32) {
        for (int64_t i = 0; i < rows; i++)
            gemm->convert(k, a + i * g->a_row, to + i * LDA);
        panel->step = LDA;
    } else {
        panel->x = a;
        panel->step = g->a_row;
    }
}

/* c[row .. row_end, n .. n + cols] += or = a[, p .. p + k] times packed b. */
static void gemm_block(const struct gemm_job *job, const struct area *area, int64_t n, int64_t cols, int64_t p,
                       int64_t k, const float *b, float *a_block)
{
    const struct gd_gemm *g = job->gemm;
    const struct gd_kernels *kernels = job->kernels;
    const struct gd_gemm_kernels *gemm = &kernels->gemm[g->precision];
    const int64_t words = gd_divide_up(k, gemm->elements);
    for (int64_t r = area->row; r < area->row_end; r += GEMM_ROWS) {
        struct gd_panel panel = {
            .rows = gd_smaller(area->row_end - r, GEMM_ROWS), .taps = 1, .in = words, .tap_stride = words,
            .gemm = gemm, .ldresidual = g->ldc, .ldy = g->ldc,
        };
        pack_rows(job, r, panel.rows, p, k, a_block, &panel);
        for (int64_t j = 0; j < cols; j += kernels->gemm_cols) {
            panel.cols = (int)gd_smaller(cols - j, kernels->gemm_cols);
            panel.b = b + j * words;
            panel.y = g->c + r * g->ldc + n + j;
            panel.residual = p > 0 || g->accumulate ? panel.y : NULL;
            kernels->gemm_panel(&panel);
        }
    }
}

static void gemm_task(void *argument, int64_t index, int slot)
{
    const struct gemm_job *job = argument;
    const struct gd_gemm *g = job->gemm;
    const struct gd_gemm_kernels *gemm = &job->kernels->gemm[g->precision];
    const int64_t nr = job->kernels->gemm_cols, block_k = BLOCK_K * gemm->elements;
    struct area area = area_of(&job->grid, index, g->m, gemm->rows);
    float *b_block = gd_cpu_scratch(job->context, GEMM_SCRATCH), *a_block = b_block + BLOCK_K * BLOCK_COLS;
    int64_t end = gd_smaller(g->n, area.panel_end * nr);
    (void)slot;
    for (int64_t n = area.panel * nr; n < end; n += BLOCK_COLS) {
        int64_t cols = gd_smaller(end - n, BLOCK_COLS);
        for (int64_t p = 0; p < g->k; p += block_k) {
            int64_t k = gd_smaller(g->k - p, block_k);
            gemm->pack_b(k, cols, g->b + p * g->b_row + n * g->b_col, g->b_row, g->b_col,
                         gd_divide_up(k, gemm->elements), b_block);
            gemm_block(job, &area, n, cols, p, k, b_block, a_block);
        }
    }
}

void gd_cpu_gemm(gd_context *context, const struct gd_gemm *gemm)
{
    if (gemm->k == 0) {
        for (int64_t i = 0; i < gemm->m && !gemm->accumulate; i++)
            memset(gemm->c + i * gemm->ldc, 0, (size_t)gemm->n * sizeof(float));
        return;
    }
    const struct gd_kernels *kernels = gd_cpu_kernels(context);
    struct gemm_job job = {context, kernels, gemm,
                           divide(context, gemm->m, gemm->n, kernels->gemm[gemm->precision].rows)};
    gd_cpu_run(context, job.grid.tasks_down * job.grid.tasks_across, gemm_task, &job);
}

#define BIAS_COLS 64

struct bias_job {
    const struct gd_kernels *kernels;
    int64_t rows, width, lddy;
    const float *dy;
    float *dbias;
};

static void bias_task(void *argument, int64_t index, int slot)
{
    const struct bias_job *job = argument;
    int64_t c = index * BIAS_COLS;
    (void)slot;
    job->kernels->gemm_column_sums(job->rows, gd_smaller(job->width - c, BIAS_COLS), job->dy + c, job->lddy,
                                   job->dbias + c);
}

void gd_cpu_bias_backward(gd_context *context, int64_t rows, int64_t width, const float *dy, int64_t lddy, float *dbias)
{
    struct bias_job job = {gd_cpu_kernels(context), rows, width, lddy, dy, dbias};
    gd_cpu_run(context, gd_divide_up(width, BIAS_COLS), bias_task, &job);
}
