"""Audio files: find them, read them as mono float32 at 16 kHz.

Reading is soundfile's (libsndfile: WAV, FLAC, Ogg, MP3, AIFF, ...), resampling soxr's. Both are imported
when the first file is opened. A file that can't be used is reported as an `AudioError` whose message is
its reason; `find_audio` collects such files instead of failing.
"""
from __future__ import annotations

import contextlib
import csv
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Iterable, Iterator, NamedTuple, Optional, Sequence, Union

import numpy as np

from .shards import Member, expand_braces, list_members

RATE = 16000
SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf",
            ".w64", ".rf64", ".sph", ".nist")
_PROBE_THREADS = 8
_PROBE_FILES = 512  # a task's: a future for each file would take more memory than the list


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


def _opened(file: AudioFile):
    """What soundfile takes, as a context: a path, or a member as a file."""
    return Member(file.path, file.offset, file.size) if file.offset else contextlib.nullcontext(file.path)


def _reason(error: Exception, file: AudioFile) -> str:
    """One line; libsndfile says "System error" where the operating system has a better reason."""
    try:
        with open(file.path, "rb") as stream:
            empty = file.size == 0 if file.offset else not stream.read(1)
    except OSError as cause:
        return cause.strerror or str(cause)
    return "the file is empty" if empty else " ".join(getattr(error, "error_string", str(error)).split()).rstrip(".")


def probe(source: Source) -> int:
    """Length in samples at 16 kHz, from the header alone. Raises AudioError."""
    file = _as_file(source)
    soundfile = _soundfile()
    try:
        frames, rate = _flac_length(file)
        if not frames:
            with _opened(file) as stream:
                info = soundfile.info(stream)
            frames, rate = info.frames, info.samplerate
    except (RuntimeError, OSError) as error:
        raise AudioError(file.name, _reason(error, file)) from None
    return int(round(frames * RATE / rate))


def _flac_length(file: AudioFile) -> tuple[int, int]:
    """(samples, rate) of a FLAC file by its first block, STREAMINFO (RFC 9639, 8.2): a seventh of the time that
    libsndfile takes, of which a large set is listed. (0, 0) for anything else."""
    with open(file.path, "rb", buffering=0) as stream:
        stream.seek(file.offset)
        head = stream.read(26)
    if len(head) < 26 or head[:4] != b"fLaC" or head[4] & 127 or 0 < file.size < 42:
        return 0, 0
    fields = int.from_bytes(head[18:26], "big")  # rate 20 bits, channels 3, bits of a sample 5, samples 36
    rate = fields >> 44
    return (fields & (1 << 36) - 1, rate) if rate else (0, 0)


@contextlib.contextmanager
def open_audio(file: AudioFile):
    """A file as soundfile has it open. Raises AudioError where it can't be."""
    with contextlib.ExitStack() as opened:
        try:
            raw = opened.enter_context(_opened(file))
            stream = opened.enter_context(_soundfile().SoundFile(raw))
        except (RuntimeError, OSError) as error:
            raise AudioError(file.name, _reason(error, file)) from None
        yield stream


