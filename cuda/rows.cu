/*
 * rows.cu - what knows the utterances of a ragged batch: dropout, and rows to (B, T, width) and back. An utterance is
 * a launch: its place in the batch lies on the host.
 */
#include "../csrc/philox.h"
#include "kernel.cuh"

/* ---- Dropout -------------------------------------------------------------------------------------------- */

/* x[r, c] *= its factor, for the four columns that one counter serves. */
struct dropout {
    struct gd_dropout_row mask; /* of row 0 */
    int64_t width;
    float *x;
    int64_t ldx;

    __device__ void operator()(int64_t r, int64_t four) const
    {
        const uint32_t counter[4] = {(uint32_t)four, mask.frame + (uint32_t)r, mask.line, mask.site};
        uint32_t words[4];
        gd_philox(counter, mask.key, words);
        for (int i = 0; i < 4 && 4 * four + i < width; i++)
            x[r * ldx + 4 * four + i] *= words[i] >= mask.threshold ? mask.scale : 0.0f;
    }
};

void gd_cuda_dropout(gd_context *context, const struct gd_rows *rows, int64_t first, int64_t count, int64_t width,
                     float *x, int64_t ldx, double p, const gd_dropout_seed *seed, uint32_t site)
{
    struct gd_dropout_row mask = gd_dropout_row(p, seed, site);
    for (int64_t b = 0; b < rows->batch; b++) {
        const int64_t own = rows->first[b], end = rows->first[b + 1];
        const int64_t from = own > first ? own : first, to = end < first + count ? end : first + count;
        mask.frame = (uint32_t)(from - own);
        mask.line = (uint32_t)(seed->first_utterance + b);
        gd_for_elements(context, to - from, gd_divide_up(width, 4), dropout{mask, width, x + (from - first) * ldx, ldx},
                        "dropout");
    }
}

/* ---- (B, T, width) and back ----------------------------------------------------------------------------- */

/* Rows 0 .. count - 1 copied, those behind them zero. */
struct copy_rows {
    int64_t count;
    const float *from;
    int64_t ldfrom;
    float *to;
    int64_t ldto;

    __device__ void operator()(int64_t r, int64_t c) const
    {
        to[r * ldto + c] = r < count ? from[r * ldfrom + c] : 0.0f;
    }
};

void gd_cuda_scatter_rows(gd_context *context, const struct gd_rows *rows, int64_t width, const float *x, int64_t ldx,
                          int64_t frames_max, float *padded)
{
    for (int64_t b = 0; b < rows->batch; b++)
        gd_for_elements(context, frames_max, width,
                        copy_rows{rows->valid[b], x + rows->first[b] * ldx, ldx,
                                  padded + b * frames_max * width, width},
                        "scatter_rows");
}

void gd_cuda_gather_rows(gd_context *context, const struct gd_rows *rows, int64_t width, const float *padded,
                         int64_t frames_max, float *x, int64_t ldx)
{
    for (int64_t b = 0; b < rows->batch; b++)
        gd_for_elements(context, rows->first[b + 1] - rows->first[b], width,
                        copy_rows{frames_max, padded + b * frames_max * width, width, x + rows->first[b] * ldx, ldx},
                        "gather_rows");
}
