/*
 * checkpoint_tensors.h - the tensors of a safetensors file whose header is read.
 */
#ifndef GD_CHECKPOINT_TENSORS_H
#define GD_CHECKPOINT_TENSORS_H

#include "checkpoint_reader.h"

/* The tensors' values, once the header is read: entries into reader->entries, checked against the model and the file's
 * length, then the values into the model's parameters. */
gd_status gd_read_tensors(struct reader *reader, gd_model *model);

#endif
