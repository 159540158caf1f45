"""Loss and gradient of a whole batch, computed in parts, and by several processes."""
from __future__ import annotations

from typing import Callable, Optional, Union

import numpy as np

from .distributed import Processes
from .recipe import Recipe
from .validation import TERMS


def batch_gradient(student, wavs: list[np.ndarray], teach: Callable, into: np.ndarray, *, recipe: Recipe,
                   processes: Processes, step: int, place: int = 0, threads: Optional[int] = None
                   ) -> tuple[float, dict[str, Union[float, np.ndarray]]]:
    """The loss, and its terms as means over frames: {"l1": (L,), "cos": ..., "similarity": ...,
    "feature_penalty": float}. `into` is overwritten with the gradient, flat float32.

    wavs: this process's share of the batch of step `step`, from its utterance number `place` on; computed in
    recipe.accumulate parts. Sums of parts and processes are divided once, by the frames of all.
    teach: (first, last) -> (targets (L, B, T, D), frames) of wavs[first:last].
    """
    parts = min(recipe.accumulate, len(wavs))
    by_sum = parts > 1 or processes.size > 1 or recipe.reduction == "sum"
    bounds = [len(wavs) * i // parts for i in range(parts + 1)] if wavs else []
    config = student.config
    dropout = any((config.dropout, config.attention_dropout, config.activation_dropout))
    into[:] = 0
    totals = np.zeros(3 + len(TERMS) * len(config.target_layers))  # loss, frames, feature penalty, terms by layer
    for first, last in zip(bounds, bounds[1:]):
        targets, frames = teach(first, last)
        count = int(np.sum(frames)) if recipe.mask_padding else targets.shape[1] * targets.shape[2]
        result = student.distill_step(
            wavs[first:last], targets, lam=recipe.lam, loss_type=recipe.loss_type,
            feat_pen_loss=recipe.feat_pen_loss, reduction="sum" if by_sum else "mean",
            mask_padding=recipe.mask_padding, history=recipe.history, detach_history=recipe.detach_history,
            dropout_seed=(recipe.seed, step, place + first) if dropout else None, precision=recipe.precision,
            into=into, num_threads=threads)
        scale = 1 if by_sum else count
        totals += np.concatenate([
            [result.loss * scale, count, result.feature_penalty * scale], result.l1 * scale, result.cos * scale,
            np.asarray(result.similarity) * count])  # a mean, always
    processes.add(totals)
    processes.add(into)
    loss, frames_of_all, penalty = totals[:3].tolist()
    terms: dict[str, Union[float, np.ndarray]] = dict(zip(TERMS, totals[3:].reshape(len(TERMS), -1) / frames_of_all))
    terms["feature_penalty"] = penalty / frames_of_all
    if recipe.reduction == "sum":
        return loss, terms
    if by_sum:
        into *= np.float32(1 / frames_of_all)
    return loss / frames_of_all, terms
