/*
 * plan_test.c - plans of batches that no machine has memory for: refused by a message, never wrapped round to something
 * small. Prints "passed", or what went wrong and exits 1.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gendistiller.h"

#define TEN(d) #d "0, " #d "1, " #d "2, " #d "3, " #d "4, " #d "5, " #d "6, " #d "7, " #d "8, " #d "9, "

static const struct {
    const char *json;
    double bytes; /* that training keeps for a sample, at least */
} configs[] = {
    {"{}", 4},
    /* a frame every sample, as wide as a layer may be, of as many steps as there may be: 2^64 bytes and more */
    {"{\"conv_feature_layers\": [[65536, 2, 1]], \"encoder_embed_dim\": 64, "
     "\"encoder_ffn_embed_dim\": 65536, \"encoder_attention_heads\": 1, \"conv_pos\": 2, "
     "\"conv_pos_groups\": 1, \"target_layers\": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, "
     TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "60, 61, 62, 63]}", 64.0 * 65536 * 4},
    /* the longest frame, and the longest way to the next one */
    {"{\"conv_feature_layers\": [[4, 1024, 1024], [4, 1024, 1024], [4, 1024, 1024], [4, 1024, 1024]], "
     "\"encoder_embed_dim\": 8, \"encoder_ffn_embed_dim\": 8, \"encoder_attention_heads\": 1, \"conv_pos\": 2, "
     "\"conv_pos_groups\": 1, \"padding\": \"s3prl\"}", 4},
};

static void fail(const char *what, const char *message)
{
    printf("%s: %s\n", what, message);
    exit(1);
}

/* batch utterances of `samples`. GD_OK is right only where so little memory would do. */
static void try_plan(gd_context *context, gd_model *model, double bytes, int64_t batch, int64_t samples, int training)
{
    gd_workspace *workspace;
    if (gd_workspace_create(model, &workspace) != GD_OK)
        fail("gd_workspace_create", gd_context_message(context));
    int64_t *lengths = malloc((size_t)batch * sizeof *lengths);
    for (int64_t b = 0; b < batch; b++)
        lengths[b] = samples;
    const gd_batch planned = {.batch = batch, .lengths = lengths};
    const gd_status status = gd_workspace_plan(workspace, &planned, 0, training, GD_FLOAT32);
    const double all = (double)batch * (double)samples;
    const char *message = gd_context_message(context);
    char what[100];
    snprintf(what, sizeof what, "%lld x %lld samples, training %d", (long long)batch, (long long)samples, training);
    if (status == GD_OK && (double)gd_workspace_bytes(workspace) < all * sizeof(float))
        fail(what, "planned in less memory than the audio takes");
    if (status == GD_EINVAL && strncmp(message, "wavs: ", 6) != 0 && strncmp(message, "lengths: ", 9) != 0)
        fail(what, message);
    size_t wanted;
    if (status == GD_ENOMEM && sscanf(message, "out of memory for a workspace of %zu bytes", &wanted) != 1)
        fail(what, message);
    /* What passes SIZE_MAX stays there. */
    const double least = all * (training ? bytes : sizeof(float));
    if (status == GD_ENOMEM && (double)wanted < 0.99 * (least < (double)SIZE_MAX ? least : (double)SIZE_MAX))
        fail(what, message);
    if (status != GD_OK && status != GD_EINVAL && status != GD_ENOMEM)
        fail(what, message);
    if (all > 0x1p39 && status == GD_OK)
        fail(what, "planned");
    free(lengths);
    gd_workspace_free(workspace);
}

int main(void)
{
    static const int64_t samples[] = {400, (int64_t)1 << 36, ((int64_t)1 << 40) - 1, (int64_t)1 << 40,
                                      ((int64_t)1 << 40) + 1, INT64_MAX};
    gd_context *context;
    char message[512];
    if (gd_context_create("cpu", 1024, &context, message, sizeof message) != GD_OK)
        fail("gd_context_create", message);
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        gd_config config;
        gd_model *model;
        if (gd_config_from_json(configs[i].json, strlen(configs[i].json), &config, message, sizeof message) != GD_OK)
            fail(configs[i].json, message);
        if (gd_model_create(context, &config, &model) != GD_OK)
            fail(configs[i].json, gd_context_message(context));
        for (size_t s = 0; s < sizeof samples / sizeof *samples; s++)
            for (int training = 0; training <= 1; training++) {
                try_plan(context, model, configs[i].bytes, 1, samples[s], training);
                try_plan(context, model, configs[i].bytes, 3, samples[s], training);
            }
        gd_model_free(model);
    }
    gd_context_free(context);
    puts("passed");
    return 0;
}
