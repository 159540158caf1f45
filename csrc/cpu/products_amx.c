/*
 * products_amx.c - products in AMX's tile registers (Intel, Architecture Instruction Set Extensions Programming
 * Reference, chapter "AMX").
 *
 * A register holds 16 rows of 16 words. The words of both factors lie as the other tiles' do (gemm_tile_template.h):
 * one instruction multiplies 16 words of 16 rows by as many words of 16 columns. In bfloat16 it adds up even and odd
 * elements apart before it adds both to the sums, and takes denormal numbers for zeros.
 */
#define GD_ISA_AMX
#include "isa.h"

#if defined(GD_TARGET)
GD_ISA_BEGIN
#include "pairs_template.h"

enum { AMX_ROWS = 16, AMX_WORDS = 16, TILE_ROWS = 2 * AMX_ROWS };
_Static_assert(TILE_ROWS <= GEMM_MOST_MR && GEMM_NR == 2 * AMX_WORDS, "a gd_gemm_tile is two registers by two");

/* Registers: sums of the upper 16 rows and of the lower, of either vector of columns; the rows; the columns. */
#define UPPER_0 0
#define UPPER_1 1
#define LOWER_0 2
#define LOWER_1 3
#define ROWS_UPPER 4
#define ROWS_LOWER 5
#define COLUMNS_0 6
#define COLUMNS_1 7

/* GCC does not know what AMX's intrinsics read: all that was stored before this is there for them. */
GD_INLINE void written(void)
{
    __asm__ volatile("" ::: "memory");
}

/* Rows that the registers of this thread are shaped for; 0: they are not in use. Shaping them takes as long as a fifth
 * of a tile. */
static _Thread_local int shaped;

static void shape(int rows)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    const int upper = rows < AMX_ROWS ? rows : AMX_ROWS, lower = rows - upper;
    config.rows[UPPER_0] = config.rows[UPPER_1] = config.rows[ROWS_UPPER] = (uint8_t)upper;
    config.rows[LOWER_0] = config.rows[LOWER_1] = config.rows[ROWS_LOWER] = (uint8_t)lower;
    config.rows[COLUMNS_0] = config.rows[COLUMNS_1] = AMX_WORDS;
    for (int i = 0; i < 8; i++)
        config.row_bytes[i] = config.rows[i] > 0 ? AMX_WORDS * sizeof(float) : 0;
    written();
    _tile_loadconfig(&config);
    shaped = rows;
}

static void release(void)
{
    if (shaped)
        _tile_release();
    shaped = 0;
}

#define MULTIPLY_ADD(precision, sum, rows, columns) \
    do { \
        if ((precision) == GD_INT8) \
            _tile_dpbusd(sum, rows, columns); \
        else \
            _tile_dpbf16ps(sum, rows, columns); \
    } while (0)

/* Sums += AMX_WORDS words of a and b. lower, wide: there are rows for the lower registers; two vectors of columns.
 * Columns serve many tiles, and rows go by: streamed, they leave the columns in the first cache. */
GD_INLINE void multiply_add(const enum gd_precision precision, const int lower, const int wide, const float *a,
                            int64_t a_row, const float *b, int64_t b_row)
{
    const int64_t a_bytes = a_row * (int64_t)sizeof *a, b_bytes = b_row * (int64_t)sizeof *b;
    _tile_stream_loadd(ROWS_UPPER, a, a_bytes);
    _tile_loadd(COLUMNS_0, b, b_bytes);
    MULTIPLY_ADD(precision, UPPER_0, ROWS_UPPER, COLUMNS_0);
    if (wide) {
        _tile_loadd(COLUMNS_1, b + VL, b_bytes);
        MULTIPLY_ADD(precision, UPPER_1, ROWS_UPPER, COLUMNS_1);
    }
    if (lower) {
        _tile_stream_loadd(ROWS_LOWER, a + AMX_ROWS * a_row, a_bytes);
        MULTIPLY_ADD(precision, LOWER_0, ROWS_LOWER, COLUMNS_0);
        if (wide)
            MULTIPLY_ADD(precision, LOWER_1, ROWS_LOWER, COLUMNS_1);
    }
}

