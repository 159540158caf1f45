/*
 * gendistiller.h - GenDistiller (Gao et al., arXiv 2406.09444) in C.
 *
 *     f      = post_extract_proj(layer_norm(cnn(x)))              the feature embedding, (B, T, D)
 *     h[0]   = encoder_layer_norm(f + gelu(pos_conv(f)))
 *     h[l]   = O(F(h[l-1]) + h[l-1]),  l = 1..L                   equation 1; one block for all steps
 *     hidden_states = [f, h[1], ..., h[L]]
 *
 * Audio is mono float32 at 16 kHz. Sizes: B utterances, N samples, T frames, D width, L generated
 * layers, S hidden states. Arrays are C-contiguous and time-major, (B, T, D).
 *
 * Every function that can fail returns a gd_status; gd_context_message() then names the argument, what
 * was expected and what came. Nothing is written on failure. A context serves one call at a time; calls
 * on different contexts may run at once. Memory is allocated by the create, load and plan functions
 * only: gd_forward(), gd_backward(), gd_distill_step() and gd_adamw_step() allocate nothing.
 */
#ifndef GENDISTILLER_H
#define GENDISTILLER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of a library that is compiled with -fvisibility=hidden -DGD_EXPORT (make lib), what is declared here is all that it
 * exports. */
#ifdef GD_EXPORT
#pragma GCC visibility push(default)
#endif

#define GD_VERSION "0.1.0"

typedef enum gd_status {
    GD_OK = 0,
    GD_EINVAL,       /* an argument is wrong */
    GD_ENOMEM,       /* out of memory, host or device */
    GD_EIO,          /* the operating system refused: errno holds its reason */
    GD_EFORMAT,      /* a checkpoint is damaged or of another kind */
    GD_EDEVICE,      /* no such device, or it failed */
    GD_EUNSUPPORTED, /* a valid request that this build cannot serve */
} gd_status;

/* ---- Configuration: field for field the JSON in a checkpoint ------------------------------------ */

enum gd_architecture { GD_GENERATIVE, GD_SELF_HIDDEN, GD_MULTI_HEAD, GD_ENCODER };
enum gd_extractor_mode { GD_EXTRACTOR_DEFAULT, GD_EXTRACTOR_LAYER_NORM };
enum gd_position { GD_POSITION_ONCE, GD_POSITION_EVERY_STEP };
enum gd_padding { GD_PADDING_EXACT, GD_PADDING_S3PRL };

#define GD_MAX_CONV_LAYERS 16
#define GD_MAX_TARGETS 64
#define GD_MAX_SAMPLES ((int64_t)1 << 40) /* of a batch, and of a frame */
#define GD_MAX_PARAMS ((int64_t)1 << 36)

/* What matrix products multiply: float32, or what both factors are rounded to. Sums, norms, softmax and the first
 * convolution are float32 always. */
enum gd_precision { GD_FLOAT32, GD_BFLOAT16, GD_INT8 };

typedef struct gd_conv_layer {
    int dim, kernel, stride;
} gd_conv_layer;

typedef struct gd_config {
    int architecture;   /* enum gd_architecture */
    int extractor_mode; /* enum gd_extractor_mode */
    int num_conv_layers;
    gd_conv_layer conv_feature_layers[GD_MAX_CONV_LAYERS];
    int conv_bias;
    int feature_layer_norm;
    int feature_projection; /* post_extract_proj also where the extractor is as wide as the encoder */
    int encoder_layers;
    int encoder_embed_dim;
    int encoder_ffn_embed_dim;
    int encoder_attention_heads;
    int layer_norm_first;
    int conv_pos;
    int conv_pos_groups;
    int relative_position_embedding;
    int gru_rel_pos;
    int num_buckets;
    int max_distance;
    int normalize;
    double normalize_eps;
    double dropout;
    double attention_dropout;
    double activation_dropout;
    double feature_grad_mult;
    int skip_connection;
    int output_layer;
    int cross_attention;
    int position; /* enum gd_position */
    int num_targets;
    int target_layers[GD_MAX_TARGETS];
    int padding; /* enum gd_padding */
} gd_config;

