"""Every named gradient against autograd through the PyTorch reference in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from checks import assert_gradients
from conftest import SEED, SMALL, SMALL_CONFIGS, SMALL_VARIANTS
from engine import build, gd
from reference import torch_train
from reference.layout import num_frames, random_state, random_targets, random_wavs


def named(model, flat):
    """The flat gradient by name, in the order of the flat parameters."""
    out, offset = {}, 0
    for name, value in model.params.items():
        out[name] = flat[offset : offset + value.size].reshape(value.shape)
        offset += value.size
    assert offset == flat.size
    return out


@pytest.mark.parametrize("lengths", [[400], [719, 400, 2500], [9000, 3333]], ids=str)
@pytest.mark.parametrize("name", [*SMALL_CONFIGS, *SMALL_VARIANTS])
def test_distill_step(name, lengths):
    config = {**SMALL_CONFIGS, **SMALL_VARIANTS}[name]
    state = random_state(config, SEED)
    wavs, targets = random_wavs(lengths, SEED), random_targets(config, lengths, SEED)
    model = build(config, state)
    out = model.distill_step(wavs, targets)
    expected = torch_train.distill_step(config, state, wavs, targets)
    assert abs(out.loss - expected.loss) < 1e-5
    assert_gradients(out.grads, expected.grads)
    assert np.array_equal(np.concatenate([out.grads[n].ravel() for n in model.params]), out.flat_grads)


OPTIONS = [
    dict(history=history, detach_history=detach, reduction=reduction, mask_padding=mask, lam=lam)
    for history, detach, reduction, mask, lam in [
        *itertools.product(("free", "teacher"), (False, True), ("mean", "sum"), (True, False), (1.0,)),
        ("free", False, "mean", True, 0.0),
        ("teacher", False, "sum", True, 2.5),
    ]
] + [dict(loss_type="l2", mask_padding=True),
     dict(loss_type="l2", mask_padding=True, reduction="sum", history="teacher", lam=0.3)] + [
    dict(feat_pen_loss=weight, reduction=reduction, mask_padding=mask)
    for weight, reduction, mask in [(5.0, "mean", True), (2.0, "sum", True), (7.0, "mean", False), (3.0, "sum", False)]
]


def options_config(options):
    """Only with S3PRL's padding are there padded frames that can be counted."""
    return {**SMALL, "target_layers": (4, 8, 12), "padding": "exact" if options["mask_padding"] else "s3prl"}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_options(options):
    config = options_config(options)
    lengths = [4000, 2500, 719]
    state, wavs, targets = (
        random_state(config, SEED),
        random_wavs(lengths, SEED),
        random_targets(config, lengths, SEED),
    )
    out = build(config, state).distill_step(wavs, targets, **options)
    expected = torch_train.distill_step(config, state, wavs, targets, **options)
    assert abs(out.loss - expected.loss) < 1e-5 * max(1, abs(expected.loss))
    for term in ("l1", "cos", "similarity", "feature_penalty"):
        np.testing.assert_allclose(
            getattr(out, term), getattr(expected, term), rtol=1e-5, atol=1e-5, err_msg=term
        )
    assert_gradients(out.grads, expected.grads)


@pytest.mark.parametrize("name", ["odd_widths", *SMALL_VARIANTS])
def test_counted_padding(name):
    """What each architecture makes of padded frames, where pos_conv reaches into them."""
    config = {**SMALL_CONFIGS, **SMALL_VARIANTS}[name] | {"padding": "s3prl"}
    lengths = [2500, 4000, 719]
    state, wavs, targets = (
        random_state(config, SEED),
        random_wavs(lengths, SEED),
        random_targets(config, lengths, SEED),
    )
    out = build(config, state).distill_step(wavs, targets, mask_padding=False)
    expected = torch_train.distill_step(config, state, wavs, targets, mask_padding=False)
    assert abs(out.loss - expected.loss) < 1e-5
    assert_gradients(out.grads, expected.grads)


