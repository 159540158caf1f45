"""The configuration of a model: WavLM's and S3PRL's field names, checked once, then frozen.

The same fields are the JSON in a checkpoint, the keyword arguments of `Config` and the keys of a YAML file.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any

from .conv_layers import MAX_CONV_LAYERS, parse_conv_feature_layers
from .presets import PRESETS

ARCHITECTURES = ("generative", "self_hidden", "multi_head", "encoder")
EXTRACTOR_MODES = ("default", "layer_norm")
POSITIONS = ("once", "every_step")
PADDINGS = ("exact", "s3prl")

BASE_CONV_LAYERS = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2
# Bounds of csrc/gendistiller.h and csrc/config.c.
MAX_TARGETS = 64
MAX_LAYERS = 1024
MAX_WIDTH = 65536
MAX_KERNEL = 4096
MAX_DISTANCE = 1 << 20


def describe(value: Any) -> str:
    """Type and value for a message: short whatever the value is, as a file's nested tuples can be endless."""
    kind = type(value).__name__
    if isinstance(value, (str, int, float)):
        return f"{kind} {value!r}"[:200]
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def _int(name: str, value: Any, low: int, high: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected int, got {describe(value)}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {number}")
    return number


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


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    expected = ", ".join(repr(choice) for choice in choices)
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {expected}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")
    return str(value)


def _conv_feature_layers(value: Any) -> tuple[tuple[int, int, int], ...]:
    name = "conv_feature_layers"
    if isinstance(value, str):
        value = parse_conv_feature_layers(value)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected ((dim, kernel, stride), ...) or a string, got {describe(value)}")
    if not 1 <= len(value) <= MAX_CONV_LAYERS:
        raise ValueError(f"{name}: expected 1 to {MAX_CONV_LAYERS} layers, got {len(value)}")
    layers = []
    for i, layer in enumerate(value):
        if not isinstance(layer, (tuple, list)) or len(layer) != 3:
            raise TypeError(f"{name}[{i}]: expected (dim, kernel, stride), got {describe(layer)}")
        layers.append(tuple(_int(f"{name}[{i}].{part}", number, 1, MAX_WIDTH if part == "dim" else MAX_KERNEL)
                            for part, number in zip(("dim", "kernel", "stride"), layer)))
    return tuple(layers)


def _target_layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"target_layers: expected a tuple of ints, got {describe(value)}")
    if len(value) > MAX_TARGETS:
        raise ValueError(f"target_layers: expected at most {MAX_TARGETS} layers, got {len(value)}")
    layers = tuple(_int(f"target_layers[{i}]", layer, 0, MAX_LAYERS) for i, layer in enumerate(value))
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"target_layers: expected rising layers, got {layers}")
    return layers


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
    encoder_layers      blocks; 1 where generative
    encoder_embed_dim, encoder_ffn_embed_dim, encoder_attention_heads
    layer_norm_first    pre-norm blocks (encoder only)
    conv_pos, conv_pos_groups           kernel and groups of the positional convolution
    relative_position_embedding, gru_rel_pos, num_buckets, max_distance     WavLM's bias and its gate
    normalize           zero mean, unit variance for each utterance's samples
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

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "architecture": _choice("architecture", self.architecture, ARCHITECTURES),
            "extractor_mode": _choice("extractor_mode", self.extractor_mode, EXTRACTOR_MODES),
            "position": _choice("position", self.position, POSITIONS),
            "padding": _choice("padding", self.padding, PADDINGS),
            "conv_feature_layers": _conv_feature_layers(self.conv_feature_layers),
            "target_layers": _target_layers(self.target_layers),
            "encoder_layers": _int("encoder_layers", self.encoder_layers, 1, MAX_LAYERS),
            "feature_grad_mult": _float("feature_grad_mult", self.feature_grad_mult),
            "max_distance": _int("max_distance", self.max_distance, 2, MAX_DISTANCE),
            "num_buckets": _int("num_buckets", self.num_buckets, 4, MAX_WIDTH),
        }
        for name in ("encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads", "conv_pos",
                     "conv_pos_groups"):
            checked[name] = _int(name, getattr(self, name), 1, MAX_WIDTH)
        for name in ("conv_bias", "feature_layer_norm", "layer_norm_first", "relative_position_embedding",
                     "gru_rel_pos", "normalize", "skip_connection", "output_layer", "cross_attention"):
            checked[name] = _bool(name, getattr(self, name))
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            checked[name] = _float(name, getattr(self, name))
            if not 0 <= checked[name] < 1:
                raise ValueError(f"{name}: expected 0 <= p < 1, got {checked[name]}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_together()

    def _check_together(self) -> None:
        if self.feature_grad_mult < 0:
            raise ValueError(f"feature_grad_mult: expected >= 0, got {self.feature_grad_mult}")
        for name in ("encoder_attention_heads", "conv_pos_groups"):
            if self.encoder_embed_dim % getattr(self, name):
                raise ValueError(f"{name}: expected a divisor of encoder_embed_dim {self.encoder_embed_dim}, "
                                 f"got {getattr(self, name)}")
        if self.conv_bias and self.extractor_mode == "default":
            raise ValueError("conv_bias: expected False with extractor_mode 'default', got True")
        if self.gru_rel_pos and not self.relative_position_embedding:
            raise ValueError("gru_rel_pos: expected False without relative_position_embedding, got True")
        if self.relative_position_embedding and self.max_distance <= self.num_buckets // 4:
            raise ValueError(f"max_distance: expected more than num_buckets / 4 = {self.num_buckets // 4}, "
                             f"got {self.max_distance}")

        kind = f"for architecture {self.architecture!r}"
        if self.architecture == "generative":
            if self.encoder_layers != 1:
                raise ValueError(f"encoder_layers: expected 1 {kind}, got {self.encoder_layers}")
        else:
            fixed = {"skip_connection": False, "cross_attention": False, "position": "once",
                     "output_layer": self.architecture == "multi_head"}
            for name, expected in fixed.items():
                if getattr(self, name) != expected:
                    raise ValueError(f"{name}: expected {expected!r} {kind}, got {getattr(self, name)!r}")
        if self.layer_norm_first and self.architecture != "encoder":
            raise ValueError(f"layer_norm_first: expected False {kind}, got True")

        targets = len(self.target_layers)
        if self.architecture == "encoder":
            if targets:
                raise ValueError(f"target_layers: expected () {kind}, got {self.target_layers}")
        elif self.architecture == "self_hidden":
            layers = self.encoder_layers
            if targets not in (layers, layers + 1):
                raise ValueError(f"target_layers: expected {layers} or {layers + 1} layers {kind} with "
                                 f"{layers} encoder_layers, got {self.target_layers}")
        elif not targets:
            raise ValueError(f"target_layers: expected at least one layer {kind}, got ()")

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
        return cls(**PRESETS[_choice("preset", name, tuple(PRESETS))])

    @classmethod
    def presets(cls) -> tuple[str, ...]:
        """Names that `Config.preset` takes: the rows of the paper's tables, then the teachers."""
        return tuple(PRESETS)


def parameter_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every parameter tensor's name in a checkpoint and its shape, in the checkpoint's order."""
    dim, heads, ffn = config.encoder_embed_dim, config.encoder_attention_heads, config.encoder_ffn_embed_dim
    shapes: dict[str, tuple[int, ...]] = {}

    def weight_bias(name: str, *weight: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def attention(name: str) -> None:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weight_bias(f"{name}.{part}", dim, dim)

    channels = 1
    for i, (width, kernel, _) in enumerate(config.conv_feature_layers):
        name = f"feature_extractor.conv_layers.{i}"
        weight_bias(f"{name}.0", width, channels, kernel, bias=config.conv_bias)
        if config.extractor_mode == "layer_norm":
            weight_bias(f"{name}.2.1", width)
        elif i == 0:
            weight_bias(f"{name}.2", width)
        channels = width
    if config.feature_layer_norm:
        weight_bias("layer_norm", channels)
    if channels != dim:
        weight_bias("post_extract_proj", dim, channels)

    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, config.conv_pos)
    shapes["encoder.pos_conv.0.weight_v"] = (dim, dim // config.conv_pos_groups, config.conv_pos)
    shapes["encoder.pos_conv.0.bias"] = (dim,)
    weight_bias("encoder.layer_norm", dim)

    for i in range(config.encoder_layers):
        name = f"encoder.layers.{i}"
        attention(f"{name}.self_attn")
        if config.gru_rel_pos:
            weight_bias(f"{name}.self_attn.grep_linear", 8, dim // heads)
            shapes[f"{name}.self_attn.grep_a"] = (1, heads, 1, 1)
        if config.relative_position_embedding and i == 0:
            shapes[f"{name}.self_attn.relative_attention_bias.weight"] = (config.num_buckets, heads)
        weight_bias(f"{name}.self_attn_layer_norm", dim)
        if config.cross_attention:
            attention(f"{name}.cross_attn")
            weight_bias(f"{name}.cross_attn_layer_norm", dim)
        weight_bias(f"{name}.fc1", ffn, dim)
        weight_bias(f"{name}.fc2", dim, ffn)
        weight_bias(f"{name}.final_layer_norm", dim)

    if config.architecture == "multi_head":
        # S3PRL's "expand-last": one hidden layer as wide as all heads, then a matrix (in, out) for each.
        targets = len(config.target_layers)
        weight_bias("output_layer.0", targets * dim, dim)
        shapes["output_layer.2.weight"] = (targets, dim, dim)
        shapes["output_layer.2.bias"] = (1, 1, targets, dim)
    elif config.output_layer:
        weight_bias("output_layer.0", dim, dim)
        weight_bias("output_layer.2", dim, dim)
    return shapes