/* Reads the JSON object of a checkpoint's metadata. All fields are optional; the defaults are the
 * `gendistiller` preset's. On failure `message` (size bytes) names the field. */
gd_status gd_config_from_json(const char *json, size_t length, gd_config *config, char *message, size_t size);

/* Writes the config as a JSON object, NUL-terminated; returns the length it has (as snprintf). */
size_t gd_config_to_json(const gd_config *config, char *json, size_t size);

/* Frames of an utterance of `samples` samples: t = (n - K) / stride + 1 for each convolution; 0 where
 * it is shorter than one frame. */
int64_t gd_num_frames(const gd_config *config, int64_t samples);

/* Samples of the shortest utterance that has a frame (400 for the presets), and from frame to frame (320). */
int64_t gd_min_samples(const gd_config *config);
int64_t gd_hop(const gd_config *config);

/* Hidden states that gd_forward() gives; num_layers as in gd_workspace_plan(). */
int gd_num_states(const gd_config *config, int num_layers);

/* Checks every field, and the fields against each other: GD_EINVAL, and `message` (size bytes) names the field. What
 * this lets pass has sizes that fit: at most GD_MAX_SAMPLES to a frame and from frame to frame, and GD_MAX_PARAMS. */
gd_status gd_config_validate(const gd_config *config, char *message, size_t size);


/* ---- Context: a device, its threads, the last message ------------------------------------------- */

typedef struct gd_context gd_context;

/* Cores that this process may keep busy, 1 or more: the processors that its thread may run on, or what the quotas of
 * its cgroups leave of them; shared among the LOCAL_WORLD_SIZE processes that torchrun starts (an environment
 * variable), unless they are bound to different processors. See cores.c. */
int gd_usable_cores(void);

/* device: "cpu", "cuda" or "cuda:N". num_threads: 0 for gd_usable_cores(). On failure *context is NULL and
 * `message` (size bytes, may be NULL) says why. */
gd_status gd_context_create(const char *device, int num_threads, gd_context **context, char *message, size_t size);
void gd_context_free(gd_context *context);
const char *gd_context_message(const gd_context *context);
int gd_context_num_threads(const gd_context *context);
gd_status gd_context_set_num_threads(gd_context *context, int num_threads);

/* Instruction sets that this process found and may use, best last, e.g. "generic avx2 avx512". */
const char *gd_cpu_features(void);

/* ---- Model: a config and its parameters ---------------------------------------------------------- */

typedef struct gd_model gd_model;

typedef struct gd_tensor {
    const char *name; /* checkpoint name, e.g. "encoder.layers.0.fc1.weight" */
    int ndim;
    int64_t shape[4];
    size_t offset; /* in floats, into the flat buffer */
    size_t size;   /* number of elements */
    int decay;     /* 1: a matrix or a convolution, subject to weight decay */
} gd_tensor;

/* What a valid config's model has, before any memory is taken for it: function() is called for each tensor in the order
 * of the flat buffer; the tensor lives as long as the call. */
typedef void gd_tensor_function(void *argument, const gd_tensor *tensor);
void gd_config_tensors(const gd_config *config, gd_tensor_function *function, void *argument);
int64_t gd_config_num_params(const gd_config *config);

/* All parameters zero. The context is borrowed and must outlive the model. */
gd_status gd_model_create(gd_context *context, const gd_config *config, gd_model **model);
void gd_model_free(gd_model *model);
const gd_config *gd_model_config(const gd_model *model);

/* Random initialisation, a function of the seed and each tensor's name alone. */
void gd_model_init(gd_model *model, uint64_t seed);

/* The parameters: one flat float32 buffer on the host, tensor after tensor. Whoever writes to it calls
 * gd_model_touch(): packed weights are then rebuilt by the next gd_workspace_plan(). */
float *gd_model_params(gd_model *model);
size_t gd_model_num_params(const gd_model *model);
const gd_tensor *gd_model_tensors(const gd_model *model, int *count);
void gd_model_touch(gd_model *model);

