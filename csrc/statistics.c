/*
 * statistics.c - what the extractor must know of a whole utterance, gathered piece by piece: struct gd_moments'
 * sums over the samples, for `normalize`, and over conv 0's frames, for GroupNorm.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "model.h"

enum { HEARD, SAMPLES, FRAMES = SAMPLES + 2 };

#define MOST_SAMPLES 0x1p53

size_t gd_statistics_size(const gd_config *config)
{
    const size_t kernel = (size_t)config->conv_feature_layers[0].kernel;
    return FRAMES + kernel * (1 + kernel);
}

static int64_t frames_in(const gd_conv_layer *conv, int64_t samples)
{
    return samples < conv->kernel ? 0 : (samples - conv->kernel) / conv->stride + 1;
}

gd_status gd_statistics_add(gd_model *model, const float *audio, int64_t count, double *statistics)
{
    gd_context *context = model->context;
    const gd_conv_layer *conv = &model->config.conv_feature_layers[0];
    if (!context->backend->shares_memory)
        return gd_fail(context, GD_EUNSUPPORTED, "statistics: expected a model on the CPU");
    if (!(statistics[HEARD] >= 0 && statistics[HEARD] < MOST_SAMPLES))
        return gd_fail(context, GD_EINVAL, "statistics: expected those of at most 2^53 samples, got %g",
                       statistics[HEARD]);
    if (count < 1)
        return gd_fail(context, GD_EINVAL, "audio: expected at least one sample, got %lld", (long long)count);
    const int64_t heard = (int64_t)statistics[HEARD], before = frames_in(conv, heard);
    const int64_t frames = frames_in(conv, heard + count) - before;
    context->backend->moments(context, &(struct gd_moments){
        .before = heard, .frames = count, .kernel = 1, .stride = 1, .x = audio, .moments = statistics + SAMPLES,
    });
    if (frames)
        context->backend->moments(context, &(struct gd_moments){
            .before = before, .frames = frames, .kernel = conv->kernel, .stride = conv->stride,
            .x = audio + (before * conv->stride - heard), .moments = statistics + FRAMES,
        });
    statistics[HEARD] = (double)(heard + count);
    return GD_OK;
}

gd_status gd_statistics_check(gd_context *context, const gd_config *config, const double *statistics)
{
    const int kernel = config->conv_feature_layers[0].kernel;
    const size_t size = gd_statistics_size(config);
    /* Rounding may leave a variance of silence a little below 0. */
    int good = statistics[HEARD] >= kernel && statistics[HEARD] < MOST_SAMPLES && statistics[SAMPLES + 1] > -1e-9;
    for (size_t i = 0; i < size; i++)
        good = good && isfinite(statistics[i]);
    if (!good)
        return gd_fail(context, GD_EINVAL, "statistics: expected those of at least %d samples of audio", kernel);
    return GD_OK;
}

const double *gd_statistics_normalize(const double *statistics) { return statistics + SAMPLES; }

void gd_statistics_moments(const gd_config *config, const double *statistics, double *moments)
{
    const int kernel = config->conv_feature_layers[0].kernel;
    const double scale = config->normalize ? 1 / sqrt(statistics[SAMPLES + 1] + config->normalize_eps) : 1;
    const double centre = config->normalize ? statistics[SAMPLES] : 0;
    for (int k = 0; k < kernel; k++)
        moments[k] = (statistics[FRAMES + k] - centre) * scale;
    for (int k = kernel; k < kernel * (1 + kernel); k++)
        moments[k] = statistics[FRAMES + k] * (scale * scale);
}

/* ---- A model's own ---------------------------------------------------------------------------------- */

const double *gd_model_statistics(const gd_model *model) { return model->statistics; }

gd_status gd_model_set_statistics(gd_model *model, const double *statistics)
{
    const size_t bytes = gd_statistics_size(&model->config) * sizeof(double);
    double *copy = NULL;
    if (statistics) {
        gd_status status = gd_statistics_check(model->context, &model->config, statistics);
        if (status != GD_OK)
            return status;
        copy = malloc(bytes);
        if (!copy)
            return gd_fail(model->context, GD_ENOMEM, "out of memory for %zu bytes of statistics", bytes);
        memcpy(copy, statistics, bytes);
    }
    free(model->statistics);
    model->statistics = copy;
    return GD_OK;
}
