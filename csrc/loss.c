/*
 * loss.c - the distillation loss (the paper's section 3.2; S3PRL's pretrain/distiller compute_loss).
 *
 *     l1  = |h' - h|_1 / D  or  |h' - h|_2^2 / D,  cos = -log sigmoid(cosine_similarity(h', h))   for each layer, frame
 *     penalty = |cnn|_2^2 / C                                                                     for each frame
 *     loss = mean over layers of (l1 + lambda cos) + feat_pen_loss penalty, mean or sum over frames
 */
#include <stdlib.h>

#include "stages.h"

/* Rows of utterance b that count. */
static int64_t counted_rows(const struct gd_rows *rows, const gd_loss_options *options, int64_t b)
{
    return options->count_padding ? rows->first[b + 1] - rows->first[b] : rows->valid[b];
}

static int64_t all_counted_rows(const struct gd_rows *rows, const gd_loss_options *options)
{
    int64_t counted = 0;
    for (int64_t b = 0; b < rows->batch; b++)
        counted += counted_rows(rows, options, b);
    return counted;
}

/* What sums over the rows are multiplied by. */
static double reduction_scale(const struct gd_rows *rows, const gd_loss_options *options)
{
    return options->reduction_sum ? 1 : 1 / (double)all_counted_rows(rows, options);
}

void gd_loss_rows(gd_context *context, int layers, int64_t dim, const struct gd_rows *rows, const gd_mat *pred,
                  const gd_mat *target, const gd_loss_options *options, double *terms, gd_loss *loss,
                  const gd_mat *dpred)
{
    const double scale = reduction_scale(rows, options);
    double sums[GD_MAX_TARGETS][3] = {{0}}, *device_sums = terms;

    context->backend->zero(context, device_sums, (size_t)layers * sizeof *sums);
    for (int i = 0; i < layers; i++)
        for (int64_t b = 0; b < rows->batch; b++) {
            const int64_t row = rows->first[b];
            context->backend->loss_rows(context, &(struct gd_loss_rows){
                .rows = counted_rows(rows, options, b), .dim = dim,
                .pred = pred[i].data + row * pred[i].ld, .ldpred = pred[i].ld,
                .target = target[i].data + row * target[i].ld, .ldtarget = target[i].ld,
                .lam = (float)options->lam, .grad_scale = (float)(scale / layers), .squared = options->squared,
                .dpred = dpred ? dpred[i].data + row * dpred[i].ld : NULL, .lddpred = dpred ? dpred[i].ld : 0,
                .terms = terms + 3 * layers, .sums = device_sums + 3 * i,
            });
        }
    context->backend->download(context, sums, device_sums, (size_t)layers * sizeof *sums);
    *loss = (gd_loss){0};
    for (int i = 0; i < layers; i++) {
        loss->l1[i] = sums[i][0] * scale;
        loss->cos[i] = sums[i][1] * scale;
        loss->similarity[i] = sums[i][2] / (double)all_counted_rows(rows, options);
        loss->loss += (loss->l1[i] + options->lam * loss->cos[i]) / layers;
    }
}

static int64_t channels(const gd_config *c) { return c->conv_feature_layers[c->num_conv_layers - 1].dim; }

/* The squared distance of the extractor's rows from zero. dcnn, to which nothing has been written yet, lends a zero. */
void gd_feature_penalty(gd_workspace *ws, const gd_loss_options *options, gd_loss *loss)
{
    gd_context *context = ws->model->context;
    const int64_t C = channels(&ws->model->config);
    double sums[3] = {0}, *device_sums = ws->terms;
    context->backend->zero(context, device_sums, sizeof sums);
    context->backend->zero(context, ws->dcnn.data, (size_t)C * sizeof(float));
    for (int64_t b = 0; b < ws->rows.batch; b++)
        context->backend->loss_rows(context, &(struct gd_loss_rows){
            .rows = counted_rows(&ws->rows, options, b), .dim = C,
            .pred = ws->cnn.data + ws->rows.first[b] * ws->cnn.ld,
            .ldpred = ws->cnn.ld, .target = ws->dcnn.data, .squared = 1, .terms = ws->terms + 3, .sums = device_sums,
        });
    context->backend->download(context, sums, device_sums, sizeof sums);
    loss->feature_penalty = sums[0] * reduction_scale(&ws->rows, options);
    loss->loss += options->feat_pen_loss * loss->feature_penalty;
}