/* `.safetensors` with the config under metadata key "gendistiller". Writing goes to a temporary file
 * beside `path`, fsync, rename. dtype: "float32", "bfloat16", or "int8" for matrices and convolutions with a float32
 * scale for each output channel, the rest float32. */
gd_status gd_model_save(gd_model *model, const char *path, const char *dtype);
gd_status gd_model_load(gd_context *context, const char *path, gd_model **model);

/* What the model is meant to be run in, as its checkpoint says; GD_FLOAT32 at first. Only a default for callers. */
enum gd_precision gd_model_precision(const gd_model *model);
gd_status gd_model_set_precision(gd_model *model, enum gd_precision precision);
/* "float32", "bfloat16", "int8". */
const char *gd_precision_name(enum gd_precision precision);

/* ---- Forward -------------------------------------------------------------------------------------- */

typedef struct gd_batch {
    int64_t batch;
    const float *const *wavs; /* one pointer an utterance */
    const int64_t *lengths;   /* samples of each */
    /* NULL; or the statistics of longer utterances, of which these are windows: see below */
    const double *const *statistics;
} gd_batch;

/* Buffers for one shape of batch, planned once and kept for smaller ones. A model may have several. */
typedef struct gd_workspace gd_workspace;

gd_status gd_workspace_create(gd_model *model, gd_workspace **workspace);
void gd_workspace_free(gd_workspace *workspace);

/* Checks the batch and makes room for it, and brings packed weights up to date. num_layers: how many layers to
 * generate (generative) or blocks to run (encoder); 0 for all of the config's. training: keep what gd_backward()
 * needs; in GD_FLOAT32 or GD_BFLOAT16. CUDA has these two, the second from compute capability 8.0 on. A model's packed
 * weights are of one precision at a time: after a plan for another one, workspaces are planned anew. */
gd_status gd_workspace_plan(gd_workspace *workspace, const gd_batch *batch, int num_layers, int training,
                            enum gd_precision precision);

int gd_workspace_num_states(const gd_workspace *workspace);
int64_t gd_workspace_max_frames(const gd_workspace *workspace); /* T: the longest utterance's */
const int64_t *gd_workspace_frames(const gd_workspace *workspace); /* (B,) */
size_t gd_workspace_bytes(const gd_workspace *workspace); /* of its buffers on the device */

/* What a training step's dropout is drawn from: see philox.h. */
typedef struct gd_dropout_seed {
    uint64_t seed, step;
    int64_t first_utterance; /* of this batch in the whole batch */
} gd_dropout_seed;

/* hidden: S pointers to (B, T, D), any NULL; rows past an utterance's frames are written as zeros.
 * The batch is the one planned for. dropout: NULL in evaluation. */
gd_status gd_forward(gd_workspace *workspace, const gd_batch *batch, const gd_dropout_seed *dropout,
                     float *const *hidden);

/* Adds d loss / d params to `grads` (flat, gd_model_num_params() floats), given dhidden: S pointers to
 * d loss / d hidden (B, T, D), any NULL. Follows a gd_forward() of the same batch and dropout in a
 * workspace planned for training. */
gd_status gd_backward(gd_workspace *workspace, const gd_batch *batch, const gd_dropout_seed *dropout,
                      const float *const *dhidden, float *grads);

/* ---- Windows of long audio ------------------------------------------------------------------------ */

/* Two things in the extractor look at a whole utterance: GroupNorm, and `normalize` where it is on. With their
 * statistics given, a window that begins at a multiple of GD_WINDOW_ALIGNMENT frames has the very feature embedding
 * that these frames have in one pass, bit for bit where it reaches so many samples past its last frame as make no frame
 * more, or to the utterance's end. The positional convolution and attention see the window alone. Evaluation only,
 * padding "exact".
 *
 * Statistics are gd_statistics_size() doubles: samples heard, their mean and variance, then what frames of conv 0
 * have: kernel means, kernel x kernel covariances. */
#define GD_WINDOW_ALIGNMENT 4

size_t gd_statistics_size(const gd_config *config);

