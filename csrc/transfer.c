/*
 * transfer.c - between the caller's arrays, which are the host's, and the device's: hidden states and the gradient.
 * Where memory is shared, nothing is copied that need not be.
 */
#include "stages.h"

static size_t padded_bytes(const gd_workspace *ws)
{
    return (size_t)(ws->rows.batch * ws->rows.longest * ws->model->config.encoder_embed_dim) * sizeof(float);
}

void gd_state_out(gd_workspace *ws, gd_mat state, float *padded)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    float *to = backend->shares_memory ? padded : ws->padded;
    backend->scatter_rows(context, &ws->rows, ws->model->config.encoder_embed_dim, state.data, state.ld,
                          ws->rows.longest, to);
    if (to != padded)
        backend->download(context, padded, to, padded_bytes(ws));
}

void gd_state_in(gd_workspace *ws, const float *padded, gd_mat state)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    const float *from = backend->shares_memory ? padded : ws->padded;
    if (from != padded)
        backend->upload(context, ws->padded, padded, padded_bytes(ws));
    backend->gather_rows(context, &ws->rows, ws->model->config.encoder_embed_dim, from, ws->rows.longest, state.data,
                         state.ld);
}

void gd_gradient_in(gd_workspace *ws, float *grads)
{
    gd_model *model = ws->model;
    const struct gd_backend *backend = model->context->backend;
    float *to = backend->shares_memory ? grads : ws->flat_grads;
    if (to != grads)
        backend->upload(model->context, to, grads, model->num_params * sizeof(float));
    gd_params_bind(model, to, &ws->grads);
}

void gd_gradient_out(gd_workspace *ws, float *grads)
{
    gd_model *model = ws->model;
    const struct gd_backend *backend = model->context->backend;
    if (!backend->shares_memory)
        backend->download(model->context, grads, ws->flat_grads, model->num_params * sizeof(float));
}
