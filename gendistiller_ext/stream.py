"""Long audio and audio that is still coming: hidden states in chunks, each from a window of the audio.

    stream = model.stream(chunk_seconds=2, context_seconds=1)
    for piece in microphone:                    # float32 (samples,), 16 kHz, of any lengths
        states = stream.feed(piece)             # the new frames of each hidden state, maybe none
    states = stream.finish()

A chunk's frames come from a window that has `context_seconds` more audio on either side. With the statistics of
the whole utterance (GroupNorm's and those of `normalize`: see csrc/gendistiller.h) the feature embedding is that
of one pass; the positional convolution and attention see the window alone.
"""
from __future__ import annotations

import math
from typing import Any, Iterable, Iterator, Literal, Optional, Protocol

import numpy as np

from .config import Config, Precision

_RATE = 16000
_ALIGNMENT = 4  # frames: GD_WINDOW_ALIGNMENT, where a window's frames have the bits that they have in one pass
_BLOCK = 60 * _RATE  # samples that statistics() adds at a time


class Streamed(Protocol):
    """What a stream needs of a model: gendistiller_ext.Model has it."""

    @property
    def config(self) -> Config: ...

    @property
    def statistics(self) -> Optional[np.ndarray]: ...

    def forward(self, wavs: np.ndarray, *, num_layers: Optional[int], precision: Optional[Precision],
                num_threads: Optional[int], statistics: Optional[np.ndarray]
                ) -> tuple[list[np.ndarray], np.ndarray]: ...

    def _add_statistics(self, statistics: Optional[np.ndarray], audio: np.ndarray, before: int) -> np.ndarray: ...


def statistics(model: Streamed, pieces: Iterable[np.ndarray]) -> np.ndarray:
    """Statistics of an utterance, float64 (n,), for Stream or `Model.statistics`; the first is its samples.

    pieces: float32 (samples,) each, 16 kHz, which follow one another; how they are cut changes no bit.
    Raises ValueError or TypeError for samples of another kind, NaN or infinity, and fewer than one frame's.
    """
    least = model.config.min_samples
    lookback = _lookback(model)
    total, tail = None, np.empty(0, np.float32)
    for block in _blocks(pieces):
        total = model._add_statistics(total, np.concatenate([tail, block]), len(tail))
        tail = np.concatenate([tail, block])[-lookback:] if lookback else tail
    if total is None or total[0] < least:
        raise ValueError(f"pieces: expected at least {least} samples in all, got "
                         f"{0 if total is None else int(total[0])}")
    return total