/* Adds `count` more samples, at `audio`, to statistics that are all zero at first. In front of them lie the samples
 * that were added last, as many as conv 0's kernel less one (9 for the presets), or all where there were less:
 * audio[-1] is read. */
gd_status gd_statistics_add(gd_model *model, const float *audio, int64_t count, double *statistics);

/* Statistics that a checkpoint has along with the model, for streams: NULL, or gd_statistics_size() doubles, which are
 * copied in. GD_EINVAL where they are not those of any audio. */
const double *gd_model_statistics(const gd_model *model);
gd_status gd_model_set_statistics(gd_model *model, const double *statistics);

/* ---- Distillation --------------------------------------------------------------------------------- */

typedef struct gd_loss_options {
    double lam;           /* weight of the cosine term; 1 */
    int reduction_sum;    /* 0: mean over all frames (S3PRL); 1: sum over utterances and frames (eq. 2) */
    int count_padding;    /* 1: padded frames count as in S3PRL */
    int teacher_history;  /* 1: step l > 1 reads targets[l - 2], the teacher's layer, instead of h[l - 1] */
    int detach_history;   /* 1: no gradient through h[l-1] into the step before */
    int squared;          /* 1: squared differences in place of absolute ones (S3PRL's loss_type l2) */
    double feat_pen_loss; /* weight of the feature penalty, in gd_distill_step() only; 0 */
} gd_loss_options;

/* Per layer and frame: l1 = |h' - h|_1 / D, or |h' - h|_2^2 / D where `squared`; cos = -log sigmoid(similarity); the
 * loss is the mean over layers of l1 + lam cos, reduced over frames; similarity is their mean over frames, always.
 * To the loss gd_distill_step() adds feat_pen_loss times the feature penalty: the mean over channels of the squares
 * of the convolutions' output, reduced over frames alike. */
typedef struct gd_loss {
    double loss;
    double l1[GD_MAX_TARGETS], cos[GD_MAX_TARGETS], similarity[GD_MAX_TARGETS];
    double feature_penalty; /* whatever its weight; 0 of gd_distill_loss() */
} gd_loss;

/* On a CPU's context. pred, target: (L, B, T, D); frames: (B,) or NULL for all T; dpred: (L, B, T, D) = d loss / d
 * pred, or NULL. Where count_padding is 0, frames past frames[b] neither count nor have a gradient. */
gd_status gd_distill_loss(gd_context *context, const float *pred, const float *target, int64_t layers,
                          int64_t batch, int64_t frames_max, int64_t dim, const int64_t *frames,
                          const gd_loss_options *options, gd_loss *loss, float *dpred);

/* Forward, loss against targets (L, B, T, D), backward: adds to grads (flat). The workspace is planned
 * for training with num_layers = L. */
gd_status gd_distill_step(gd_workspace *workspace, const gd_batch *batch, const float *targets,
                          const gd_loss_options *options, const gd_dropout_seed *dropout, gd_loss *loss,
                          float *grads);

/* ---- Optimiser ------------------------------------------------------------------------------------ */

typedef struct gd_adamw {
    double lr, beta1, beta2, eps, weight_decay;
    double clip;      /* largest global norm of the gradient; 0 for none */
    int s3prl;        /* 1: adamw_s3prl, S3PRL's BertAdam-like update */
    int64_t step;     /* updates made so far */
} gd_adamw;

/* One update of params from grads; m, v: flat moments, zero at first. `lr` is the rate of this step
 * (schedule applied). grads is not changed. *norm: the gradient's global norm before clipping. A gradient
 * that holds NaN or Inf is GD_EINVAL and changes nothing. With feature_grad_mult 0 the extractor is left as
 * it is. Calls gd_model_touch(). */
gd_status gd_adamw_step(gd_model *model, gd_adamw *adamw, double lr, const float *grads, float *m, float *v,
                        double *norm);

#ifdef GD_EXPORT
#pragma GCC visibility pop
#endif

#ifdef __cplusplus
}
#endif

/* See build_text.h. */
#ifdef GD_EMBED_HEADER
GD_EMBED_HEADER(__FILE__)
#endif

#endif
