/* linear.c - the linear layer, sums, activation and dropout over rows, as the stages use them. */
#include "stages.h"

void gd_linear_forward(gd_workspace *ws, struct gd_tile tile, gd_mat x, const struct gd_weight *weight,
                       const float *bias, enum gd_activation activation, const gd_mat *residual, const gd_mat *pre,
                       gd_mat y)
{
    gd_context *context = ws->model->context;
    context->backend->linear(context, &(struct gd_linear){
        .rows = tile.count, .weight = weight, .x = x.data, .ldx = x.ld, .bias = bias, .activation = activation,
        .residual = residual ? residual->data : NULL, .ldresidual = residual ? residual->ld : 0,
        .pre = pre ? pre->data : NULL, .ldpre = pre ? pre->ld : 0,
        .y = y.data, .ldy = y.ld,
    });
}

void gd_linear_backward(gd_workspace *ws, struct gd_tile tile, int64_t out, int64_t in, gd_mat x, gd_mat dy,
                        const float *weight, gd_mat dx, int accumulate, float *dweight, float *dbias)
{
    gd_context *context = ws->model->context;
    const struct gd_backend *backend = context->backend;
    backend->gemm(context, &(struct gd_gemm){
        .m = out, .n = in, .k = tile.count, .a = dy.data, .a_row = 1, .a_col = dy.ld,
        .b = x.data, .b_row = x.ld, .b_col = 1, .c = dweight, .ldc = in, .accumulate = 1, .precision = ws->precision,
    });
    backend->bias_backward(context, tile.count, out, dy.data, dy.ld, dbias);
    backend->gemm(context, &(struct gd_gemm){
        .m = tile.count, .n = in, .k = out, .a = dy.data, .a_row = dy.ld, .a_col = 1,
        .b = weight, .b_row = in, .b_col = 1, .c = dx.data, .ldc = dx.ld, .accumulate = accumulate,
        .precision = ws->precision,
    });
}

void gd_copy_rows(gd_workspace *ws, int64_t width, float scale, gd_mat x, gd_mat y)
{
    gd_context *context = ws->model->context;
    context->backend->axpby(context, ws->rows.total, width, scale, x.data, x.ld, 0, y.data, y.ld);
}

void gd_add_rows(gd_workspace *ws, struct gd_tile tile, int64_t width, gd_mat x, gd_mat y)
{
    gd_context *context = ws->model->context;
    context->backend->axpby(context, tile.count, width, 1, x.data, x.ld, 1, y.data, y.ld);
}

void gd_activate(gd_workspace *ws, int64_t rows, int64_t width, gd_mat z, gd_mat y)
{
    gd_context *context = ws->model->context;
    context->backend->activate(context, GD_ACTIVATION, rows, width, z.data, z.ld, y.data, y.ld);
}

void gd_activate_backward(gd_workspace *ws, int64_t rows, int64_t width, gd_mat z, gd_mat dy, gd_mat dz)
{
    gd_context *context = ws->model->context;
    context->backend->activate_backward(context, GD_ACTIVATION, rows, width, z.data, z.ld, dy.data, dy.ld, dz.data,
                                        dz.ld);
}

int gd_dropout_active(const gd_workspace *ws, double p) { return ws->dropout && p > 0; }

void gd_dropout_apply(gd_workspace *ws, struct gd_tile tile, int64_t width, gd_mat x, double p,
                      enum gd_dropout_site site, int step)
{
    gd_context *context = ws->model->context;
    if (gd_dropout_active(ws, p))
        context->backend->dropout(context, &ws->rows, tile.first, tile.count, width, x.data, x.ld, p, ws->dropout,
                                  gd_dropout_place(site, step));
}
