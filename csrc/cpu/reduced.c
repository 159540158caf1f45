/*
 * reduced.c - the factors of products in bfloat16 and int8: rows when they are used, int8 weights when they are packed.
 *
 * A packed panel is (depth, columns) words, whose elements follow one another along K. With int8, the words of each
 * chain (GEMM_CHAIN) are followed by a row of their columns' sums, and the last of all by the columns' scales. A sum is
 * low + 128 high, as two int16: of at most 4 GEMM_CHAIN elements, high is below 2^10.
 */
#include "reduced.h"

#include <math.h>
#include <string.h>

#include "../int8.h"
#include "ops.h"

/* Rounded rows that one task keeps at a time: they and a panel's chains fit in a core's second cache. */
#define BLOCK_BYTES (480 * 1024)

static int64_t words_of(int elements, int64_t in)
{
    return (in + elements - 1) / elements;
}

/* Words of a row of the left factor. */
static int64_t row_words(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    const int64_t words = words_of(kernels->gemm[weight->precision].elements, weight->in);
    return words + (weight->precision == GD_INT8 ? (words + GEMM_CHAIN - 1) / GEMM_CHAIN * GEMM_INT8_WORDS : 0);
}

int64_t gd_reduced_depth(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    const int64_t words = words_of(kernels->gemm[weight->precision].elements, weight->in);
    const int64_t chains = (words + GEMM_CHAIN - 1) / GEMM_CHAIN;
    if (weight->precision == GD_INT8)
        return weight->taps * (words + chains) + 1;
    return gd_cpu_matrices(weight) * words;
}

static float channel_scale(const struct gd_panel_weights *from, int64_t c)
{
    float largest = 0, unfinite = 0;
    for (int64_t tap = 0; tap < from->weight->taps; tap++)
        for (int64_t k = 0; k < from->weight->in; k++) {
            const float w = from->w[c * from->w_out + tap * from->w_tap + k * from->w_in];
            largest = fabsf(w) > largest ? fabsf(w) : largest;
            unfinite += w * 0;
        }
    return isnan(unfinite) ? NAN : gd_int8_scale(largest);
}

void gd_reduced_pack_int8(const struct gd_kernels *kernels, const struct gd_panel_weights *from, void *to)
{
    enum { ELEMENTS = 4 };
    const struct gd_weight *weight = from->weight;
    const int64_t words = words_of(ELEMENTS, weight->in), width = from->width;
    memset(to, 0, (size_t)(gd_reduced_depth(kernels, weight) * width) * sizeof(float));
    for (int64_t c = 0; c < from->cols; c++) {
        const float scale = channel_scale(from, c), inverse = scale > 0 ? 1 / scale : 0;
        char *chain = (char *)to + c * ELEMENTS;
        for (int64_t tap = 0; tap < weight->taps; tap++)
            for (int64_t p = 0; p < words; p += GEMM_CHAIN) {
                const int64_t end = p + GEMM_CHAIN < words ? p + GEMM_CHAIN : words;
                const float *w = from->w + c * from->w_out + tap * from->w_tap + p * ELEMENTS * from->w_in;
                int32_t sum = 0;
                for (int64_t left = weight->in - p * ELEMENTS, word = p; word < end; word++, left -= ELEMENTS) {
                    int8_t q[ELEMENTS] = {0};
                    for (int e = 0; e < ELEMENTS && e < left; e++, w += from->w_in) {
                        q[e] = gd_int8_from_float(*w, inverse);
                        sum += q[e];
                    }
                    memcpy(chain, q, ELEMENTS);
                    chain += width * ELEMENTS;
                }
                const int32_t low = (sum & 127);
                const int16_t parts[2] = {(int16_t)low, (int16_t)((sum - low) / 128)};
                memcpy(chain, parts, sizeof parts);
                chain += width * ELEMENTS;
            }
        memcpy(chain, &scale, sizeof scale);
    }
}

/* Bytes of the rows of x that `rows` output rows read; or the filter's points, in float32 of one
 * group, and the odd rows. */
static int64_t block_bytes(const struct gd_kernels *kernels, const struct gd_weight *weight, int64_t rows)
{
    const int64_t groups = (rows + FILTER_OUTPUTS - 1) / FILTER_OUTPUTS;
    const int64_t row = gd_row_stride(row_words(kernels, weight)) * (int64_t)sizeof(float);
    if (gd_cpu_filtered(weight))
        return (FILTER_POINTS * groups + rows) * row + FILTER_POINTS * gd_row_stride(weight->in) * (int64_t)sizeof(float);
    return ((rows - 1) * weight->stride + weight->taps) * row;
}

