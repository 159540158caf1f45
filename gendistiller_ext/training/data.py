"""Training data: which utterances make up which batch, where they are cropped, and reading them ahead.

All randomness is a function of (seed, epoch or pool, utterance) by Philox: batch n of a run is the same
however often the run was interrupted, and no generator state has to be kept. Only raw Philox words are
used, whose stream NumPy guarantees from version to version, unlike that of `Generator`'s methods.
"""
from __future__ import annotations

import hashlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Callable, Iterator, Optional, Protocol, Sequence

import numpy as np

from ..audio.files import RATE, AudioError, AudioFile, read_audio, too_short
from ..audio.find import find_audio, without
from .recipe import Recipe

# Second half of the Philox key: what the words are drawn for.
PERMUTATION, CROP, BATCH_ORDER = 1, 2, 3

POOL_BATCHES = 16  # batches whose utterances are sorted by length together


def philox_words(seed: int, purpose: int, index: int, utterance: int = 0, count: int = 1) -> np.ndarray:
    """(count,) uint64: Philox 4x64-10 with key (seed, purpose), counter (0.., 0, utterance, index)."""
    counter = np.array([0, 0, utterance, index], np.uint64)
    return np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=counter).random_raw(count)


def shuffled(seed: int, purpose: int, index: int, size: int) -> np.ndarray:
    """(size,) int64: a permutation of range(size)."""
    return np.argsort(philox_words(seed, purpose, index, count=size), kind="stable")


def crop_position(seed: int, epoch: int, utterance: int) -> float:
    """Where in [0, 1) the crop of an utterance lies in an epoch: the upper 53 bits of a word."""
    return int(philox_words(seed, CROP, epoch, utterance)[0] >> np.uint64(11)) * 2.0 ** -53


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")  # as the file system has it, where it is no text


def split_validation(files: Sequence[AudioFile], fraction: float) -> tuple[list[AudioFile], list[AudioFile]]:
    """(training, validation) files. A file is held out if the hash of its name falls below `fraction`, so
    adding files moves none of the others; where that chooses none or all, one file of two or more is held
    out or kept."""
    if not 0 <= fraction < 1:
        raise ValueError(f"valid_fraction: expected 0 <= fraction < 1, got {fraction}")
    ranks = [int.from_bytes(hashlib.sha256(_bytes(file.name)).digest()[:8], "big") for file in files]
    order = sorted(range(len(files)), key=lambda i: (ranks[i], files[i].name))
    held = sum(rank < fraction * 2.0 ** 64 for rank in ranks)
    if fraction > 0 and len(files) > 1:
        held = min(max(held, 1), len(files) - 1)
    else:
        held = 0
    chosen = set(order[:held])
    return ([file for i, file in enumerate(files) if i not in chosen],
            [file for i, file in enumerate(files) if i in chosen])


def find_training_audio(recipe: Recipe, min_samples: int, say: Callable[[str], None]
                        ) -> tuple[list[AudioFile], list[AudioFile]]:
    """(training, validation) files of a recipe; `say` hears of those that are left out. Raises ValueError where
    none are left for training."""
    def usable(sources: Sequence[str]) -> list[AudioFile]:
        files, skipped = find_audio(sources, root=recipe.root, min_samples=min_samples)
        for error in skipped:
            say(f"skipped {error}")
        if skipped:
            say(f"skipped {len(skipped)} files, {len(files)} are left")
        return files

    files = usable(recipe.audio)
    if not recipe.valid_audio:
        return split_validation(files, recipe.valid_fraction)
    held = usable(recipe.valid_audio)
    files = without(files, held)
    if not files:
        raise ValueError("audio: expected files that are not in valid_audio, got none")
    return files, held


