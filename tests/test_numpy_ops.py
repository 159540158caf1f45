"""The NumPy operations: forward against torch's in float64, gradients against central differences."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from conftest import SEED
from reference import numpy_ops as ops
from reference.torch_train import AdamW

RNG = np.random.default_rng(SEED)


def normal(*shape):
    return RNG.standard_normal(shape)


def conv0_norm(stride):
    """x is no parameter there: audio needs no gradient."""
    x = normal(43) + 3.0
    return (
        lambda w, g, b: ops.conv0_norm(x, w, g, b, stride),
        lambda dy, w, g, b: ops.conv0_norm_backward(dy, x, w, g, b, stride),
        lambda w, g, b: (
            F.group_norm(F.conv1d(torch.tensor(x)[None, None], w[:, None], stride=stride), len(w), g, b)[0].T
        ),
    )


def attention(q, k, v, gates, bias):
    offset = torch.arange(len(q))[None] - torch.arange(len(q))[:, None] + len(q) - 1
    mask = gates.T[:, :, None] * bias[:, offset]
    return F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), mask).transpose(0, 1)


def gate(x, weight, bias, grep_a):
    a, b = torch.sigmoid(F.linear(x, weight, bias).view(*x.shape[:2], 2, 4).sum(-1)).chunk(2, -1)
    return (a * (b * grep_a[:, None] - 1.0) + 2.0)[..., 0]


def apart(shape):
    """Two arrays that no small step brings to the L1 term's kink."""
    pred, gap = normal(*shape), normal(*shape)
    return pred, pred + gap + 0.01 * np.sign(gap)


def cosine_loss(pred, target):
    return F.l1_loss(pred, target) - 0.7 * F.logsigmoid(F.cosine_similarity(pred, target, dim=-1)).mean()


