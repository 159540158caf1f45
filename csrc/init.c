/* init.c - random initialisation: a function of the seed and each tensor's name alone. */
#include <math.h>
#include <string.h>

#include "model.h"
#include "philox.h"

static uint64_t name_hash(const char *name)
{
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a */
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return hash;
}

/* Two uniforms in (0, 1) for element pair `index` of a tensor. */
static void uniforms(uint64_t seed, uint64_t tensor, uint64_t index, double u[2])
{
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)tensor, (uint32_t)(tensor >> 32)};
    uint32_t bits[4];
    gd_philox(counter, key, bits);
    for (int i = 0; i < 2; i++)
        u[i] = ((double)(((uint64_t)bits[2 * i] << 21) ^ (bits[2 * i + 1] >> 11)) + 0.5) / 9007199254740992.0;
}

static void fill(uint64_t seed, const gd_tensor *tensor, float *values, double scale, int normal)
{
    uint64_t hash = name_hash(tensor->name);
    for (size_t i = 0; i < tensor->size; i += 2) {
        double u[2], x[2];
        uniforms(seed, hash, i / 2, u);
        if (normal) { /* Box-Muller */
            double radius = sqrt(-2 * log(u[0])), angle = 2 * 3.14159265358979323846 * u[1];
            x[0] = radius * cos(angle), x[1] = radius * sin(angle);
        } else {
            x[0] = 2 * u[0] - 1, x[1] = 2 * u[1] - 1;
        }
        for (size_t j = i; j < tensor->size && j < i + 2; j++)
            values[j] = (float)(scale * x[j - i]);
    }
}

/* The gain whose weight-normed kernel is v itself: |v[., ., k]|. */
static void pos_conv_gain(const gd_tensor *tensor, const float *v, size_t v_size, float *g)
{
    const size_t kernel = tensor->size;
    for (size_t k = 0; k < kernel; k++) {
        double sum = 0;
        for (size_t i = k; i < v_size; i += kernel)
            sum += (double)v[i] * v[i];
        g[k] = (float)sqrt(sum);
    }
}

void gd_model_init(gd_model *model, uint64_t seed)
{
    const gd_config *c = &model->config;
    const int64_t D = c->encoder_embed_dim;
    for (int i = 0; i < model->num_tensors; i++) {
        const gd_tensor *tensor = &model->tensors[i];
        float *values = model->values + tensor->offset;
        switch (model->slots[i].init) {
        case GD_INIT_ZERO:
            memset(values, 0, tensor->size * sizeof *values);
            break;
        case GD_INIT_ONE:
            for (size_t j = 0; j < tensor->size; j++)
                values[j] = 1;
            break;
        case GD_INIT_NORMAL:
            fill(seed, tensor, values, 0.02, 1);
            break;
        case GD_INIT_LINEAR: { /* torch.nn.Linear's: uniform within 1 / sqrt(in), the bias with its matrix */
            const gd_tensor *matrix = tensor->decay ? tensor : tensor - 1;
            fill(seed, tensor, values, 1 / sqrt((double)matrix->shape[1]), 0);
            break;
        }
        case GD_INIT_KAIMING: /* kaiming_normal_: sqrt(2 / (in * kernel)) */
            fill(seed, tensor, values, sqrt(2.0 / (double)(tensor->shape[1] * tensor->shape[2])), 1);
            break;
        case GD_INIT_POS_CONV:
            fill(seed, tensor, values, sqrt(4.0 / (double)(c->conv_pos * D)), 1);
            break;
        case GD_INIT_POS_CONV_G: /* filled below, from v */
            break;
        }
    }
    for (int i = 0; i < model->num_tensors; i++)
        if (model->slots[i].init == GD_INIT_POS_CONV_G)
            pos_conv_gain(&model->tensors[i], model->host.pos_conv_v,
                          (size_t)(D * (D / c->conv_pos_groups) * c->conv_pos), model->host.pos_conv_g);
    gd_model_touch(model);
}
