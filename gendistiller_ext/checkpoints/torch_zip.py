"""Reads what torch.save writes, without torch, and without running anything in it.

The file is a zip of uncompressed entries: NAME/data.pkl (a pickle whose tensors refer to storages by
persistent id), NAME/data/KEY (the storages' bytes) and NAME/byteorder. The pickle is read by `inert_pickle`,
so containers and tensors come out and everything else is an inert placeholder. Tensors are lazy: their bytes
are read by `numpy()`, so an optimizer's state in the same file costs nothing.

Layout: torch/serialization.py (_save, _load), torch/_utils.py (_rebuild_tensor_v2, _v3), caffe2/serialize.
"""
from __future__ import annotations

import errno
import os
import struct
from typing import Any

import numpy as np

from . import git_lfs, inert_pickle, numpy_scalars
from .inert_pickle import Global

_MAX_PICKLE = 1 << 28
_MAX_DIMS = 32
_STORED = 0  # zip's method "no compression"

# torch's dtype -> NumPy's of the same bits; bfloat16 comes out as the float32 that it is the top half of.
_DTYPES = {
    "float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2", "complex64": "c8",
    "complex128": "c16", "int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1",
    "uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "bool": "u1",
}
# Of these only the size is needed: to check bounds in a file that holds some.
_OPAQUE_SIZES = {
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "float4_e2m1fn_x2": 1, "complex32": 4, "quint8": 1, "qint8": 1, "qint32": 4, "bits8": 1, "bits16": 2,
}
_STORAGES = {
    "torch.DoubleStorage": "float64", "torch.FloatStorage": "float32", "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16", "torch.LongStorage": "int64", "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16", "torch.CharStorage": "int8", "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool", "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128", "torch.QUInt8Storage": "quint8",
    "torch.QInt8Storage": "qint8", "torch.QInt32Storage": "qint32",
    "torch.storage.UntypedStorage": "uint8", "torch.UntypedStorage": "uint8",
}


def _item_size(dtype: str) -> int:
    return np.dtype(_DTYPES[dtype]).itemsize if dtype in _DTYPES else _OPAQUE_SIZES[dtype]


class Storage:
    """A run of bytes in the file. `read()` reads them once and keeps them."""

    __slots__ = ("_archive", "_entry", "key", "dtype", "nbytes", "_data")

    def __init__(self, archive: _Archive, key: str, dtype: str, nbytes: int):
        self._archive = archive
        self._entry = f"data/{key}"
        self.key = key
        self.dtype = dtype
        self.nbytes = nbytes
        self._data: bytes | None = None
        size = archive.size(self._entry)
        if size != nbytes:
            raise ValueError(f"storage {key[:200]!r}: expected {nbytes} bytes, got {size}")

    @property
    def byteorder(self) -> str:
        return self._archive.byteorder

    @property
    def path(self) -> str:
        return self._archive.path

    def read(self) -> bytes:
        if self._data is None:
            try:
                self._data = self._archive.read(self._entry)
            except ValueError as error:
                raise ValueError(f"{self.path}: {error}") from None
        return self._data


