/*
 * generate.c - the loop, and its reverse.
 *
 *     generative     h[l] = O(F(h[l-1]) + h[l-1]), one block for all l           states f, h[1] .. h[L]
 *     self_hidden    x[l] = F_l(x[l-1])                                          states f, x[1] .. x[L]
 *     multi_head     likewise, then prediction i = W2_i gelu(W1 x[L])_i          states f, x[..], predictions
 *     encoder        likewise, without predictions                               states x[0] .. x[L]
 *
 * With position every_step the block reads z = position(h[l-1]) in place of h[l-1], and h[0] is f.
 */
#include "stages.h"

static int layer_of(const gd_workspace *ws, int step)
{
    return ws->model->config.architecture == GD_GENERATIVE ? 0 : step - 1;
}

static int skips(const gd_config *c) { return c->architecture == GD_GENERATIVE && c->skip_connection; }

/* ---- Forward ---------------------------------------------------------------------------------------- */

/* Called as soon as state s stands in its buffer. */
static void emit(gd_workspace *ws, int s, float *const *hidden)
{
    if (hidden && hidden[s])
        gd_state_out(ws, gd_workspace_state(ws, s), hidden[s]);
}

/* A pre-norm encoder's last block is followed by the encoder's own LayerNorm, in place. */
static void final_norm(gd_workspace *ws, gd_mat x)
{
    const gd_model *model = ws->model;
    model->context->backend->layer_norm(model->context, &(struct gd_layer_norm){
        .rows = ws->rows.total, .width = model->config.encoder_embed_dim, .eps = GD_LAYER_NORM_EPS,
        .x = x.data, .ldx = x.ld, .y = x.data, .ldy = x.ld,
        .gamma = model->params.encoder_norm_weight, .beta = model->params.encoder_norm_bias,
    });
}

/* teacher_history: step l > 1 reads targets[l-2], the teacher's layer l-1. */
static void run_forward(gd_workspace *ws, int teacher_history, float *const *hidden)
{
    const gd_model *model = ws->model;
    const gd_config *c = &model->config;
    gd_extractor_forward(ws);
    gd_prenet_forward(ws);
    if (model->params.layers[0].relative_attention_bias)
        model->context->backend->position_bias(model->context, c, ws->rows.longest,
                                               model->params.layers[0].relative_attention_bias, ws->bias);
    if (c->position == GD_POSITION_ONCE)
        gd_position_forward(ws, ws->f, &ws->position, 0);
    emit(ws, 0, hidden);

    gd_mat h = c->position == GD_POSITION_ONCE ? ws->position.out : ws->f;
    for (int l = 1; l <= ws->num_layers; l++) {
        struct gd_step_activations *a = &ws->steps[l - 1];
        a->input = teacher_history && l > 1 ? ws->targets[l - 2] : h;
        gd_mat x = a->input;
        if (c->position == GD_POSITION_EVERY_STEP) {
            gd_position_forward(ws, a->input, &a->position, l);
            x = a->position.out;
        }
        gd_block_forward(ws, layer_of(ws, l), l, x, skips(c), &a->block);
        gd_head_forward(ws, a);
        h = a->out;
        if (c->layer_norm_first && l == c->encoder_layers)
            final_norm(ws, h);
        emit(ws, l, hidden);
    }
    if (c->architecture == GD_MULTI_HEAD) {
        gd_heads_forward(ws, h);
        for (int i = 0; i < c->num_targets; i++) {
            gd_prediction_forward(ws, i);
            emit(ws, 1 + ws->num_layers + i, hidden);
        }
    }
}

gd_status gd_forward(gd_workspace *ws, const gd_batch *batch, const gd_dropout_seed *dropout, float *const *hidden)
{
    gd_status status = gd_workspace_begin(ws, batch, dropout);
    if (status != GD_OK)
        return status;
    run_forward(ws, 0, hidden);
    return ws->model->context->backend->synchronize(ws->model->context);
}

/* ---- Backward --------------------------------------------------------------------------------------- */

/* Back through the steps from dstates, the gradient by each state, which is used up. loss: the options of the loss
 * that they come from, or NULL. */
