"""Safetensors files as bytes, taken apart and put together again, without the code under test."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np


def pack(header: Any, data: bytes, pad: int = 8) -> bytes:
    """A file from its header (a dict, or bytes as they are) and its data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if not isinstance(header, bytes):
        text += b" " * (-len(text) % pad)
    return struct.pack("<Q", len(text)) + text + data


def unpack(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, data) of a file; the header keeps its order."""
    length, = struct.unpack("<Q", content[:8])
    return json.loads(content[8:8 + length]), content[8 + length:]


def bits(array: np.ndarray) -> np.ndarray:
    """A float32 array's bits, so that NaNs compare too."""
    return np.ascontiguousarray(array, dtype="<f4").view("<u4")


def tensors(content: bytes) -> dict[str, np.ndarray]:
    """Every tensor's raw values in the file's order: float32 bits as uint32, 16-bit ones as uint16."""
    header, data = unpack(content)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            dtype = "<u4" if entry["dtype"] == "F32" else "<u2"
            found[name] = np.frombuffer(data[begin:end], dtype).reshape(entry["shape"])
    return found


def assemble(arrays: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str]) -> bytes:
    """A file of (dtype code, raw values), in the order given, one after the other."""
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, (code, values) in arrays.items():
        raw = np.ascontiguousarray(values).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    return pack(header, data)
