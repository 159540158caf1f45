"""The loss alone, the optimiser alone, and ten steps of training against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from conftest import SEED, SMALL_CONFIGS
from engine import build, gd
from reference import torch_train
from reference.layout import random_state, random_targets, random_wavs
from reference.peers import s3prl_loss

VARIANTS = ("adamw", "adamw_s3prl")


def random_pair(shape):
    rng = np.random.default_rng(SEED)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(2)]


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 17, 9), (3, 2, 49, 768)], ids=str)
def test_distill_loss_is_s3prls(shape, lam, loss_type):
    """Everything counted, as S3PRL counts: its value and its gradient."""
    pred, target = random_pair(shape)
    loss, l1, cos, grad = gd.distill_loss(pred, target, lam=lam, loss_type=loss_type)
    theirs = torch.tensor(pred, dtype=torch.float64, requires_grad=True)
    expected = s3prl_loss(theirs, torch.tensor(target, dtype=torch.float64), lam, loss_type)
    expected.backward()
    assert abs(loss - expected.item()) < 1e-6 * max(1, expected.item())
    assert abs(loss - (l1 + lam * cos).mean()) < 1e-6
    assert grad.shape == shape and grad.dtype == np.float32
    assert np.abs(grad - theirs.grad.numpy()).max() < 1e-5 * np.abs(theirs.grad.numpy()).max()


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_distill_loss_of_a_ragged_batch(reduction, mask_padding):
    pred, target = random_pair((3, 4, 17, 13))
    frames = np.array([17, 3, 9, 1])
    loss, l1, cos, grad = gd.distill_loss(
        pred, target, frames, lam=0.7, reduction=reduction, mask_padding=mask_padding
    )
    theirs = torch.tensor(pred, dtype=torch.float64, requires_grad=True)
    expected = torch_train.distill_loss(
        theirs, torch.tensor(target, dtype=torch.float64), frames, 0.7, reduction, mask_padding
    )
    expected.loss.backward()
    assert abs(loss - expected.loss.item()) < 1e-6 * max(1, expected.loss.item())
    np.testing.assert_allclose(l1, expected.l1.detach(), rtol=2e-6)
    np.testing.assert_allclose(cos, expected.cos.detach(), rtol=2e-6)
    assert np.abs(grad - theirs.grad.numpy()).max() < 1e-5 * np.abs(theirs.grad.numpy()).max()
    if mask_padding:
        assert not any(grad[:, b, n:].any() for b, n in enumerate(frames))


def test_distill_loss_of_zero_frames():
    """torch's similarity of a zero vector is 0; of a short one with a long one, by each one's own clamp. Its
    gradient is torch's too, frame by frame, since a short frame's is immense."""
    pred, target = random_pair((1, 1, 8, 8))
    pred[0, 0, 0], target[0, 0, 1] = 0, 0
    for frame, scale in enumerate((1e-10, 1e-7, 1e10), 2):  # below eps, above it, far from it
        pred[0, 0, frame] *= scale
        target[0, 0, frame + 3] *= scale
    loss, _, _, grad = gd.distill_loss(pred, target)
    theirs = torch.tensor(pred, dtype=torch.float64, requires_grad=True)
    expected = s3prl_loss(theirs, torch.tensor(target, dtype=torch.float64))
    expected.backward()
    assert abs(loss / expected.item() - 1) < 1e-6
    for ours, row in zip(grad[0, 0], theirs.grad.numpy()[0, 0]):
        assert np.abs(ours - row).max() < 1e-5 * np.abs(row).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_optimiser(variant):
    """Ten updates by given gradients, of which every other one is clipped; the norm is the one before
    clipping."""
    config = SMALL_CONFIGS["odd_widths"]
    state, rng = random_state(config, SEED), np.random.default_rng(SEED)
    model = build(config, state)
    options = dict(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, clip=5.0, variant=variant)
    ours = gd.AdamW(model, **options)
    theirs = torch_train.AdamW({n: v.astype(np.float64) for n, v in state.items()}, **options)
    for step in range(10):
        grads = {
            n: (rng.standard_normal(v.shape) * (1 if step % 2 else 1e-3)).astype(np.float32)
            for n, v in state.items()
        }
        flat = np.concatenate([grads[n].ravel() for n in model.params])
        lr = 1e-2 * torch_train.schedule(step + 1, 12, 0.3)
        norm, expected = ours.step(flat, lr=lr), theirs.step(grads, lr)
        assert abs(norm / expected - 1) < 1e-6
    for name, value in model.params.items():
        moved = np.abs(theirs.params[name].numpy() - state[name]).max()
        assert moved > 1e-3, name
        assert (
            np.abs(value - theirs.params[name].numpy()).max() < 1e-4 * moved + 2e-7 * np.abs(value).max()
        ), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["vector_widths", "odd_widths", "gendistiller"])
def test_ten_steps(name, variant):
    """Loss after loss within 1e-4, and it falls."""
    config = SMALL_CONFIGS.get(name) or gd.Config.preset(name).to_dict()
    lengths = [8000, 5000, 719] if name in SMALL_CONFIGS else [2500, 1500]
    state, wavs, targets = (
        random_state(config, SEED),
        random_wavs(lengths, SEED),
        random_targets(config, lengths, SEED),
    )
    model = build(config, state)
    ours = gd.AdamW(model, lr=1e-3, variant=variant)
    theirs = torch_train.AdamW({n: v.astype(np.float64) for n, v in state.items()}, lr=1e-3, variant=variant)
    losses = []
    for step in range(10):
        lr = 1e-3 * torch_train.schedule(step + 1, 12, 0.3)
        out = model.distill_step(wavs, targets)
        params = {n: p.numpy() for n, p in theirs.params.items()}
        expected = torch_train.distill_step(config, params, wavs, targets)
        losses.append((out.loss, expected.loss))
        norms = ours.step(out.flat_grads, lr=lr), theirs.step(expected.grads, lr)
        assert abs(norms[0] / norms[1] - 1) < 1e-3
    assert max(abs(a - b) for a, b in losses) < 1e-4, losses
    assert losses[-1][0] < losses[0][0] - 0.01
