/*
 * attention_template.h - one utterance's attention in one head, forward and backward.
 *
 * Queries go by in tiles of ATTENTION_ROWS, keys in blocks of ATTENTION_KEYS from key 0 on: a tile's logits with a
 * block of keys stay in the cache, and memory is linear in the number of keys. Softmax is online: a row keeps its
 * maximum m and its sum l of e^(logit - m) so far, and rescales both and its output when a block raises m. Every
 * sum of a query's row runs over keys, or over the head's columns, in an order that the number of keys fixes:
 * a row has the same bits in any tile. In a reduced precision Q, K, V and the numerators of the softmax are rounded to
 * words (gemm_tile_template.h), which stand where their floats stood; sums, maxima and the softmax stay float32.
 */
#ifndef GD_CPU_ATTENTION_TEMPLATE_H
#define GD_CPU_ATTENTION_TEMPLATE_H

#include <math.h>

#include "../philox.h"
#include "dropout_template.h"
#include "gemm_tile_template.h"
#include "kernels.h"
#include "vec.h"
#include "vmath_template.h"

/* ROWS and KEYS are multiples of every register tile's height, KEYS of a word's elements; the stride of logits is an
 * odd number of lines. */
enum { ATTENTION_ROWS = 96, ATTENTION_KEYS = 384, ATTENTION_STRIDE = ATTENTION_KEYS + 16 };

#if VL == 16 || defined(__aarch64__)
#define ATTENTION_MR 12
#elif VL == 8
#define ATTENTION_MR 6
#else
#define ATTENTION_MR 4
#endif
#define ATTENTION_NR (2 * VL)

/* Floats, in whole panels. */
GD_INLINE int64_t attention_panels(int64_t n)
{
    return gd_round_up(n, ATTENTION_NR);
}

/* t[mr, NR] += a[mr, k] b[k, NR]; a[r, p] = a[r * a_row + p * a_col], row r of t at r * ldt. */
GD_INLINE void attention_tile(const int mr, int64_t k, const float *a, int64_t a_row, int64_t a_col, const float *b,
                              float *t, int64_t ldt)
{
    vf sum[ATTENTION_MR][2];
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++)
        sum[r][0] = sum[r][1] = (vf){0};
    for (int64_t p = 0; p < k; p++, a += a_col, b += ATTENTION_NR) {
        vf b0 = vf_load(b), b1 = vf_load(b + VL);
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            vf row = vf_set(a[r * a_row]);
            sum[r][0] += row * b0;
            sum[r][1] += row * b1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++) {
        vf_store(t + r * ldt, vf_load(t + r * ldt) + sum[r][0]);
        vf_store(t + r * ldt + VL, vf_load(t + r * ldt + VL) + sum[r][1]);
    }
}

/* c[m, n] += a[m, k] b, b being n / NR panels (k, NR), b_panel floats apart. */
static void attention_product(int64_t m, int64_t n, int64_t k, const float *a, int64_t a_row, int64_t a_col,
                              const float *b, int64_t b_panel, float *c, int64_t ldc)
{
    for (int64_t j = 0; j < n; j += ATTENTION_NR, b += b_panel, c += ATTENTION_NR) {
        int64_t i = 0;
        for (; i + ATTENTION_MR <= m; i += ATTENTION_MR)
            attention_tile(ATTENTION_MR, k, a + i * a_row, a_row, a_col, b, c + i * ldc, ldc);
        for (; i + 4 <= m; i += 4)
            attention_tile(4, k, a + i * a_row, a_row, a_col, b, c + i * ldc, ldc);
        for (; i < m; i++)
            attention_tile(1, k, a + i * a_row, a_row, a_col, b, c + i * ldc, ldc);
    }
}

/* The same of words. */
static void attention_words_product(const struct gd_gemm_kernels *products, int64_t m, int64_t n, int64_t k,
                                    const float *a, int64_t a_row, const float *b, int64_t b_panel, float *c,
                                    int64_t ldc)
{
    _Alignas(64) float t[GEMM_MOST_MR * GEMM_NR];
    for (int64_t j = 0; j < n; j += ATTENTION_NR, b += b_panel, c += ATTENTION_NR)
        for (int64_t i = 0; i < m; i += products->rows) {
            const int mr = (int)gd_smaller(m - i, products->rows);
            products->tile(mr, 2, k, a + i * a_row, a_row, b, ATTENTION_NR, t, 0);
            for (int r = 0; r < mr; r++)
                for (int v = 0; v < ATTENTION_NR; v += VL) {
                    float *to = c + (i + r) * ldc + v;
                    vf_store(to, vf_load(to) + vf_load(t + r * GEMM_NR + v));
                }
        }
}

