"""Files that are written whole or not at all."""
from __future__ import annotations

import os
from typing import IO


class replacing:
    """`with replacing(path) as stream`: a temporary file beside `path` that takes its place on success only,
    flushed to the disk first. On any exception it is removed and `path` stays what it was."""

    def __init__(self, path: str):
        self._path = os.fspath(path)
        # One suffix for all processes would let two of them write into the same file.
        self._temporary = f"{self._path}.{os.getpid()}.tmp"

    def __enter__(self) -> IO[bytes]:
        self._stream = open(self._temporary, "wb")
        return self._stream

    def __exit__(self, kind, value, trace) -> None:
        try:
            try:
                if kind is None:
                    self._stream.flush()
                    os.fsync(self._stream.fileno())
            finally:
                self._stream.close()
            if kind is None:
                os.replace(self._temporary, self._path)
                _sync_folder(os.path.dirname(self._path) or ".")
        finally:
            if os.path.exists(self._temporary):
                os.unlink(self._temporary)


def _sync_folder(folder: str) -> None:
    """Makes a rename last over a power failure, where folders can be opened (not on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
