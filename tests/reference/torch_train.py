"""Distillation in PyTorch: the loss and its gradients by autograd, both AdamW variants, S3PRL's schedule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor

from .torch_model import Reference


def distill_loss(
    pred: Tensor,
    target: Tensor,
    frames: Sequence[int] | None = None,
    lam: float = 1.0,
    reduction: str = "mean",
    mask_padding: bool = True,
    loss_type: str = "l1",
) -> SimpleNamespace:
    """loss, l1 (L,), cos (L,), similarity (L,) of (L, B, T, D) predictions. l1 and cos are reduced as the
    loss is, so that loss = mean over layers of l1 + lam cos; similarity is always the mean over the frames
    that count."""
    layers, batch, total, width = pred.shape
    counted = torch.ones(batch, total, dtype=torch.bool)
    if mask_padding and frames is not None:
        counted = torch.arange(total)[None] < torch.as_tensor(np.asarray(frames))[:, None]
    pred, target = pred[:, counted], target[:, counted]
    divisor = pred.shape[1] if reduction == "mean" else 1
    difference = pred - target
    l1 = (difference.square() if loss_type == "l2" else difference.abs()).sum((1, 2)) / width / divisor
    norms = [torch.linalg.vector_norm(x, dim=-1) for x in (pred, target)]
    # torch.nn.functional.cosine_similarity clamps where autograd does not look: a short norm still moves.
    norms = [norm + (norm.clamp(min=1e-8) - norm).detach() for norm in norms]
    similarity = (pred * target).sum(-1) / (norms[0] * norms[1])
    cos = torch.log1p(torch.exp(-similarity)).sum(1) / divisor
    return SimpleNamespace(loss=(l1 + lam * cos).mean(), l1=l1, cos=cos, similarity=similarity.mean(1))


def feature_penalty(
    extracted: Sequence[Tensor], frames: Sequence[int], reduction: str = "mean", mask_padding: bool = True
) -> Tensor:
    """Mean square over channels of the convolutions' output, reduced over the frames that count."""
    utterances = [x for batch in extracted for x in batch]
    if mask_padding:
        utterances = [x[:count] for x, count in zip(utterances, frames, strict=True)]
    squares = torch.cat(utterances).square().mean(1)
    return squares.mean() if reduction == "mean" else squares.sum()


def predictions(config: Any, hidden: list[Tensor]) -> Tensor:
    """What the loss compares with the targets, (L, B, T, D): the last L hidden states (self_hidden with one
    more target than blocks begins with f)."""
    return torch.stack(hidden[len(hidden) - len(config.target_layers) :])


def distill_step(
    config: Any,
    state: dict[str, np.ndarray],
    wavs: Sequence[np.ndarray],
    targets: np.ndarray,
    *,
    lam: float = 1.0,
    reduction: str = "mean",
    mask_padding: bool = True,
    history: str = "free",
    detach_history: bool = False,
    loss_type: str = "l1",
    feat_pen_loss: float = 0.0,
    dropout_seed: tuple[int, int, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> SimpleNamespace:
    """distill_loss's terms and the feature_penalty, which adds to the loss, as NumPy values, and `grads`: name ->
    NumPy gradient (zero where none flows)."""
    model = Reference(config, state, dtype, grad=True, dropout_seed=dropout_seed)
    target = torch.tensor(np.asarray(targets), dtype=dtype)
    hidden, frames = model.forward(
        wavs, history=target if history == "teacher" else None, detach_history=detach_history
    )
    out = distill_loss(predictions(model.config, hidden), target, frames, lam, reduction, mask_padding, loss_type)
    out.feature_penalty = feature_penalty(model.extracted, frames, reduction, mask_padding)
    out.loss = out.loss + feat_pen_loss * out.feature_penalty
    out.loss.backward()
    terms = {name: value.detach().numpy() for name, value in vars(out).items()}
    return SimpleNamespace(
        **terms, grads=gradients(model), hidden=[h.detach().numpy() for h in hidden], frames=frames
    )


def backward(
    config: Any,
    state: dict[str, np.ndarray],
    wavs: Sequence[np.ndarray],
    grad_hidden: Sequence[np.ndarray],
    dtype: torch.dtype = torch.float64,
    num_layers: int | None = None,
) -> dict[str, np.ndarray]:
    """Gradients of sum over states of <grad_hidden, hidden state>."""
    model = Reference(config, state, dtype, grad=True)
    hidden, _ = model.forward(wavs, num_layers=num_layers)
    sum(
        (h * torch.tensor(np.asarray(g), dtype=dtype)).sum() for h, g in zip(hidden, grad_hidden, strict=True)
    ).backward()
    return gradients(model)


def gradients(model: Reference) -> dict[str, np.ndarray]:
    return {
        name: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.numpy()
        for name, p in model.params.items()
    }


def schedule(step: int, total: int, warmup: float = 0.07) -> float:
    """S3PRL's factor at step 1, 2, ...: linear up over the warm-up's share of the steps, then linear down to
    0."""
    progress = step / total
    return progress / warmup if progress < warmup else max((1 - progress) / (1 - warmup), 0.0)


class AdamW:
    """`adamw`: torch's update, decay where `decays(name, array)`. `adamw_s3prl`: the decay rides in the
    update, the bias correction on the step size alone, decay 0.01 on names without "bias"."""

    def __init__(
        self,
        params: dict[str, np.ndarray],
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 1e-6,
        clip: float = 5.0,
        variant: str = "adamw",
    ) -> None:
        self.params = {name: torch.tensor(np.asarray(p)) for name, p in params.items()}
        self.m = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.v = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.lr, self.betas, self.eps, self.clip, self.variant, self.t = lr, betas, eps, clip, variant, 0
        self.weight_decay = weight_decay

    def decays(self, name: str) -> bool:
        if self.variant == "adamw_s3prl":
            return "bias" not in name
        return name.endswith((".weight", ".weight_v")) and self.params[name].ndim >= 2

    def step(self, grads: dict[str, np.ndarray], lr: float | None = None) -> float:
        """Updates `params` in place; returns the gradient's norm before clipping."""
        lr = self.lr if lr is None else lr
        self.t += 1
        (b1, b2), s3prl = self.betas, self.variant == "adamw_s3prl"
        norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values())))
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        correct1, correct2 = 1 - b1**self.t, 1 - b2**self.t
        for name, p in self.params.items():
            g = torch.tensor(np.asarray(grads[name])).to(p.dtype) * scale
            m, v = self.m[name], self.v[name]
            m.mul_(b1).add_(g, alpha=1 - b1)
            v.mul_(b2).addcmul_(g, g, value=1 - b2)
            if s3prl:
                update = m / (v.sqrt() + self.eps) + (0.01 * p if self.decays(name) else 0)
                p -= lr * correct2**0.5 / correct1 * update
            else:
                if self.decays(name):
                    p *= 1 - lr * self.weight_decay
                p -= lr / correct1 * m / (v.sqrt() / correct2**0.5 + self.eps)
        return norm
