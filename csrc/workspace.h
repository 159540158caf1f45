/*
 * workspace.h - inside of gd_workspace: what a batch's shape fixes, and every matrix of a pass. plan.c makes it,
 * layout.c gives each matrix its place, the stages read and write them.
 */
#ifndef GD_WORKSPACE_H
#define GD_WORKSPACE_H

#include "model.h"

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
    int64_t *arrays; /* rows.first, rows.valid, sample_first, tiles.first, lengths: (batch + 1) each */
    int64_t arrays_batch;
    int64_t *sample_first; /* (batch + 1) into audio */
    int64_t *lengths;      /* (batch) samples, without the padding to the longest that S3PRL's has */
    int has_statistics;
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
    gd_mat targets[GD_MAX_TARGETS]; /* the teacher's layers as ragged rows */
    gd_mat fc1, hidden;             /* of GD_PART_ROWS: every step's, and computed again by its backward */

    /* Gradients in flight, by the stage that they are of; (rows, D) but for what a comment says. */
    gd_mat dstates[1 + 2 * GD_MAX_TARGETS]; /* by each hidden state; used up */
    gd_mat dinput; /* by the block's input, where that is no state: h[0] = position(f), z = position(h[l-1]), or a
                      detached history, whose gradient nothing reads */
    gd_mat dout;                 /* by the block's output */
    gd_mat dhidden, dheads;      /* head.c: O's inner layer, from its part's first row on; (rows, targets * D) */
    gd_mat dresidual, dbranch;   /* block.c: along the residual connections; a copy that a branch uses up */
    gd_mat dfc1;                 /* (GD_PART_ROWS, F) */
    gd_mat dcontext, dq, dk, dv; /* attention.c */
    float *dgate, *dbias;        /* as gate and bias */
    float *pos_conv_weight, *dpos_conv_weight; /* prenet.c: (D, D / groups, kernel), normed; the gradient by it */
    void *pos_conv_transposed;                 /* packed from it */
    gd_mat dcnn;                               /* extractor.c: (rows, C) */

    double *terms;     /* scratch of the loss: see gd_loss_rows() */
    float *flat_grads; /* (num_params), where memory is not shared */

    /* Of the call in progress. */
    const gd_dropout_seed *dropout;
    int given_moments; /* moments hold those of the utterances that the batch has windows of */
};

/* Assigns the pointers of a planned workspace into `memory`, or with NULL only measures. Returns the bytes. */
size_t gd_workspace_lay_out(gd_workspace *ws, void *memory);

/* Hidden state s of gd_forward()'s list. In inference it holds only until the next step. */
static inline gd_mat gd_workspace_state(const gd_workspace *ws, int s)
{
    if (s > ws->num_layers)
        return ws->predictions[s - ws->num_layers - 1];
    if (s > 0)
        return ws->steps[s - 1].out;
    return ws->model->config.architecture == GD_ENCODER ? ws->position.out : ws->f;
}

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

/* Copies the batch's audio in and makes the workspace's scratch the context's. GD_EINVAL, with nothing done, where the
 * batch, the number of threads or the packed weights' precision are not those planned for. */
gd_status gd_workspace_begin(gd_workspace *ws, const gd_batch *batch, const gd_dropout_seed *dropout);

#endif
