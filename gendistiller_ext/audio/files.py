"""Audio files as mono float32 at 16 kHz: their length, the whole or a crop of them.

Reading is soundfile's (libsndfile: WAV, FLAC, Ogg, MP3, AIFF, ...), resampling soxr's. Both are imported
when the first file is opened. What a file says of itself is not believed: whatever is wrong with it, and whatever
exception that makes, is an `AudioError` whose message is the reason.
"""
from __future__ import annotations

import contextlib
import os
import stat
from typing import Iterator, NamedTuple, Optional, Union

import numpy as np

from . import RATE
from .shards import Member

RATES = (1000, 1_000_000)  # Hz, the lowest and the highest that are taken for audio
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe must not be waited for
_UNKNOWN = 1 << 62  # frames, and more: libsndfile's word for a length that the header leaves open
_BLOCK = 1 << 22  # values decoded at a time: a header must not take memory that the file can't fill


class AudioError(ValueError):
    """A file that is no usable audio. `name` is the file's, the message the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class AudioFile(NamedTuple):
    """One file of a set, or one member of a tar shard.

    name: relative to the set's root ('/' between folders, never outside it), a member's SHARD/MEMBER;
    path: its path, a member's shard's; samples: its length at 16 kHz as far as it is known without decoding
    (0: unknown); offset, size: where a member's bytes are in its shard (0, 0: a file).
    """
    name: str
    path: str
    samples: int = 0
    offset: int = 0
    size: int = 0


Source = Union[str, "os.PathLike[str]", AudioFile]


def too_short(samples: int, least: int) -> str:
    """Why a file of so many samples is left out."""
    return f"too short: {samples} samples at 16 kHz, at least {least} needed"


def _soundfile():
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading audio needs soundfile: pip install 'gendistiller_ext[train]'") from error
    return soundfile


def _as_file(source: Source) -> AudioFile:
    return source if isinstance(source, AudioFile) else AudioFile(os.fspath(source), os.fspath(source))


@contextlib.contextmanager
def _faults_of(file: AudioFile):
    """Makes an AudioError of whatever a file does; a package that is missing is not its fault."""
    try:
        yield
    except (AudioError, ImportError):
        raise
    except Exception as error:
        raise AudioError(file.name, _reason(error, file)) from None


def check_kind(file: AudioFile) -> None:
    """Raises AudioError for what is not there, and for what would wait or have no end when opened."""
    try:
        mode = os.stat(file.path).st_mode
    except (OSError, ValueError) as error:
        raise AudioError(file.name, getattr(error, "strerror", None) or str(error)) from None
    _check_mode(file, mode)


def _check_mode(file: AudioFile, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise AudioError(file.name, f"expected a file, got {kinds.get(stat.S_IFMT(mode), 'a device')}")


def _reason(error: Exception, file: AudioFile) -> str:
    """One line; libsndfile says "System error" where the operating system has a better reason."""
    try:
        with open(file.path, "rb") as stream:
            empty = file.size == 0 if file.offset else not stream.read(1)
    except (OSError, ValueError) as cause:
        return getattr(cause, "strerror", None) or str(cause)
    text = getattr(error, "error_string", None) or str(error) or type(error).__name__
    return "the file is empty" if empty else " ".join(text.split()).rstrip(".")


def probe(source: Source) -> int:
    """Length in samples at 16 kHz: the header's, or where it leaves that open, as a streamed FLAC's does, by
    decoding. Raises AudioError."""
    file = _as_file(source)
    with _faults_of(file):
        frames, rate = _flac_length(file)
        if not frames:
            with open_audio(file) as stream:
                frames, rate = stream.frames, stream.samplerate
                if frames >= _UNKNOWN:
                    frames = sum(map(len, decoded(file, stream)))
        _check_rate(file, rate)
        return int(round(frames * RATE / rate))


def _check_rate(file: AudioFile, rate: int) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise AudioError(file.name, f"expected a rate of {RATES[0]} to {RATES[1]} Hz, got {rate}")


def _flac_length(file: AudioFile) -> tuple[int, int]:
    """(samples, rate) of a FLAC file by its first block, STREAMINFO (RFC 9639, 8.2): a seventh of the time that
    libsndfile takes, of which a large set is listed. (0, 0) for anything else. Raises AudioError as check_kind."""
    handle = os.open(file.path, _OPEN)
    try:
        _check_mode(file, os.fstat(handle).st_mode)
        os.lseek(handle, file.offset, os.SEEK_SET)
        head = os.read(handle, 26)
    finally:
        os.close(handle)
    if len(head) < 26 or head[:4] != b"fLaC" or head[4] & 127 or 0 < file.size < 42:
        return 0, 0
    fields = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, bits of a sample 5, samples 36
    rate = fields >> 44
    return (fields & (1 << 36) - 1, rate) if rate else (0, 0)


@contextlib.contextmanager
def open_audio(file: AudioFile):
    """A file as soundfile has it open, to be read by `decoded`. Raises AudioError where it can't be."""
    soundfile = _soundfile()

    class Stream(soundfile.SoundFile):
        def seekable(self) -> bool:
            """soundfile seeks to where it is after each read of one that is: FLAC of unknown length can't."""
            return False

    check_kind(file)
    with contextlib.ExitStack() as opened:
        with _faults_of(file):
            if file.offset:
                raw = opened.enter_context(Member(file.path, file.offset, file.size))
            else:  # bytes: a name need not be text
                raw = os.fsencode(file.path) if os.name == "posix" else file.path
            stream = opened.enter_context(Stream(raw))
            _check_rate(file, stream.samplerate)
        yield stream