def read_audio(source: Source, *, crop: Optional[int] = None, position: float = 0.0) -> np.ndarray:
    """(samples,) float32, mono, 16 kHz: the whole file, or at most `crop` samples of it.

    A crop starts at `position` in [0, 1) of the places where it fits. Only the crop is decoded and
    resampled. Channels are averaged. Raises AudioError for what libsndfile can't decode, for a file
    shorter than its header says, and for NaN or Inf.
    """
    file = _as_file(source)
    soundfile = _soundfile()
    try:
        with _opened(file) as raw, soundfile.SoundFile(raw) as stream:
            rate, total = stream.samplerate, stream.frames
            need = total
            if crop is not None:
                need = min(total, -(-crop * rate // RATE))
                if need < total:
                    stream.seek(int(position * (total - need + 1)))
            data = stream.read(need, dtype="float32", always_2d=True)
    except (RuntimeError, OSError, MemoryError) as error:
        raise AudioError(file.name, _reason(error, file)) from None
    if len(data) == 0:
        raise AudioError(file.name, "no samples")
    if len(data) < need:
        raise AudioError(file.name, f"damaged: {len(data)} of {need} samples could be decoded")
    wav = data[:, 0] if data.shape[1] == 1 else data.mean(axis=1)
    if not np.isfinite(wav).all():
        raise AudioError(file.name, "NaN or Inf samples")
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
    audio file, a WebDataset shard (an uncompressed .tar; braces as in "train-{000..099}.tar" name several),
    an S3PRL bucket CSV (columns file_path, length; paths below `root`, else beside the CSV) or a TSV:
    fairseq's manifest (first line the root, then path<TAB>samples) or a table with a `path` column (and
    `samples` or `seconds`), paths below `root`, else beside it. Lengths that a list states are believed,
    others are read from the headers. Files shorter than `min_samples` (at 16 kHz) are left out. What several
    sources name is taken once.
    Raises FileNotFoundError for a source that doesn't exist and ValueError for an unknown or damaged list
    and where nothing is left.
    """
    given = [os.fspath(source) for source in sources]
    names = [name for source in given
             for name in (expand_braces(source) if "{" in source and not os.path.exists(source) else [source])]
    files: list[AudioFile] = []
    skipped: list[AudioError] = []
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        found: dict[tuple[str, int], AudioFile] = {}
        for listed, errors in pool.map(lambda name: _expand(name, root), names):
            skipped += errors
            for place, file in zip(_places(listed), listed):
                found.setdefault(place, file)
        every = list(found.values())
        del found
        parts = [every[i:i + _PROBE_FILES] for i in range(0, len(every), _PROBE_FILES)]
        for part in pool.map(lambda part: [_check(file, min_samples) for file in part], parts):
            for result in part:
                (skipped if isinstance(result, AudioError) else files).append(result)
    if not files:
        raise ValueError(f"audio: expected audio in {', '.join(given) or 'nothing'}, found none "
                         f"({_why_none(given, skipped)})")
    files.sort()
    return files, sorted(skipped, key=lambda error: error.name)


def without(files: Sequence[AudioFile], others: Sequence[AudioFile]) -> list[AudioFile]:
    """The files that are not among `others`, by their place on the disk rather than by name."""
    excluded = set(_places(others))
    return [file for place, file in zip(_places(files), files) if place not in excluded]


def _places(files: Sequence[AudioFile]) -> Iterator[tuple[str, int]]:
    """Each file's real path, and where in it. Folders repeat: theirs are looked up once."""
    folders: dict[str, str] = {}
    for file in files:
        folder, name = os.path.split(file.path)
        if os.path.islink(file.path):
            yield os.path.realpath(file.path), file.offset
            continue
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        yield os.path.join(folders[folder], name), file.offset


def _why_none(sources: Sequence[str], skipped: Sequence[AudioError]) -> str:
    if skipped:
        return f"{len(skipped)} unusable, first {skipped[0]}"
    if any(name.endswith(".tar") for source in sources for _, _, names in os.walk(source) for name in names):
        return "no audio files; shards are named themselves, as in FOLDER/*.tar"
    return "no audio files"


def _check(file: AudioFile, min_samples: int) -> Union[AudioFile, AudioError]:
    try:
        samples = file.samples
        if samples <= 0:
            samples = probe(file)
        elif not os.path.isfile(file.path):
            raise AudioError(file.name, "No such file")
        if samples < min_samples:
            raise AudioError(file.name, too_short(samples, min_samples))
        return file._replace(samples=samples)
    except AudioError as error:
        return error


def _expand(source: str, root: Optional[str]) -> tuple[list[AudioFile], list[AudioError]]:
    """The files that a source names, of unknown length where it doesn't say, and what is wrong with it."""
    if os.path.isdir(source):
        return list(_walk(source)), []
    if not os.path.exists(source):
        raise FileNotFoundError(f"audio: no such file or folder: {source}")
    suffix = os.path.splitext(source)[1].lower()
    if suffix == ".csv":
        return list(_read_csv(source, root)), []
    if suffix == ".tsv":
        return list(_read_tsv(source, root)), []
    if suffix == ".tar":
        return _read_shard(source)
    if suffix in SUFFIXES:
        return [AudioFile(os.path.basename(source), source)], []
    packed = " (shards must not be compressed: members are read where they lie)" if ".tar." in source else ""
    raise ValueError(f"audio: expected a folder, an audio file, a .tar, a .csv or a .tsv, got {source}{packed}")


def _is_audio(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _read_shard(source: str) -> tuple[list[AudioFile], list[AudioError]]:
    shard = os.path.basename(source)
    members, problem = list_members(source)
    files = [AudioFile(f"{os.path.splitext(shard)[0]}/{_relative(name)}", source, 0, offset, size)
             for name, offset, size in members if _is_audio(name.rsplit("/", 1)[-1])]
    return files, [AudioError(shard, problem)] if problem else []


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
            if _is_audio(name):
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
