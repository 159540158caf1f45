/*
 * model.h - inside of gd_model and gd_workspace, and the stages that work on them.
 */
#ifndef GD_MODEL_H
#define GD_MODEL_H

#include "backend.h"

#define GD_LAYER_NORM_EPS 1e-5f

/* ---- Parameters ----------------------------------------------------------------------------------- */

/* Pointers into a flat buffer of parameters or of gradients; NULL where the config has no such tensor. */
struct gd_attention_params {
    float *q_weight, *q_bias, *k_weight, *k_bias, *v_weight, *v_bias, *out_weight, *out_bias;
};

struct gd_conv_params {
    float *weight, *bias, *group_norm_weight, *group_norm_bias, *layer_norm_weight, *layer_norm_bias;
};

struct gd_layer_params {
    struct gd_attention_params self_attn, cross_attn;
    float *grep_weight, *grep_bias, *grep_a, *relative_attention_bias;
    float *self_attn_norm_weight, *self_attn_norm_bias, *cross_attn_norm_weight, *cross_attn_norm_bias;
    float *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias, *final_norm_weight, *final_norm_bias;
};

struct gd_params {
    struct gd_conv_params conv[GD_MAX_CONV_LAYERS];
    float *layer_norm_weight, *layer_norm_bias, *proj_weight, *proj_bias;
    float *pos_conv_g, *pos_conv_v, *pos_conv_bias, *encoder_norm_weight, *encoder_norm_bias;
    float *output0_weight, *output0_bias, *output2_weight, *output2_bias, *heads_weight, *heads_bias;
    struct gd_layer_params *layers; /* (encoder_layers) */
};

enum gd_init { GD_INIT_ZERO, GD_INIT_ONE, GD_INIT_NORMAL, GD_INIT_LINEAR,
              GD_INIT_KAIMING, GD_INIT_POS_CONV, GD_INIT_POS_CONV_G };

/* Where a tensor's pointer stands in struct gd_params: at `field` of the room's struct number `index`. */
struct gd_slot {
    enum { GD_IN_CONV, GD_IN_MODEL, GD_IN_LAYER } room;
    int index;
    size_t field;
    enum gd_init init;
};

/* Weights in linear()'s layout, rebuilt when the parameters change. */
struct gd_packed_attention {
    struct gd_weight q, k, v, out;
};

struct gd_packed_layer {
    struct gd_packed_attention self_attn, cross_attn;
    struct gd_weight fc1, fc2;
};

struct gd_packed {
    /* conv[0] is not packed with GroupNorm: it is folded for each utterance */
    struct gd_weight conv[GD_MAX_CONV_LAYERS];
    struct gd_weight proj, output0, output2, heads[GD_MAX_TARGETS];
    void *pos_conv;
    struct gd_packed_layer *layers;
};

struct gd_model {
    gd_context *context;
    gd_config config;
    int num_tensors;
    gd_tensor *tensors;
    struct gd_slot *slots; /* parallel to tensors */
    char *names;
    size_t num_params;
    float *values;            /* flat, on the host */
    struct gd_params host;    /* into values */
    float *device_values;     /* flat, on the device: values itself where memory is shared */
    struct gd_params params;  /* into device_values */
    enum gd_precision precision; /* of the checkpoint */
    void *packed_memory;
    size_t packed_size;
    struct gd_packed packed;
    int64_t version, packed_version; /* of values; of the packed weights */
    enum gd_precision packed_precision;
    double *statistics; /* gd_model_statistics() */
};

/* By enum gd_architecture, then NULL. */
extern const char *const gd_architecture_names[];

/* Generation steps or blocks that run; num_layers as in gd_workspace_plan(). */
int gd_num_steps(const gd_config *, int num_layers);

/* Calls visit() for each tensor of a valid config's model, in the order of the flat buffer; its name lives as long as
 * the call. */
typedef void gd_visit_tensor(void *argument, const gd_tensor *, const struct gd_slot *);
void gd_visit_tensors(const gd_config *, gd_visit_tensor *visit, void *argument);

/* Whether products that sum over `in` values are ever reduced to bfloat16 or int8. */
int gd_is_reduced(int64_t in);

/* How int8 checkpoints store tensor i: value e as int8 times scale[(e / outer) * inner + e % inner], `count` scales
 * of the shape that is given. count is 0 for tensors that stay float32. */
struct gd_channels {
    size_t count, outer, inner;
    int ndim;
    int64_t shape[2];
};
struct gd_channels gd_tensor_channels(const gd_model *model, int i);

/* Points `params` (and its layers array, encoder_layers long) into a flat buffer. */
void gd_params_bind(const gd_model *model, float *values, struct gd_params *params);

