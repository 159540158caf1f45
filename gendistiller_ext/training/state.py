"""Training states: `state/step-NNNNNNNN.state`, everything that a run needs to go on bit for bit.

A file is a safetensors body (arrays, and a JSON document under metadata key "state") followed by the
32-byte SHA-256 of the body. A file whose checksum is wrong, such as one torn by a crash or a full disk, is
never used: the newest good one is.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any, Callable, Mapping, Optional

import numpy as np

from ..atomic import replacing
from ..checkpoints import safetensors

KEEP = 2
_PATTERN = re.compile(r"step-(\d{8,})\.state")


def state_files(folder: str) -> list[tuple[int, str]]:
    """(step, path) of the states in a folder, newest first; [] where there is none."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = [(int(match[1]), os.path.join(folder, name)) for name in names
             if (match := _PATTERN.fullmatch(name))]
    return sorted(found, reverse=True)


def save_state(folder: str, step: int, arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> str:
    """Writes the state of `step`, removes all but the newest KEEP and unfinished files. `document` is JSON.

    Returns the path. On failure (OSError: the disk is full, ...) the older states stay as they were.
    """
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"step-{step:08d}.state")
    write_checked(path, arrays, document)
    for _, old in state_files(folder)[KEEP:]:
        os.unlink(old)
    for name in os.listdir(folder):
        if name.startswith("step-") and name.endswith(".tmp"):
            os.unlink(os.path.join(folder, name))
    return path


def write_checked(path: str, arrays: Mapping[str, np.ndarray], document: Mapping[str, Any]) -> None:
    """Writes arrays, a JSON document and their checksum, atomically."""
    digest = hashlib.sha256()
    with replacing(path) as stream:
        for piece in safetensors.chunks(arrays, {"state": json.dumps(document)}):
            digest.update(piece)
            stream.write(piece)
        stream.write(digest.digest())


def read_checked(path: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, document). Raises ValueError where the checksum is wrong."""
    with open(path, "rb") as stream:
        content = stream.read()
    body = memoryview(content)[:-32]
    if hashlib.sha256(body).digest() != content[-32:]:
        raise ValueError(f"{path}: the checksum is wrong: the file is damaged")
    arrays, metadata = safetensors.parse(body, path)
    return arrays, json.loads(metadata["state"])


def load_newest(folder: str, warn: Callable[[str], None]
                ) -> Optional[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    """(path, arrays, document) of the newest good state; None where there is no state at all.

    Damaged ones are named to `warn`. Raises ValueError where every one is damaged.
    """
    files = state_files(folder)
    for _, path in files:
        try:
            return (path, *read_checked(path))
        except ValueError as error:
            warn(str(error))
    if files:
        raise ValueError(f"resume: no usable state in {folder}, all {len(files)} are damaged")
    return None


def check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError that names the first setting in which a resumed run differs."""
    now = json.loads(json.dumps(now))
    for group in ("recipe", "student"):
        for key in sorted(set(saved[group]) | set(now[group])):
            before, after = saved[group].get(key), now[group].get(key)
            if before != after:
                raise ValueError(f"resume: {key}: expected {before}, as in the run so far, got {after}")
    for key, what in (("teacher", "the same weights"), ("audio", "the same files"),
                      ("valid_audio", "the same files")):
        if saved[key] != now[key]:
            raise ValueError(f"resume: {key}: expected {what} as in the run so far, got others")
