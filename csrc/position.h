/*
 * position.h - T5's buckets of relative positions, as WavLM has them.
 */
#ifndef GD_POSITION_H
#define GD_POSITION_H

#include <math.h>

#include "gendistiller.h"

/* The bucket of offset d, key minus query. WavLM computes it in float32: half of the buckets are for d > 0; in each
 * half distances below `exact` have their own, longer ones share logarithmically, and the last takes all from
 * max_distance on. So offsets that share a bucket are neighbours of the same sign. */
static inline int64_t gd_position_bucket(const gd_config *config, int64_t d)
{
    int64_t half = config->num_buckets / 2, exact = half / 2, distance = d < 0 ? -d : d;
    int64_t first = d > 0 ? half : 0;
    if (distance < exact)
        return first + distance;
    float position = (float)log((double)((float)distance / (float)exact));
    position = position / (float)log((double)config->max_distance / (double)exact);
    int64_t shared = exact + (int64_t)(position * (float)(half - exact));
    return first + (shared < half - 1 ? shared : half - 1);
}

#endif
