"""Training over more rows than a part of a feed-forward (1,024) or a tile of the extractor's backward (200) has, or
than the extractor keeps: the gradient of a batch is the sum of its utterances', which have fewer."""

from __future__ import annotations

import numpy as np
import pytest

from checks import bits
from conftest import SEED, SMALL_CONFIGS, SMALL_VARIANTS
from engine import build
from reference.layout import num_frames, random_state, random_targets, random_wavs

#: Frames: 1,399 in all, at most 468 each; and 57.
SAMPLES = [150000, 149000, 18480, 130000]
NAMES = ("vector_widths", "small", "layer_norm_extractor", *SMALL_VARIANTS)


def deep(config: dict) -> dict:
    """The paper's convolutions, so that tiles meet in groups of rows of each kind; wide enough for filtering."""
    layers = ((16, 10, 5), (20, 3, 2), (16, 3, 2), (24, 3, 2), (16, 3, 2), (20, 2, 2),
              (config["conv_feature_layers"][-1][0], 2, 2))
    return {**config, "conv_feature_layers": layers}


def gradient(model, wavs, targets, precision, first, **options):
    return model.distill_step(wavs, targets, reduction="sum", dropout_seed=(3, 5, first), precision=precision,
                              **options).flat_grads


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_the_sum_of_its_utterances(name, precision):
    config = deep({**SMALL_CONFIGS, **SMALL_VARIANTS}[name])
    frames = [num_frames(config, n) for n in SAMPLES]
    assert sum(frames) > 1024 > max(frames) > 400 and min(frames) > 50
    model, wavs = build(config, random_state(config, SEED)), random_wavs(SAMPLES, SEED)
    targets = random_targets(config, SAMPLES, SEED)
    whole = gradient(model, wavs, targets, precision, 0, num_threads=1)
    assert np.array_equal(bits(gradient(model, wavs, targets, precision, 0, num_threads=2)), bits(whole))
    parts = sum(gradient(model, [wav], targets[:, b:b + 1, :n], precision, b).astype(np.float64)
                for b, (wav, n) in enumerate(zip(wavs, frames)))
    assert np.linalg.norm(whole - parts) < 1e-6 * np.linalg.norm(parts)


def test_rows_that_are_computed_again():
    """A second layer of 1,040 floats every 5 samples: of the whole batch more than the GiB that float32 keeps, of each
    utterance less."""
    layers = ((16, 10, 5), (1024, 1, 1), (16, 64, 64))
    config = {**SMALL_CONFIGS["vector_widths"], "conv_feature_layers": layers}
    samples = [480000, 470000, 400000]
    assert max(samples) / 5 * 1040 * 4 < 2**30 < sum(samples) / 5 * 1040 * 4
    model, wavs = build(config, random_state(config, SEED)), random_wavs(samples, SEED)
    targets = random_targets(config, samples, SEED)
    whole = model.distill_step(wavs, targets, reduction="sum").flat_grads
    parts = np.zeros(whole.size)
    for b, wav in enumerate(wavs):
        frames = num_frames(config, samples[b])
        parts += model.distill_step([wav], targets[:, b:b + 1, :frames], reduction="sum").flat_grads
    assert np.linalg.norm(whole - parts) < 1e-6 * np.linalg.norm(parts)


def test_rows_that_bfloat16_keeps_are_the_forwards():
    """Tiles of the forward have 50 frames, of the backward 200, so that a clip of each length has its rows kept by
    other tiles than it is read by: the extractor's gradient stays as near float32's as a single tile's is."""
    config = deep(SMALL_CONFIGS["vector_widths"])
    model = build(config, random_state(config, SEED))
    errors = []
    for samples in (16000, 66000, 129000):
        wavs, targets = random_wavs([samples, 9000], SEED), random_targets(config, [samples, 9000], SEED)
        exact, rounded = (model.distill_step(wavs, targets, precision=precision).grads
                          for precision in ("float32", "bfloat16"))
        for tensor, grad in exact.items():
            if tensor.startswith("feature_extractor") and tensor.endswith("0.weight"):
                errors.append(np.linalg.norm(rounded[tensor] - grad) / np.linalg.norm(grad))
    assert 1e-4 < min(errors) and max(errors) < 0.08, errors
