/*
 * optimizer.c - AdamW on the flat buffers: clip by the global norm, then one pass over all parameters.
 *
 *     adamw        torch.optim.AdamW; decay on matrices and convolutions only
 *     adamw_s3prl  S3PRL's BertAdam; decay on every tensor whose name holds no "bias"
 *
 * With feature_grad_mult 0 the extractor is frozen: it has no gradient, and no decay either.
 */
#include <math.h>
#include <string.h>

#include "model.h"

static int decays(const gd_adamw *adamw, const gd_tensor *tensor)
{
    return adamw->s3prl ? strstr(tensor->name, "bias") == NULL : tensor->decay;
}

static int frozen(const gd_model *model, int tensor)
{
    return model->config.feature_grad_mult == 0 && model->slots[tensor].room == GD_IN_CONV;
}

static gd_status check(gd_context *context, const gd_adamw *a, double lr)
{
    const struct {
        const char *name;
        double value, high;
    } fields[] = {{"lr", lr, 1e30}, {"eps", a->eps, 1e30}, {"weight_decay", a->weight_decay, 1e30},
                  {"clip", a->clip, 1e30}, {"betas[0]", a->beta1, 1}, {"betas[1]", a->beta2, 1}};
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (!(fields[i].value >= 0 && fields[i].value < fields[i].high))
            return gd_fail(context, GD_EINVAL, "%s: expected at least 0 and below %g, got %g", fields[i].name,
                           fields[i].high, fields[i].value);
    return GD_OK;
}

gd_status gd_adamw_step(gd_model *model, gd_adamw *adamw, double lr, const float *grads, float *m, float *v,
                        double *norm)
{
    gd_context *context = model->context;
    gd_status status = check(context, adamw, lr);
    if (status != GD_OK)
        return status;
    gd_context *host = gd_context_host(context); /* where parameters, gradient and moments are */
    if (!host)
        return GD_ENOMEM;
    *norm = sqrt(host->backend->sum_squares(host, model->num_params, grads));
    if (!isfinite(*norm))
        return gd_fail(context, GD_EINVAL, "grads: expected finite numbers, got a norm of %g", *norm);

    struct gd_adamw_update update = {
        .lr = lr, .beta1 = adamw->beta1, .beta2 = adamw->beta2, .eps = adamw->eps, .step = adamw->step + 1,
        .s3prl = adamw->s3prl, .grad_scale = adamw->clip > 0 ? fmin(1, adamw->clip / (*norm + 1e-6)) : 1,
    };
    /* Neighbours that decay alike are one pass. The extractor's tensors come first. */
    int i = 0;
    while (i < model->num_tensors && frozen(model, i))
        i++;
    while (i < model->num_tensors) {
        const int decay = decays(adamw, &model->tensors[i]);
        const size_t start = model->tensors[i].offset;
        size_t end = start;
        for (; i < model->num_tensors && decays(adamw, &model->tensors[i]) == decay; i++)
            end = model->tensors[i].offset + model->tensors[i].size;
        update.count = end - start;
        update.p = model->values + start;
        update.m = m + start;
        update.v = v + start;
        update.g = grads + start;
        update.decay = decay ? (adamw->s3prl ? 0.01 : adamw->weight_decay) : 0;
        host->backend->adamw(host, &update);
    }
    adamw->step++;
    gd_model_touch(model);
    return GD_OK;
}