/* The last words of a K that is no multiple of AMX_WORDS, with zeros behind them. */
GD_INLINE void multiply_add_rest(const enum gd_precision precision, const int lower, const int wide, int rows,
                                 int64_t k, const float *a, int64_t a_row, const float *b, int64_t b_row)
{
    _Alignas(64) float a_words[TILE_ROWS * AMX_WORDS], b_words[AMX_WORDS * GEMM_NR] = {0};
    for (int r = 0; r < rows; r++)
        vf_store(a_words + r * AMX_WORDS, vf_load_left(a + r * a_row, k));
    for (int64_t p = 0; p < k; p++)
        for (int v = 0; v <= wide; v++)
            vf_store(b_words + p * GEMM_NR + v * VL, vf_load(b + p * b_row + v * VL));
    written();
    multiply_add(precision, lower, wide, a_words, AMX_WORDS, b_words, GEMM_NR);
}

/* _tile_loadd() or _tile_stored() of the sums in use, from or to t. */
#define EACH_SUM(instruction, lower, wide, t) \
    do { \
        enum { BYTES = GEMM_NR * sizeof *(t) }; \
        instruction(UPPER_0, t, BYTES); \
        if (wide) \
            instruction(UPPER_1, (t) + VL, BYTES); \
        if (lower) \
            instruction(LOWER_0, (t) + AMX_ROWS * GEMM_NR, BYTES); \
        if ((lower) && (wide)) \
            instruction(LOWER_1, (t) + AMX_ROWS * GEMM_NR + VL, BYTES); \
    } while (0)

GD_INLINE void zero_sums(const int lower, const int wide)
{
    _tile_zero(UPPER_0);
    if (wide)
        _tile_zero(UPPER_1);
    if (lower)
        _tile_zero(LOWER_0);
    if (lower && wide)
        _tile_zero(LOWER_1);
}

/* A gd_gemm_tile. packed: a is what pack_a() wrote. */
GD_INLINE void amx_tile_of(const enum gd_precision precision, const int packed, const int lower, const int wide,
                           int rows, int64_t k, const float *a, int64_t a_row, const float *b, int64_t b_row, float *t,
                           int add)
{
    _Alignas(64) float sums[TILE_ROWS * GEMM_NR];
    const int int8 = precision == GD_INT8;
    const int64_t a_step = packed ? TILE_ROWS * AMX_WORDS : AMX_WORDS; /* from a row's words to its next */
    int64_t p = 0;
    written();
    if (add && !int8)
        EACH_SUM(_tile_loadd, lower, wide, t);
    else
        zero_sums(lower, wide);
    for (; p + AMX_WORDS <= k; p += AMX_WORDS, a += a_step, b += AMX_WORDS * b_row)
        multiply_add(precision, lower, wide, a, packed ? AMX_WORDS : a_row, b, b_row);
    if (p < k)
        multiply_add_rest(precision, lower, wide, rows, k - p, a, packed ? k - p : a_row, b, b_row);
    if (!int8) {
        EACH_SUM(_tile_stored, lower, wide, t);
        return;
    }
    EACH_SUM(_tile_stored, lower, wide, sums);
    a += k - p;
    b += (k - p) * b_row;
    for (int r = 0; r < rows; r++, a += a_row)
        for (int v = 0; v <= wide; v++) {
            float *to = t + r * GEMM_NR + v * VL;
            const vf sum = gemm_scale_sum(vf_load(sums + r * GEMM_NR + v * VL), vf_set(a[0]), vf_set(a[1]),
                                          vf_load(b + v * VL));
            vf_store(to, add ? vf_load(to) + sum : sum);
        }
}

GD_INLINE void amx_tile(const enum gd_precision precision, const int packed, int rows, int vectors, int64_t k,
                        const float *a, int64_t a_row, const float *b, int64_t b_row, float *t, int add)
{
    if (shaped != rows)
        shape(rows);
    if (rows <= AMX_ROWS && vectors == 1)
        amx_tile_of(precision, packed, 0, 0, rows, k, a, a_row, b, b_row, t, add);
    else if (rows <= AMX_ROWS)
        amx_tile_of(precision, packed, 0, 1, rows, k, a, a_row, b, b_row, t, add);
    else if (vectors == 1)
        amx_tile_of(precision, packed, 1, 0, rows, k, a, a_row, b, b_row, t, add);
    else
        amx_tile_of(precision, packed, 1, 1, rows, k, a, a_row, b, b_row, t, add);
}

