"""Hidden states and loss terms against the PyTorch reference in float64, under every choice of instruction
set."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import SEED, SMALL, SMALL_CONFIGS, SMALL_TEACHERS, SMALL_VARIANTS
from engine import ISAS, build, gd, run_elsewhere
from reference import torch_train
from reference.layout import num_frames, param_shapes, random_state, random_targets, random_wavs
from reference.torch_model import Reference

TOLERANCE = 1e-4  # the promise is 2e-4; measured at most 2.2e-5
SMALL_LENGTHS = [401, 719, 720, 3333, 16000]
PRESET_LENGTHS = {
    "gendistiller": [400, 401, 719, 16000, 80000, 480000],
    "gendistiller_plain": [400, 719, 80000],
}
SMALLS = {**SMALL_CONFIGS, **SMALL_TEACHERS, **SMALL_VARIANTS}


def case(name):
    """(config, state, wavs): the shortest utterance that has a frame, longer ones, and one that is quiet
    beside its constant offset. (`one_conv` normalises over its only layer's frames: of one frame nothing
    would be left.)"""
    if name in PRESET_LENGTHS:
        config, lengths = gd.Config.preset(name).to_dict(), PRESET_LENGTHS[name]
    else:
        config, lengths = SMALLS[name], [120 if name == "one_conv" else 400, *SMALL_LENGTHS]
    wavs = random_wavs(lengths, SEED)
    wavs.append(0.01 * wavs[-1][:4000] + np.float32(0.1))
    return config, random_state(config, SEED), wavs


@pytest.fixture(scope="module")
def golden():
    """name -> for each utterance the reference's states, made once for all instruction sets."""
    made = {}

    def states(name):
        if name not in made:
            config, state, wavs = case(name)
            with torch.no_grad():
                model = Reference(config, state, torch.float64)
                made[name] = [[h.numpy() for h in model.forward([wav])[0]] for wav in wavs]
        return made[name]

    return states


@pytest.fixture(scope="module", params=ISAS)
def computed(request, tmp_path_factory):
    """name -> for each utterance (hidden, frames) of the engine in one process limited to some instruction
    sets."""
    models = {}
    for name in [*SMALLS, *PRESET_LENGTHS]:
        config, state, wavs = case(name)
        models[name] = {"config": config, "state": state, "runs": [{"wavs": [wav]} for wav in wavs]}
    results = run_elsewhere(models, tmp_path_factory.mktemp(request.param), ISAS[request.param])
    for masked in filter(None, ISAS[request.param].split(",")):
        assert masked not in results["features"].split(), "GENDISTILLER_DISABLE_CPU was not heeded"
    return results


@pytest.mark.parametrize("name", [*SMALLS, *PRESET_LENGTHS])
def test_hidden_states(name, computed, golden):
    wavs = case(name)[2]
    for wav, expected, (hidden, frames) in zip(wavs, golden(name), computed[name], strict=True):
        assert list(frames) == [expected[0].shape[1]]
        assert len(hidden) == len(expected)
        for s, (h, e) in enumerate(zip(hidden, expected)):
            assert h.dtype == np.float32 and h.shape == e.shape
            error = np.abs(h - e).max()
            assert error < TOLERANCE, f"{len(wav)} samples, state {s}: {error:.2e}"


@pytest.mark.parametrize("name", [*SMALLS, *PRESET_LENGTHS])
def test_names_and_shapes(name):
    """The same tensors as the equations call for, whatever their order in the flat buffer."""
    config = case(name)[0]
    model = gd.Model(gd.Config(**config))
    shapes = param_shapes(config)
    assert {key: value.shape for key, value in model.params.items()} == shapes
    assert model.num_params == sum(int(np.prod(shape)) for shape in shapes.values())
    assert all(value.dtype == np.float32 and not value.flags.writeable for value in model.params.values())


def test_presets_have_the_papers_sizes():
    counts = {name: gd.Model(gd.Config.preset(name)).num_params for name in PRESET_LENGTHS}
    assert counts == {"gendistiller": 17_589_908, "gendistiller_plain": 17_584_512}


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_num_layers(num_layers):
    """Any number of layers can be generated; an encoder stops after as many blocks."""
    state, wavs = random_state(SMALL, SEED), random_wavs([4000], SEED)
    hidden, _ = build(SMALL, state).forward(wavs, num_layers=num_layers)
    with torch.no_grad():
        expected, _ = Reference(SMALL, state, torch.float64).forward(wavs, num_layers)
    assert len(hidden) == num_layers + 1
    assert max(np.abs(h - e.numpy()).max() for h, e in zip(hidden, expected, strict=True)) < TOLERANCE


@pytest.mark.parametrize("name", SMALL_TEACHERS)
def test_encoder_runs_some_blocks(name):
    """A teacher that runs fewer blocks gives the leading states of the whole one, bit for bit."""
    config = SMALL_TEACHERS[name]
    model = build(config, random_state(config, SEED))
    whole, _ = model.forward(random_wavs([4000], SEED))
    for blocks in range(1, config["encoder_layers"]):
        some, _ = model.forward(random_wavs([4000], SEED), num_layers=blocks)
        assert len(some) == blocks + 1
        assert all(np.array_equal(a, b) for a, b in zip(some, whole))


@pytest.mark.parametrize("length", [400, 719, 720, 721, 5000, 16000, 250000])
def test_num_frames(length):
    for config in (SMALL, SMALL_CONFIGS["one_conv"]):
        assert gd.num_frames(gd.Config(**config), length) == num_frames(config, length)


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_loss_terms(name):
    """distill_step's loss, and every layer's l1, cosine term and similarity."""
    config = SMALL_CONFIGS[name]
    state, wavs = random_state(config, SEED), random_wavs([16000, 5000, 720], SEED)
    targets = random_targets(config, [16000, 5000, 720], SEED) / 3
    ours = build(config, state).distill_step(wavs, targets)
    expected = torch_train.distill_step(config, state, wavs, targets)
    assert abs(ours.loss - expected.loss) < 1e-5
    for term in ("l1", "cos", "similarity"):
        np.testing.assert_allclose(getattr(ours, term), getattr(expected, term), atol=1e-5, err_msg=term)


def test_loss_ignores_what_stands_in_padded_targets():
    state, wavs = random_state(SMALL, SEED), random_wavs([5000, 720], SEED)
    targets = random_targets(SMALL, [5000, 720], SEED)
    model = build(SMALL, state)
    first = model.distill_step(wavs, targets)
    targets[:, 1, num_frames(SMALL, 720) :] = 1e6
    second = model.distill_step(wavs, targets)
    assert first.loss == second.loss and np.array_equal(first.flat_grads, second.flat_grads)
