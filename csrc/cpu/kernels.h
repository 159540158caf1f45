/*
 * kernels.h - the table of kernels that one instruction set provides. Kernels know nothing of threads:
 * the operations beside them (gemm.c, attention.c, ...) divide the outputs and call them.
 *
 * The words of this folder, of a product's outputs y = x w, the numbers those of AVX-512 in float32:
 *
 *            columns of y, panel by panel                  one panel of a block
 *          +--------+--------+--------+--------+          +--------+
 *     rows |   task 0        |   task 1        |          |  tile  | 12 rows x 32 columns of sums, in registers
 *          |  block          |                 |          |  tile  |
 *          |- - - - + - - - -|- - - - + - - - -|          |  ...   |
 *          |  block          |                 |          |  tile  | the last one has fewer rows
 *          +--------+--------+--------+--------+          +--------+
 *
 *     task     an area of the outputs that whoever is free takes next: rows of whole tiles, columns of whole panels
 *     block    up to GEMM_ROWS (192) rows of a task, whose x stays in the second cache while panels go by
 *     panel    gemm_cols (32, two vectors) columns, and the weights for them, packed one behind the other
 *     tile     as many rows as there are registers for (GEMM_MR of gemm_tile_template.h), times a panel's columns
 *     chain    GEMM_CHAIN (256) words of K that a sum takes in one go; chains are added up in ascending order
 *     word     four bytes of K: a float32, two bfloat16 or four int8
 *     group    of rows: FILTER_OUTPUTS (4) that minimal filtering computes together; of channels: pos_conv's, as in
 *              Conv1d(groups)
 *     window   rows that an FFT takes at once
 */
#ifndef GD_CPU_KERNELS_H
#define GD_CPU_KERNELS_H

#include "../backend.h"

/* Most rows of a struct gd_panel. */
#define GEMM_ROWS 192

/* Words of K in one chain of sums (gemm_template.h). */
#define GEMM_CHAIN 256

/* t[rows, gemm_cols] = or += a[rows, k] b[k, columns], words of one precision (gemm_tile_template.h) and one or two
 * vectors of columns: a's rows are a_row words apart, b's b_row. t is float32. */
typedef void gd_gemm_tile(int rows, int vectors, int64_t k, const float *a, int64_t a_row, const float *b,
                          int64_t b_row, float *t, int add);

/* Most rows of any gd_gemm_tile. */
#define GEMM_MOST_MR 32

/* Words that follow a chain's in a row of int8 factors: the row's zero and scale. */
#define GEMM_INT8_WORDS 2

/* Of a row's values and zero. NaN in one where there is NaN in the row. */
struct gd_range {
    float least, greatest;
};

/* What products in one precision are made of. */
struct gd_gemm_kernels {
    int elements; /* of a word */
    int rows;     /* of a tile, at most */
    int filtered; /* convolutions take fewer of these products by minimal filtering, and less time */
    gd_gemm_tile *tile;
    gd_gemm_tile *packed_tile; /* of a left factor that pack_a() wrote; may write all of its `rows` rows of t */
    /* Gives back what the tiles keep in the processor from one to the next; NULL where they keep nothing. */
    void (*release)(void);
    /* Rounds a row of A to `width` elements in whole words, zeros behind the last. */
    void (*convert)(int64_t width, const float *x, float *words);
    /* The same where the row's range is known; NULL where convert() does not ask for it. */
    void (*convert_within)(int64_t width, const float *x, struct gd_range, float *words);
    /* Packs k elements of K or, where products are filtered, a part of a K of `depth` words that begins with whole
     * words: see gemm_template.h. Not with int8. */
    void (*pack_b)(int64_t k, int64_t cols, const float *b, int64_t b_row, int64_t b_col, int64_t depth, float *words);
    void (*pack_a)(int64_t k, int64_t rows, const float *a, int64_t a_col, int64_t depth, float *words);
};

static inline int gd_gemm_is_int8(const struct gd_gemm_kernels *gemm)
{
    return gemm->elements == 4;
}

/* `rows` rows of A times one panel of packed B, and what linear() does to the sums. Pointers and strides
 * as in struct gd_linear, from the block's first row and the panel's first column on. */
struct gd_panel {
    int64_t rows;
    int cols; /* at most gemm_cols */
    int64_t taps, in;
    const struct gd_gemm_kernels *gemm;
    const float *x; /* words of their precision, which `in`, step, tap_stride and b_row count too */
    int64_t step, tap_stride;
    int packed; /* x is what pack_a() wrote, taps 1, step in */
    const float *b; /* packed: (taps * in, cols in whole vectors) */
    int64_t b_row;  /* 0; or the row stride of a b that is not packed, whose rows are readable in whole vectors */
    const float *bias;
    enum gd_activation activation;
    const float *residual;
    int64_t ldresidual;
    float *pre;
    int64_t ldpre;
    float *y;
    int64_t ldy;
};

/* Minimal filtering: so many outputs of a group, from so many products; groups of a block of rows. */
#define FILTER_OUTPUTS GD_ROW_GROUP
#define FILTER_POINTS (FILTER_OUTPUTS + 1)
#define FILTER_GROUPS (GEMM_ROWS / FILTER_OUTPUTS)

/* FILTER_POINTS matrices of a row a group, `matrix` floats apart. */
struct gd_points {
    float *data;
    int64_t ld, matrix;
};

