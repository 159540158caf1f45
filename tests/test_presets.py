"""Every student preset at its own size against the independent PyTorch model: hidden states, loss, and every
gradient of a distillation step."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from checks import assert_gradients
from conftest import SEED
from engine import build, gd
from reference import torch_train
from reference.layout import random_state, random_targets, random_wavs
from reference.torch_model import Reference

STUDENTS = [name for name in gd.Config.presets() if gd.Config.preset(name).architecture != "encoder"]


@pytest.mark.parametrize("preset", STUDENTS)
def test_student(preset):
    config = gd.Config.preset(preset).to_dict()
    lengths = [3000, 1999]
    state, wavs = random_state(config, SEED), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    model = build(config, state)
    reference = Reference(config, state, torch.float64)
    layers = [None, 2, 3, 4] if config["architecture"] == "generative" else [None]
    for num_layers in layers:  # Table 5: as many as wanted, whatever the training's targets
        for b, wav in enumerate(wavs):
            with torch.no_grad():
                theirs = reference.forward([wav], **({"num_layers": num_layers} if num_layers else {}))[0]
            hidden, _ = model.forward([wav], num_layers=num_layers)
            assert len(hidden) == len(theirs)
            for s, (ours, other) in enumerate(zip(hidden, theirs)):
                assert np.abs(ours - other.numpy()).max() < 1e-4, f"state {s} of {num_layers}, utterance {b}"
    out = model.distill_step(wavs, targets)
    expected = torch_train.distill_step(config, state, wavs, targets)
    assert abs(out.loss - expected.loss) < 1e-5
    assert_gradients(out.grads, expected.grads)
