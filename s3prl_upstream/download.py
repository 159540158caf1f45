"""Checkpoints from the web, each downloaded once."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Optional

CHUNK = 1 << 20


def cache_folder() -> Path:
    """$GENDISTILLER_CACHE, else gendistiller in $XDG_CACHE_HOME or ~/.cache."""
    own, common = os.environ.get("GENDISTILLER_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(common or Path.home() / ".cache") / "gendistiller"


def cached(url: str, refresh: bool = False, folder: Optional[Path] = None) -> Path:
    """The file that `url` names, downloaded unless the cache has it or `refresh` asks for it anew.

    A fragment `#sha256=HEX` is the checksum that the file must have, checked whenever it is asked for:
    ValueError if it has another, and the file is not kept. OSError if the download fails. A file is complete
    before it has its name.
    """
    address, fragment = urllib.parse.urldefrag(url)
    expected = dict(urllib.parse.parse_qsl(fragment)).get("sha256", "").lower()
    if fragment and not expected:
        raise ValueError(f"url: expected nothing or sha256=HEX after #, got {fragment!r}")
    name = os.path.basename(urllib.parse.urlsplit(address).path) or "checkpoint"
    folder = cache_folder() if folder is None else folder
    target = folder / hashlib.sha256(address.encode()).hexdigest()[:16] / name
    if refresh or not target.is_file():
        _download(address, target, expected)
    elif expected and _digest(target) != expected:
        raise ValueError(f"{target}: the sha256 is not {expected}: refresh it, or correct the checksum")
    return target


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _download(address: str, target: Path, expected: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(address, timeout=60) as response:
            length, written = response.headers.get("Content-Length"), 0
            while chunk := response.read(CHUNK):
                written += file.write(chunk)
        if length is not None and written != int(length):
            raise OSError(f"{address}: got {written} of {length} bytes")
        if expected and (found := _digest(Path(partial))) != expected:
            raise ValueError(f"{address}: expected sha256 {expected}, got {found}")
        os.replace(partial, target)
    except BaseException:
        os.unlink(partial)
        raise