static void run_backward(gd_workspace *ws, const gd_loss_options *loss)
{
    const gd_model *model = ws->model;
    const struct gd_backend *backend = model->context->backend;
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim, H = c->encoder_attention_heads;
    const int every_step = c->position == GD_POSITION_EVERY_STEP;
    const gd_mat df = ws->dstates[0];
    /* No gradient through step l's input into step l-1. */
    const int detached = loss && (loss->detach_history || loss->teacher_history);

    backend->zero(model->context, ws->dbias, (size_t)(H * (2 * ws->rows.longest - 1)) * sizeof(float));
    gd_position_prepare_backward(ws);
    if (c->architecture == GD_MULTI_HEAD)
        gd_heads_backward(ws, gd_workspace_state(ws, ws->num_layers), ws->dstates + 1 + ws->num_layers,
                          ws->dstates[ws->num_layers]);
    for (int l = ws->num_layers; l >= 1; l--) {
        struct gd_step_activations *a = &ws->steps[l - 1];
        gd_head_backward(ws, a, ws->dstates[l], ws->dout);

        /* The block's input is a state, h[l-1], whose gradient this one joins; or it is none. */
        const int joins = l > 1 && !detached && !every_step;
        const gd_mat dx = joins ? ws->dstates[l - 1] : ws->dinput;
        if (!joins)
            gd_copy_rows(ws, D, 0, ws->dout, dx);
        if (skips(c))
            gd_add_rows(ws, gd_all_rows(ws), D, ws->dout, dx);
        const gd_mat x = every_step ? a->position.out : a->input;
        gd_block_backward(ws, layer_of(ws, l), l, x, &a->block, ws->dout, dx, df);
        if (every_step) {
            /* A detached input has no gradient, but the positional convolution has its own. */
            const gd_mat dh = l > 1 && detached ? (gd_mat){NULL, 0} : ws->dstates[l - 1];
            gd_position_backward(ws, a->input, &a->position, l, dx, dh);
        }
    }
    if (!every_step)
        gd_position_backward(ws, ws->f, &ws->position, 0, ws->dinput, df);
    if (ws->grads.layers[0].relative_attention_bias)
        backend->position_bias_backward(model->context, c, ws->rows.longest, ws->dbias,
                                        ws->grads.layers[0].relative_attention_bias);
    gd_prenet_backward(ws, df, ws->dcnn);
    if (loss)
        gd_feature_penalty_backward(ws, loss, ws->dcnn);
    if (c->feature_grad_mult > 0)
        gd_extractor_backward(ws, ws->dcnn);
}

static gd_status check_training(gd_workspace *ws)
{
    if (!ws->training)
        return gd_fail(ws->model->context, GD_EINVAL, "workspace: expected one planned for training");
    return GD_OK;
}

gd_status gd_backward(gd_workspace *ws, const gd_batch *batch, const gd_dropout_seed *dropout,
                      const float *const *dhidden, float *grads)
{
    gd_context *context = ws->model->context;
    gd_status status = check_training(ws);
    if (status == GD_OK)
        status = gd_workspace_begin(ws, batch, dropout);
    if (status != GD_OK)
        return status;
    gd_gradient_in(ws, grads);
    for (int s = 0; s < ws->num_states; s++) {
        const gd_mat d = ws->dstates[s];
        if (dhidden[s])
            gd_state_in(ws, dhidden[s], d);
        else
            context->backend->zero(context, d.data, (size_t)(ws->rows.total * d.ld) * sizeof(float));
    }
    run_backward(ws, NULL);
    gd_gradient_out(ws, grads);
    return context->backend->synchronize(context);
}

/* ---- Distillation ----------------------------------------------------------------------------------- */

static gd_status check_step(gd_workspace *ws, const gd_loss_options *options)
{
    gd_context *context = ws->model->context;
    const gd_config *c = &ws->model->config;
    gd_status status = check_training(ws);
    if (status != GD_OK)
        return status;
    if (options->teacher_history && c->architecture != GD_GENERATIVE)
        return gd_fail(context, GD_EINVAL, "history: expected \"free\" but for architecture \"generative\"");
    if (options->count_padding && c->padding == GD_PADDING_EXACT && ws->rows.total != ws->rows.batch * ws->rows.longest)
        return gd_fail(context, GD_EINVAL,
                       "mask_padding: expected True with padding \"exact\", which has no padded frames to count");
    return GD_OK;
}

gd_status gd_distill_step(gd_workspace *ws, const gd_batch *batch, const float *targets, const gd_loss_options *options,
                          const gd_dropout_seed *dropout, gd_loss *loss, float *grads)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    const int64_t D = ws->model->config.encoder_embed_dim, rows = ws->rows.total;
    gd_status status = check_step(ws, options);
    if (status == GD_OK)
        status = gd_workspace_begin(ws, batch, dropout);
    if (status != GD_OK)
        return status;
    const int layers = ws->model->config.architecture == GD_GENERATIVE ? ws->num_layers : ws->model->config.num_targets;
    const int first = ws->num_states - layers; /* the predictions are the last states */
    gd_gradient_in(ws, grads);
    for (int i = 0; i < layers; i++)
        gd_state_in(ws, targets + i * ws->rows.batch * ws->rows.longest * D, ws->targets[i]);
    run_forward(ws, options->teacher_history, NULL);

    gd_mat predictions[GD_MAX_TARGETS];
    for (int s = 0; s < ws->num_states; s++)
        backend->zero(context, ws->dstates[s].data, (size_t)(rows * ws->dstates[s].ld) * sizeof(float));
    for (int i = 0; i < layers; i++)
        predictions[i] = gd_workspace_state(ws, first + i);
    gd_loss_rows(context, layers, D, &ws->rows, predictions, ws->targets, options, ws->terms, loss,
                 ws->dstates + first);
    gd_feature_penalty(ws, options, loss);
    run_backward(ws, options);
    gd_gradient_out(ws, grads);
    return backend->synchronize(context);
}
