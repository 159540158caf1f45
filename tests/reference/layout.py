"""What a checkpoint of a given configuration holds: tensor names, shapes, and random values of unit-scale
activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Mapping

import numpy as np

BASE_CONV = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2

#: The `gendistiller` preset, field by field.
DEFAULTS: dict[str, Any] = {
    "extractor_mode": "default",
    "conv_feature_layers": BASE_CONV,
    "conv_bias": False,
    "feature_layer_norm": True,
    "feature_projection": False,
    "encoder_layers": 1,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "relative_position_embedding": True,
    "gru_rel_pos": True,
    "num_buckets": 320,
    "max_distance": 800,
    "normalize": False,
    "normalize_eps": 1e-5,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "feature_grad_mult": 0.1,
    "architecture": "generative",
    "skip_connection": True,
    "output_layer": True,
    "cross_attention": False,
    "position": "once",
    "target_layers": (4, 8),
    "padding": "exact",
}

#: E[gelu(z)^2] for a standard normal z: what a layer after a GELU divides its weights by.
GELU_POWER = 0.4252


def as_config(config: Any) -> SimpleNamespace:
    """A dict of fields, or an object with `to_dict()`, as attributes; what a dict leaves out comes from
    DEFAULTS."""
    fields = (
        config
        if isinstance(config, Mapping)
        else (vars(config) if isinstance(config, SimpleNamespace) else config.to_dict())
    )
    unknown = set(fields) - set(DEFAULTS)
    if unknown:
        raise KeyError(f"config: unknown fields {sorted(unknown)}")
    merged = SimpleNamespace(**{**DEFAULTS, **fields})
    merged.conv_feature_layers = tuple(tuple(layer) for layer in merged.conv_feature_layers)
    merged.target_layers = tuple(merged.target_layers)
    return merged


def num_frames(config: Any, num_samples: int) -> int:
    """Frames that the convolutions give for `num_samples` samples: t = (n - K) // stride + 1, layer after
    layer."""
    for _, kernel, stride in as_config(config).conv_feature_layers:
        num_samples = (num_samples - kernel) // stride + 1 if num_samples >= kernel else 0
    return num_samples


def param_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape for every parameter of `config`."""
    c = as_config(config)
    width, ffn, heads = c.encoder_embed_dim, c.encoder_ffn_embed_dim, c.encoder_attention_heads
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, size: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)

    def linear(name: str, size_out: int, size_in: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size_out, size_in), (size_out,)

    channels = 1
    for i, (dim, kernel, _) in enumerate(c.conv_feature_layers):
        layer = f"feature_extractor.conv_layers.{i}"
        shapes[f"{layer}.0.weight"] = (dim, channels, kernel)
        if c.conv_bias:
            shapes[f"{layer}.0.bias"] = (dim,)
        if c.extractor_mode == "layer_norm":
            norm(f"{layer}.2.1", dim)
        elif i == 0:
            norm(f"{layer}.2", dim)
        channels = dim
    if c.feature_layer_norm:
        norm("layer_norm", channels)
    if channels != width or c.feature_projection:
        linear("post_extract_proj", width, channels)
    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, c.conv_pos)
    shapes["encoder.pos_conv.0.weight_v"] = (width, width // c.conv_pos_groups, c.conv_pos)
    shapes["encoder.pos_conv.0.bias"] = (width,)
    norm("encoder.layer_norm", width)
    for i in range(c.encoder_layers):
        layer = f"encoder.layers.{i}"
        for proj in "qkv":
            linear(f"{layer}.self_attn.{proj}_proj", width, width)
        linear(f"{layer}.self_attn.out_proj", width, width)
        if c.relative_position_embedding and c.gru_rel_pos:
            linear(f"{layer}.self_attn.grep_linear", 8, width // heads)
            shapes[f"{layer}.self_attn.grep_a"] = (1, heads, 1, 1)
        if c.relative_position_embedding and i == 0:
            shapes[f"{layer}.self_attn.relative_attention_bias.weight"] = (c.num_buckets, heads)
        norm(f"{layer}.self_attn_layer_norm", width)
        if c.cross_attention:
            for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
                linear(f"{layer}.cross_attn.{proj}", width, width)
            norm(f"{layer}.cross_attn_layer_norm", width)
        linear(f"{layer}.fc1", ffn, width)
        linear(f"{layer}.fc2", width, ffn)
        norm(f"{layer}.final_layer_norm", width)
    if c.architecture == "generative" and c.output_layer:
        linear("output_layer.0", width, width)
        linear("output_layer.2", width, width)
    elif c.architecture == "multi_head":
        heads_out = len(c.target_layers)
        linear("output_layer.0", heads_out * width, width)
        shapes["output_layer.2.weight"] = (heads_out, width, width)
        shapes["output_layer.2.bias"] = (1, 1, heads_out, width)
    return shapes


def random_state(config: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 parameters of which none is neutral: weights that keep activations at unit scale,
    biases, gains and gates away from 0 and 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, shape in param_shapes(config).items():
        value = rng.standard_normal(shape)
        leaf = name.rsplit(".", 1)[1]
        if (
            "layer_norm" in name
            or name.endswith((".2.1.weight", ".2.1.bias"))
            or (name.startswith("feature_extractor.conv_layers.0.2."))
        ):
            value = 0.1 * value + (leaf == "weight")
        elif leaf == "bias":
            value *= 0.1
        elif leaf == "grep_a":
            value = 1 + 0.3 * value
        elif "relative_attention_bias" in name:
            value *= 0.5
        elif leaf == "weight_g":
            value = 1 + 0.1 * value
        elif "output_layer.2" in name:
            value *= np.sqrt(1 / (GELU_POWER * shape[1]))
        elif "output_layer.0" in name:
            value *= np.sqrt(1 / (2 * shape[1]))
        else:
            fan_in = np.prod(shape[1:])
            after_gelu = ".fc2." in name or (name.startswith("feature_extractor") and shape[1] > 1)
            value *= np.sqrt(1 / (fan_in * (GELU_POWER if after_gelu else 1)))
        state[name] = value
    weight_v = state["encoder.pos_conv.0.weight_v"]
    state["encoder.pos_conv.0.weight_g"] *= np.sqrt(np.sum(weight_v**2, axis=(0, 1)))
    return {name: np.ascontiguousarray(value, np.float32) for name, value in state.items()}


def random_targets(config: Any, lengths: list[int], seed: int = 0) -> np.ndarray:
    """Float32 (L, B, T, D), each value 3 or more from 0. Near a prediction the L1 term has a kink, where
    rounding turns a whole sign of the gradient over: unit-scale predictions seldom come that far."""
    c = as_config(config)
    shape = (len(c.target_layers), len(lengths), num_frames(c, max(lengths)), c.encoder_embed_dim)
    value = np.random.default_rng(seed).standard_normal(shape)
    return (value + 3 * np.sign(value)).astype(np.float32)


def random_wavs(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """Unit-scale float32 audio, one array a length: noise with a drifting amplitude, a tone and an offset, so
    that statistics over time (means, variances, their padding) matter."""
    rng = np.random.default_rng(seed)
    wavs = []
    for length in lengths:
        t = np.arange(length) / 16000
        tone = np.sin(2 * np.pi * rng.uniform(100, 1000) * t + rng.uniform(0, 6))
        loudness = 0.6 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.5, 3) * t + rng.uniform(0, 6))
        wavs.append((loudness * rng.standard_normal(length) + 0.5 * tone + 0.1).astype(np.float32))
    return wavs
