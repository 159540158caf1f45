"""WebDataset shards: tar files whose members are read where they lie.

A shard is listed by its members' headers; a member is read from its offset. (The webdataset package streams
whole shards, in an order of its own. Training picks utterances one by one, so that step n reads the same
ones however often a run was interrupted.)
"""
from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from typing import Optional

_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_EXPANSION = 1_000_000


def expand_braces(pattern: str) -> list[str]:
    """The shell's braces: "train-{000..002}.tar" names three shards, "{dev,test}.tar" two. A range's numbers
    are as wide as its ends are written. Raises ValueError for braces that are neither."""
    parts = _BRACES.split(pattern)
    choices = [[text] if i % 2 == 0 else _alternatives(text, pattern) for i, text in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_EXPANSION:
        raise ValueError(f"audio: expected at most {_MAX_EXPANSION} names, {pattern!r} has {count}")
    return ["".join(names) for names in itertools.product(*choices)]


def _alternatives(text: str, pattern: str) -> list[str]:
    ends = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", text, re.ASCII)
    if ends:
        first, last = int(ends[1]), int(ends[2])
        if abs(last - first) >= _MAX_EXPANSION:
            raise ValueError(f"audio: expected at most {_MAX_EXPANSION} names, got {pattern!r}")
        padded = any(end.startswith("0") and len(end) > 1 for end in ends.groups())
        width = max(map(len, ends.groups())) if padded else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    if "," in text:
        return text.split(",")
    raise ValueError(f"audio: expected {{000..099}} or {{a,b}} in {pattern!r}, got {{{text}}}")


def list_members(path: str) -> tuple[list[tuple[str, int, int]], Optional[str]]:
    """([(name, offset of its bytes, their number), ...] of a tar file's regular files, what is wrong with it).

    Reads headers only. Where a file is damaged or can't be read, the members before that place are there, and the
    second value says what was met; else it is None.
    """
    members: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            at, total = -1, os.path.getsize(path)
            while (entry := archive.next()) is not None:
                if archive.offset <= at or not 0 <= entry.size <= total - entry.offset_data:
                    return members, f"a damaged tar file: unexpected end of data after {len(members)} whole members"
                at = archive.offset
                archive.members.clear()  # 1 KB each, of members by the hundred thousand
                if entry.isreg() and not entry.issparse():
                    members.append((entry.name, entry.offset_data, entry.size))
            # next() ends at a damaged header as it does at the end, which is a block of zeros.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(_BLOCK) != bytes(_BLOCK):
                return members, f"a damaged tar file: no header at byte {archive.offset}"
    except tarfile.ReadError as error:
        if not members:
            return members, f"expected an uncompressed tar file, got another ({error})"
        return members, f"a damaged tar file: {error} after {len(members)} whole members"
    except OSError as error:
        return members, error.strerror or str(error)
    except Exception as error:  # what a header can make of tarfile: ValueError, OverflowError, UnicodeDecodeError, ...
        return members, f"a damaged tar file: {error or type(error).__name__} after {len(members)} whole members"
    return members, None


class Member(io.RawIOBase):
    """Bytes `offset` to `offset + size` of a file as a file of their own, to be read and sought."""

    def __init__(self, path: str, offset: int, size: int):
        super().__init__()
        self._stream = open(path, "rb", buffering=0)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        room = memoryview(buffer)[:max(0, self._size - self._at)]
        self._stream.seek(self._offset + self._at)
        count = self._stream.readinto(room)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"expected a place in the file, got {base + offset}")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._stream.close()
        super().close()
