"""A batch gives each utterance bit for bit what it has alone, whatever its company and the number of
threads."""

from __future__ import annotations

import numpy as np
import pytest

from checks import assert_rows_alone, bits
from conftest import SEED, SMALL, SMALL_CONFIGS, SMALL_TEACHERS
from engine import ISAS, build, gd, run_elsewhere
from reference.layout import random_state, random_targets, random_wavs

LENGTHS = [5000, 400, 16000, 719, 720, 12345, 3333]
CONFIGS = {
    name: SMALL_CONFIGS[name]
    for name in (
        "small",
        "odd_widths",
        "vector_widths",
        "normalize",
        "plain",
        "layer_norm_extractor",
        "no_projection",
    )
} | SMALL_TEACHERS


@pytest.mark.parametrize("isa", ISAS)
def test_batch_is_alone(isa, tmp_path):
    """Each instruction set, 1 and 2 threads, the batch in two orders; the presets at full width too."""
    models, presets = {}, ("gendistiller", "gendistiller_plain")
    for name, config in {**CONFIGS, **{p: gd.Config.preset(p).to_dict() for p in presets}}.items():
        lengths = LENGTHS if name in CONFIGS else [5000, 400, 9999]
        wavs = random_wavs(lengths, SEED)
        runs = [{"wavs": [w], "num_threads": 1 + i % 2} for i, w in enumerate(wavs)]
        runs += [
            {"wavs": wavs, "num_threads": 1},
            {"wavs": wavs, "num_threads": 2},
            {"wavs": wavs[::-1], "num_threads": 2},
        ]
        models[name] = {
            "config": config,
            "state": random_state(config, SEED),
            "runs": runs,
            "lengths": lengths,
        }
    results = run_elsewhere(models, tmp_path, ISAS[isa])
    for name, model in models.items():
        lengths = model["lengths"]
        *alone, one, two, reverse = results[name]
        assert_rows_alone(one, alone, lengths, model["config"])
        assert_rows_alone(two, alone, lengths, model["config"])
        assert_rows_alone(reverse, alone[::-1], lengths[::-1], model["config"])


@pytest.mark.parametrize("name", ["small", "vector_widths", "normalize"])
def test_padded_array_is_a_list(name):
    """(B, N) with lengths is the list of utterances: what stands behind an utterance's end is never looked
    at."""
    config = CONFIGS[name]
    model = build(config, random_state(config, SEED))
    wavs = random_wavs(LENGTHS, SEED)
    padded = np.full((len(wavs), max(LENGTHS)), 123.0, np.float32)
    for row, wav in zip(padded, wavs):
        row[: len(wav)] = wav
    expected, frames = model.forward(wavs)
    hidden, ours = model.forward(padded, np.array(LENGTHS))
    assert np.array_equal(frames, ours)
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(hidden, expected, strict=True))


def test_forward_is_deterministic():
    """The same call twice, with a longer batch between them that grows the workspace."""
    config = CONFIGS["vector_widths"]
    model = build(config, random_state(config, SEED))
    wavs = random_wavs([5000, 720], SEED)
    first, _ = model.forward(wavs)
    first = [h.copy() for h in first]
    model.forward(random_wavs([20000, 5000, 600], SEED + 1))
    second, _ = model.forward(wavs)
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(first, second))


@pytest.mark.parametrize("name", ["small", "vector_widths"])
@pytest.mark.parametrize("dropout_seed", [None, (7, 3, 0)])
def test_training_is_deterministic(name, dropout_seed):
    config = CONFIGS[name]
    model = build(config, random_state(config, SEED))
    lengths = [5000, 16000, 720]
    wavs, targets = random_wavs(lengths, SEED), random_targets(config, lengths, SEED)
    first = model.distill_step(wavs, targets, dropout_seed=dropout_seed)
    first_grads = first.flat_grads.copy()
    model.forward(random_wavs([20000], SEED))
    second = model.distill_step(wavs, targets, dropout_seed=dropout_seed)
    assert first.loss == second.loss and np.array_equal(bits(first_grads), bits(second.flat_grads))


def test_training_states_are_the_forward_states():
    """Without dropout the loss in a training step is that of the evaluated states."""
    config = SMALL
    model = build(config, random_state(config, SEED))
    wavs, targets = random_wavs([5000, 16000, 720], SEED), random_targets(config, [5000, 16000, 720], SEED)
    hidden, frames = model.forward(wavs)
    loss, l1, cos, _ = gd.distill_loss(np.stack(hidden[1:]), targets, frames)
    out = model.distill_step(wavs, targets)
    assert abs(loss - out.loss) < 1e-6
    np.testing.assert_allclose(out.l1, l1, atol=1e-6)
    np.testing.assert_allclose(out.cos, cos, atol=1e-6)
