/*
 * fuzz_checkpoint.c - damages checkpoints at random and loads them, for a build with sanitizers.
 *
 *     cc -fsanitize=address,undefined -Icsrc csrc/[a-z]*.c tests/fuzz/fuzz_checkpoint.c -lm -ldl
 *     a.out FOLDER SECONDS [SEED]
 *
 * FOLDER is best one in memory (/dev/shm). Every load must end in GD_OK with a model or in
 * GD_EFORMAT or GD_EUNSUPPORTED without one, with a message that names the file; a config that is
 * read must be written and read again as the same. Prints the counts, or the seed and number of
 * the first case that does otherwise, which stays in FOLDER, and exits 1.
 */
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "backend.h"

enum { CAPACITY = 1 << 17, CONFIGS_A_FILE = 10 };

static const char *const configs[] = {
    "{\"conv_feature_layers\": [[4, 10, 5], [4, 3, 2]], \"encoder_embed_dim\": 4, "
    "\"encoder_ffn_embed_dim\": 4, \"encoder_attention_heads\": 2, \"conv_pos\": 4, "
    "\"conv_pos_groups\": 2}",
    "{\"architecture\": \"encoder\", \"extractor_mode\": \"layer_norm\", \"conv_bias\": true, "
    "\"encoder_layers\": 2, \"conv_feature_layers\": [[4, 10, 5]], \"encoder_embed_dim\": 4, "
    "\"encoder_ffn_embed_dim\": 4, \"encoder_attention_heads\": 2, \"conv_pos\": 4, "
    "\"conv_pos_groups\": 2, \"skip_connection\": false, \"output_layer\": false, "
    "\"target_layers\": []}",
};

/* Checkpoints compute nothing: of a backend they need but that its memory is the host's. */
static void close_host(gd_context *context) { (void)context; }

static const struct gd_backend host = {.name = "host", .shares_memory = 1, .close = close_host};

gd_status gd_backend_cpu_open(gd_context *context)
{
    context->backend = &host;
    return GD_OK;
}

/* What a header is made of, and what a reader may stumble over. */
static const char *const words[] = {
    "{", "}", "[", "]", ",", ":", "\"", "\\", "\\\"", "\\u0000", "\\ud800", "\\u0041", "\\u20ac",
    "\\ud83d\\ude00", "1e999", "0.1000000000000000055", "0", "-1", "1e9", "0.5", "null", "true",
    "false", "[0,0]", "[[[[[[[[[[[[[[[[[[", "9223372036854775807", "18446744073709551616",
    "99999999999999999999", "\"dtype\"", "\"shape\"", "\"data_offsets\"", "F32", "BF16", "F16",
    "I8", "F64", "__metadata__", "gendistiller", ".scale", "65536", "4294967296", "encoder",
    "layer_norm", "\xff", "\xc0\x80", "\xed\xa0\x80", " ", "\n",
};

static uint64_t state;

static uint32_t draw(uint32_t below)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(((state >> 33) * below) >> 31);
}

static size_t splice(char *data, size_t size, size_t at, size_t gone, const char *word,
                     size_t length)
{
    gone = gone < size - at ? gone : size - at;
    if (size - gone + length > CAPACITY)
        return size;
    memmove(data + at + length, data + at + gone, size - at - gone);
    memcpy(data + at, word, length);
    return size - gone + length;
}

/* One change, most of them within the first `header` bytes. */
static size_t change(char *data, size_t size, size_t header)
{
    size_t at =
        draw(4) ? draw((uint32_t)(header < size ? header : size) + 1) : draw((uint32_t)size + 1);
    const char *word = words[draw(sizeof words / sizeof *words)];

    switch (draw(11)) {
    case 0:
        if (at < size)
            data[at] = (char)(data[at] ^ 1 << draw(8));
        return size;
    case 1:
        if (at < size)
            data[at] = (char)('0' + draw(10));
        return size;
    case 2:
        return at;
    case 3: { /* a piece of the file, moved */
        size_t length = draw(40), from = draw((uint32_t)size);
        char piece[40];
        length = length < size - from ? length : size - from;
        memcpy(piece, data + from, length);
        size = splice(data, size, at, draw(2) ? length : 0, piece, length);
        break;
    }
    case 4:
        size = splice(data, size, at, 1 + draw(30), "", 0);
        break;
    case 5:
        size = splice(data, size, at, strlen(word), word, strlen(word));
        break;
    case 6:
        size = splice(data, size, at, draw(8), word, strlen(word));
        break;
    default: { /* a whole name or number */
        size_t end;
        while (at < size && !isalnum((unsigned char)data[at]))
            at++;
        for (end = at; end < size && (isalnum((unsigned char)data[end]) || data[end] == '_'); end++)
            ;
        size = splice(data, size, at, end - at, word, strlen(word));
        break;
    }
    }
    return size;
}

/* A change after which most headers have the right length again. */
static size_t change_file(char *data, size_t size, size_t header)
{
    char prefix[8];
    size_t before = size, keep = size < 8 ? size : 8;

    memcpy(prefix, data, keep);
    size = change(data, size, header);
    if (size < 8 || keep < 8 || draw(8) == 0)
        return size;
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--)
        length = length << 8 | (unsigned char)prefix[i];
    length += size - before;
    for (int i = 0; i < 8; i++)
        data[i] = (char)(length >> 8 * i);
    return size;
}

