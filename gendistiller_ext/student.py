"""A student made after its teacher: its config, and what it takes over from the teacher's weights."""
from __future__ import annotations

import dataclasses
from typing import Any, Mapping

import numpy as np

from .config import Config

# What a student has in common with its teacher, unless preset or user say otherwise.
SHARED_FIELDS = (
    "extractor_mode", "conv_feature_layers", "conv_bias", "feature_layer_norm", "feature_projection",
    "encoder_embed_dim",
    "encoder_ffn_embed_dim", "encoder_attention_heads", "conv_pos", "conv_pos_groups", "num_buckets",
    "max_distance", "normalize", "normalize_eps")


def student_config(preset: str, teacher, overrides: Mapping[str, Any] = {}):
    """Config of the student `preset` in the teacher's sizes.

    A shared field in which the preset differs from `gendistiller` (such as table4_ffn2048's width) is what
    the preset is about and stays. `overrides` (field -> value) come last. Raises ValueError for a preset
    that is a teacher, for a target that the teacher lacks, and for frames or widths that can't be compared.
    """
    config, base = Config.preset(preset), Config.preset("gendistiller")
    if config.architecture == "encoder":
        raise ValueError(f"preset: expected a student, got the teacher {preset!r}")
    shared = {name: getattr(teacher, name) for name in SHARED_FIELDS
              if getattr(config, name) == getattr(base, name)}
    config = dataclasses.replace(config, **{**shared, **overrides})
    _check_pair(config, teacher)
    return config


def _check_pair(student, teacher) -> None:
    if not student.target_layers:
        raise ValueError("target_layers: expected the teacher's layers to learn, got none")
    if student.architecture == "encoder":
        raise ValueError("architecture: expected a student's, got 'encoder'")
    for layer in student.target_layers:
        if not 0 <= layer < teacher.num_states:
            raise ValueError(f"target_layers: expected layers from 0 to {teacher.num_states - 1}, which the "
                             f"teacher has, got {layer}")
    if student.encoder_embed_dim != teacher.encoder_embed_dim:
        raise ValueError(f"encoder_embed_dim: expected the teacher's width {teacher.encoder_embed_dim}, "
                         f"got {student.encoder_embed_dim}")
    if (student.min_samples, student.hop) != (teacher.min_samples, teacher.hop):
        raise ValueError(f"conv_feature_layers: expected the teacher's frames of {teacher.min_samples} samples every "
                         f"{teacher.hop}, got {student.min_samples} every {student.hop}")


def init_from_teacher(student, teacher) -> tuple[list[str], list[str]]:
    """Copies every tensor that both have in the same shape: (names copied, names left as they were).

    That is the CNN, the norms, the projection, pos_conv and the first blocks with their attention's gate and
    bias table. A pre-norm teacher's encoder.layer_norm follows its last block, the student's precedes its
    first: it is left as it is.
    """
    source = teacher.params
    other_norm = teacher.config.layer_norm_first != student.config.layer_norm_first
    copied, left = {}, []
    for name, value in student.params.items():
        same = name in source and source[name].shape == value.shape
        if same and not (other_norm and name.startswith("encoder.layer_norm.")):
            copied[name] = np.asarray(source[name])
        else:
            left.append(name)
    student.load_params(copied)
    return sorted(copied), sorted(left)