/* Words of `count` elements of K. */
GD_INLINE int64_t attention_words(const struct gd_gemm_kernels *products, int64_t count)
{
    return gd_divide_up(count, products->elements);
}

/* x (rows, dim) into panels of columns (dim / NR, stride rows, NR), zero beyond dim. */
static void attention_pack_columns(int64_t rows, int64_t dim, const float *x, int64_t ldx, float *to, int64_t stride)
{
    for (int64_t d = 0; d < dim; d += ATTENTION_NR, to += stride * ATTENTION_NR)
        for (int64_t r = 0; r < rows; r++)
            for (int v = 0; v < ATTENTION_NR; v += VL)
                vf_store(to + r * ATTENTION_NR + v, vf_load_left(x + r * ldx + d + v, dim - d - v));
}

/* x (rows, dim) transposed into panels of rows (rows / NR, dim, NR), zero beyond rows: four rows at a time, whose
 * 4 x 4 blocks turn in registers. */
static void attention_pack_rows(int64_t rows, int64_t dim, const float *x, int64_t ldx, float *to)
{
    for (int64_t j = 0; j < rows; j += ATTENTION_NR, to += dim * ATTENTION_NR)
        for (int64_t r = 0; r < ATTENTION_NR; r += 4)
            for (int64_t d = 0; d < dim; d += VL) {
                vu w[4];
                for (int i = 0; i < 4; i++)
                    w[i] = (vu)(j + r + i < rows ? vf_load_left(x + (j + r + i) * ldx + d, dim - d) : (vf){0});
                vu_transpose_quarters(w);
                for (int i = 0; i < VL && d + i < dim; i++)
                    memcpy(to + (d + i) * ATTENTION_NR + r, (const char *)&w[i % 4] + i / 4 * 16, 16);
            }
}

/* What a head's tiles share, all in the scratch. */
struct attention_head {
    int64_t rows, keys, dim, columns; /* columns: dim in whole panels */
    const struct gd_gemm_kernels *products; /* NULL: float32's */
    int64_t query_stride;
    const float *q, *gate;            /* of the utterance's first row */
    struct gd_dropout_row mask;
    int dropout;
    float *bias;                        /* bias[j - i] is the one of query i and key j; or NULL */
    float *k_rows;                      /* K by rows: panels (dim, NR) */
    float *v_columns;                   /* V by columns: panels (keys, NR) */
    float *k_columns, *v_rows;          /* backward: K by columns, V by rows */
    float *dk, *dv, *dbias;             /* backward: (keys, columns) twice, and as bias */
    float *query, *logits, *out;        /* a tile's scaled q (ROWS, dim), logits, output (ROWS, columns) */
    float *dlogits, *dout;              /* backward: as logits, as query */
    float *query_columns, *dout_columns; /* backward: the same by columns */
};

/* Gives out the scratch from `memory` on, or only counts where it is NULL. Returns the floats taken. */
static size_t attention_layout(struct attention_head *head, int64_t longest, int backward, float *memory)
{
    size_t taken = 0;
    int64_t keys = attention_panels(longest), tile = ATTENTION_ROWS * head->columns;
    int64_t logits = ATTENTION_ROWS * ATTENTION_STRIDE;
#define TAKE(pointer, count) \
    do { \
        (pointer) = memory + (memory ? taken : 0); \
        taken += (size_t)((count) + 15) / 16 * 16; \
    } while (0)
    TAKE(head->k_rows, keys * head->dim);
    TAKE(head->v_columns, keys * head->columns);
    TAKE(head->query, tile);
    TAKE(head->out, tile);
    TAKE(head->logits, logits);
    TAKE(head->bias, 2 * keys);
    if (backward) {
        TAKE(head->k_columns, keys * head->columns);
        TAKE(head->v_rows, keys * head->dim);
        TAKE(head->dk, keys * head->columns);
        TAKE(head->dv, keys * head->columns);
        TAKE(head->dbias, 2 * keys);
        TAKE(head->dout, tile);
        TAKE(head->query_columns, tile);
        TAKE(head->dout_columns, tile);
        TAKE(head->dlogits, logits);
    }
#undef TAKE
    return taken;
}

