"""Audio files: find them, read them as mono float32 at 16 kHz.

Reading is soundfile's (libsndfile: WAV, FLAC, Ogg, MP3, AIFF, ...), resampling soxr's. Both are imported
when the first file is opened. A file that can't be used is reported as an `AudioError` whose message is
its reason; `find_audio` collects such files instead of failing.
"""
from __future__ import annotations

import csv
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Iterable, Iterator, Optional

import numpy as np

RATE = 16000
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf",
            ".w64", ".rf64", ".sph", ".nist")
_PROBE_THREADS = 8


class AudioError(ValueError):
    """A file that is no usable audio. `name` is the file's, the message the reason."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


@dataclass(frozen=True, order=True)
class AudioFile:
    """One file of a set: its name relative to the set's root ('/' between folders, never outside it), its
    path, and its length in samples at 16 kHz as far as it is known without decoding (0: unknown)."""
    name: str
    path: str
    samples: int = 0


def too_short(samples: int, least: int) -> str:
    return f"too short: {samples} samples at 16 kHz, at least {least} needed"


def _soundfile():
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("reading audio needs soundfile: pip install 'gendistiller_ext[train]'") from error
    return soundfile


def _reason(error: Exception, path: str) -> str:
    """One line; libsndfile says "System error" where the operating system has a better reason."""
    try:
        with open(path, "rb") as stream:
            if not stream.read(1):
                return "the file is empty"
    except OSError as cause:
        return cause.strerror or str(cause)
    return " ".join(str(error).replace(f"Error opening {path!r}: ", "").split()).rstrip(".")


def probe(path: str, name: Optional[str] = None) -> int:
    """Length in samples at 16 kHz, from the header alone. Raises AudioError."""
    try:
        info = _soundfile().info(path)
    except (RuntimeError, OSError) as error:
        raise AudioError(name or path, _reason(error, path)) from None
    return int(round(info.frames * RATE / info.samplerate))


def read_audio(path: str, *, crop: Optional[int] = None, position: float = 0.0,
               name: Optional[str] = None) -> np.ndarray:
    """(samples,) float32, mono, 16 kHz: the whole file, or at most `crop` samples of it.

    A crop starts at `position` in [0, 1) of the places where it fits. Only the crop is decoded and
    resampled. Channels are averaged. Raises AudioError for what libsndfile can't decode, for a file
    shorter than its header says, and for NaN or Inf.
    """
    name = name or path
    try:
        with _soundfile().SoundFile(path) as stream:
            rate, total = stream.samplerate, stream.frames
            need = total
            if crop is not None:
                need = min(total, -(-crop * rate // RATE))
                if need < total:
                    stream.seek(int(position * (total - need + 1)))
            data = stream.read(need, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, MemoryError) as error:
        raise AudioError(name, _reason(error, path)) from None
    if len(data) == 0:
        raise AudioError(name, "no samples")
    if len(data) < need:
        raise AudioError(name, f"damaged: {len(data)} of {need} samples could be decoded")
    wav = data[:, 0] if data.shape[1] == 1 else data.mean(axis=1)
    if not np.isfinite(wav).all():
        raise AudioError(name, "NaN or Inf samples")
    if rate != RATE:
        wav = _resample(wav, rate)
    return np.ascontiguousarray(wav if crop is None else wav[:crop], dtype=np.float32)


def _resample(wav: np.ndarray, rate: int) -> np.ndarray:
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"audio at {rate} Hz needs soxr: pip install 'gendistiller_ext[train]'") from error
    return soxr.resample(np.ascontiguousarray(wav), rate, RATE, quality="HQ")


# ---- Finding files -----------------------------------------------------------------------------------------

def find_audio(sources: Iterable[str], *, root: Optional[str] = None, min_samples: int = 0
               ) -> tuple[list[AudioFile], list[AudioError]]:
    """All audio of `sources`, sorted by name, and what was left out with the reason.

    A source is a folder (searched recursively for the usual suffixes; hidden entries are passed over), an
    audio file, an S3PRL bucket CSV (columns file_path, length; paths below `root`, else beside the CSV) or
    a TSV: fairseq's manifest (first line the root, then path<TAB>samples) or a table with a `path` column
    (and `samples` or `seconds`), paths below `root`, else beside it. Lengths that a list states are
    believed, others are read from the headers. Files shorter than `min_samples` (at 16 kHz) are left out.
    Raises FileNotFoundError for a source that doesn't exist and ValueError for an unknown or damaged list
    and where nothing is left.
    """
    sources = list(sources)
    found: dict[str, AudioFile] = {}
    for source in sources:
        for file in _expand(source, root):
            found.setdefault(os.path.realpath(file.path), file)
    files, skipped = [], []
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        for result in pool.map(lambda file: _check(file, min_samples), found.values()):
            (skipped if isinstance(result, AudioError) else files).append(result)
    if not files:
        where = ", ".join(map(str, sources)) or "nothing"
        why = f"{len(skipped)} unusable, first {skipped[0]}" if skipped else "no audio files"
        raise ValueError(f"audio: expected audio in {where}, found none ({why})")
    return sorted(files), sorted(skipped, key=lambda error: error.name)


def _check(file: AudioFile, min_samples: int):
    try:
        samples = file.samples
        if samples <= 0:
            samples = probe(file.path, file.name)
        elif not os.path.isfile(file.path):
            raise AudioError(file.name, "No such file")
        if samples < min_samples:
            raise AudioError(file.name, too_short(samples, min_samples))
        return AudioFile(file.name, file.path, samples)
    except AudioError as error:
        return error


def _expand(source: str, root: Optional[str]) -> Iterator[AudioFile]:
    source = os.fspath(source)
    if os.path.isdir(source):
        return _walk(source)
    if not os.path.exists(source):
        raise FileNotFoundError(f"audio: no such file or folder: {source}")
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".csv":
        return _read_csv(source, root)
    if suffix == ".tsv":
        return _read_tsv(source, root)
    if suffix in SUFFIXES:
        return iter([AudioFile(os.path.basename(source), source)])
    raise ValueError(f"audio: expected a folder, an audio file, a .csv or a .tsv, got {source}")


def _walk(folder: str) -> Iterator[AudioFile]:
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        identity = os.stat(parent)
        if (identity.st_dev, identity.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
                path = os.path.join(parent, name)
                yield AudioFile(_relative(os.path.relpath(path, folder)), path)


def _relative(path: str) -> str:
    """A name that stays inside whatever folder it is joined to."""
    parts = os.path.splitdrive(os.path.normpath(path))[1].replace(os.sep, "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _listed(path: str, base: str, samples: int) -> AudioFile:
    full = os.path.join(base, path)
    inside = os.path.relpath(full, base) if os.path.isabs(path) else path
    return AudioFile(_relative(path if inside.startswith("..") else inside), full, samples)


def _length(value: Optional[str], scale: float, where: str) -> int:
    if value is None or value == "":
        return 0
    try:
        return int(round(float(value) * scale))
    except (ValueError, OverflowError):
        raise ValueError(f"{where}: expected a length, got {value!r}") from None


def _read_csv(source: str, root: Optional[str]) -> Iterator[AudioFile]:
    with open(source, newline="", encoding="utf-8") as stream:
        rows = csv.DictReader(stream)
        if "file_path" not in (rows.fieldnames or ()):
            raise ValueError(f"{source}: expected a column file_path, got {rows.fieldnames}")
        for row in rows:
            samples = _length(row.get("length"), 1, f"{source}: line {rows.line_num}: length")
            yield _listed(row["file_path"], root or os.path.dirname(source), samples)


def _read_tsv(source: str, root: Optional[str]) -> Iterator[AudioFile]:
    with open(source, newline="", encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    header = lines[0].split("\t") if lines else []
    if "path" in header:
        column = header.index("path")
        length, scale = next(((header.index(key), unit) for key, unit in (("samples", 1), ("seconds", RATE))
                              if key in header), (None, 1))
        base = root or os.path.dirname(source)
    elif len(header) == 1 and header[0].strip():
        column, length, scale, base = 0, 1, 1, root or header[0].strip()
    else:
        raise ValueError(f"{source}: expected fairseq's manifest (first line a folder) or a header line with "
                         f"a column path, got {lines[0] if lines else 'an empty file'!r}")
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) <= column:
            raise ValueError(f"{source}: line {number}: expected at least {column + 1} columns, got {line!r}")
        value = cells[length] if length is not None and length < len(cells) else None
        yield _listed(cells[column], base, _length(value, scale, f"{source}: line {number}: length"))