void gd_feature_penalty_backward(gd_workspace *ws, const gd_loss_options *options, gd_mat dcnn)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    const int64_t C = channels(c);
    const double slope = 2 * options->feat_pen_loss * reduction_scale(&ws->rows, options) / (double)C;
    if (options->feat_pen_loss == 0)
        return;
    for (int64_t b = 0; b < ws->rows.batch; b++) {
        const int64_t row = ws->rows.first[b];
        context->backend->axpby(context, counted_rows(&ws->rows, options, b), C, (float)(c->feature_grad_mult * slope),
                                ws->cnn.data + row * ws->cnn.ld, ws->cnn.ld, 1, dcnn.data + row * dcnn.ld, dcnn.ld);
    }
}

gd_status gd_distill_loss(gd_context *context, const float *pred, const float *target, int64_t layers, int64_t batch,
                          int64_t frames_max, int64_t dim, const int64_t *frames, const gd_loss_options *options,
                          gd_loss *loss, float *dpred)
{
    if (!context->backend->shares_memory)
        return gd_fail(context, GD_EUNSUPPORTED, "context: expected one on the CPU, where pred and target are");
    if (layers < 1 || layers > GD_MAX_TARGETS || batch < 1 || frames_max < 1 || dim < 1)
        return gd_fail(context, GD_EINVAL,
                       "pred: expected (1 to %d layers, batch, frames, dim), got (%lld, %lld, %lld, %lld)",
                       GD_MAX_TARGETS, (long long)layers, (long long)batch, (long long)frames_max, (long long)dim);
    for (int64_t b = 0; frames && b < batch; b++)
        if (frames[b] < 1 || frames[b] > frames_max)
            return gd_fail(context, GD_EINVAL, "frames: expected 1 to %lld, got %lld in utterance %lld",
                           (long long)frames_max, (long long)frames[b], (long long)b);
    int64_t *arrays = malloc((size_t)(2 * batch + 1) * sizeof *arrays);
    double *terms = malloc((size_t)(3 * (layers + frames_max)) * sizeof *terms);
    if (!arrays || !terms) {
        free(arrays);
        free(terms);
        return gd_fail(context, GD_ENOMEM, "out of memory for a loss over %lld frames", (long long)frames_max);
    }
    int64_t *first = arrays, *valid = arrays + batch + 1;
    for (int64_t b = 0; b < batch; b++) {
        first[b] = b * frames_max;
        valid[b] = frames ? frames[b] : frames_max;
    }
    first[batch] = batch * frames_max;
    const struct gd_rows rows = {.batch = batch, .total = batch * frames_max, .longest = frames_max, .first = first,
                                 .valid = valid};
    gd_mat p[GD_MAX_TARGETS], t[GD_MAX_TARGETS], d[GD_MAX_TARGETS];
    for (int64_t i = 0; i < layers; i++) {
        const int64_t offset = i * rows.total * dim;
        /* The operation reads pred and target only. */
        p[i] = (gd_mat){(float *)pred + offset, dim};
        t[i] = (gd_mat){(float *)target + offset, dim};
        d[i] = (gd_mat){dpred ? dpred + offset : NULL, dim};
    }
    if (dpred)
        context->backend->zero(context, dpred, (size_t)(layers * rows.total * dim) * sizeof(float));
    gd_loss_rows(context, (int)layers, dim, &rows, p, t, options, terms, loss, dpred ? d : NULL);
    free(arrays);
    free(terms);
    return context->backend->synchronize(context);
}
