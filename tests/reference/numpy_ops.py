"""NumPy float64 operations with gradients written by hand: what the C kernels compute, one small function
each.

Time-major: x (T, C). Every `<op>_backward` returns the gradients of <dy, op(...)> in the order of the op's
arguments.
"""

from __future__ import annotations

import math

import numpy as np

Array = np.ndarray
_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_backward(dy: Array, x: Array) -> Array:
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return dy * (0.5 * (1 + _erf(x / math.sqrt(2))) + x * density)


def linear(x: Array, weight: Array, bias: Array) -> Array:
    return x @ weight.T + bias


def linear_backward(dy: Array, x: Array, weight: Array, bias: Array) -> tuple[Array, Array, Array]:
    return dy @ weight, dy.T @ x, dy.sum(0)


def layer_norm(x: Array, gain: Array, shift: Array, eps: float = 1e-5) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * gain + shift


def layer_norm_backward(
    dy: Array, x: Array, gain: Array, shift: Array, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    centred = x - x.mean(-1, keepdims=True)
    sigma = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    unit, dunit = centred / sigma, dy * gain
    dx = (dunit - dunit.mean(-1, keepdims=True) - unit * (dunit * unit).mean(-1, keepdims=True)) / sigma
    return dx, (dy * unit).sum(0), dy.sum(0)


def conv1d(x: Array, weight: Array, stride: int) -> Array:
    """x (N, C_in), weight (C_out, C_in, K) -> (T, C_out), no padding: the taps' products with strided rows,
    added."""
    kernel = weight.shape[2]
    frames = (len(x) - kernel) // stride + 1
    return sum(x[k : k + stride * (frames - 1) + 1 : stride] @ weight[:, :, k].T for k in range(kernel))


def conv1d_backward(dy: Array, x: Array, weight: Array, stride: int) -> tuple[Array, Array]:
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    for k in range(weight.shape[2]):
        rows = slice(k, k + stride * (len(dy) - 1) + 1, stride)
        dx[rows] += dy @ weight[:, :, k]
        dweight[:, :, k] = dy.T @ x[rows]
    return dx, dweight


def _frames(x: Array, kernel: int, stride: int) -> Array:
    return np.lib.stride_tricks.sliding_window_view(x, kernel)[::stride]


def conv0_norm(x: Array, weight: Array, gain: Array, shift: Array, stride: int, eps: float = 1e-5) -> Array:
    """First convolution and its norm over time as one affine map. x (N,), weight (C, K) -> (T, C).

    With m the mean and S the covariance of the strided frames x_t (both biased), w . x_t has mean w . m and
    variance w' S w: no pass over the C channels is needed for the statistics."""
    rows = _frames(x, weight.shape[1], stride)
    mean = rows.mean(0)
    cov = (rows - mean).T @ (rows - mean) / len(rows)
    sigma = np.sqrt(np.einsum("ck,kl,cl->c", weight, cov, weight) + eps)
    scale = gain / sigma
    return rows @ (scale[:, None] * weight).T + (shift - scale * (weight @ mean))


def conv0_norm_backward(
    dz: Array, x: Array, weight: Array, gain: Array, shift: Array, stride: int, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """(dweight, dgain, dshift) from one pass over dz: with G = sum dz x_t, S1 = sum dz and S2 = (w.G - mu S1)
    / sigma, dweight = gain / sigma (G - S1 m - S2 / sigma S w). S is the covariance: with the raw second
    moment R in its place the last term is R w - mu m."""
    rows = _frames(x, weight.shape[1], stride)
    mean = rows.mean(0)
    cov = (rows - mean).T @ (rows - mean) / len(rows)
    sigma = np.sqrt(np.einsum("ck,kl,cl->c", weight, cov, weight) + eps)
    total, moment = dz.sum(0), dz.T @ rows
    dgain = ((weight * moment).sum(1) - weight @ mean * total) / sigma
    dweight = moment - total[:, None] * mean - (dgain / sigma)[:, None] * (weight @ cov)
    return (gain / sigma)[:, None] * dweight, dgain, total


def weight_norm(v: Array, g: Array) -> Array:
    """v (C_out, C_in, K), g (1, 1, K): one norm for each tap."""
    return g * v / np.sqrt((v * v).sum((0, 1), keepdims=True))


def weight_norm_backward(dw: Array, v: Array, g: Array) -> tuple[Array, Array]:
    norm = np.sqrt((v * v).sum((0, 1), keepdims=True))
    dg = (dw * v).sum((0, 1), keepdims=True) / norm
    return g / norm * (dw - dg * v / norm), dg


def pos_conv(x: Array, weight: Array, bias: Array, groups: int) -> Array:
    """x (T, D), weight (D, D / groups, K), zero padding K // 2, the first T outputs kept (gelu not
    included)."""
    frames, kernel, size = len(x), weight.shape[2], weight.shape[1]
    padded = np.pad(x, ((kernel // 2, kernel // 2), (0, 0)))
    out = np.zeros((frames, len(weight)))
    for g in range(groups):
        rows, cols = (
            slice(g * len(weight) // groups, (g + 1) * len(weight) // groups),
            slice(g * size, (g + 1) * size),
        )
        out[:, rows] = conv1d(padded[:, cols], weight[rows], 1)[:frames]
    return out + bias


def pos_conv_backward(
    dy: Array, x: Array, weight: Array, bias: Array, groups: int
) -> tuple[Array, Array, Array]:
    frames, kernel, size = len(x), weight.shape[2], weight.shape[1]
    half, dweight = kernel // 2, np.zeros_like(weight)
    padded = np.pad(x, ((half, half), (0, 0)))[: frames + kernel - 1]
    dpadded = np.zeros_like(padded)
    for g in range(groups):
        rows, cols = (
            slice(g * len(weight) // groups, (g + 1) * len(weight) // groups),
            slice(g * size, (g + 1) * size),
        )
        dpadded[:, cols], dweight[rows] = conv1d_backward(dy[:, rows], padded[:, cols], weight[rows], 1)
    return dpadded[half : half + frames], dweight, dy.sum(0)


def gate(x: Array, weight: Array, bias: Array, grep_a: Array) -> Array:
    """WavLM's gate of the position bias. x (T, H, Dh), weight (8, Dh), bias (8,), grep_a (H,) -> (T, H)."""
    s = (x @ weight.T + bias).reshape(*x.shape[:2], 2, 4).sum(-1)
    a, b = np.moveaxis(1 / (1 + np.exp(-s)), -1, 0)
    return a * (b * grep_a - 1) + 2


def gate_backward(
    dgate: Array, x: Array, weight: Array, bias: Array, grep_a: Array
) -> tuple[Array, Array, Array, Array]:
    s = (x @ weight.T + bias).reshape(*x.shape[:2], 2, 4).sum(-1)
    a, b = np.moveaxis(1 / (1 + np.exp(-s)), -1, 0)
    ds = np.stack([dgate * (b * grep_a - 1) * a * (1 - a), dgate * a * grep_a * b * (1 - b)], -1)
    du = np.repeat(ds, 4, -1)
    return du @ weight, np.einsum("tho,thd->od", du, x), du.sum((0, 1)), (dgate * a * b).sum(0)


def attention(q: Array, k: Array, v: Array, gates: Array, bias: Array) -> Array:
    """q, k, v (T, H, Dh), gates (T, H), bias (H, 2T - 1) read at j - i + T - 1 -> (T, H, Dh)."""
    return np.einsum("hij,jhd->ihd", _probabilities(q, k, gates, bias), v)


def _probabilities(q: Array, k: Array, gates: Array, bias: Array) -> Array:
    offset = np.arange(len(q))[None, :] - np.arange(len(q))[:, None] + len(q) - 1
    logits = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) + gates.T[:, :, None] * bias[:, offset]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention_backward(
    dy: Array, q: Array, k: Array, v: Array, gates: Array, bias: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """The softmax needs only the row sums of dy * y: sum_j p_ij dp_ij = dy_i . y_i."""
    frames, scale = len(q), 1 / math.sqrt(q.shape[-1])
    offset = np.arange(frames)[None, :] - np.arange(frames)[:, None] + frames - 1
    p = _probabilities(q, k, gates, bias)
    y = np.einsum("hij,jhd->ihd", p, v)
    dlogits = p * (np.einsum("ihd,jhd->hij", dy, v) - (dy * y).sum(-1).T[:, :, None])
    dbias = np.stack(
        [
            np.bincount(offset.ravel(), (gates[:, h, None] * dlogits[h]).ravel(), 2 * frames - 1)
            for h in range(q.shape[1])
        ]
    )
    return (
        scale * np.einsum("hij,jhd->ihd", dlogits, k),
        scale * np.einsum("hij,ihd->jhd", dlogits, q),
        np.einsum("hij,ihd->jhd", p, dy),
        (dlogits * bias[:, offset]).sum(-1).T,
        dbias,
    )


def distill_loss(pred: Array, target: Array, lam: float = 1.0) -> float:
    """Mean over layers and frames, (L, F, D) each; the frames are those that count."""
    norms = [np.maximum(np.sqrt((x * x).sum(-1)), 1e-8) for x in (pred, target)]
    similarity = (pred * target).sum(-1) / (norms[0] * norms[1])
    return float((np.abs(pred - target).mean(-1) + lam * np.log1p(np.exp(-similarity))).mean())


def distill_loss_backward(pred: Array, target: Array, lam: float = 1.0) -> Array:
    """d loss / d pred, as torch has it: a norm below eps counts as eps, yet its own gradient is p / |p|."""
    layers, frames, width = pred.shape
    raw, other = (np.sqrt((x * x).sum(-1, keepdims=True)) for x in (pred, target))
    norm, other = np.maximum(raw, 1e-8), np.maximum(other, 1e-8)
    similarity = (pred * target).sum(-1, keepdims=True) / (norm * other)
    dsimilarity = -lam / (1 + np.exp(similarity))
    direction = target / (norm * other) - similarity * pred / (norm * np.where(raw > 0, raw, 1))
    return (np.sign(pred - target) / width + dsimilarity * direction) / (layers * frames)


def adamw(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    decay: float = 0.0,
    variant: str = "adamw",
) -> tuple[Array, Array, Array]:
    """One update at step 1, 2, ... of an already clipped gradient; returns the new p, m, v."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    correct1, correct2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    if variant == "adamw_s3prl":
        return p - lr * math.sqrt(correct2) / correct1 * (m / (np.sqrt(v) + eps) + decay * p), m, v
    return p * (1 - lr * decay) - lr / correct1 * m / (np.sqrt(v / correct2) + eps), m, v
