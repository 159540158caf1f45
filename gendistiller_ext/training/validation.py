"""The loss on held-out files while a student trains."""
from __future__ import annotations

from typing import Callable, Literal, Optional, Sequence

import numpy as np

from ..audio.files import AudioFile
from .data import length_batches, read_files
from .distributed import Processes

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

    teach: (wavs) -> (targets (L, B, T, D), frames). Each of the processes computes every so many-th batch.
    """

    def __init__(self, files: Sequence[AudioFile], batch_size: int, crop: int, min_samples: int,
                 teach: Callable, processes: Processes):
        self._batches = length_batches(files, batch_size)
        self._crop, self._min_samples = crop, min_samples
        self._teach, self._processes = teach, processes
        self._kept: dict[int, tuple[list[str], np.ndarray]] = {}

    def _targets(self, index: int, names: list[str], wavs: list[np.ndarray]) -> np.ndarray:
        kept = self._kept.get(index)
        if kept is not None and kept[0] == names:
            return kept[1]
        target, _ = self._teach(wavs)
        if sum(other.nbytes for _, other in self._kept.values()) + target.nbytes <= CACHE_BYTES:
            self._kept[index] = (names, target)
        return target

    def evaluate(self, student, lam: float, loss_type: Literal["l1", "l2"], num_threads: Optional[int] = None
                 ) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """({"valid_loss": ..., "valid_l1_4": ..., ...}, files that could not be read, with the reason): means
        over all frames of all files, in evaluation mode and on the student's own history; {} where there is
        no file."""
        import gendistiller_ext as gd
        target_layers = student.config.target_layers
        # By batch: frames, loss, terms of each layer. Summed over processes, then over batches in their order,
        # so that the sums are those of one process.
        sums = np.zeros((len(self._batches), 2 + len(TERMS) * len(target_layers)))
        failed: list[tuple[str, str]] = []
        for index in range(self._processes.rank, len(self._batches), self._processes.size):
            batch = read_files(self._batches[index], crop=self._crop, min_samples=self._min_samples)
            failed += [(error.name, error.reason) for error in batch.failed]
            if not batch.wavs:
                continue
            target = self._targets(index, batch.names, batch.wavs)
            hidden, frames = student.forward(batch.wavs, num_threads=num_threads)
            pred = np.stack(hidden[-len(target_layers):])
            value, l1, cos, _ = gd.distill_loss(pred, target, frames, lam=lam, loss_type=loss_type)
            weight = int(np.sum(frames))
            sums[index] = np.concatenate([[1, value], l1, cos, similarity(pred, target, frames)]) * weight
        self._processes.add(sums)
        failed = sum(self._processes.gather(failed), [])
        count, *totals = np.cumsum(sums, axis=0)[-1].tolist() if len(sums) else [0.0]
        if count == 0:
            return {}, failed
        names = ["valid_loss", *(f"valid_{term}_{layer}" for term in TERMS for layer in target_layers)]
        return {name: total / count for name, total in zip(names, totals)}, failed