class Tensor:
    """A tensor of the file: `shape`, `stride` and `offset` in elements, `dtype` by torch's name."""

    __slots__ = ("storage", "dtype", "offset", "shape", "stride")

    def __init__(self, storage: Storage, dtype: str, offset: int, shape: tuple[int, ...],
                 stride: tuple[int, ...]):
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.stride = stride

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape})"

    def numpy(self) -> np.ndarray:
        """The values, read-only; bfloat16 as float32. Raises ValueError for a dtype that NumPy can't hold and
        for a tensor of more elements than its storage (an expanded one)."""
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.storage.path}: dtype torch.{self.dtype} is not supported")
        available = self.storage.nbytes // _item_size(self.dtype)
        if np.prod(self.shape, dtype=object) > available:
            raise ValueError(f"{self.storage.path}: expected a tensor no larger than its storage of "
                             f"{available} elements, got {self.shape}")
        order = ">" if self.storage.byteorder == "big" else "<"
        code = _DTYPES[self.dtype]
        flat = np.frombuffer(self.storage.read(), order + code).astype(code, copy=False)
        if self.dtype == "bfloat16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        elif self.dtype == "bool":
            flat = flat != 0
        if 0 in self.shape:
            return np.empty(self.shape, flat.dtype)
        strides = tuple(step * flat.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(flat[self.offset:], self.shape, strides, writeable=False)


class _Archive:
    """The entries of the zip: where each one's bytes are."""

    def __init__(self, path: str):
        self.path = path
        self.entries = _zip_entries(path)
        tops = [name[:-len("data.pkl")] for name in self.entries if name.endswith("/data.pkl")
                and name.count("/") == 1]
        if len(tops) != 1:
            raise ValueError("not a file of torch.save: expected one entry NAME/data.pkl, "
                             f"got {len(tops)} in a zip of {len(self.entries)} entries")
        self.top = tops[0]
        if self.top + "constants.pkl" in self.entries:
            raise ValueError("a TorchScript archive: expected a checkpoint written by torch.save")
        self.byteorder = "little"
        if self.top + "byteorder" in self.entries:
            self.byteorder = self.read("byteorder").decode("latin-1")
            if self.byteorder not in ("little", "big"):
                raise ValueError(f"byteorder: expected 'little' or 'big', got {self.byteorder[:20]!r}")

    def _entry(self, name: str) -> Any:
        try:
            return self.entries[self.top + name]
        except KeyError:
            raise ValueError(f"the entry {name[:200]!r} is missing") from None

    def size(self, name: str) -> int:
        return self._entry(name).file_size

    def read(self, name: str) -> bytes:
        """An entry's bytes, checked against its CRC-32 (0 where torch was told not to compute one)."""
        import zlib

        entry = self._entry(name)
        where = f"entry {name[:200]!r}"
        if entry.compress_type != _STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(f"{where}: expected an uncompressed, unencrypted entry")
        with open(self.path, "rb") as stream:
            stream.seek(entry.header_offset)
            # The local header's own sizes may be 0 (they then follow the data), and its extra field, which
            # aligns the data, differs from the directory's.
            header = stream.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise ValueError(f"{where}: no local header at byte {entry.header_offset}")
            name_size, extra_size = struct.unpack("<HH", header[26:30])
            stream.seek(name_size + extra_size, os.SEEK_CUR)
            data = stream.read(entry.file_size)
        if len(data) != entry.file_size:
            raise ValueError(f"{where}: expected {entry.file_size} bytes, got {len(data)}")
        if entry.CRC not in (0, zlib.crc32(data)):
            raise ValueError(f"{where}: its checksum is wrong, the file is damaged")
        return data

    def storage(self, key: str, dtype: str, nbytes: int, known: dict[str, Storage]) -> Storage:
        if key not in known:
            known[key] = Storage(self, key, dtype, nbytes)
        elif (known[key].dtype, known[key].nbytes) != (dtype, nbytes):
            raise ValueError(f"storage {key[:200]!r}: described in two ways")
        return known[key]


def _zip_entries(path: str) -> dict[str, Any]:
    import zipfile

    with open(path, "rb") as stream:
        total = os.fstat(stream.fileno()).st_size
        head = stream.read(262)
        if head[:4] != b"PK\x03\x04":
            if git_lfs.pointer(head):
                raise ValueError(git_lfs.pointer(head))
            # Legacy files begin with a pickled number, 0x1950a86a20f9469cfc6c; the oldest are tar files.
            if head[:14] == b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19" or head[257:262] == b"ustar":
                raise ValueError("a file in torch's legacy format (before 1.6): re-save it where torch is "
                                 "installed, torch.save(torch.load(OLD, map_location='cpu'), NEW)")
            raise ValueError(f"not a file of torch.save: expected a zip, got {total} bytes that begin with "
                             f"{head[:8]!r}")
        try:
            infos = zipfile.ZipFile(stream).infolist()
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError, struct.error,
                ValueError, OSError) as error:
            # zipfile seeks where the file says, before its start too: EINVAL, and the file's fault.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise ValueError(f"a damaged zip: {error}") from None
    entries = {info.filename: info for info in infos}
    if len(entries) != len(infos):
        raise ValueError("a damaged zip: two entries of one name")
    if any(info.header_offset < 0 for info in infos) or sum(info.file_size for info in infos) > total:
        raise ValueError(f"a damaged zip: its entries are larger than the file's {total} bytes")
    return entries


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(dtype: str, storage: Any, offset: Any, shape: Any, stride: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError(f"a tensor over a {type(storage).__name__}")
    if not (_whole(offset) and isinstance(shape, tuple) and isinstance(stride, tuple)
            and len(shape) == len(stride) <= _MAX_DIMS and all(map(_whole, shape + stride))):
        raise ValueError("a tensor whose shape, stride or offset is none")
    if 0 not in shape:
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
        if (last + 1) * _item_size(dtype) > storage.nbytes:
            raise ValueError(f"a tensor of shape {shape} reaches beyond its storage {storage.key[:200]!r}")
    return Tensor(storage, dtype, offset, shape, stride)


def _rebuild_tensor(*args: Any) -> Tensor:
    # (storage, offset, shape, stride), then in _v2 requires_grad, hooks and perhaps metadata
    if len(args) < 4 or not isinstance(args[0], Storage):
        raise ValueError("a tensor without a storage")
    return _tensor(args[0].dtype, *args[:4])


def _rebuild_tensor_v3(*args: Any) -> Tensor:
    # (storage, offset, shape, stride, requires_grad, hooks, dtype), perhaps metadata: an untyped storage
    dtype = args[6].name.removeprefix("torch.") if len(args) > 6 and isinstance(args[6], Global) else ""
    if dtype not in _DTYPES and dtype not in _OPAQUE_SIZES:
        raise ValueError(f"a tensor of unknown dtype {dtype[:50]!r}")
    return _tensor(dtype, *args[:4])


def _rebuild_parameter(*args: Any) -> Any:
    if not args:
        raise ValueError("a parameter without data")
    return args[0]


def _size(*args: Any) -> tuple:
    if len(args) != 1 or not isinstance(args[0], (tuple, list)):
        raise ValueError("a torch.Size of something else than a tuple")
    return tuple(args[0])


_KNOWN = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": _size,
    "collections.OrderedDict": inert_pickle.dictionary,
    **numpy_scalars.KNOWN,
}