CASES = {
    "gelu": (ops.gelu, ops.gelu_backward, F.gelu, (3 * normal(5, 7),)),
    "linear": (ops.linear, ops.linear_backward, F.linear, (normal(5, 4), normal(3, 4), normal(3))),
    "layer_norm": (
        ops.layer_norm,
        ops.layer_norm_backward,
        lambda x, g, b: F.layer_norm(x, x.shape[-1:], g, b),
        (normal(5, 7), normal(7), normal(7)),
    ),
    **{
        f"conv1d_k{k}_s{s}": (
            lambda x, w, s=s: ops.conv1d(x, w, s),
            lambda dy, x, w, s=s: ops.conv1d_backward(dy, x, w, s),
            lambda x, w, s=s: F.conv1d(x.T[None], w, stride=s)[0].T,
            (normal(17, 3), normal(4, 3, k)),
        )
        for k, s in ((3, 2), (2, 2), (2, 5), (5, 1))
    },
    "conv0_norm": (*conv0_norm(5), (normal(4, 10), normal(4), normal(4))),
    "weight_norm": (
        ops.weight_norm,
        ops.weight_norm_backward,
        lambda v, g: torch._weight_norm(v, g, 2),
        (normal(4, 3, 5), normal(1, 1, 5)),
    ),
    **{
        f"pos_conv_k{k}": (
            lambda x, w, b: ops.pos_conv(x, w, b, 2),
            lambda dy, x, w, b: ops.pos_conv_backward(dy, x, w, b, 2),
            lambda x, w, b, k=k: F.conv1d(x.T[None], w, b, padding=k // 2, groups=2)[0, :, : len(x)].T,
            (normal(9, 6), normal(6, 3, k), normal(6)),
        )
        for k in (4, 5, 32)
    },
    "gate": (ops.gate, ops.gate_backward, gate, (normal(6, 3, 5), normal(8, 5), normal(8), normal(3))),
    "attention": (
        ops.attention,
        ops.attention_backward,
        attention,
        (*(normal(6, 3, 5) for _ in range(3)), normal(6, 3), normal(3, 11)),
    ),
    "distill_loss": (
        lambda p, t: ops.distill_loss(p, t, 0.7),
        lambda dy, p, t: dy * ops.distill_loss_backward(p, t, 0.7),
        cosine_loss,
        apart((2, 6, 5)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_is_torchs(name):
    forward, _, peer, arguments = CASES[name]
    theirs = peer(*(torch.tensor(a) for a in arguments)).numpy()
    np.testing.assert_allclose(forward(*arguments), theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_central_differences(name):
    forward, backward, _, arguments = CASES[name]
    dy = np.random.default_rng(SEED).standard_normal(np.shape(forward(*arguments)))
    grads = backward(dy, *arguments)
    grads = grads if isinstance(grads, tuple) else (grads,)
    assert len(grads) == len(arguments) or name == "distill_loss"
    for i, grad in enumerate(grads):
        assert grad.shape == arguments[i].shape
        for index in np.ndindex(*grad.shape):
            moved = [[a.copy() for a in arguments] for _ in range(2)]
            moved[0][i][index] += 1e-5
            moved[1][i][index] -= 1e-5
            slope = ((forward(*moved[0]) - forward(*moved[1])) * dy).sum() / 2e-5
            assert abs(slope - grad[index]) < 1e-7 * max(1, np.abs(grad).max()), (i, index)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_bear_an_offset(offset):
    """Centred moments lose nothing to a constant in the audio; raw ones would lose offset^2."""
    x, w, g, b = normal(4000) + offset, normal(6, 10), normal(6), normal(6)
    w -= w.mean(1, keepdims=True)
    theirs = F.group_norm(
        F.conv1d(torch.tensor(x)[None, None], torch.tensor(w)[:, None], stride=5),
        6,
        torch.tensor(g),
        torch.tensor(b),
    )[0].T.numpy()
    np.testing.assert_allclose(ops.conv0_norm(x, w, g, b, 5), theirs, atol=1e-9)


def test_loss_of_short_frames_is_torchs():
    """Below eps a norm counts as eps, for each of the two vectors alone."""
    pred, target = normal(1, 4, 5), normal(1, 4, 5)
    pred[0, 0], target[0, 1], pred[0, 2] = 0, 0, pred[0, 2] * 1e-10
    theirs = torch.tensor(pred, requires_grad=True)
    loss = cosine_loss(theirs, torch.tensor(target))
    loss.backward()
    assert abs(ops.distill_loss(pred, target, 0.7) - loss.item()) < 1e-14
    np.testing.assert_allclose(ops.distill_loss_backward(pred, target, 0.7), theirs.grad.numpy(), rtol=1e-9)


@pytest.mark.parametrize("variant", ["adamw", "adamw_s3prl"])
def test_adamw_is_the_references(variant):
    """The array form against the PyTorch form (itself held against torch.optim.AdamW), five steps."""
    p = {"a.weight": normal(3, 4), "a.bias": normal(4)}
    peer = AdamW(p, lr=1e-2, weight_decay=0.1, variant=variant, clip=0)
    state = {name: (value, np.zeros_like(value), np.zeros_like(value)) for name, value in p.items()}
    for step in range(1, 6):
        grads = {name: normal(*value.shape) for name, value in p.items()}
        peer.step(grads)
        for name, (value, m, v) in state.items():
            decay = (0.01 if variant == "adamw_s3prl" else 0.1) * (name == "a.weight")
            state[name] = ops.adamw(value, grads[name], m, v, step, 1e-2, decay=decay, variant=variant)
    for name, (value, _, _) in state.items():
        np.testing.assert_allclose(value, peer.params[name].numpy(), rtol=1e-12)


def test_s3prl_update_by_hand():
    """One step from zero moments: u = g (1 - b1) / (|g| sqrt(1 - b2) + eps) + 0.01 p."""
    peer = AdamW(
        {"a.weight": np.array([[2.0]]), "rel_bias.weight": np.array([[2.0]])},
        lr=0.1,
        variant="adamw_s3prl",
        clip=0,
    )
    peer.step({"a.weight": np.array([[0.5]]), "rel_bias.weight": np.array([[0.5]])})
    rate = 0.1 * np.sqrt(0.02) / 0.1
    update = 0.05 / (0.5 * np.sqrt(0.02) + 1e-6)
    assert abs(peer.params["a.weight"].item() - (2 - rate * (update + 0.02))) < 1e-12
    assert abs(peer.params["rel_bias.weight"].item() - (2 - rate * update)) < 1e-12
