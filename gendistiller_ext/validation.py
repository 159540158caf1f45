"""The loss on held-out files while a student trains."""
from __future__ import annotations

from typing import Callable, Optional, Sequence

import numpy as np

from .audio import AudioError, AudioFile
from .data import length_batches, read_files

TERMS = ("l1", "cos", "similarity")
# The teacher's states of the files are kept in memory up to this size, recomputed beyond it.
CACHE_BYTES = 256 << 20


def similarity(pred: np.ndarray, target: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """(L,) mean cosine over valid frames of (L, B, T, D) arrays, as torch.nn.functional.cosine_similarity."""
    dot = np.einsum("lbtd,lbtd->lbt", pred, target, dtype=np.float64)
    norms = [np.maximum(np.sqrt(np.einsum("lbtd,lbtd->lbt", x, x, dtype=np.float64)), 1e-8)
             for x in (pred, target)]
    mask = np.arange(pred.shape[2]) < np.asarray(frames)[:, None]
    return (dot / (norms[0] * norms[1]) * mask).sum(axis=(1, 2)) / mask.sum()


class Validation:
    """Files, from their beginning and cut at `crop` samples, in batches that are the same each time.

    teach: (wavs) -> (targets (L, B, T, D), frames); failed: called with each AudioError.
    """

    def __init__(self, files: Sequence[AudioFile], batch_size: int, crop: int, min_samples: int,
                 teach: Callable, failed: Callable[[AudioError], None]):
        self._batches = length_batches(files, batch_size)
        self._crop, self._min_samples = crop, min_samples
        self._teach, self._failed = teach, failed
        self._kept: dict[int, tuple[list[str], np.ndarray]] = {}

    def _targets(self, index: int, names: list[str], wavs: list[np.ndarray]) -> np.ndarray:
        kept_names, target = self._kept.get(index, (None, None))
        if kept_names != names:
            target, _ = self._teach(wavs)
            if sum(kept.nbytes for _, kept in self._kept.values()) + target.nbytes <= CACHE_BYTES:
                self._kept[index] = (names, target)
        return target

    def evaluate(self, student, lam: float, num_threads: Optional[int] = None) -> dict[str, float]:
        """{"valid_loss": ..., "valid_l1_4": ..., ...}: means over all frames of all files, in evaluation mode
        and on the student's own history; {} where there is no file."""
        import gendistiller_ext as gd
        target_layers = student.config.target_layers
        totals = {term: np.zeros(len(target_layers)) for term in TERMS}
        loss, count = 0.0, 0
        for index, files in enumerate(self._batches):
            batch = read_files(files, crop=self._crop, min_samples=self._min_samples)
            for error in batch.failed:
                self._failed(error)
            if not batch.wavs:
                continue
            target = self._targets(index, batch.names, batch.wavs)
            hidden, frames = student.forward(batch.wavs, num_threads=num_threads)
            pred = np.stack(hidden[-len(target_layers):])
            value, l1, cos, _ = gd.distill_loss(pred, target, frames, lam=lam)
            weight = int(np.sum(frames))
            loss += float(value) * weight
            count += weight
            for term, values in zip(TERMS, (l1, cos, similarity(pred, target, frames))):
                totals[term] += np.asarray(values, np.float64) * weight
        if count == 0:
            return {}
        row = {"valid_loss": loss / count}
        for term in TERMS:
            row.update({f"valid_{term}_{layer}": float(total) / count
                        for layer, total in zip(target_layers, totals[term])})
        return row