int64_t gd_reduced_block_rows(const struct gd_kernels *kernels, const struct gd_weight *weight)
{
    const int64_t step = kernels->gemm_rows * (gd_cpu_filtered(weight) ? FILTER_OUTPUTS : 1);
    int64_t rows = GEMM_ROWS / step * step;
    while (rows > step && block_bytes(kernels, weight, rows) > BLOCK_BYTES)
        rows -= step;
    return rows;
}

static size_t scratch_of(const struct gd_kernels *kernels, struct gd_weight weight)
{
    int64_t most = 0;
    for (weight.precision = GD_BFLOAT16; weight.precision <= GD_INT8; weight.precision++) {
        const int64_t rows = gd_reduced_block_rows(kernels, &weight);
        const int64_t bytes = block_bytes(kernels, &weight, rows);
        most = bytes > most ? bytes : most;
    }
    return (size_t)most;
}

size_t gd_reduced_scratch(const struct gd_kernels *kernels, const gd_config *config)
{
    const int64_t widths[] = {config->encoder_embed_dim, config->encoder_ffn_embed_dim,
                              config->conv_feature_layers[config->num_conv_layers > 0 ? config->num_conv_layers - 1 : 0].dim};
    size_t most = 0;
    for (int i = 1; i < config->num_conv_layers; i++) {
        const gd_conv_layer *conv = &config->conv_feature_layers[i];
        const size_t bytes = scratch_of(kernels, (struct gd_weight){
            .taps = conv->kernel, .in = config->conv_feature_layers[i - 1].dim, .stride = conv->stride});
        most = bytes > most ? bytes : most;
    }
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        const size_t bytes = scratch_of(kernels, (struct gd_weight){.taps = 1, .in = widths[i], .stride = 1});
        most = bytes > most ? bytes : most;
    }
    return most;
}

static void round_filtered(const struct gd_kernels *kernels, const struct gd_weight *weight, const float *x, int64_t ldx,
                           float *scratch, struct gd_panel *panel, struct gd_points *points)
{
    const struct gd_gemm_kernels *gemm = &kernels->gemm[weight->precision];
    const int64_t words = words_of(gemm->elements, weight->in), ld = gd_row_stride(words);
    const int64_t groups = (panel->rows + FILTER_OUTPUTS - 1) / FILTER_OUTPUTS;
    const struct gd_points exact = {scratch, 0, gd_row_stride(weight->in)};
    float *to = scratch + FILTER_POINTS * exact.matrix, *odd = to + FILTER_POINTS * groups * ld;
    *points = (struct gd_points){to, ld, groups * ld};
    for (int64_t g = 0; g < groups; g++) {
        const int64_t left = panel->rows - g * FILTER_OUTPUTS;
        kernels->filter_input(left < FILTER_OUTPUTS ? left : FILTER_OUTPUTS, weight->in, x + g * FILTER_OUTPUTS * 2 * ldx, ldx,
                              exact);
        for (int i = 0; i < FILTER_POINTS; i++)
            gemm->convert(weight->in, scratch + i * exact.matrix, to + i * points->matrix + g * ld);
    }
    for (int64_t r = 0; r < panel->rows; r++)
        gemm->convert(weight->in, x + (2 * r + 1) * ldx, odd + r * ld);
    panel->tiles = gemm->tiles;
    panel->x = odd;
    panel->in = words;
    panel->step = ld;
}

void gd_reduced_round(const struct gd_kernels *kernels, const struct gd_linear *linear, int64_t row, int64_t rows,
                      void *scratch, struct gd_panel *panel, struct gd_points *points)
{
    const struct gd_weight *weight = linear->weight;
    const struct gd_gemm_kernels *gemm = &kernels->gemm[weight->precision];
    const int64_t ld = gd_row_stride(row_words(kernels, weight));
    if (gd_cpu_filtered(weight)) {
        round_filtered(kernels, weight, linear->x + row * weight->stride * linear->ldx, linear->ldx, scratch, panel, points);
        return;
    }
    const int64_t count = (rows - 1) * weight->stride + weight->taps;
    float *to = scratch;
    for (int64_t r = 0; r < count; r++)
        gemm->convert(weight->in, linear->x + (row * weight->stride + r) * linear->ldx, to + r * ld);
    panel->tiles = gemm->tiles;
    panel->x = to;
    panel->in = words_of(gemm->elements, weight->in);
    panel->step = weight->stride * ld;
    panel->tap_stride = ld;
    panel->int8 = weight->precision == GD_INT8;
}