def dataset_hash(files: Sequence[AudioFile]) -> str:
    """SHA-256 over names and lengths, in order: two sets with the same hash give the same batches."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(_bytes(f"{file.name}\t{file.samples}\n"))
    return digest.hexdigest()


class Plan(Protocol):
    """Which crops each batch has: BatchPlan, or a part of it."""

    def __getitem__(self, batch: int) -> list[tuple[int, int]]: ...

    def epoch(self, batch: int) -> float: ...


class BatchPlan:
    """Which utterances form batch n, n = 0, 1, ...

    The utterances of all epochs, each epoch permuted, make one endless stream. Every POOL_BATCHES batches
    of it are sorted by their length (after cropping), cut into batches of like length, and the batches
    shuffled. All batches are full; one may hold the end of an epoch and the start of the next.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, crop: int, seed: int):
        if not lengths:
            raise ValueError("audio: expected at least one training file, got none")
        self._lengths = np.minimum(np.asarray(lengths, np.int64), crop)
        self._batch_size = batch_size
        self._seed = seed
        self._permutation = lru_cache(4)(lambda epoch: shuffled(seed, PERMUTATION, epoch, len(lengths)))
        self._pool = lru_cache(2)(self._make_pool)

    def _make_pool(self, index: int) -> list[list[tuple[int, int]]]:
        size = POOL_BATCHES * self._batch_size
        stream = []
        for position in range(index * size, (index + 1) * size):
            epoch, place = divmod(position, len(self._lengths))
            stream.append((epoch, int(self._permutation(epoch)[place])))
        stream.sort(key=lambda entry: self._lengths[entry[1]])
        order = shuffled(self._seed, BATCH_ORDER, index, POOL_BATCHES)
        return [stream[i * self._batch_size:(i + 1) * self._batch_size] for i in order]

    def __getitem__(self, batch: int) -> list[tuple[int, int]]:
        """[(epoch, utterance), ...] of batch number `batch`."""
        return self._pool(batch // POOL_BATCHES)[batch % POOL_BATCHES]

    def epoch(self, batch: int) -> float:
        """Epochs begun or done when batch number `batch` begins, as a fraction."""
        return batch * self._batch_size / len(self._lengths)


@dataclass
class Batch:
    """One batch: waveforms (1-D float32), the names of their files, and files that failed to be read."""
    number: int
    wavs: list[np.ndarray]
    names: list[str]
    failed: list[AudioError]

    @property
    def seconds(self) -> float:
        return sum(len(wav) for wav in self.wavs) / RATE

    def read(self, file: AudioFile, min_samples: int, crop: Optional[int], position: float = 0.0) -> None:
        """Appends a file, or why it can't be used."""
        try:
            wav = read_audio(file, crop=crop, position=position)
            if len(wav) < min_samples:
                raise AudioError(file.name, too_short(len(wav), min_samples))
        except AudioError as error:
            self.failed.append(error)
            return
        self.wavs.append(wav)
        self.names.append(file.name)


class ReadAhead:
    """Runs load(item) for the items in threads, at most `ahead` results early; iterates in their order.

    An exception of `load` is raised where its result would have come. Leaving the `with` block stops the
    threads: nothing new is started and what runs is waited for.
    """

    def __init__(self, load, items: Iterator, *, threads: int = 2, ahead: int = 4):
        self._load = load
        self._items = iter(items)
        self._ahead = ahead
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gendistiller-read")
        self._pending: deque = deque()

    def _fill(self) -> None:
        while len(self._pending) < self._ahead:
            try:
                item = next(self._items)
            except StopIteration:
                return
            self._pending.append(self._pool.submit(self._load, item))

    def __iter__(self):
        return self

    def __next__(self):
        self._fill()
        if not self._pending:
            raise StopIteration
        result = self._pending.popleft().result()
        self._fill()
        return result

    def close(self) -> None:
        self._items = iter(())
        while self._pending:
            self._pending.popleft().cancel()
        self._pool.shutdown(wait=True)

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class TrainingData:
    """Batches of random crops of `files`; `min_samples` is the model's shortest input."""

    def __init__(self, files: Sequence[AudioFile], batch_size: int, crop: int, seed: int,
                 min_samples: int = 1):
        self.files = list(files)
        self.crop = crop
        self.seed = seed
        self.min_samples = min_samples
        self.plan: Plan = BatchPlan([file.samples for file in self.files], batch_size, crop, seed)

    def load(self, planned: tuple[int, list[tuple[int, int]]]) -> Batch:
        number, entries = planned
        batch = Batch(number, [], [], [])
        for epoch, utterance in entries:
            batch.read(self.files[utterance], self.min_samples, self.crop,
                       crop_position(self.seed, epoch, utterance))
        return batch

    def batches(self, start: int, stop: int, *, threads: int = 2, ahead: int = 4) -> ReadAhead:
        """Batches number start to stop - 1, read in the background. To be used in a `with` statement."""
        return ReadAhead(self.load, ((number, self.plan[number]) for number in range(start, stop)),
                         threads=threads, ahead=ahead)


def length_batches(files: Sequence[AudioFile], batch_size: int) -> list[list[AudioFile]]:
    """All files in batches of like length, longest first: the largest batch shows whether memory holds."""
    order = sorted(files, key=lambda file: (-file.samples, file.name))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def read_files(files: Sequence[AudioFile], *, crop: Optional[int] = None, min_samples: int = 1) -> Batch:
    """The files from their beginning, at most `crop` samples of each."""
    batch = Batch(0, [], [], [])
    for file in files:
        batch.read(file, min_samples, crop)
    return batch
