"""What a model is and costs: its bytes and hash, its parameters by part, its MACs as SUPERB counts them.

Multiply-accumulates (MACs) follow the profiler of the SUPERB challenge at SLT 2022
(github.com/B06901052/DeepSpeed, branch superb-challenge), which counts a PyTorch model's calls:

    linear           rows * in * out
    conv1d           frames out * kernel * in / groups * out; pos_conv makes T + 1 frames, one is dropped
    attention        4 D^2 T for the projections + 2 D T^2 for the products
                     + 4 D T (three biases and the scaling of q) + 4 H T^2 (mask, softmax twice, dropout)
    norms, GELU      none

and sums over 32 utterances of LibriSpeech test-clean, 1.28 to 20.38 s. For HuBERT Base the published sum,
1,669,156,022,848, comes out to the last digit. A native op would be invisible to that profiler, so the
model is counted as the same one written in PyTorch.
"""
from __future__ import annotations

import hashlib
import json
import os
from typing import Any, Optional

import numpy as np

# Samples of the challenge's 32 utterances, as its script lists them.
SUPERB_SAMPLES = (
    20560, 34560, 38480, 42560, 45600, 48720, 52000, 55120, 59120, 62720, 66400, 71200, 75200, 78640, 82800,
    87520, 92720, 98560, 104400, 111120, 118480, 125040, 132720, 142640, 154000, 166720, 180880, 197920, 217920,
    239280, 268160, 326000)

# (part, prefixes of its tensors' names), first match wins; {i} stands for any number.
_PARTS = (("extractor", ("feature_extractor.",)), ("projection", ("layer_norm.", "post_extract_proj.")),
          ("pos_conv", ("encoder.pos_conv.",)), ("encoder norm", ("encoder.layer_norm.",)),
          ("blocks", ("encoder.layers.",)), ("output layer", ("output_layer.",)))


def file_size(path: str) -> int:
    """Bytes of a file, or of the files of a folder."""
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    return os.path.getsize(path)


def model_hash(model) -> str:
    """SHA-256 over the config, and every tensor's name and float32 values: the same weights have the same
    hash, whatever file they came from."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.params.items()):
        digest.update(name.encode() + b"\0")
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return digest.hexdigest()


def parameter_groups(model) -> dict[str, int]:
    """Number of parameters of each part of the model, in the order of the data's way."""
    groups: dict[str, int] = {}
    for name, value in model.params.items():
        part = next((part for part, prefixes in _PARTS if name.startswith(prefixes)), "other")
        groups[part] = groups.get(part, 0) + int(np.asarray(value).size)
    order = [part for part, _ in _PARTS] + ["other"]
    return {part: groups[part] for part in order if part in groups}


def _attention(config, frames: int, relative: bool) -> int:
    width, heads = config.encoder_embed_dim, config.encoder_attention_heads
    total = (4 * width * width * frames + 2 * width * frames * frames
             + 4 * width * frames + 4 * heads * frames * frames)
    if relative and config.relative_position_embedding and config.gru_rel_pos:
        total += frames * width * 8  # grep_linear: H heads of D / H -> 8
    return total


def macs(config, samples: int, num_layers: Optional[int] = None) -> dict[str, int]:
    """MACs of one utterance by part. num_layers: layers generated or blocks run; None: the config's."""
    frames, channels, extractor = samples, 1, 0
    for dim, kernel, stride in config.conv_feature_layers:
        frames = (frames - kernel) // stride + 1
        extractor += frames * channels * dim * kernel
        channels = dim
    width, ffn = config.encoder_embed_dim, config.encoder_ffn_embed_dim
    block = _attention(config, frames, True) + 2 * width * ffn * frames
    if config.cross_attention:
        block += _attention(config, frames, False)
    targets = len(config.target_layers)
    positions, heads = 1, 0
    if config.architecture == "generative":
        steps = targets if num_layers is None else num_layers
        blocks = steps * config.encoder_layers
        heads = steps * 2 * width * width * frames if config.output_layer else 0
        positions = steps if config.position == "every_step" else 1
    else:
        blocks = config.encoder_layers if num_layers is None else num_layers
        if config.architecture == "multi_head":
            heads = 2 * targets * width * width * frames
    return {
        "extractor": extractor,
        "projection": frames * channels * width if channels != width or config.feature_projection else 0,
        "pos_conv": positions * (frames + 1) * width * (width // config.conv_pos_groups) * config.conv_pos,
        "blocks": blocks * block,
        "output layer": heads,
    }


def superb_macs(config) -> dict[str, Any]:
    """{"total": sum over SUPERB's 32 utterances, "per_second": that / their seconds, "parts": per second}."""
    parts: dict[str, int] = {}
    for samples in SUPERB_SAMPLES:
        for part, count in macs(config, samples).items():
            parts[part] = parts.get(part, 0) + count
    seconds = sum(SUPERB_SAMPLES) / 16000
    total = sum(parts.values())
    return {"total": total, "per_second": total / seconds,
            "parts": {part: count / seconds for part, count in parts.items()}}
