"""NumPy's numbers in a pickle, read as the Python numbers that they are.

A number of NumPy is pickled as a call of `scalar(dtype, bytes)`, its dtype as `dtype(code, False, True)` with the
state (version, byte order, ...), and in protocol 2, which torch writes, its bytes as `_codecs.encode(text, "latin1")`
(numpy/_core/src/multiarray: scalartypes.c.src, descriptor.c). None of it is called: the recorded arguments are
decoded. Numbers of other kinds, dates and text stay `inert_pickle.Opaque`.
"""
from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from .inert_pickle import Opaque

# NumPy's code -> struct's.
_CODES = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
          "f2": "e", "f4": "f", "f8": "d"}
_ORDERS = {"<": "<", ">": ">", "|": "<", "=": "<"}


def _encode(*args: Any) -> Any:
    """bytes, which protocol 2 lacks, as a text of the same code points."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        return Opaque("_codecs.encode", args)
    try:
        return args[0].encode("latin-1")
    except UnicodeEncodeError:
        raise ValueError("bytes of a text with other characters than bytes") from None


def _scalar(*args: Any) -> Any:
    dtype = args[0] if args else None
    known = isinstance(dtype, Opaque) and dtype.name == "numpy.dtype" and dtype.args and isinstance(dtype.args[0], str)
    if not known or dtype.args[0] not in _CODES:
        return Opaque("numpy.core.multiarray.scalar", args)
    code, state = _CODES[dtype.args[0]], dtype.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    size = struct.calcsize("<" + code)
    if not isinstance(order, str) or order not in _ORDERS:
        raise ValueError("a NumPy number without a byte order")
    if len(args) != 2 or not isinstance(args[1], bytes) or len(args[1]) != size:
        raise ValueError(f"a NumPy number of dtype {dtype.args[0]}: expected {size} bytes")
    return struct.unpack(_ORDERS[order] + code, args[1])[0]


#: For `inert_pickle.loads`.
KNOWN: dict[str, Callable] = {
    "_codecs.encode": _encode, "numpy.core.multiarray.scalar": _scalar, "numpy._core.multiarray.scalar": _scalar}
