"""The configuration of a model: WavLM's and S3PRL's field names, checked once, then frozen.

The same fields are the JSON in a checkpoint, the keyword arguments of `Config` and the keys of a YAML file. Types,
defaults and presets are here; what the fields have to be, and what follows from them, is in csrc/config.c.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from . import _core
from .conv_layers import parse_conv_feature_layers
from .presets import PRESETS

Precision = Literal["float32", "bfloat16", "int8"]  # of matrix products

BASE_CONV_LAYERS = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2


def describe(value: Any) -> str:
    """Type and value for a message: short whatever the value is, as a file's nested tuples can be endless."""
    kind = type(value).__name__
    if isinstance(value, (str, int, float)):
        return f"{kind} {value!r}"[:200]
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def _int(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected int, got {describe(value)}") from None


def _float(name: str, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected float, got {describe(value)}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{name}: expected float, got {describe(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def _bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name}: expected bool, got {describe(value)}")


def _str(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected str, got {describe(value)}")
    return str(value)


def _conv_feature_layers(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    if isinstance(value, str):
        value = parse_conv_feature_layers(value)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected ((dim, kernel, stride), ...) or a string, got {describe(value)}")
    for i, layer in enumerate(value):
        if not isinstance(layer, (tuple, list)) or len(layer) != 3:
            raise TypeError(f"{name}[{i}]: expected (dim, kernel, stride), got {describe(layer)}")
    return tuple(tuple(_int(f"{name}[{i}].{part}", number) for part, number in zip(("dim", "kernel", "stride"), layer))
                 for i, layer in enumerate(value))


def _target_layers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a tuple of ints, got {describe(value)}")
    return tuple(_int(f"{name}[{i}]", layer) for i, layer in enumerate(value))


_COERCE = {"str": _str, "bool": _bool, "int": _int, "float": _float, "tuple[int, ...]": _target_layers,
           "tuple[tuple[int, int, int], ...]": _conv_feature_layers}


@dataclasses.dataclass(frozen=True)
class Config:
    """A model's configuration; the defaults are the `gendistiller` preset.

    Raises TypeError or ValueError that names the field, what was expected and what came. Lists become tuples.
    `dataclasses.replace(config, field=value)` makes a changed copy, checked again.

    architecture        "generative" (h[l] = O(F(h[l-1]) + h[l-1])), "self_hidden", "multi_head" or "encoder"
    extractor_mode      "default" (GroupNorm after the first convolution) or "layer_norm" (after each)
    conv_feature_layers ((dim, kernel, stride), ...), or fairseq's string form
    conv_bias           whether the extractor's convolutions have a bias ("layer_norm" only)
    feature_layer_norm  LayerNorm over the extractor's channels before post_extract_proj
    feature_projection  post_extract_proj also where the extractor is as wide as the encoder (transformers has it there,
                        S3PRL and fairseq don't); else it is there where the widths differ
    encoder_layers      blocks; 1 where generative
    encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads
    layer_norm_first    pre-norm blocks (encoder only)
    conv_pos, conv_pos_groups           kernel and groups of the positional convolution
    relative_position_embedding, gru_rel_pos, num_buckets, max_distance     WavLM's bias and its gate
    normalize           zero mean, unit variance for each utterance's samples
    normalize_eps       added to that variance: 1e-5 in fairseq and unilm, 1e-7 in transformers
    dropout, attention_dropout, activation_dropout      probabilities in training, 0 <= p < 1
    feature_grad_mult   scale of the extractor's gradients; 0 skips its backward
    skip_connection, output_layer       the + h[l-1] and the O of a generative model
    cross_attention     each step also attends to the feature embedding (generative only)
    position            "once" or "every_step" (generative only)
    target_layers       the teacher's layers to predict, rising (0: its first block's input); () for encoder
    padding             "exact" (a batch equals its utterances alone) or "s3prl"
    """

    architecture: str = "generative"
    extractor_mode: str = "default"
    conv_feature_layers: tuple[tuple[int, int, int], ...] = BASE_CONV_LAYERS
    conv_bias: bool = False
    feature_layer_norm: bool = True
    feature_projection: bool = False
    encoder_layers: int = 1
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_attention_heads: int = 12
    layer_norm_first: bool = False
    conv_pos: int = 128
    conv_pos_groups: int = 16
    relative_position_embedding: bool = True
    gru_rel_pos: bool = True
    num_buckets: int = 320
    max_distance: int = 800
    normalize: bool = False
    normalize_eps: float = 1e-5
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1
    feature_grad_mult: float = 0.1
    skip_connection: bool = True
    output_layer: bool = True
    cross_attention: bool = False
    position: str = "once"
    target_layers: tuple[int, ...] = (4, 8)
    padding: str = "exact"

    _facts: ClassVar[_core.ConfigFacts]  # of each config: no field, and so no part of its equality

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _COERCE[str(field.type)](field.name, getattr(self, field.name)))
        object.__setattr__(self, "_facts", _core.config_facts(self.to_json()))

    @property
    def min_samples(self) -> int:
        """Samples of the shortest utterance that has a frame."""
        return self._facts.min_samples

    @property
    def hop(self) -> int:
        """Samples from frame to frame."""
        return self._facts.hop

    @property
    def num_states(self) -> int:
        """Hidden states of a forward pass (teachers: block 0's input included)."""
        return self._facts.num_states

    @property
    def num_params(self) -> int:
        """Parameters of the model."""
        return self._facts.num_params

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter tensor's name in a checkpoint and its shape, in the checkpoint's order."""
        return _core.config_tensors(self.to_json())

    def to_json(self) -> str:
        """The fields as the JSON that a checkpoint holds."""
        return json.dumps(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """All fields as what JSON can hold (tuples become lists); `Config.from_dict` takes it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["conv_feature_layers"] = [list(layer) for layer in self.conv_feature_layers]
        values["target_layers"] = list(self.target_layers)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """A Config from a mapping of fields; missing ones keep their default, unknown ones are an error."""
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a mapping of fields, got {describe(values)}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ValueError(f"config: unknown {'field' if len(unknown) == 1 else 'fields'} "
                             f"{', '.join(map(repr, unknown[:20]))}")
        return cls(**values)

    @classmethod
    def preset(cls, name: str) -> Config:
        """A named configuration: see `Config.presets()`."""
        if _str("preset", name) not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(map(repr, PRESETS))}, got {name!r}")
        return cls(**PRESETS[name])

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that `Config.preset` takes: the rows of the paper's tables, then the teachers."""
        return tuple(PRESETS)