def load(path: str | os.PathLike) -> Any:
    """The object saved in a file of torch.save (torch >= 1.6): dicts, lists, numbers, strings, and `Tensor`s
    to be read by their `numpy()`. OrderedDicts are dicts, parameters are tensors, any other object is an
    `inert_pickle.Opaque`, any other name an `inert_pickle.Global`.

    Raises OSError where the file can't be read, ValueError that names the file and what is wrong where it is
    no such file, is damaged, is TorchScript's or in torch's legacy format (with the way to re-save it).
    """
    path = os.fsdecode(path)
    try:
        archive = _Archive(path)
        size = archive.size("data.pkl")
        if size > _MAX_PICKLE:
            raise ValueError(f"data.pkl: expected at most {_MAX_PICKLE} bytes, got {size}")
        storages: dict[str, Storage] = {}

        def persistent(pid: Any) -> Storage:
            # ("storage", type, key, location, number of elements)
            if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"
                    and isinstance(pid[1], Global) and isinstance(pid[2], str) and _whole(pid[4])):
                raise ValueError("a persistent id that is no storage")
            if pid[1].name not in _STORAGES:
                raise ValueError(f"a storage of unknown type {pid[1].name[:50]!r}")
            dtype = _STORAGES[pid[1].name]
            return archive.storage(pid[2], dtype, pid[4] * _item_size(dtype), storages)

        return inert_pickle.loads(archive.read("data.pkl"), _KNOWN, persistent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
