"""The engine against S3PRL's own DistillerModel with the same state dict, at the presets' sizes: forward, the
loss of S3PRL's compute_loss, and every gradient."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from checks import assert_gradients
from conftest import SEED
from engine import build, gd
from reference.layout import num_frames, random_state, random_targets, random_wavs
from reference.peers import distiller_of, s3prl_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

# S3PRL's blocks have no gate and no bias, and nothing is normed before the projection.
PLAIN = {"relative_position_embedding": False, "gru_rel_pos": False, "feature_layer_norm": False}
CASES = {"distilhubert": ("expand-last", {}),
         "table3_feat_2layers": ("self-hidden", PLAIN)}


@pytest.mark.parametrize("preset,feat_pen_loss", [(preset, weight) for preset in CASES for weight in (0.0, 5.0)])
def test_forward_loss_and_gradient(preset, feat_pen_loss):
    task, changes = CASES[preset]
    config = dataclasses.replace(gd.Config.preset(preset), **changes).to_dict()
    assert config["feature_grad_mult"] == 0.1
    lengths = [12000]
    state, [wav] = random_state(config, SEED), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    peer, model = distiller_of(config, state, task), build(config, state)
    given = torch.tensor(wav)[None]
    feat, feature, pred, _, blocks = peer(given, torch.ones_like(given), get_hidden=True)
    loss = s3prl_loss(pred, torch.tensor(targets).transpose(0, 1), feat=feat, feat_pen_loss=feat_pen_loss)
    loss.backward()

    hidden, frames = model.forward([wav])
    theirs = [feature, *blocks, *(pred.unbind(1) if task == "expand-last" else ())]
    assert frames[0] == num_frames(config, 12000) == pred.shape[2] and len(hidden) == len(theirs)
    if task == "self-hidden":
        assert torch.equal(pred, torch.stack(theirs, dim=1))
    for s, (ours, other) in enumerate(zip(hidden, theirs)):
        assert np.abs(ours - other.detach().numpy()).max() < 1e-4, f"state {s}"
    out = model.distill_step([wav], targets, feat_pen_loss=feat_pen_loss)
    assert abs(out.loss - loss.item()) < 1e-5
    assert out.feature_penalty == pytest.approx(feat.square().mean().item(), rel=1e-5)
    assert_gradients(out.grads, {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()})


def test_gradients_of_a_batch_of_like_lengths():
    """S3PRL's loss is the mean over the batch."""
    config = gd.Config.preset("distilhubert").to_dict()
    lengths = [6000, 6000, 6000]
    state, wavs = random_state(config, SEED), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    peer, model = distiller_of(config, state, "expand-last"), build(config, state)
    given = torch.tensor(np.stack(wavs))
    pred = peer(given, torch.ones_like(given))[2]
    loss = s3prl_loss(pred, torch.tensor(targets).transpose(0, 1))
    loss.backward()
    out = model.distill_step(wavs, targets)
    assert abs(out.loss - loss.item()) < 1e-5
    assert_gradients(out.grads, {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()})


def test_a_padded_batch():
    """What S3PRL makes of it: GroupNorm over the padding, whose frames the penalty and the other terms count."""
    config = dataclasses.replace(gd.Config.preset("distilhubert"), padding="s3prl").to_dict()
    lengths = [6000, 3000, 1200]
    state, wavs = random_state(config, SEED), random_wavs(lengths, SEED)
    targets = random_targets(config, lengths, SEED)
    peer, model = distiller_of(config, state, "expand-last"), build(config, state)
    given, mask = torch.zeros(2, 3, 6000)
    for b, wav in enumerate(wavs):
        given[b, :len(wav)], mask[b, :len(wav)] = torch.tensor(wav), 1
    feat, _, pred, _ = peer(given, mask)
    loss = s3prl_loss(pred, torch.tensor(targets).transpose(0, 1), feat=feat, feat_pen_loss=5.0)
    loss.backward()
    out = model.distill_step(wavs, targets, feat_pen_loss=5.0, mask_padding=False)
    assert abs(out.loss - loss.item()) < 1e-5
    assert out.feature_penalty == pytest.approx(feat.square().mean().item(), rel=1e-5)
    assert_gradients(out.grads, {name: parameter.grad.numpy() for name, parameter in peer.named_parameters()})
    assert model.distill_step(wavs, targets).feature_penalty != pytest.approx(out.feature_penalty, rel=0.01)
