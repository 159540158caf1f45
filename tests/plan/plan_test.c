/*
 * plan_test.c - a call's batch has to be the one that its workspace was planned for, with either padding. Prints what
 * failed; the exit status is 0 if nothing did.
 */
#include "../../csrc/gendistiller.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHORT = 900, MIDDLE = 1700, LONG = 2500, WIDTH = 8, MOST = 3 * 2 * 40 * WIDTH };

static const float audio[LONG] = {1, -2, 3};
static const float *const wavs[] = {audio, audio, audio};
static int failures;

static void expect(int condition, const char *what, const char *got)
{
    if (!condition) {
        printf("FAILED: %s: %s\n", what, got);
        failures++;
    }
}

static gd_config config_of(const char *padding)
{
    char text[400], message[200] = "";
    gd_config config;
    const int length = snprintf(text, sizeof text,
        "{\"encoder_embed_dim\": 8, \"encoder_ffn_embed_dim\": 12, \"encoder_attention_heads\": 2, \"conv_pos\": 4, "
        "\"conv_pos_groups\": 2, \"target_layers\": [4, 12], \"padding\": \"%s\", "
        "\"conv_feature_layers\": [[8, 10, 5], [8, 8, 8], [8, 8, 8]]}", padding);
    if (gd_config_from_json(text, (size_t)length, &config, message, sizeof message) != GD_OK) {
        printf("FAILED: %s\n", message);
        exit(1);
    }
    return config;
}

/* One call: its status has to be the wanted one, and of a failure `message`, and nothing written. */
static void call(gd_context *context, gd_workspace *ws, const gd_batch *batch, float *states, const char *message)
{
    float *const hidden[] = {states, states + MOST / 3, states + 2 * (MOST / 3)};
    memset(states, 0, MOST * sizeof *states);
    const gd_status status = gd_forward(ws, batch, NULL, hidden);
    expect(status == (message ? GD_EINVAL : GD_OK), message ? message : "a planned batch", gd_context_message(context));
    if (!message)
        return;
    expect(strcmp(gd_context_message(context), message) == 0, message, gd_context_message(context));
    int written = 0;
    for (int i = 0; i < MOST; i++)
        written += states[i] != 0;
    expect(written == 0, message, "a refused batch wrote states");
}

static void test_padding(const char *padding)
{
    static float first[MOST], states[MOST];
    static const int64_t planned[] = {LONG, SHORT, SHORT}, longer[] = {LONG, MIDDLE, SHORT};
    static const int64_t shorter[] = {MIDDLE, SHORT, SHORT};
    const gd_config config = config_of(padding);
    const gd_batch batch = {.batch = 2, .wavs = wavs, .lengths = planned};
    gd_context *context;
    gd_model *model;
    gd_workspace *ws;
    char message[256] = "";
    if (gd_context_create("cpu", 2, &context, message, sizeof message) != GD_OK ||
        gd_model_create(context, &config, &model) != GD_OK || gd_workspace_create(model, &ws) != GD_OK) {
        printf("FAILED: %s\n", message);
        exit(1);
    }
    gd_model_init(model, 1);
    call(context, ws, &batch, states, "workspace: expected one that is planned");
    expect(gd_workspace_plan(ws, &batch, 0, 0, GD_FLOAT32) == GD_OK, "a plan", gd_context_message(context));
    call(context, ws, &batch, first, NULL);
    call(context, ws, &(gd_batch){.batch = 2, .wavs = wavs, .lengths = longer}, states,
         "lengths: expected 900 samples in utterance 1 as planned, got 1700");
    call(context, ws, &(gd_batch){.batch = 2, .wavs = wavs, .lengths = shorter}, states,
         "lengths: expected 2500 samples in utterance 0 as planned, got 1700");
    call(context, ws, &(gd_batch){.batch = 3, .wavs = wavs, .lengths = planned}, states,
         "wavs: expected 2 utterances as planned, got 3");
    gd_context_set_num_threads(context, 1);
    call(context, ws, &batch, states, "num_threads: expected 2 as planned, got 1");
    gd_context_set_num_threads(context, 2);
    call(context, ws, &batch, states, NULL);
    expect(memcmp(first, states, sizeof states) == 0, "the planned batch again", "other bits");
    gd_workspace_free(ws);
    gd_model_free(model);
    gd_context_free(context);
}

int main(void)
{
    test_padding("exact");
    test_padding("s3prl");
    puts(failures == 0 ? "passed" : "failed");
    return failures != 0;
}
