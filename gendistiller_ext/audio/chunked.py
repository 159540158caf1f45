"""Hidden states of a long audio file, chunk by chunk, in memory that doesn't grow with its length.

Two passes read the file: one takes the statistics of the whole, which make the extractor's frames those of one
pass; the other computes the chunks (stream.py) and writes each to its place.
"""
from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from typing import IO, Iterator, Mapping, Optional, Sequence

import numpy as np

from ..atomic import replacing
from ..checkpoints import safetensors
from ..stream import Stream, statistics
from .files import RATE, AudioError, AudioFile, decoded, open_audio
from .find import find_audio

_PIECE = 30  # seconds read at a time
_COPY = 1 << 20


@dataclass(frozen=True)
class Chunking:
    """How long files are cut, in seconds. Raises ValueError where they can't be."""
    chunk: float
    context: float

    def __post_init__(self) -> None:
        if not 0 < self.chunk < 1e6:
            raise ValueError(f"chunk-seconds: expected more than 0, got {self.chunk:g}")
        if not 0 <= self.context < 1e6:
            raise ValueError(f"context-seconds: expected 0 or more, got {self.context:g}")

    def applies(self, file: AudioFile) -> bool:
        """Whether a file is longer than a chunk; others are computed whole."""
        return file.samples > self.chunk * RATE

    @property
    def tags(self) -> dict[str, str]:
        return {"chunk_seconds": f"{self.chunk:g}", "context_seconds": f"{self.context:g}"}


def read_pieces(file: AudioFile, seconds: float = _PIECE) -> Iterator[np.ndarray]:
    """A file's audio as read_audio() has it, (samples,) float32 at 16 kHz, piece by piece. Raises AudioError."""
    with open_audio(file) as stream:
        rate = stream.samplerate
        pieces = decoded(file, stream, block=max(1, round(seconds * rate)))
        if rate != RATE:
            pieces = _resampled(pieces, rate)
        for piece in pieces:
            yield np.ascontiguousarray(piece, dtype=np.float32)


def _resampled(pieces: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"audio at {rate} Hz needs soxr: pip install 'gendistiller_ext[train]'") from error
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    for piece in pieces:
        yield resampler.resample_chunk(np.ascontiguousarray(piece))
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def audio_statistics(model, sources: Sequence[str]) -> np.ndarray:
    """Statistics of all audio of `sources` (as find_audio() takes them), one file after the other. Raises as
    find_audio() does, and AudioError."""
    files, _ = find_audio(sources, min_samples=model.config.min_samples)
    return statistics(model, (piece for file in files for piece in read_pieces(file)))


def extract_long(model, file: AudioFile, path: str, chunking: Chunking, *, layers: Sequence[int],
                 tags: Mapping[str, str], num_layers: Optional[int] = None, precision: Optional[str] = None,
                 threads: Optional[int] = None) -> None:
    """Writes the states `layers` of a file to `path`, .safetensors or .npz, as the command extract does.

    Raises AudioError for a file that can't be used; nothing is written then.
    """
    least, hop = model.config.min_samples, model.config.hop
    try:
        whole = statistics(model, read_pieces(file))
    except AudioError:
        raise
    except ValueError as error:
        raise AudioError(file.name, str(error)) from None
    frames = (int(whole[0]) - least) // hop + 1
    stream = Stream(model, chunking.chunk, chunking.context, "fixed", statistics=whole, num_layers=num_layers,
                    precision=precision, num_threads=threads)
    shape = (len(layers), frames, model.config.encoder_embed_dim)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with replacing(path) as target:
        if path.endswith(".npz"):
            with tempfile.TemporaryFile(dir=os.path.dirname(path)) as rows:
                _write_chunks(rows, 0, shape, stream, file, layers)
                _write_npz(target, rows, shape, tags)
        else:
            target.write(safetensors.header({"hidden_states": (np.dtype(np.float32), shape)}, tags))
            _write_chunks(target, target.tell(), shape, stream, file, layers)


def _write_chunks(target: IO[bytes], start: int, shape: tuple[int, int, int], stream: Stream, file: AudioFile,
                  layers: Sequence[int]) -> None:
    """All chunks, as a C array of `shape` from byte `start` on."""
    row = shape[2] * 4
    written = 0

    def write(states: list[np.ndarray]) -> None:
        nonlocal written
        for place, layer in enumerate(layers):
            target.seek(start + (place * shape[1] + written) * row)
            target.write(states[layer].astype("<f4", copy=False).tobytes())
        written += len(states[0])

    for piece in read_pieces(file):
        states = stream.feed(piece)
        if len(states[0]):
            write(states)
    write(stream.finish())
    if written != shape[1]:
        raise AudioError(file.name, f"changed while it was read: {written} frames, {shape[1]} before")


def _write_npz(target: IO[bytes], rows: IO[bytes], shape: tuple[int, int, int], tags: Mapping[str, str]) -> None:
    """NumPy's archive of the bytes in `rows` and of the tags, as np.savez has it."""
    rows.seek(0)
    with zipfile.ZipFile(target, "w") as archive:
        with archive.open("hidden_states.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(
                entry, {"descr": "<f4", "fortran_order": False, "shape": shape})
            shutil.copyfileobj(rows, entry, _COPY)
        for key, value in tags.items():
            with archive.open(f"{key}.npy", "w") as entry:
                np.lib.format.write_array(entry, np.array(value), allow_pickle=False)
