"""Finds audio: in folders, lists and shards, and what of it can't be used."""
from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Iterable, Iterator, Optional, Sequence, Union

from .files import AudioError, AudioFile, check_kind, probe, too_short
from .lists import read_csv, read_tsv
from .shards import expand_braces, list_members

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc", ".au", ".caf",
            ".w64", ".rf64", ".sph", ".nist")
_PROBE_THREADS = 8
_PROBE_FILES = 512  # a task's: a future for each file would take more memory than the list


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
        else:
            check_kind(file)
        if samples < min_samples:
            raise AudioError(file.name, too_short(samples, min_samples))
        return file._replace(samples=samples)
    except AudioError as error:
        return error


def _expand(source: str, root: Optional[str]) -> tuple[list[AudioFile], list[AudioError]]:
    """The files that a source names, of unknown length where it doesn't say, and what is wrong with it."""
    if os.path.isdir(source):
        return _walk(source)
    if not os.path.lexists(source):
        raise FileNotFoundError(f"audio: no such file or folder: {source}")
    suffix = os.path.splitext(source)[1].lower()
    if suffix in SUFFIXES:
        return [AudioFile(os.path.basename(source), source)], []
    if suffix in (".csv", ".tsv", ".tar") and not os.path.isfile(source):
        raise ValueError(f"audio: expected a file, got a device, pipe or broken link: {source}")
    if suffix in (".csv", ".tsv"):
        return [_listed(*row) for row in (read_csv if suffix == ".csv" else read_tsv)(source, root)], []
    if suffix == ".tar":
        return _read_shard(source)
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


def _walk(folder: str) -> tuple[list[AudioFile], list[AudioError]]:
    """The audio below a folder, and the folders in it that can't be read."""
    files: list[AudioFile] = []
    skipped: list[AudioError] = []
    seen = set()

    def refuse(error: OSError) -> None:
        name = _relative(os.path.relpath(error.filename or folder, folder)) or folder
        skipped.append(AudioError(name, error.strerror or str(error)))

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        try:
            identity = os.stat(parent)
        except OSError as error:
            refuse(error)
            continue
        if (identity.st_dev, identity.st_ino) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if _is_audio(name):
                path = os.path.join(parent, name)
                files.append(AudioFile(_relative(os.path.relpath(path, folder)), path))
    return files, skipped


def _relative(path: str) -> str:
    """A name that stays inside whatever folder it is joined to."""
    parts = os.path.splitdrive(os.path.normpath(path))[1].replace(os.sep, "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def _listed(path: str, base: str, samples: int) -> AudioFile:
    full = os.path.join(base, path)
    inside = os.path.relpath(full, base) if os.path.isabs(path) else path
    return AudioFile(_relative(path if inside.startswith("..") else inside), full, samples)
