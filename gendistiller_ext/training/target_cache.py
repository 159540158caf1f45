"""Targets of a frozen teacher, kept on the disk: `distill --teacher-cache DIR`.

The teacher hears each file once, whole; a crop's targets are the frames that it covers. They are not the very
targets of the crop heard alone: attention and norms see what is around it too. Crops begin at a multiple of
a frame's samples then. An entry is found by the SHA-256 of the teacher's weights, the layers and the
file's samples, so that changed audio is another entry; it holds bfloat16 and its own checksum, and one that
is damaged is computed again.
"""
from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import Callable, Optional, Sequence

import numpy as np

from ..audio.files import AudioFile
from ..model import num_frames
from .data import Batch, TrainingData, crop_position, read_files
from .state import read_checked, write_checked


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """uint16, the upper halves of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + half) >> np.uint32(16)).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32, exactly, of to_bfloat16()'s uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclass
class WholeBatch(Batch):
    """A batch of crops with the files that they are of: (all samples, the crop's first frame)."""
    wholes: list[tuple[np.ndarray, int]] = field(default_factory=list)


class WholeData(TrainingData):
    """TrainingData whose files are read whole, and cropped at frames, `hop` samples from one to the next."""

    def __init__(self, files: Sequence[AudioFile], batch_size: int, crop: int, seed: int, min_samples: int, hop: int):
        super().__init__(files, batch_size, crop, seed, min_samples)
        self.hop = hop

    def load(self, planned) -> WholeBatch:
        number, entries = planned
        batch = WholeBatch(number, [], [], [])
        for epoch, utterance in entries:
            file = self.files[utterance]
            whole = read_files([file], min_samples=self.min_samples)
            batch.failed += whole.failed
            for wav in whole.wavs:
                places = max(0, len(wav) - self.crop) // self.hop + 1
                first = int(crop_position(self.seed, epoch, utterance) * places)
                batch.wavs.append(wav[first * self.hop:first * self.hop + self.crop])
                batch.names.append(file.name)
                batch.wholes.append((wav, first))
        return batch


class TargetCache:
    """folder: made if absent; several runs may share it. say: told of damaged entries."""

    def __init__(self, teacher, layers: Sequence[int], folder: str, say: Callable[[str], None] = print):
        self._teacher, self._layers, self._folder, self._say = teacher, list(layers), folder, say
        self._config = teacher.config

    def targets(self, wholes: Sequence[tuple[np.ndarray, int]], wavs: Sequence[np.ndarray],
                threads: Optional[int] = None) -> tuple[np.ndarray, np.ndarray]:
        """As a teacher's, for crops `wavs` of `wholes`."""
        frames = num_frames(self._config, np.array([len(wav) for wav in wavs]))
        width = self._config.encoder_embed_dim
        targets = np.zeros((len(self._layers), len(wavs), frames.max(), width), np.float32)
        for row, ((whole, first), count) in enumerate(zip(wholes, frames)):
            targets[:, row, :count] = self.whole(whole, threads)[:, first:first + count]
        return targets, frames

    def path(self, wav: np.ndarray) -> str:
        digest = hashlib.sha256(f"{self._teacher.hash} {self._layers} {len(wav)} ".encode())
        digest.update(np.ascontiguousarray(wav).view(np.uint8))
        name = digest.hexdigest()
        return os.path.join(self._folder, name[:2], f"{name}.targets")

    def whole(self, wav: np.ndarray, threads: Optional[int] = None) -> np.ndarray:
        """(L, T, D) of a file's samples: rounded to bfloat16, read or computed. Raises OSError."""
        path = self.path(wav)
        frames = num_frames(self._config, len(wav))
        shape = (len(self._layers), frames, self._config.encoder_embed_dim)
        try:
            bits = read_checked(path)[0]["targets"]
            if bits.shape == shape and bits.dtype == np.uint16:
                return from_bfloat16(bits)
            self._say(f"{path}: expected {shape}, got {bits.shape}: computed again")
        except FileNotFoundError:
            pass
        except (ValueError, KeyError) as error:
            self._say(f"{error}: computed again")
        targets, _ = self._teacher.targets([wav], self._layers, threads)
        bits = to_bfloat16(targets[:, 0])
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_checked(path, {"targets": bits}, {})
        return from_bfloat16(bits)
