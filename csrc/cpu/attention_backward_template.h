/*
 * attention_backward_template.h - gradients of one utterance's attention in one head, from the kept log-sums:
 * with p = e^(logit - lse), f the dropout factors and D = sum over j of p f (dout v^T) = dout . out,
 *
 *     dlogit = p (f dout v^T - D)          dv = (p f)^T dout
 *     dq = scale dlogit k                  dk = scale dlogit^T q
 *     dgate = sum over j of dlogit bias    dbias[j - i] += dlogit gate
 *
 * Tiles of queries and blocks of keys are those of the forward pass; dk, dv and dbias add up tile after tile.
 */
#ifndef GD_CPU_ATTENTION_BACKWARD_TEMPLATE_H
#define GD_CPU_ATTENTION_BACKWARD_TEMPLATE_H

#include "attention_template.h"

struct attention_tile_backward {
    int64_t first, rows; /* queries */
    float lse[ATTENTION_ROWS], d[ATTENTION_ROWS], dgate[ATTENTION_ROWS];
};

/* The tile's dout and D, and what the products over queries read. */
static void attention_open_tile(struct attention_head *head, const struct gd_attention_backward *b,
                                int64_t utterance, int64_t h, struct attention_tile_backward *tile)
{
    const struct gd_attention *a = &b->forward;
    int64_t begin = a->rows->first[utterance] + tile->first, dim = head->dim;
    attention_load_queries(head, a, tile->first, tile->rows);
    for (int64_t r = 0; r < tile->rows; r++) {
        const float *dout = b->dout + (begin + r) * b->lddout + h * dim;
        const float *out = a->out + (begin + r) * a->ldout + h * dim;
        vf sum = {0};
        for (int64_t i = 0; i < dim; i += VL) {
            vf v = vf_load_left(dout + i, dim - i);
            sum += v * vf_load_left(out + i, dim - i);
            vf_store_left(head->dout + r * dim + i, v, dim - i);
        }
        tile->d[r] = vf_sum(sum);
        tile->lse[r] = a->lse[(begin + r) * a->heads + h];
        tile->dgate[r] = 0;
    }
    attention_pack_columns(tile->rows, dim, head->query, dim, head->query_columns, tile->rows);
    attention_pack_columns(tile->rows, dim, head->dout, dim, head->dout_columns, tile->rows);
}

/* One row of a block: logits become p f, dout v^T becomes dlogits. */
static void attention_row_backward(struct attention_head *head, float gate, struct attention_tile_backward *tile,
                                   int64_t r, int64_t block, int64_t width)
{
    float *logits = head->logits + r * ATTENTION_STRIDE, *dlogits = head->dlogits + r * ATTENTION_STRIDE;
    int64_t offset = block - (tile->first + r);
    float factors[ATTENTION_KEYS + 4 * VL];
    vf sum = {0};
    if (head->dropout) {
        head->mask.frame = (uint32_t)(tile->first + r);
        for (int64_t j = 0; j < width; j += 4 * VL) {
            vf factor[4];
            dropout_factors(&head->mask, (uint32_t)(block + j), factor);
            for (int k = 0; k < 4; k++)
                vf_store(factors + j + k * VL, factor[k]);
        }
    }
    for (int64_t j = 0; j < width; j += VL) {
        vf p = vf_exp(vf_load(logits + j) - tile->lse[r]), dp = vf_load(dlogits + j), kept = p;
        if (head->dropout) {
            vf factor = vf_load(factors + j);
            dp *= factor;
            kept *= factor;
        }
        vf dlogit = p * (dp - tile->d[r]);
        vf_store(logits + j, kept);
        vf_store(dlogits + j, dlogit);
        if (head->bias) {
            sum += dlogit * vf_load(head->bias + offset + j);
            vf_store(head->dbias + offset + j, vf_load(head->dbias + offset + j) + gate * dlogit);
        }
    }
    tile->dgate[r] += vf_sum(sum);
}