static void bfloat16_tile(int rows, int vectors, int64_t k, const float *a, int64_t a_row, const float *b,
                          int64_t b_row, float *t, int add)
{
    amx_tile(GD_BFLOAT16, 0, rows, vectors, k, a, a_row, b, b_row, t, add);
}

static void int8_tile(int rows, int vectors, int64_t k, const float *a, int64_t a_row, const float *b,
                      int64_t b_row, float *t, int add)
{
    amx_tile(GD_INT8, 0, rows, vectors, k, a, a_row, b, b_row, t, add);
}

static void bfloat16_packed_tile(int rows, int vectors, int64_t k, const float *a, int64_t a_row, const float *b,
                                 int64_t b_row, float *t, int add)
{
    amx_tile(GD_BFLOAT16, 1, rows, vectors, k, a, a_row, b, b_row, t, add);
}

/* 16 rows of 16 words, turned: word i of row j becomes word j of row i. */
GD_INLINE void transpose(__m512i row[AMX_ROWS])
{
    __m512i t[AMX_ROWS];
    for (int i = 0; i < AMX_ROWS; i += 2) {
        t[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    /* row[i + j]: words j, j + 4, j + 8 and j + 12 of rows i .. i + 3 */
    for (int i = 0; i < AMX_ROWS; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    /* t[8 h + 4 i + j]: words j + 8 h and j + 8 h + 4, of rows 8 i .. 8 i + 7 */
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            t[4 * i + j] = _mm512_shuffle_i32x4(row[8 * i + j], row[8 * i + 4 + j], 0x44);
            t[8 + 4 * i + j] = _mm512_shuffle_i32x4(row[8 * i + j], row[8 * i + 4 + j], 0xee);
        }
    for (int h = 0; h < 2; h++)
        for (int j = 0; j < 4; j++) {
            row[8 * h + j] = _mm512_shuffle_i32x4(t[8 * h + j], t[8 * h + 4 + j], 0x88);
            row[8 * h + 4 + j] = _mm512_shuffle_i32x4(t[8 * h + j], t[8 * h + 4 + j], 0xdd);
        }
}

/* As pack_pairs_a(), but for a whole K and in tiles of TILE_ROWS rows: to[depth / AMX_WORDS, TILE_ROWS, AMX_WORDS], of
 * which the last has as many words a row as are left. */
static void pack_a(int64_t k, int64_t rows, const float *a, int64_t a_col, int64_t depth, float *to)
{
    for (int64_t r = 0; r < rows; r += TILE_ROWS)
        for (int64_t p = 0; p < depth; p += AMX_WORDS) {
            const int64_t words = gd_smaller(depth - p, AMX_WORDS);
            for (int64_t i = r; i < r + TILE_ROWS && i < rows; i += AMX_ROWS) {
                __m512i row[AMX_ROWS];
                for (int64_t e = 2 * p, j = 0; j < AMX_ROWS; j++, e += 2)
                    row[j] = e < k ? (__m512i)pair_word(a + e * a_col + i, e + 1 < k ? a + (e + 1) * a_col + i : NULL,
                                                        rows - i)
                                   : _mm512_setzero_si512();
                transpose(row);
                for (int j = 0; j < AMX_ROWS && i + j < rows; j++)
                    vf_store_left(to + r * depth + p * TILE_ROWS + (i - r + j) * words, (vf)row[j], words);
            }
        }
}

const struct gd_gemm_kernels gd_bfloat16_amx = {
    .elements = 2, .rows = TILE_ROWS, .tile = bfloat16_tile, .packed_tile = bfloat16_packed_tile, .release = release,
    .convert = round_pairs, .pack_b = pack_pairs_b, .pack_a = pack_a,
};

const struct gd_gemm_kernels gd_int8_amx = {
    .elements = 4, .rows = TILE_ROWS, .tile = int8_tile, .release = release,
    .convert = round_int8, .convert_within = round_int8_within,
};
GD_ISA_END
#endif