def decoded(file: AudioFile, stream, need: Optional[int] = None, block: Optional[int] = None) -> Iterator[np.ndarray]:
    """From where the stream is, `need` frames (None: all), in (n,) float32 blocks of at most `block` frames; channels
    are averaged. Raises AudioError for NaN or Inf, what can't be decoded, and where fewer come than the header or
    `need` says."""
    total = stream.frames if need is None else need
    size = min(block or _BLOCK, max(1, _BLOCK // stream.channels))
    left = total
    with _faults_of(file):
        while left > 0:
            data = stream.read(min(left, size), dtype="float32", always_2d=True)
            if len(data) == 0:
                break
            left -= len(data)
            wav = data[:, 0] if data.shape[1] == 1 else data.mean(axis=1)
            if not np.isfinite(wav).all():
                raise AudioError(file.name, "NaN or Inf samples")
            yield wav
        if left > 0 and total < _UNKNOWN:
            raise AudioError(file.name, f"damaged: {total - left} of {total} samples could be decoded")


def read_audio(source: Source, *, crop: Optional[int] = None, position: float = 0.0) -> np.ndarray:
    """(samples,) float32, mono, 16 kHz: the whole file, or at most `crop` samples of it.

    A crop starts at `position` in [0, 1) of the places where it fits. Only the crop is decoded and
    resampled, but of a file of unknown length. Channels are averaged. Raises AudioError for what libsndfile can't
    decode, for a file shorter than its header says, for NaN or Inf, and for whatever else a file does.
    """
    file = _as_file(source)
    with open_audio(file) as stream, _faults_of(file):
        rate, total = stream.samplerate, stream.frames
        need = total if crop is None else min(total, -(-crop * rate // RATE))
        if total >= _UNKNOWN:
            wav = _joined(decoded(file, stream))
            first = int(position * (max(0, len(wav) - need) + 1))
            wav = wav[first:first + need]
        else:
            if need < total:
                stream.seek(int(position * (total - need + 1)))
            wav = _joined(decoded(file, stream, need))
        if len(wav) == 0:
            raise AudioError(file.name, "no samples")
        if rate != RATE:
            wav = _resample(wav, rate)
        return np.ascontiguousarray(wav if crop is None else wav[:crop], dtype=np.float32)


def _joined(blocks: Iterator[np.ndarray]) -> np.ndarray:
    parts = list(blocks) or [np.empty(0, np.float32)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _resample(wav: np.ndarray, rate: int) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"audio at {rate} Hz needs soxr: pip install 'gendistiller_ext[train]'") from error
    return soxr.resample(np.ascontiguousarray(wav), rate, RATE, quality="HQ")