static void attention_block_backward(struct attention_head *head, const struct gd_attention *a,
                                     struct attention_tile_backward *tile, int64_t block)
{
    int64_t keys = head->keys - block < ATTENTION_KEYS ? head->keys - block : ATTENTION_KEYS;
    int64_t width = attention_panels(keys), rows = tile->rows, dim = head->dim, columns = head->columns;
    attention_logits(head, a, tile->first, rows, block, keys);
    for (int64_t r = 0; r < rows; r++)
        memset(head->dlogits + r * ATTENTION_STRIDE, 0, (size_t)width * sizeof(float));
    attention_product(rows, width, dim, head->dout, dim, 1, head->v_rows + block * dim, dim * ATTENTION_NR,
                      head->dlogits, ATTENTION_STRIDE);
    for (int64_t r = 0; r < rows; r++)
        attention_row_backward(head, attention_gate(head, a, tile->first + r), tile, r, block, width);

    attention_product(rows, columns, keys, head->dlogits, ATTENTION_STRIDE, 1,
                      head->k_columns + block * ATTENTION_NR, head->keys * ATTENTION_NR, head->out, columns);
    attention_product(keys, columns, rows, head->dlogits, 1, ATTENTION_STRIDE, head->query_columns,
                      rows * ATTENTION_NR, head->dk + block * columns, columns);
    attention_product(keys, columns, rows, head->logits, 1, ATTENTION_STRIDE, head->dout_columns,
                      rows * ATTENTION_NR, head->dv + block * columns, columns);
}

/* One utterance's dq, dk, dv and dgate in head h, written; its dbias added. */
static void attention_backward(const struct gd_attention_backward *b, int64_t utterance, int64_t h, float *scratch)
{
    const struct gd_attention *a = &b->forward;
    struct attention_head head;
    struct attention_tile_backward tile;
    attention_open(&head, a, NULL, utterance, h, 1, scratch);
    int64_t begin = a->rows->first[utterance], dim = head.dim, columns = head.columns, column = h * dim;
    float *dbias = head.dbias;
    memset(dbias, 0, (size_t)(2 * attention_panels(head.rows)) * sizeof(float));
    head.dbias += head.rows - 1;

    for (tile.first = 0; tile.first < head.rows; tile.first += ATTENTION_ROWS) {
        int64_t left = head.rows - tile.first;
        tile.rows = left < ATTENTION_ROWS ? left : ATTENTION_ROWS;
        attention_open_tile(&head, b, utterance, h, &tile);
        memset(head.out, 0, (size_t)(tile.rows * columns) * sizeof(float));
        for (int64_t block = 0; block < head.keys; block += ATTENTION_KEYS)
            attention_block_backward(&head, a, &tile, block);
        for (int64_t r = 0; r < tile.rows; r++) {
            int64_t row = begin + tile.first + r;
            for (int64_t i = 0; i < dim; i += VL)
                vf_store_left(b->dq + row * b->lddq + column + i, vf_load(head.out + r * columns + i) * a->scale,
                              dim - i);
            if (b->dgate)
                b->dgate[row * a->heads + h] = tile.dgate[r];
        }
    }
    for (int64_t j = 0; j < head.rows; j++)
        for (int64_t i = 0; i < dim; i += VL) {
            int real = j < head.keys;
            vf dk = real ? vf_load(head.dk + j * columns + i) : (vf){0};
            vf dv = real ? vf_load(head.dv + j * columns + i) : (vf){0};
            vf_store_left(b->dk + (begin + j) * b->lddk + column + i, dk, dim - i);
            vf_store_left(b->dv + (begin + j) * b->lddv + column + i, dv, dim - i);
        }
    if (b->dbias) {
        int64_t longest = a->rows->longest;
        float *to = b->dbias + h * (2 * longest - 1) + longest - head.rows;
        for (int64_t i = 0; i < 2 * head.rows - 1; i++)
            to[i] += dbias[i];
    }
}

#endif
