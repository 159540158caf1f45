"""What engines are given, weights and audio, and how their hidden states are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from peers import checkpoint
from process import Failed

RATE = 16000


def make_checkpoint(folder: Path, preset: str):
    """Random weights with every bias, norm and gate away from where initialisation puts it, so that a peer
    that forgot one would not agree."""
    import gendistiller_ext as gd

    model, noise = gd.Model(gd.Config.preset(preset), seed=0), np.random.default_rng(1)
    params = {}
    for name, value in model.params.items():
        spread = 1.0 if "relative_attention_bias" in name else 0.1 if value.std() == 0 else 0.0
        params[name] = (value + spread * noise.standard_normal(value.shape)).astype(np.float32)
    model.load_params(params)
    model.save(checkpoint(folder, preset))
    return model.config


def make_audio(file: Path, batch: int, seconds: float, seed: int) -> None:
    noise = np.random.default_rng(seed).standard_normal((batch, round(seconds * RATE)))
    np.save(file, (0.1 * noise).astype(np.float32))


def compare(states: Path, reference: Path) -> dict:
    """{"difference": largest, "cosine": smallest of a state} against the reference; shapes must agree."""
    with np.load(states) as got, np.load(reference) as expected:
        if got.files != expected.files:
            raise Failed("ValueError", f"expected {len(expected.files)} hidden states, got {len(got.files)}")
        difference, cosine = 0.0, 1.0
        for name in expected.files:
            a, b = got[name].astype(np.float64), expected[name].astype(np.float64)
            if a.shape != b.shape:
                raise Failed("ValueError", f"expected hidden states {b.shape}, got {a.shape}")
            difference = max(difference, float(np.abs(a - b).max()))
            cosine = min(cosine, float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())))
    return {"difference": difference, "cosine": cosine}