@pytest.mark.parametrize("name", [*SMALL_CONFIGS, *SMALL_VARIANTS])
def test_feature_penalty(name):
    """From the convolutions' output, before any norm, on through feature_grad_mult, and into nothing else. It counts
    the valid frames; its weight 5 makes it most of the gradient."""
    config = {**SMALL_CONFIGS, **SMALL_VARIANTS}[name]
    lengths = [4000, 719, 2500]
    state, wavs, targets = (
        random_state(config, SEED),
        random_wavs(lengths, SEED),
        random_targets(config, lengths, SEED),
    )
    model = build(config, state)
    without, out = (model.distill_step(wavs, targets, feat_pen_loss=weight) for weight in (0.0, 5.0))
    expected = torch_train.distill_step(config, state, wavs, targets, feat_pen_loss=5.0)
    assert out.feature_penalty == without.feature_penalty == pytest.approx(float(expected.feature_penalty), rel=2e-6)
    assert out.loss == pytest.approx(without.loss + 5 * out.feature_penalty, rel=1e-12)
    assert abs(out.loss - expected.loss) < 1e-5
    assert_gradients(out.grads, expected.grads)
    for tensor, grad in without.grads.items():
        moved = np.linalg.norm(out.grads[tensor] - grad)
        if tensor.startswith("feature_extractor") and name != "extractor_frozen":
            assert moved > 0.05 * np.linalg.norm(grad), tensor
        else:
            assert moved == 0, tensor


def test_feature_penalty_in_bfloat16():
    """Rounded products, a penalty near float32's, and its gradient in the same direction."""
    config, lengths = {**SMALL_CONFIGS["vector_widths"], "feature_grad_mult": 0.1}, [5000, 9000]
    model, wavs = build(config, random_state(config, SEED)), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    moved, penalties = [], []
    for precision in ("float32", "bfloat16"):
        without, out = (
            model.distill_step(wavs, targets, feat_pen_loss=weight, precision=precision) for weight in (0.0, 50.0)
        )
        moved.append(out.flat_grads.astype(np.float64) - without.flat_grads)
        penalties.append(out.feature_penalty)
    assert 0 < abs(penalties[1] / penalties[0] - 1) < 0.01
    exact, rounded = moved
    assert exact @ rounded > 0.999 * np.linalg.norm(exact) * np.linalg.norm(rounded)
    assert 0.98 < np.linalg.norm(rounded) / np.linalg.norm(exact) < 1.02


def test_options_differ():
    """Each option changes the reference's answer by far more than the tolerance: none is tested in vain."""
    lengths, flat = [4000, 2500, 719], []
    state, wavs, targets = (
        random_state(SMALL, SEED),
        random_wavs(lengths, SEED),
        random_targets(options_config(OPTIONS[0]), lengths, SEED),
    )
    for options in OPTIONS:
        if not (options.get("history") == "teacher" and options.get("detach_history")):
            grads = torch_train.distill_step(options_config(options), state, wavs, targets, **options).grads
            flat.append(np.concatenate([grad.ravel() for grad in grads.values()]))
    for a, b in itertools.combinations(flat, 2):
        assert np.linalg.norm(a - b) > 0.02 * np.linalg.norm(a)


def test_counting_padding_needs_padding():
    """Exact padding leaves nothing to count in a ragged batch, and says so; without padding all counts are
    one."""
    model, lengths = build(SMALL, random_state(SMALL, SEED)), [2500, 2500]
    wavs, targets = random_wavs(lengths, SEED), random_targets(SMALL, lengths, SEED)
    one, other = (model.distill_step(wavs, targets, mask_padding=mask) for mask in (True, False))
    assert one.loss == other.loss and np.array_equal(one.flat_grads, other.flat_grads)
    with pytest.raises(ValueError, match="^mask_padding: "):
        model.distill_step([wavs[0], wavs[1][:800]], targets, mask_padding=False)


@pytest.mark.parametrize("preset", ["gendistiller", "gendistiller_plain"])
def test_preset(preset):
    """At full width, every tensor of the two presets."""
    config = gd.Config.preset(preset).to_dict()
    lengths = [8000, 719]
    state, wavs, targets = (
        random_state(config, SEED),
        random_wavs(lengths, SEED),
        random_targets(config, lengths, SEED),
    )
    out = build(config, state).distill_step(wavs, targets)
    expected = torch_train.distill_step(config, state, wavs, targets)
    assert abs(out.loss - expected.loss) < 1e-5
    assert_gradients(out.grads, expected.grads)


@pytest.mark.parametrize("num_layers", [None, 1, 3])
@pytest.mark.parametrize("name", ["small", "plain", "odd_widths", "vector_widths", "layer_norm_extractor"])
def test_backward(name, num_layers):
    """Arbitrary gradients of every hidden state, the feature embedding's too."""
    config, lengths = SMALL_CONFIGS[name], [3000, 719]
    state, wavs, rng = random_state(config, SEED), random_wavs(lengths, SEED), np.random.default_rng(SEED)
    model = build(config, state)
    hidden, _ = model.forward(wavs, num_layers=num_layers)
    grad_hidden = [rng.standard_normal(h.shape).astype(np.float32) for h in hidden]
    flat = model.backward(wavs, grad_hidden, num_layers=num_layers)
    expected = torch_train.backward(config, state, wavs, grad_hidden, num_layers=num_layers)
    assert flat.shape == (model.num_params,) and flat.dtype == np.float32
    assert_gradients(named(model, flat), expected)


