"""The safetensors format for NumPy arrays: features, and the body of a training state.

    8 bytes   N, the header's length, little-endian
    N bytes   JSON {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest  the arrays' bytes, C order, little-endian; offsets count from here

(https://github.com/huggingface/safetensors, "Format"). Model checkpoints are read and written in C.
"""
from __future__ import annotations

import json
import os
import struct
from typing import IO, Iterator, Mapping, Optional

import numpy as np

_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
          "bool": "BOOL"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in _CODES.items()}
_MAX_HEADER = 100_000_000


def chunks(arrays: Mapping[str, np.ndarray],
           metadata: Optional[Mapping[str, str]] = None) -> Iterator[memoryview]:
    """The file's bytes, piece by piece, without a copy of the arrays. Raises TypeError for other dtypes."""
    # Wider types first, so that every array is aligned to its element size.
    order = sorted(arrays, key=lambda name: (-np.asarray(arrays[name]).dtype.itemsize, name))
    data = {name: np.asarray(arrays[name]) for name in order}
    yield memoryview(header({name: (array.dtype, array.shape) for name, array in data.items()}, metadata))
    for array in data.values():
        plain = np.ascontiguousarray(array, dtype=_DTYPES[_CODES[array.dtype.name]])
        yield memoryview(plain.reshape(-1).view(np.uint8))


def header(arrays: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
           metadata: Optional[Mapping[str, str]] = None) -> bytes:
    """What precedes the bytes of arrays of these dtypes and shapes, which follow in this order. Raises TypeError
    for dtypes that the format lacks."""
    entries: dict = {}
    if metadata:
        entries["__metadata__"] = {str(key): str(value) for key, value in metadata.items()}
    offset = 0
    for name, (dtype, shape) in arrays.items():
        if dtype.name not in _CODES:
            raise TypeError(f"{name}: expected numbers, got dtype {dtype}")
        end = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype.name], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(path: str, arrays: Mapping[str, np.ndarray], metadata: Optional[Mapping[str, str]] = None) -> None:
    """Writes a file, atomically: see `replacing`. metadata: strings to strings."""
    with replacing(path) as stream:
        for piece in chunks(arrays, metadata):
            stream.write(piece)


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


def parse(content: bytes, name: str = "safetensors") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a whole file's bytes; the arrays are read-only views. Raises ValueError."""
    header, start = _header(content[:8], lambda size: content[8:8 + size], len(content), name)
    metadata = header.pop("__metadata__", {})
    arrays = {}
    for key, entry in header.items():
        try:
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{name}: {key}: damaged entry {entry!r}") from None
        if begin < 0 or end - begin != size or start + end > len(content):
            raise ValueError(f"{name}: {key}: expected {size} bytes, got {begin}..{end} "
                             f"of {len(content) - start}")
        array = np.frombuffer(content, dtype, count=size // dtype.itemsize, offset=start + begin)
        arrays[key] = array.reshape(shape)
    return arrays, metadata


def read_header(path: str) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """(metadata, name -> (dtype code, shape)) of a file. Raises ValueError where the header, or the file's
    length, is wrong."""
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        header, start = _header(stream.read(8), stream.read, size, path)
    metadata = header.pop("__metadata__", {})
    try:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{path}: a damaged entry in the header") from None
    if start + end != size:
        raise ValueError(f"{path}: expected {start + end} bytes, got {size}")
    return metadata, tensors


def _header(prefix: bytes, read, total: int, name: str) -> tuple[dict, int]:
    if len(prefix) < 8:
        raise ValueError(f"{name}: expected a safetensors file, got {total} bytes")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(_MAX_HEADER, total - 8):
        raise ValueError(f"{name}: expected a safetensors file, got a header length of {length}")
    try:
        header = json.loads(bytes(read(length)))
    except ValueError:
        raise ValueError(f"{name}: the header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name}: expected a JSON object, got {type(header).__name__}")
    return header, 8 + length