/* Most rows of a window whose FFT is taken. */
#define FFT_MOST 512

/* Tables of the FFT of `size` real rows, a power of two from 16 to FFT_MOST. Angles are -2 pi, over size / 2 and over
 * size. */
struct gd_fft {
    int64_t size;
    int64_t last; /* length of the transforms of the last pass, which has no turns: 8 or 4 */
    int64_t num_turns;
    int rounded; /* weights' spectra are bfloat16 */
    float turns[FFT_MOST];      /* pass by pass, for j < length / 4: w^j, w^2j, w^3j, w of angle 1 / length */
    float split[FFT_MOST / 2 + 2]; /* w^k, k <= size / 4, w of angle 1 / size */
    int32_t place[FFT_MOST / 2]; /* where frequency k of the size / 2 complex rows is: its bits reversed */
};

struct gd_dropout_row;

struct gd_kernels {
    const char *name;
    int vector; /* floats in a vector */

    /* gemm_template.h */
    int gemm_cols; /* of a panel */
    void (*gemm_panel)(const struct gd_panel *);
    struct gd_gemm_kernels gemm[3]; /* by enum gd_precision */
    void (*gemm_column_sums)(int64_t rows, int64_t cols, const float *x, int64_t ldx, float *out);

    /* filter_template.h */
    void (*filter_input)(int64_t rows, int64_t in, const float *x, int64_t ldx, struct gd_points, struct gd_range *);
    void (*filter_output_backward)(int64_t rows, int64_t out, const float *dz, int64_t lddz, struct gd_points);
    void (*filter_weights)(int64_t count, float *u);
    void (*filter_weights_backward)(int64_t count, const float *du, float *dg0, float *dg1);
    void (*filter_panel)(const struct gd_panel *, struct gd_points);
    void (*filter_input_panel)(const struct gd_panel *, struct gd_points, int first);

    /* fft_template.h */
    void (*fft_forward)(const struct gd_fft *, const float *x, int64_t ldx, int64_t begin, int64_t end,
                        int64_t channels, float *to, int64_t stride, int64_t imaginary);
    void (*fft_inverse)(const struct gd_fft *, const float *from, int64_t stride, int64_t imaginary, int64_t first,
                        int64_t added, const struct gd_panel *);
    void (*fft_multiply)(const struct gd_fft *, int64_t rows, int64_t n, const float *x, const float *w, float *y,
                         int64_t row, int64_t imaginary);
    void (*fft_pack)(const struct gd_fft *, int64_t n, int64_t channel, int64_t kernel, const float *w, int64_t w_out,
                     int reversed, float scale, float *to, int64_t stride);

    /* norm_template.h: rows, or columns, begin .. end - 1 */
    void (*layer_norm)(const struct gd_layer_norm *, int64_t begin, int64_t end);
    void (*layer_norm_backward)(const struct gd_layer_norm_backward *, int64_t begin, int64_t end);
    void (*layer_norm_backward_params)(const struct gd_layer_norm_backward *, int64_t begin, int64_t end);

    /* elementwise_template.h, dropout_template.h: one row, or elements begin .. end - 1 */
    void (*activate)(enum gd_activation, int64_t width, const float *z, float *y);
    void (*activate_backward)(enum gd_activation, int64_t width, const float *z, const float *dy, float *dz);
    void (*round_row)(int64_t width, const float *x, uint16_t *to);
    void (*widen_row)(enum gd_activation, int64_t width, const uint16_t *from, float *z, float *y);
    void (*axpby)(int64_t width, float alpha, const float *x, float beta, float *y);
    double (*sum_squares)(size_t count, const float *x);
    void (*adamw)(const struct gd_adamw_update *, size_t begin, size_t end);
    void (*dropout)(const struct gd_dropout_row *, int64_t index, int64_t width, float *x);

    /* moments_template.h: one utterance */
    void (*moments)(const struct gd_moments *);
    void (*normalize)(int64_t samples, float *x, const double *statistics, float eps);

    /* gate_template.h: rows begin .. end - 1, or all; scratch: 4 head_dim floats */
    void (*gate)(const struct gd_gate *, int64_t begin, int64_t end, float *scratch);
    void (*gate_backward)(const struct gd_gate_backward *, float *scratch);

    /* attention_template.h, attention_backward_template.h: one utterance and head, scratch of so many bytes;
     * products: NULL, or those of a precision that the logits and the sums of V are computed in */
    size_t (*attention_scratch)(int64_t head_dim, int64_t longest, int backward);
    void (*attention)(const struct gd_attention *, const struct gd_gemm_kernels *products, int64_t utterance,
                      int64_t head, int64_t begin, int64_t end, float *scratch);
    void (*attention_backward)(const struct gd_attention_backward *, int64_t utterance, int64_t head, float *scratch);

    /* loss_template.h: row r */
    void (*loss_row)(const struct gd_loss_rows *, int64_t r);
};

/* Members of a wider table's gemm[], for processors with an instruction for that precision. */
extern const struct gd_gemm_kernels gd_bfloat16_avx512, gd_bfloat16_amx, gd_int8_avx512, gd_int8_avx2, gd_int8_amx;

extern const struct gd_kernels gd_kernels_generic, gd_kernels_avx2, gd_kernels_avx512, gd_kernels_neon;

/* The best table that the processor, the operating system and GENDISTILLER_DISABLE_CPU allow. */
const struct gd_kernels *gd_kernels_select(void);

#endif
