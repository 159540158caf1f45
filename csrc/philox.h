/*
 * philox.h - Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random
 * words from a counter of four words and a key of two, and what dropout makes of them.
 *
 * Dropout of the element at `index` of a row draws word index & 3 of the counter
 *
 *     (index >> 2, frame, line, site)      line: the utterance's place in the whole batch; for attention's
 *                                          probabilities, that * heads + head, and index is the key's frame
 *
 * under the key (seed, step), and keeps the element where word / 2^32 >= p. So a mask depends neither on padding
 * nor on how a batch is divided, and is never stored: the backward pass draws it again.
 */
#ifndef GD_PHILOX_H
#define GD_PHILOX_H

#include <stdint.h>

#include "gendistiller.h"

#if defined(__CUDACC__)
#define GD_PHILOX_INLINE static __host__ __device__ __forceinline__
#else
#define GD_PHILOX_INLINE static inline
#endif

#define GD_PHILOX_ROUNDS 10
#define GD_PHILOX_M0 0xD2511F53u
#define GD_PHILOX_M1 0xCD9E8D57u
#define GD_PHILOX_W0 0x9E3779B9u
#define GD_PHILOX_W1 0xBB67AE85u

GD_PHILOX_INLINE void gd_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < GD_PHILOX_ROUNDS; round++) {
        uint64_t p0 = (uint64_t)GD_PHILOX_M0 * c0, p1 = (uint64_t)GD_PHILOX_M1 * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += GD_PHILOX_W0;
        k1 += GD_PHILOX_W1;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* What a row's mask is drawn from: the counter's last three words, the key, the first word that is kept, and
 * what kept elements are multiplied by. */
struct gd_dropout_row {
    uint32_t frame, line, site, key[2];
    uint32_t threshold;
    float scale;
};

/* 0 < p < 1. The key's words are the lower halves of seed and step, with the upper halves, crossed, on top. */
GD_PHILOX_INLINE struct gd_dropout_row gd_dropout_row(double p, const gd_dropout_seed *seed, uint32_t site)
{
    struct gd_dropout_row row;
    double threshold = p * 4294967296.0;
    uint32_t whole = threshold < 4294967295.0 ? (uint32_t)threshold : 4294967294u;
    row.frame = row.line = 0;
    row.site = site;
    row.key[0] = (uint32_t)seed->seed ^ (uint32_t)(seed->step >> 32);
    row.key[1] = (uint32_t)seed->step ^ (uint32_t)(seed->seed >> 32);
    row.threshold = whole + (whole < threshold);
    row.scale = (float)(1 / (1 - p));
    return row;
}

/* What element `index` of the row is multiplied by: scale or 0. */
GD_PHILOX_INLINE float gd_dropout_factor(const struct gd_dropout_row *row, uint32_t index)
{
    const uint32_t counter[4] = {index >> 2, row->frame, row->line, row->site};
    uint32_t words[4];
    gd_philox(counter, row->key, words);
    return words[index & 3] >= row->threshold ? row->scale : 0.0f;
}

#endif