class Stream:
    """Hidden states of audio that comes in pieces; what they are doesn't depend on how it is cut.

    model: its padding is 'exact'. It may be used elsewhere meanwhile.
    chunk_seconds: audio whose frames are computed together; context_seconds: what they see on either side.
        Both are rounded up to four frames (0.08 s).
    stats: 'running': a chunk is normalised by all that was heard up to its window's end. 'fixed': by
        `statistics`, or those that the checkpoint has (`gendistiller convert --fix-stats`).
    statistics: float64 (n,) of `statistics()`, with stats 'fixed'.
    num_layers, precision, num_threads: as in Model.forward().

    Raises ValueError or TypeError that names the argument.

    Attributes: chunk_seconds, context_seconds, as rounded; frames, how many were returned so far;
    latency_seconds, from a chunk's first sample to the last that it waits for.
    """

    def __init__(self, model: Streamed, chunk_seconds: float, context_seconds: float,
                 stats: Literal["running", "fixed"] = "running", *,
                 statistics: Optional[np.ndarray] = None, num_layers: Optional[int] = None,
                 precision: Optional[Precision] = None, num_threads: Optional[int] = None) -> None:
        if model.config.padding != "exact":
            raise ValueError(f"padding: expected a model with 'exact', got {model.config.padding!r}")
        self._model = model
        self._num_layers, self._precision, self._num_threads = num_layers, precision, num_threads
        self._least, self._hop = model.config.min_samples, model.config.hop
        self._chunk = _frames("chunk_seconds", chunk_seconds, self._hop, 1)
        self._context = _frames("context_seconds", context_seconds, self._hop, 0)
        if stats not in ("running", "fixed"):
            raise ValueError(f"stats: expected 'running' or 'fixed', got {stats!r}")
        if stats == "running" and statistics is not None:
            raise ValueError("statistics: expected none with stats 'running'")
        if stats == "fixed":
            statistics = model.statistics if statistics is None else statistics
            if statistics is None:
                raise ValueError("statistics: expected some with stats 'fixed', as the checkpoint has none "
                                 "(gendistiller convert --fix-stats writes them)")
        self._running = stats == "running"
        self._statistics = statistics
        # An empty run finds wrong options and statistics before any audio comes.
        shape = self._forward(np.zeros(self._least, np.float32), statistics)
        self._empty = [np.empty((0, state.shape[2]), np.float32) for state in shape]
        self._pieces: list[np.ndarray] = []  # samples _first .. _heard - 1
        self._first = self._heard = self._counted = 0  # _counted: samples in running statistics
        self._finished = False
        self.frames = 0

    @property
    def chunk_seconds(self) -> float:
        return self._chunk * self._hop / _RATE

    @property
    def context_seconds(self) -> float:
        return self._context * self._hop / _RATE

    @property
    def latency_seconds(self) -> float:
        return self._end(self._chunk + self._context) / _RATE

    def feed(self, samples: np.ndarray) -> list[np.ndarray]:
        """The new frames of each hidden state, a list of float32 (frames, D) in Model.forward()'s order, that
        these samples complete.

        samples: float32 (samples,), 16 kHz. Raises ValueError or TypeError for others, NaN and infinity, and
        ValueError after finish(); the stream is then as it was.
        """
        if self._finished:
            raise ValueError("samples: expected none after finish()")
        piece = _take("samples", samples)
        self._pieces.append(piece)
        self._heard += len(piece)
        return self._advance(None)

    def finish(self) -> list[np.ndarray]:
        """The rest, as feed(). Raises ValueError where all samples together are fewer than one frame's."""
        if self._finished:
            return self._empty
        if self._heard < self._least:
            raise ValueError(f"samples: expected at least {self._least} in all, got {self._heard}")
        states = self._advance((self._heard - self._least) // self._hop + 1)
        self._finished, self._pieces = True, []
        return states

    def _end(self, frame: int) -> int:
        """Samples up to which a window is heard whose last frame is the one before `frame`: all that make none more."""
        return frame * self._hop + self._least - 1

    def _advance(self, total: Optional[int]) -> list[np.ndarray]:
        """All chunks that can be computed; total: frames in all, where no audio comes any more."""
        done = []
        while self.frames < total if total is not None else self._heard >= self._end(
                self.frames + self._chunk + self._context):
            done.append(self._compute(total))
        if len(done) == 1:
            return done[0]
        return [np.concatenate(parts) for parts in zip(*done)] if done else self._empty

    def _compute(self, total: Optional[int]) -> list[np.ndarray]:
        """The next chunk."""
        stop, last = self.frames + self._chunk, self.frames + self._chunk + self._context
        if total is not None:
            stop, last = min(stop, total), min(last, total)
        first, end = max(0, self.frames - self._context), min(self._heard, self._end(last))
        audio = np.concatenate(self._pieces)
        statistics = self._statistics
        if self._running and end > self._counted:
            before = min(self._counted, _lookback(self._model))
            statistics = self._model._add_statistics(
                statistics, audio[self._counted - before - self._first:end - self._first], before)
        hidden = self._forward(audio[first * self._hop - self._first:end - self._first], statistics)
        states = [state[0, self.frames - first:stop - first].copy() for state in hidden]

        self._statistics, self._counted, self.frames = statistics, end, stop
        keep = max(0, stop - self._context) * self._hop
        self._pieces, self._first = [audio[keep - self._first:].copy()], keep
        return states

    def _forward(self, audio: np.ndarray, statistics: Optional[np.ndarray]) -> list[np.ndarray]:
        given = None if statistics is None else np.asarray(statistics)[None]
        return self._model.forward(audio[None], num_layers=self._num_layers, precision=self._precision,
                                   num_threads=self._num_threads, statistics=given)[0]


def chunks(model: Streamed, pieces: Iterable[np.ndarray], chunk_seconds: float, context_seconds: float,
           **options: Any) -> Iterator[list[np.ndarray]]:
    """The hidden states of an utterance that comes in pieces, chunk by chunk, as Stream's arguments have it."""
    stream = Stream(model, chunk_seconds, context_seconds, **options)
    for piece in pieces:
        states = stream.feed(piece)
        if len(states[0]):
            yield states
    yield stream.finish()


def _lookback(model: Streamed) -> int:
    return model.config.conv_feature_layers[0][1] - 1


def _frames(name: str, seconds: float, hop: int, least: int) -> int:
    """Seconds as frames, a multiple of _ALIGNMENT."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {type(seconds).__name__}")
    if not (0 < seconds < 1e6 if least else 0 <= seconds < 1e6):
        raise ValueError(f"{name}: expected {'more than 0' if least else '0 or more'} seconds, got {seconds}")
    return math.ceil(round(seconds * _RATE / hop / _ALIGNMENT, 6)) * _ALIGNMENT or _ALIGNMENT * least


def _take(name: str, samples: np.ndarray) -> np.ndarray:
    """A copy of a piece of audio, checked."""
    if not isinstance(samples, np.ndarray):
        raise TypeError(f"{name}: expected float32 (samples,), got {type(samples).__name__}")
    if samples.dtype != np.float32 or samples.ndim != 1:
        raise ValueError(f"{name}: expected float32 (samples,), got {samples.dtype} {samples.shape}")
    if not np.isfinite(samples).all():
        raise ValueError(f"{name}: expected finite samples, got NaN or infinity")
    return samples.copy()


def _blocks(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same samples in pieces of _BLOCK."""
    waiting: list[np.ndarray] = []
    length = 0
    for piece in pieces:
        waiting.append(_take("pieces", piece))
        length += len(piece)
        while length >= _BLOCK:
            joined = np.concatenate(waiting)
            yield joined[:_BLOCK]
            waiting, length = [joined[_BLOCK:]], length - _BLOCK
    if length:
        yield np.concatenate(waiting)