/* GD_EINVAL for statistics that no audio can have. */
gd_status gd_statistics_check(gd_context *, const gd_config *, const double *statistics);
/* Mean and variance of the samples; struct gd_moments' moments of conv 0's frames in normalised samples. */
const double *gd_statistics_normalize(const double *statistics);
void gd_statistics_moments(const gd_config *, const double *statistics, double *moments);

/* Uploads and packs the parameters if they, or the precision, changed since the last time. */
gd_status gd_model_pack(gd_model *model, enum gd_precision precision);

/* ---- Workspace ------------------------------------------------------------------------------------ */

/* Rows first .. first + count - 1. What works row by row walks through the rows in tiles, so that in inference what
 * stands between two matrices of all rows is no longer than a tile. In training it is kept: all rows are one tile. */
struct gd_tile {
    int64_t first, count;
};

/* A matrix of the workspace: a row a frame, `ld` floats from row to row. */
typedef struct gd_mat {
    float *data;
    int64_t ld;
} gd_mat;

/* What each stage leaves for its backward. In inference all steps share one set of buffers, and matrices
 * that are never needed at the same time are one buffer: see layout.c. */
struct gd_position_activations {
    gd_mat pre, sum, out; /* pos_conv before GELU; x + gelu(pre); after encoder_layer_norm */
    float *stats;         /* (rows, 2): mean, rstd */
};

struct gd_attention_activations {
    gd_mat q, k, v, context;
    float *gate, *lse; /* (rows, heads) */
};

struct gd_block_activations {
    struct gd_attention_activations self_attn, cross_attn;
    gd_mat normed;               /* layer_norm_first: what attention reads */
    gd_mat attn_sum, attn_out;   /* x + attention; after self_attn_layer_norm */
    gd_mat cross_sum, cross_out; /* likewise with cross-attention */
    gd_mat fc1_pre, fc1;         /* before and after GELU, (rows, F) */
    gd_mat ffn_sum, out;         /* x + fc2; F's output */
    float *attn_stats, *cross_stats, *ffn_stats;
};

struct gd_step_activations {
    struct gd_position_activations position; /* position every_step */
    struct gd_block_activations block;
    gd_mat input;                  /* what the step reads: h[l-1], or the teacher's */
    gd_mat hidden_pre, hidden;     /* O's inner layer before and after GELU */
    gd_mat out;                    /* h[l] */
};

/* The extractor's tile loop. */
struct gd_extractor_tiles {
    int64_t frames;      /* most output frames of a tile */
    int64_t *first;      /* (batch + 1): tiles before utterance b */
    gd_mat ping[2];      /* activations of even and odd layers, one set a slot */
    int64_t ping_size[2];
    float *pre;          /* where `kept` is: a layer before GELU, one a slot */
    int64_t pre_size;
};

/* What a convolution gave before GELU, in the workspace's precision: utterance b's rows from
 * sample_first[b] / stride + b on. */
struct gd_kept_rows {
    void *data;         /* float, or uint16_t of bfloat16's bits */
    int64_t ld, stride; /* in numbers; samples from row to row */
};

struct gd_extractor_gradients {
    int64_t frames;
    int keeps; /* the backward finds what all convolutions but conv 0 gave in `kept` */
    struct gd_kept_rows kept[GD_MAX_CONV_LAYERS];
    gd_mat raw[GD_MAX_CONV_LAYERS], pre[GD_MAX_CONV_LAYERS], act[GD_MAX_CONV_LAYERS], d[2];
    float *stats[GD_MAX_CONV_LAYERS];
    float *w_taps[GD_MAX_CONV_LAYERS], *dw_taps[GD_MAX_CONV_LAYERS], *scratch; /* of conv_backward() */
    float *g, *s; /* conv 0 with GroupNorm: see struct gd_norm_fold_backward */
};

enum gd_dropout_site {
    GD_SITE_ENCODER,
    GD_SITE_ATTENTION_PROBS,
    GD_SITE_ATTENTION,
    GD_SITE_ACTIVATION,
    GD_SITE_FFN,
    GD_SITE_CROSS_PROBS,
    GD_SITE_CROSS,
};

/* Each site has a mask of its own at each of so many generation steps. */
#define GD_DROPOUT_STEPS 32

static inline uint32_t gd_dropout_place(enum gd_dropout_site site, int step)
{
    return (uint32_t)site * GD_DROPOUT_STEPS + (uint32_t)step;
}