def test_backward_of_one_state():
    """A gradient of the embedding alone stops there: nothing of the blocks moves."""
    state, wavs = random_state(SMALL, SEED), random_wavs([3000], SEED)
    model = build(SMALL, state)
    hidden, _ = model.forward(wavs)
    grad_hidden = [np.zeros_like(h) for h in hidden]
    grad_hidden[0][:] = 1
    grads = named(model, model.backward(wavs, grad_hidden))
    assert_gradients(grads, torch_train.backward(SMALL, state, wavs, grad_hidden))
    assert all(not g.any() for n, g in grads.items() if n.startswith(("encoder", "output")))
    assert all(g.any() for n, g in grads.items() if not n.startswith(("encoder", "output")))


def test_padded_gradients_go_nowhere():
    """What a caller hands back for padded frames is never looked at."""
    lengths = [3000, 719]
    state, wavs = random_state(SMALL, SEED), random_wavs(lengths, SEED)
    model = build(SMALL, state)
    hidden, frames = model.forward(wavs)
    grad_hidden = [
        np.random.default_rng(s).standard_normal(h.shape).astype(np.float32) for s, h in enumerate(hidden)
    ]
    first = model.backward(wavs, grad_hidden)
    for g in grad_hidden:
        g[1, frames[1] :] = 1e6
    assert np.array_equal(first, model.backward(wavs, grad_hidden))


def test_into_accumulates():
    """`into` is added to and handed back; two half batches summed are the whole one."""
    lengths = [3000, 719, 2000]
    state, wavs, targets = (
        random_state(SMALL, SEED),
        random_wavs(lengths, SEED),
        random_targets(SMALL, lengths, SEED),
    )
    model = build(SMALL, state)
    flat = np.full(model.num_params, 0.5, np.float32)
    out = model.distill_step(wavs[:2], targets[:, :2].copy(), reduction="sum", into=flat)
    assert out.flat_grads is flat or np.shares_memory(out.flat_grads, flat)
    cut = targets[:, 2:, : num_frames(SMALL, 2000)].copy()
    out = model.distill_step(wavs[2:], cut, reduction="sum", into=flat)
    whole = torch_train.distill_step(SMALL, state, wavs, targets, reduction="sum")
    assert_gradients(named(model, flat - np.float32(0.5)), whole.grads, floor=5e-7)
    assert np.array_equal(np.concatenate([out.grads[n].ravel() for n in model.params]), flat)
    fresh = model.backward(wavs, [np.ones_like(h) for h in model.forward(wavs)[0]])
    twice = fresh.copy()
    again = model.backward(wavs, [np.ones_like(h) for h in model.forward(wavs)[0]], into=twice)
    assert again is twice or np.shares_memory(again, twice)
    assert np.linalg.norm(twice - 2 * fresh) <= 1e-6 * np.linalg.norm(fresh)


def test_frozen_extractor_has_no_gradient():
    config = SMALL_CONFIGS["extractor_frozen"]
    out = build(config, random_state(config, SEED)).distill_step(
        random_wavs([3000], SEED), random_targets(config, [3000], SEED)
    )
    for name, grad in out.grads.items():
        assert grad.any() != name.startswith("feature_extractor"), name


@pytest.mark.parametrize(
    "name", ["small", "vector_widths", "self_hidden", "multi_head", "cross_attention", "every_step"])
def test_dropout(name):
    """Every place has its mask, in both directions; rates differ, so that none stands in for another."""
    config = {**SMALL_CONFIGS, **SMALL_VARIANTS}[name]
    config = {**config, "dropout": 0.2, "attention_dropout": 0.3, "activation_dropout": 0.25}
    lengths, seed = [4000, 2500], (2**40 + 11, 2**35 + 5, 3)
    state, wavs = random_state(config, SEED), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    model = build(config, state)
    out = model.distill_step(wavs, targets, dropout_seed=seed)
    expected = torch_train.distill_step(config, state, wavs, targets, dropout_seed=seed)
    assert abs(out.loss - expected.loss) < 1e-5
    assert_gradients(out.grads, expected.grads)
    hidden, _ = model.forward(wavs, dropout_seed=seed)
    for ours, theirs in zip(hidden, expected.hidden, strict=True):
        assert np.abs(ours - theirs).max() < 2e-5 * max(1, np.abs(theirs).max())