static size_t attention_scratch(int64_t head_dim, int64_t longest, int backward)
{
    struct attention_head head = {.dim = head_dim, .columns = attention_panels(head_dim)};
    return attention_layout(&head, longest, backward, NULL) * sizeof(float);
}

static void attention_open(struct attention_head *head, const struct gd_attention *a,
                           const struct gd_gemm_kernels *products, int64_t utterance, int64_t h, int backward,
                           float *scratch)
{
    int64_t first = a->rows->first[utterance];
    head->rows = a->rows->first[utterance + 1] - first;
    head->keys = a->rows->valid[utterance];
    head->dim = a->head_dim;
    head->columns = attention_panels(a->head_dim);
    head->products = products;
    head->query_stride = products ? head->columns : head->dim; /* words are written in whole vectors */
    attention_layout(head, head->rows, backward, scratch);

    const float *k = a->k + first * a->ldk + h * head->dim, *v = a->v + first * a->ldv + h * head->dim;
    head->q = a->q + first * a->ldq + h * head->dim;
    head->gate = a->gate ? a->gate + first * a->heads + h : NULL;
    attention_pack_rows(head->keys, head->dim, k, a->ldk, head->k_rows);
    attention_pack_columns(head->keys, head->dim, v, a->ldv, head->v_columns, head->keys);
    if (products) {
        for (int64_t j = 0; j < head->keys; j += ATTENTION_NR) {
            float *panel = head->k_rows + j * head->dim;
            products->pack_b(head->dim, ATTENTION_NR, panel, ATTENTION_NR, 1, head->dim, panel);
        }
        for (int64_t d = 0; d < head->dim; d += ATTENTION_NR) {
            float *panel = head->v_columns + d * head->keys;
            products->pack_b(head->keys, ATTENTION_NR, panel, ATTENTION_NR, 1, head->keys, panel);
        }
    }
    if (backward) {
        attention_pack_columns(head->keys, head->dim, k, a->ldk, head->k_columns, head->keys);
        attention_pack_rows(head->keys, head->dim, v, a->ldv, head->v_rows);
        memset(head->dk, 0, (size_t)(head->keys * head->columns) * sizeof(float));
        memset(head->dv, 0, (size_t)(head->keys * head->columns) * sizeof(float));
    }
    if (a->bias) {
        /* Offsets -(rows - 1) .. rows - 1, and zeros for the last panel of keys. */
        int64_t longest = a->rows->longest, count = 2 * head->rows - 1;
        const float *bias = a->bias + h * (2 * longest - 1) + longest - head->rows;
        memcpy(head->bias, bias, (size_t)count * sizeof(float));
        memset(head->bias + count, 0, (size_t)(2 * attention_panels(head->rows) - count) * sizeof(float));
        head->bias += head->rows - 1;
    } else {
        head->bias = NULL;
    }
    head->dropout = a->seed != NULL && a->dropout > 0;
    if (head->dropout) {
        head->mask = gd_dropout_row(a->dropout, a->seed, a->site);
        head->mask.line = (uint32_t)((a->seed->first_utterance + utterance) * a->heads + h);
    }
}

/* The tile's scaled queries from row `first` on. */
static void attention_load_queries(struct attention_head *head, const struct gd_attention *a, int64_t first,
                                   int64_t rows)
{
    for (int64_t r = 0; r < rows; r++) {
        float *query = head->query + r * head->query_stride;
        for (int64_t d = 0; d < head->dim; d += VL) {
            int64_t left = head->dim - d;
            vf_store_left(query + d, vf_load_left(head->q + (first + r) * a->ldq + d, left) * a->scale, left);
        }
        if (head->products)
            head->products->convert(head->dim, query, query);
    }
}

GD_INLINE float attention_gate(const struct attention_head *head, const struct gd_attention *a, int64_t row)
{
    return head->gate ? head->gate[row * a->heads] : 1.0f;
}

/* Logits of rows first .. and keys block .. block + keys - 1, whole panels of keys. */
static void attention_logits(struct attention_head *head, const struct gd_attention *a, int64_t first, int64_t rows,
                             int64_t block, int64_t keys)
{
    int64_t width = attention_panels(keys);
    for (int64_t r = 0; r < rows; r++) {
        float *row = head->logits + r * ATTENTION_STRIDE;
        if (head->bias == NULL) {
            memset(row, 0, (size_t)width * sizeof(float));
            continue;
        }
        const float *bias = head->bias + block - (first + r);
        float gate = attention_gate(head, a, first + r);
        for (int64_t j = 0; j < width; j += VL)
            vf_store(row + j, gate * vf_load(bias + j));
    }
    const float *k_rows = head->k_rows + block * head->dim;
    if (head->products)
        attention_words_product(head->products, rows, width, attention_words(head->products, head->dim), head->query,
                                head->query_stride, k_rows, head->dim * ATTENTION_NR, head->logits, ATTENTION_STRIDE);
    else
        attention_product(rows, width, head->dim, head->query, head->dim, 1, k_rows, head->dim * ATTENTION_NR,
                          head->logits, ATTENTION_STRIDE);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = keys; j < width; j++)
            head->logits[r * ATTENTION_STRIDE + j] = -INFINITY;
}