struct gd_workspace {
    gd_model *model;
    int planned, num_threads, training, num_layers, num_states;
    enum gd_precision precision;
    struct gd_rows rows;
    int64_t tile_rows; /* most rows of a tile */
    int64_t *arrays; /* rows.first, rows.valid, sample_first, tiles.first: (batch + 1) each */
    int64_t arrays_batch;
    int64_t *sample_first; /* (batch + 1) into audio */
    void *arena;
    size_t arena_size;
    char *scratch;
    size_t scratch_stride;

    float *audio;                   /* ragged samples */
    double *moments;                /* (batch, kernel + kernel^2) */
    float *fold_weight, *fold_bias; /* conv 0 with its GroupNorm: (dim, kernel) scratch; (batch, dim) */
    struct gd_weight fold;          /* utterance b's is packed at fold_packed + b * fold_packed_size */
    char *fold_packed;
    size_t fold_packed_size;
    struct gd_extractor_tiles tiles;
    gd_mat cnn, cnn_normed, f;
    float *cnn_stats;
    struct gd_position_activations position; /* position once */
    float *bias;                             /* (heads, 2 longest - 1) */
    struct gd_step_activations *steps;       /* (num_layers) */
    int steps_capacity;
    float *padded; /* (batch, longest, D) of one state, where memory is not shared */
    gd_mat heads_pre, heads, predictions[GD_MAX_TARGETS]; /* multi_head */

    /* Training only. */
    struct gd_params grads; /* into the flat gradient of the call in progress */
    struct gd_extractor_gradients extractor;
    void *pos_conv_transposed;
    gd_mat targets[GD_MAX_TARGETS];              /* the teacher's layers as ragged rows */
    gd_mat dstates[1 + 2 * GD_MAX_TARGETS];      /* gradient of each hidden state */
    gd_mat fc1, hidden, dffn;                    /* of GD_PART_ROWS: every step's, and computed again by its backward */
    gd_mat d[7], dheads, dcnn;                   /* gradients in flight: widths D, targets * D, C */
    float *dgate, *dbias, *dpos_conv_weight;
    double *terms;     /* scratch of the loss: see gd_loss_rows() */
    float *flat_grads; /* (num_params), where memory is not shared */

    /* Of the call in progress. */
    const gd_dropout_seed *dropout;
    int given_moments; /* moments hold those of the utterances that the batch has windows of */
};

/* Assigns the pointers of a planned workspace into `memory`, or with NULL only measures. Returns the bytes. */
size_t gd_workspace_lay_out(gd_workspace *ws, void *memory);

/* Hidden state s of gd_forward()'s list. In inference it holds only until the next step. */
gd_mat gd_workspace_state(const gd_workspace *ws, int s);

/* The tile that begins at row `first`, empty at the end; all rows as one; a matrix from row `first` on. */
static inline struct gd_tile gd_tile_at(const gd_workspace *ws, int64_t first)
{
    const int64_t left = ws->rows.total - first;
    return (struct gd_tile){first, left < ws->tile_rows ? left : ws->tile_rows};
}

static inline struct gd_tile gd_all_rows(const gd_workspace *ws) { return (struct gd_tile){0, ws->rows.total}; }

/* What stands between the two layers of a feed-forward, the widest matrix, is no longer than this part of a tile, in
 * training too. It is a multiple of the chains that a weight's gradient is summed in, so that these don't depend on
 * it. */
#define GD_PART_ROWS 1024

/* The part of a tile that begins at its row r. */
static inline struct gd_tile gd_part_at(struct gd_tile tile, int64_t r)
{
    return (struct gd_tile){tile.first + r, tile.count - r < GD_PART_ROWS ? tile.count - r : GD_PART_ROWS};
}

static inline gd_mat gd_mat_at(gd_mat x, int64_t first) { return (gd_mat){x.data + first * x.ld, x.ld}; }

/* Copies the batch's audio in and makes the workspace's scratch the context's. */
gd_status gd_workspace_begin(gd_workspace *ws, const gd_batch *batch, const gd_dropout_seed *dropout);

/* ---- Stages, in the order in which data walks through them ------------------------------------------ */

/* The GELU between products of the workspace's precision. Training keeps to the one that its backward computes
 * again. */
static inline enum gd_activation gd_gelu_of(const gd_workspace *ws)
{
    return ws->precision == GD_FLOAT32 || ws->training ? GD_GELU : GD_GELU_REDUCED;
}

/* y = act(x W^T + bias) (+ residual) for a tile, at whose first rows the matrices are; pre and residual may be NULL. */
void gd_linear_forward(gd_workspace *, struct gd_tile, gd_mat x, const struct gd_weight *, const float *bias,
                       enum gd_activation, const gd_mat *residual, const gd_mat *pre, gd_mat y);
