"""Models of conftest's small configurations on one device: states, loss, gradients, and the weights after a step of
AdamW; some of them in bfloat16. Run as a script, DEVICE OUT.npz: what an emulated device gives, in a process that has
it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TESTS))

from conftest import SEED, SMALL_CONFIGS, SMALL_TEACHERS, SMALL_VARIANTS

import gendistiller_ext as gd

LENGTHS = (719, 400, 2500)


def students() -> dict[str, dict]:
    dropouts = {"dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.1}
    return {name: {**config, **dropouts} for name, config in {**SMALL_CONFIGS, **SMALL_VARIANTS}.items()}


#: Wide enough for products in bfloat16.
WIDE = {
    "two_taps": {**SMALL_CONFIGS["vector_widths"], "conv_feature_layers": ((32, 10, 5),) + ((32, 2, 2),) * 6,
                 "conv_pos": 63},
    "cross_attention": SMALL_VARIANTS["cross_attention"],
    "vector_widths": SMALL_CONFIGS["vector_widths"],
    "odd_widths": SMALL_CONFIGS["odd_widths"],
    "layer_norm_extractor": {**SMALL_CONFIGS["vector_widths"], "extractor_mode": "layer_norm", "conv_bias": True},
    "wavlm": {**SMALL_TEACHERS["wavlm"], "encoder_embed_dim": 48, "encoder_ffn_embed_dim": 70},
}


def make_model(config: dict, device: str) -> tuple[gd.Model, np.random.Generator]:
    """Weights are as random as a new model's, but for what starts at 0 or 1."""
    model, noise = gd.Model(gd.Config(**config), seed=1, device=device), np.random.default_rng(SEED)
    model.load_params({key: value + 0.05 * noise.standard_normal(value.shape).astype(np.float32)
                       for key, value in model.params.items()})
    return model, noise


def make_audio() -> list[np.ndarray]:
    random = np.random.default_rng(SEED)
    return [random.standard_normal(length).astype(np.float32) for length in LENGTHS]


def run_wide(device: str, precision: str) -> dict[str, np.ndarray]:
    """Arrays by "precision|name|what" of the models in WIDE, without dropout."""
    out, wavs = {}, make_audio()
    for name, config in WIDE.items():
        model, noise = make_model(config, device)
        hidden, _ = model.forward(wavs, precision=precision)
        key = f"{precision}|{name}"
        out |= {f"{key}|state {s}": state for s, state in enumerate(hidden)}
        if model.config.architecture != "encoder":
            targets = noise.standard_normal((len(model.config.target_layers), *hidden[0].shape)).astype(np.float32)
            step = model.distill_step(wavs, targets, precision=precision)
            out |= {f"{key}|loss": np.float64(step.loss)}
            out |= {f"{key}|gradient of {tensor}": grad for tensor, grad in step.grads.items()}
    return out


def run(device: str) -> dict[str, np.ndarray]:
    """Arrays by "name|what"."""
    out, wavs = {}, make_audio()
    for name, config in {**students(), **SMALL_TEACHERS}.items():
        model, noise = make_model(config, device)
        hidden, frames = model.forward(wavs)
        out |= {f"{name}|frames": frames} | {f"{name}|state {s}": state for s, state in enumerate(hidden)}
        if name in SMALL_TEACHERS:
            continue
        targets = noise.standard_normal((len(model.config.target_layers), *hidden[0].shape)).astype(np.float32)
        step = model.distill_step(wavs, targets, feat_pen_loss=0.5, dropout_seed=(3, 5, 7))
        out |= {f"{name}|loss": np.float64(step.loss), f"{name}|similarity": step.similarity}
        # Into a gradient that is there already, from another loss.
        into = model.backward(wavs, [np.ones_like(state) for state in hidden], dropout_seed=(3, 6, 7),
                              into=step.flat_grads.copy())
        out |= {f"{name}|gradient": step.flat_grads, f"{name}|sum of gradients": into}
        gd.AdamW(model, lr=1e-2, eps=1.0).step(into)
        out |= {f"{name}|state after": model.forward(wavs)[0][-1]}
    return out


if __name__ == "__main__":
    np.savez(sys.argv[2], **run(sys.argv[1]), **run_wide(sys.argv[1], "bfloat16"))