/* row[j] = e^(row[j] - m'), m' = max(m, row); l and the output row follow. */
static void attention_softmax(float *row, int64_t width, float *m, float *l, float *out, int64_t columns)
{
    vf largest = vf_set(*m), sum = {0};
    for (int64_t j = 0; j < width; j += VL)
        largest = vf_max(vf_load(row + j), largest);
    float top = vf_max_element(largest), shrink = vf_exp(vf_set(*m - top))[0];
    for (int64_t j = 0; j < width; j += VL) {
        vf p = vf_exp(vf_load(row + j) - top);
        vf_store(row + j, p);
        sum += p;
    }
    *l = *l * shrink + vf_sum(sum);
    if (shrink != 1.0f)
        for (int64_t d = 0; d < columns; d += VL)
            vf_store(out + d, vf_load(out + d) * shrink);
    *m = top;
}

/* The tile's output += its numerators (rows, keys) times V from key `block` on. */
static void attention_sum_values(struct attention_head *head, int64_t rows, int64_t block, int64_t keys)
{
    const struct gd_gemm_kernels *products = head->products;
    const int64_t panel = head->keys * ATTENTION_NR;
    if (products == NULL) {
        attention_product(rows, head->columns, keys, head->logits, ATTENTION_STRIDE, 1,
                          head->v_columns + block * ATTENTION_NR, panel, head->out, head->columns);
        return;
    }
    for (int64_t r = 0; r < rows; r++)
        products->convert(keys, head->logits + r * ATTENTION_STRIDE, head->logits + r * ATTENTION_STRIDE);
    attention_words_product(products, rows, head->columns, attention_words(products, keys), head->logits,
                            ATTENTION_STRIDE, head->v_columns + block / products->elements * ATTENTION_NR, panel,
                            head->out, head->columns);
}

/* Rows begin .. end - 1 of one utterance's output in head h. */
static void attention(const struct gd_attention *a, const struct gd_gemm_kernels *products, int64_t utterance,
                      int64_t h, int64_t begin, int64_t end, float *scratch)
{
    struct attention_head head;
    attention_open(&head, a, products, utterance, h, 0, scratch);
    for (int64_t first = begin; first < end; first += ATTENTION_ROWS) {
        int64_t rows = end - first < ATTENTION_ROWS ? end - first : ATTENTION_ROWS;
        float m[ATTENTION_ROWS], l[ATTENTION_ROWS];
        for (int64_t r = 0; r < rows; r++) {
            m[r] = -INFINITY;
            l[r] = 0;
        }
        memset(head.out, 0, (size_t)(rows * head.columns) * sizeof(float));
        attention_load_queries(&head, a, first, rows);
        for (int64_t block = 0; block < head.keys; block += ATTENTION_KEYS) {
            int64_t keys = head.keys - block < ATTENTION_KEYS ? head.keys - block : ATTENTION_KEYS;
            attention_logits(&head, a, first, rows, block, keys);
            for (int64_t r = 0; r < rows; r++) {
                float *row = head.logits + r * ATTENTION_STRIDE;
                attention_softmax(row, attention_panels(keys), &m[r], &l[r], head.out + r * head.columns,
                                  head.columns);
                if (head.dropout) {
                    head.mask.frame = (uint32_t)(first + r);
                    dropout(&head.mask, block, keys, row);
                }
            }
            attention_sum_values(&head, rows, block, keys);
        }
        for (int64_t r = 0; r < rows; r++) {
            int64_t row = a->rows->first[utterance] + first + r;
            float *out = a->out + row * a->ldout + h * head.dim;
            for (int64_t d = 0; d < head.dim; d += VL)
                vf_store_left(out + d, vf_load(head.out + r * head.columns + d) / l[r], head.dim - d);
            if (a->lse)
                a->lse[row * a->heads + h] = m[r] + logf(l[r]);
        }
    }
}

#endif
