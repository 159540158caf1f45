/*
 * pack.h - a model's parameters brought to its device, and its weights packed there.
 */
#ifndef GD_PACK_H
#define GD_PACK_H

#include "model.h"

/* Uploads and packs the parameters if they, or the precision, changed since the last time. */
gd_status gd_model_pack(gd_model *model, enum gd_precision precision);

#endif