static size_t read_file(const char *path, char *data)
{
    FILE *file = fopen(path, "rb");
    size_t size = file ? fread(data, 1, CAPACITY, file) : 0;
    if (file)
        fclose(file);
    return size;
}

static int write_file(const char *path, const char *data, size_t size)
{
    FILE *file = fopen(path, "wb");
    int good = file && fwrite(data, 1, size, file) == size;
    return file && fclose(file) == 0 && good;
}

/* The config is read again as what was written. */
static int config_round_trip(const gd_config *config)
{
    char text[4096], message[256];
    gd_config again;
    size_t length = gd_config_to_json(config, text, sizeof text);
    return length < sizeof text &&
           gd_config_from_json(text, length, &again, message, sizeof message) == GD_OK &&
           memcmp(config, &again, sizeof again) == 0;
}

/* A damaged config alone: refused with a message, or read. The text fills its memory. */
static int fuzz_config(char *data)
{
    const char *seed = configs[draw(2)];
    size_t size = strlen(seed);
    char message[256] = "";
    gd_config config, untouched;

    memcpy(data, seed, size);
    for (uint32_t changes = 1 + draw(3); changes > 0 && size > 0; changes--)
        size = change(data, size, size);
    char *text = malloc(size ? size : 1);
    if (!text)
        return 0;
    memcpy(text, data, size);
    memset(&config, 0x55, sizeof config);
    memcpy(&untouched, &config, sizeof config);
    gd_status status = gd_config_from_json(text, size, &config, message, sizeof message);
    free(text);
    return status == GD_OK ? config_round_trip(&config)
                           : status == GD_EINVAL && message[0] &&
                                 memcmp(&config, &untouched, sizeof config) == 0;
}

static int check(gd_context *context, const char *path, gd_status status, const gd_model *model)
{
    if (status == GD_OK)
        return model && config_round_trip(gd_model_config(model));
    return !model && (status == GD_EFORMAT || status == GD_EUNSUPPORTED) &&
           strncmp(gd_context_message(context), path, strlen(path)) == 0;
}

static int save_seeds(gd_context *context, const char *path, char *data[], size_t sizes[])
{
    for (int i = 0; i < 4; i++) {
        gd_config config;
        gd_model *model = NULL;
        char message[256];
        if (gd_config_from_json(configs[i / 2], strlen(configs[i / 2]), &config, message,
                                sizeof message) != GD_OK) {
            fprintf(stderr, "%s\n", message);
            return 0;
        }
        gd_status status = gd_model_create(context, &config, &model);
        if (status == GD_OK) {
            gd_model_init(model, 1);
            status = gd_model_save(model, path, i % 2 ? "bfloat16" : "float32");
        }
        gd_model_free(model);
        if (status != GD_OK) {
            fprintf(stderr, "%s\n", gd_context_message(context));
            return 0;
        }
        sizes[i] = read_file(path, data[i]);
    }
    return 1;
}

int main(int argc, char **argv)
{
    static char seeds[4][CAPACITY], data[CAPACITY];
    char *const pointers[4] = {seeds[0], seeds[1], seeds[2], seeds[3]};
    size_t sizes[4];
    char path[4096], message[256];
    gd_context *context;
    long counts[GD_EUNSUPPORTED + 1] = {0}, cases = 0;

    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: fuzz_checkpoint FOLDER SECONDS [SEED]\n");
        return 2;
    }
    uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    double seconds = strtod(argv[2], NULL);
    snprintf(path, sizeof path, "%s/fuzz-%llu.safetensors", argv[1], (unsigned long long)seed);
    if (gd_context_create("cpu", 1, &context, message, sizeof message) != GD_OK) {
        fprintf(stderr, "%s\n", message);
        return 2;
    }
    if (!save_seeds(context, path, (char **)pointers, sizes))
        return 2;

    time_t start = time(NULL);
    for (; difftime(time(NULL), start) < seconds; cases++) {
        gd_model *model = NULL;
        state = seed * 0x9e3779b97f4a7c15u + (uint64_t)cases;
        for (int i = 0; i < CONFIGS_A_FILE; i++) {
            if (fuzz_config(data))
                continue;
            fprintf(stderr, "seed %llu, case %ld, config %d\n", (unsigned long long)seed, cases, i);
            return 1;
        }
        int kind = (int)draw(4);
        size_t size = sizes[kind];
        memcpy(data, seeds[kind], size);
        size_t header = 8 + ((unsigned char)data[0] | (size_t)(unsigned char)data[1] << 8);
        for (uint32_t changes = 1 + draw(3); changes > 0 && size > 0; changes--)
            size = change_file(data, size, header);
        if (!write_file(path, data, size)) {
            perror(path);
            return 2;
        }
        gd_status status = gd_model_load(context, path, &model);
        int good = check(context, path, status, model);
        gd_model_free(model);
        if (!good) {
            fprintf(stderr, "seed %llu, case %ld: status %d, %s\n", (unsigned long long)seed, cases,
                    (int)status, gd_context_message(context));
            return 1;
        }
        counts[status]++;
    }
    remove(path);
    gd_context_free(context);
    printf("%ld files: %ld loaded, %ld damaged, %ld unsupported; %ld configs\n", cases,
           counts[GD_OK], counts[GD_EFORMAT], counts[GD_EUNSUPPORTED], cases * CONFIGS_A_FILE);
    return 0;
}