/* dw += dy^T x, dbias += sum dy, dx = or += dy W, likewise. */
void gd_linear_backward(gd_workspace *, struct gd_tile, int64_t out, int64_t in, gd_mat x, gd_mat dy,
                        const float *weight, gd_mat dx, int accumulate, float *dweight, float *dbias);
/* y = scale x for all rows; y += x for a tile's. */
void gd_copy_rows(gd_workspace *, int64_t width, float scale, gd_mat x, gd_mat y);
void gd_add_rows(gd_workspace *, struct gd_tile, int64_t width, gd_mat x, gd_mat y);
/* In-place dropout of a tile, and its backward: nothing in evaluation or at p = 0. */
int gd_dropout_active(const gd_workspace *, double p);
void gd_dropout_apply(gd_workspace *, struct gd_tile, int64_t width, gd_mat x, double p,
                      enum gd_dropout_site, int step);

/* A convolution's weight as products in this precision read it; conv 0's are float32. */
struct gd_weight gd_conv_weight(const gd_config *, int layer, enum gd_precision);
int64_t gd_extractor_alignment(const gd_config *);
int64_t gd_extractor_rows_below(const gd_config *, int layer, int64_t rows);
/* rows[i]: rows of convolution i that frames t0 .. t0 + frames - 1 of an utterance of `samples` are computed from. */
void gd_extractor_tile_rows(const gd_config *, int64_t samples, int64_t t0, int64_t frames, int64_t *rows);
void gd_extractor_forward(gd_workspace *);
void gd_extractor_backward(gd_workspace *, gd_mat dcnn);

void gd_prenet_forward(gd_workspace *);
void gd_prenet_backward(gd_workspace *, gd_mat df, gd_mat dcnn);
/* What packing looks at, and the padding. */
struct gd_pos_conv gd_pos_conv_shape(const gd_config *, enum gd_precision, int transposed);
void gd_position_forward(gd_workspace *, gd_mat x, struct gd_position_activations *, int step);
/* dx, if there is one, += ; dout is used up. */
void gd_position_backward(gd_workspace *, gd_mat x, const struct gd_position_activations *, int step, gd_mat dout,
                          gd_mat dx);

/* context = attention(q from x, k and v from source), with gate and bias where it isn't cross-attention. */
struct gd_attention_stage {
    int layer, step, cross;
    gd_mat x, source;
    struct gd_attention_activations *acts;
};
void gd_attention_forward(gd_workspace *, const struct gd_attention_stage *);
/* y = residual + out_proj(context) for a tile, at whose first row residual and y are. */
void gd_attention_join(gd_workspace *, const struct gd_attention_stage *, struct gd_tile, gd_mat residual, gd_mat y);
/* dx +=, dsource += (the same matrix in self-attention). */
void gd_attention_backward(gd_workspace *, const struct gd_attention_stage *, gd_mat dy, gd_mat dx, gd_mat dsource);

/* out = F(x), plus x where `skip` is 1. In inference out may be x. */
void gd_block_forward(gd_workspace *, int layer, int step, gd_mat x, int skip, struct gd_block_activations *);
/* dx +=, with cross-attention df +=; dout is used up. */
void gd_block_backward(gd_workspace *, int layer, int step, gd_mat x, struct gd_block_activations *, gd_mat dout,
                       gd_mat dx, gd_mat df);

/* h[l] = O(z), z the block's output plus h[l-1]. */
void gd_head_forward(gd_workspace *, struct gd_step_activations *);
/* dz written. */
void gd_head_backward(gd_workspace *, struct gd_step_activations *, gd_mat dout, gd_mat dz);

/* Between the caller's arrays on the host and the device: a state's ragged rows and its (B, T, D); the flat gradient,
 * which ws->grads then points into. */
void gd_state_out(gd_workspace *, gd_mat state, float *padded);
void gd_state_in(gd_workspace *, const float *padded, gd_mat state);
void gd_gradient_in(gd_workspace *, float *grads);
void gd_gradient_out(gd_workspace *, float *grads);

/* The loss over the rows of `layers` predictions; dpred written in counted rows, or NULL. terms: scratch,
 * (layers + longest, 3). */
void gd_loss_rows(gd_context *, int layers, int64_t dim, const struct gd_rows *,
                  const gd_mat *pred, const gd_mat *target, const gd_loss_options *, double *terms, gd_loss *,
                  const gd_mat *dpred);
/* Adds the feature penalty to the loss, and its gradient to dcnn, which is scaled by feature_grad_mult already. */
void gd_feature_penalty(gd_workspace *, const gd_loss_options *, gd_loss *);
void gd_feature_penalty_backward(gd_workspace *, const gd_loss_options *, gd_mat dcnn);

#endif
