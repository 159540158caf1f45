"""The safetensors format for NumPy arrays: features, and the body of a training state.

    8 bytes   N, the header's length, little-endian
    N bytes   JSON {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, ...}
    the rest  the arrays' bytes, C order, little-endian; offsets count from here

(https://github.com/huggingface/safetensors, "Format"). `read` and `parse` check a header whole before anything is
read by it. Model checkpoints of our own are read and written in C.
"""
from __future__ import annotations

import json
import math
import os
import struct
from typing import Any, Callable, Iterator, Mapping, Optional

import numpy as np

from ..atomic import replacing
from ..config import describe
from . import git_lfs

_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
          "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8",
          "bool": "BOOL"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in _CODES.items()}
# What is read only: code -> (torch's name, NumPy's dtype, bytes); NumPy's is None where it has none.
_READ = {
    **{code: (name, _DTYPES[code], _DTYPES[code].itemsize) for name, code in _CODES.items()},
    "BF16": ("bfloat16", np.dtype("<u2"), 2), "C64": ("complex64", np.dtype("<c8"), 8),
    "F8_E4M3": ("float8_e4m3fn", None, 1), "F8_E5M2": ("float8_e5m2", None, 1)}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMS = 32


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
    """Writes a file, atomically: see `atomic.replacing`. metadata: strings to strings."""
    with replacing(path) as stream:
        for piece in chunks(arrays, metadata):
            stream.write(piece)


class SafeTensor:
    """A tensor of a file: `dtype` by torch's name, `shape`; its values are read by `numpy()`."""

    __slots__ = ("path", "dtype", "shape", "begin", "end", "_code")

    def __init__(self, path: str, code: str, shape: tuple[int, ...], begin: int, end: int):
        """begin, end: where its bytes are in the file."""
        self.path, self.dtype, self.shape = path, _READ[code][0], shape
        self.begin, self.end, self._code = begin, end, code

    def numpy(self) -> np.ndarray:
        """The values (bfloat16's as float32), read-only. Raises OSError, ValueError for a dtype that NumPy lacks."""
        with open(self.path, "rb") as stream:
            stream.seek(self.begin)
            return self.decode(stream.read(self.end - self.begin))

    def decode(self, data: "bytes | memoryview") -> np.ndarray:
        """The values that its bytes are."""
        dtype = _READ[self._code][1]
        if dtype is None:
            raise ValueError(f"{self.path}: dtype {self._code} is not supported")
        if len(data) != self.end - self.begin:
            raise ValueError(f"{self.path}: expected {self.end - self.begin} bytes at {self.begin}, got {len(data)}")
        array = np.frombuffer(data, dtype)
        if self._code == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(self.shape)


def read(path: str) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """(tensors by name, metadata) of a file, by its header alone. Raises OSError, and ValueError unless every one
    of its bytes belongs to exactly one tensor of the right size."""
    with open(path, "rb") as stream:
        return _tensors(stream.read, os.fstat(stream.fileno()).st_size, path)


def parse(content: "bytes | memoryview", name: str = "safetensors") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays, metadata) of a whole file's bytes; the arrays are read-only views. Raises ValueError as `read`."""
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return bytes(content[at - size:at])

    tensors, metadata = _tensors(take, len(content), name)
    view = memoryview(content)
    return {key: tensor.decode(view[tensor.begin:tensor.end]) for key, tensor in tensors.items()}, metadata


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json's object_pairs_hook that takes each key once."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key occurs twice")
    return values


def _tensors(take: Callable[[int], bytes], total: int, name: str) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """What a file's header says, all of it checked. take(n): its next n bytes; total: how many it has."""
    prefix = take(8)
    problem = git_lfs.pointer(prefix + take(git_lfs.LONGEST)) if git_lfs.FIRST_LINE.startswith(prefix) else None
    if problem:
        raise ValueError(f"{name}: {problem}")
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else total
    if length > min(_MAX_HEADER, total - 8):
        raise ValueError(f"{name}: expected a safetensors file, got a header of {length} of {total} bytes")
    text = take(length)
    if text[:1] != b"{":
        raise ValueError(f"{name}: expected a safetensors file, got a header that begins with {text[:8]!r}")
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: the header is not the JSON that was expected: {error}") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{name}: __metadata__: expected an object of strings, got {describe(metadata)}")
    tensors, at = {}, 8 + length
    for begin, end, key, entry in sorted(_entry(key, entry, name) for key, entry in entries.items()):
        if 8 + length + begin != at:
            raise ValueError(f"{name}: expected a tensor at byte {at - 8 - length} of the data, got one at {begin}")
        at = 8 + length + end
        tensors[key] = SafeTensor(name, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, at)
    if at != total:
        raise ValueError(f"{name}: expected {at} bytes, got {total}")
    return {key: tensors[key] for key in entries}, metadata


def _entry(key: str, entry: Any, name: str) -> tuple[int, int, str, dict[str, Any]]:
    """(begin, end, key, entry) of one tensor whose entry is sound by itself."""
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if code not in _READ:
            raise ValueError(f"unknown dtype {describe(code)}")
        if not isinstance(shape, list) or len(shape) > _MAX_DIMS or not all(
                type(size) is int and size >= 0 for size in shape):
            raise ValueError("a shape that is none")
        size = math.prod(shape) * _READ[code][2]
        if type(begin) is not int or type(end) is not int or begin < 0 or end - begin != size:
            raise ValueError(f"expected {size} bytes, got offsets {describe(begin)} to {describe(end)}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {key[:200]}: damaged entry: {error}") from None
    return begin, end, key, entry
