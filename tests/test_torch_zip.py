"""torch's zip files read without torch: values as torch has them, damage and malice as ValueErrors."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest

import gendistiller_ext
from gendistiller_ext.checkpoints import torch_zip
from gendistiller_ext.checkpoints.inert_pickle import Global, Opaque

torch = pytest.importorskip("torch")

DTYPES = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128", "int64", "int32", "int16",
          "int8",
          "uint8", "bool", "uint16", "uint32", "uint64"]


def same(tensor: torch_zip.Tensor, reference) -> bool:
    array = tensor.numpy()
    if reference.dtype == torch.bfloat16:
        reference = reference.float()
    expected = reference.detach().resolve_conj().numpy()
    return array.dtype == expected.dtype and array.shape == expected.shape and np.array_equal(
        np.ascontiguousarray(array).reshape(-1).view(np.uint8),
        np.ascontiguousarray(expected).reshape(-1).view(np.uint8))


def rewrite(source, target, change=None, compression=zipfile.ZIP_STORED):
    """Copies a zip, its entries changed by change(name, data) -> data or None, with right checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for info in old.infolist():
            data = old.read(info)
            data = change(info.filename.split("/", 1)[1], data) if change else data
            if data is not None:
                new.writestr(info.filename, data)
    return target


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pt"
    torch.manual_seed(0)
    base = torch.randn(6, 5)
    value = {"a": base, "b": base.t()[1:4], "names": ["x", None, 2.5], "n": torch.arange(7)}
    torch.save(value, path)
    return path, value


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, tmp_path):
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(0, 256, (640,), dtype=torch.uint8, generator=generator)
    tensor = (bits % 2).bool() if dtype == "bool" else bits.view(kind)
    if tensor.is_floating_point():
        tensor = torch.nan_to_num(tensor.float() if dtype == "bfloat16" else tensor, 1.0, 2.0, -2.0).to(kind)
    torch.save({"t": tensor, "empty": tensor[:0].reshape(0, 3), "one": tensor[3]}, tmp_path / "x.pt")
    read = torch_zip.load(tmp_path / "x.pt")
    assert read["t"].dtype == dtype and repr(read["t"]) == f"Tensor({dtype}, {tuple(tensor.shape)})"
    assert same(read["t"], tensor) and same(read["one"], tensor[3]) and not read["t"].numpy().flags.writeable
    assert read["empty"].numpy().shape == (0, 3)


@pytest.mark.parametrize("view", [
    lambda t: t, lambda t: t.t(), lambda t: t[2:, 1:4], lambda t: t[:, ::2], lambda t: t.permute(1, 0)[3],
    lambda t: t[1, 2], lambda t: t.reshape(2, 3, 5).transpose(0, 2), lambda t: t[5:5], lambda t: t.diagonal(),
    lambda t: t.unsqueeze(1), lambda t: t.as_strided((3, 4), (7, 2), 1),
])
def test_strides_and_offsets(view, tmp_path):
    tensor = view(torch.randn(6, 5))
    torch.save([tensor], tmp_path / "x.pt")
    assert same(torch_zip.load(tmp_path / "x.pt")[0], tensor)


def test_shared_storages_are_shared_and_views_read_only(saved):
    path, value = saved
    read = torch_zip.load(str(path))
    assert read["a"].storage is read["b"].storage
    assert same(read["a"], value["a"]) and same(read["b"], value["b"]) and read["names"] == value["names"]
    array = read["a"].numpy()
    assert np.shares_memory(array, read["b"].numpy())
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_state_dicts_and_parameters(protocol, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    value = {"state": model.state_dict(), "list": list(model.parameters()), "size": torch.Size([2, 3]),
             "nested": [{"deep": (torch.ones(2), "text", True, None, -1.5, 10 ** 20)}],
             "od": collections.OrderedDict([("z", 1), ("a", 2)]), 5: b"bytes"}
    torch.save(value, tmp_path / "x.pt", pickle_protocol=protocol)
    read = torch_zip.load(tmp_path / "x.pt")
    assert list(read["state"]) == list(value["state"])
    assert all(same(read["state"][name], tensor) for name, tensor in value["state"].items())
    assert all(same(a, b) for a, b in zip(read["list"], value["list"]))
    assert read["size"] == (2, 3) and list(read["od"].items()) == [("z", 1), ("a", 2)]
    assert read["nested"][0]["deep"][1:] == value["nested"][0]["deep"][1:]


def test_other_objects_become_inert(tmp_path):
    import argparse

    value = {"args": argparse.Namespace(lr=0.1), "dtype": torch.float16, "device": torch.device("cpu"),
             "sparse": torch.eye(2).to_sparse(), "meta": torch.empty(3, device="meta"),
             "model": torch.nn.ReLU(),
             "fp8": torch.ones(3).to(torch.float8_e4m3fn)}
    torch.save(value, tmp_path / "x.pt")
    read = torch_zip.load(tmp_path / "x.pt")
    assert read["args"].name == "argparse.Namespace" and read["args"].state == {"lr": 0.1}
    assert isinstance(read["dtype"], Global) and read["dtype"].name == "torch.float16"
    assert all(isinstance(read[name], Opaque) for name in ("device", "sparse", "meta", "model"))
    with pytest.raises(ValueError, match=r"x\.pt: dtype torch\.float8_e4m3fn is not supported"):
        read["fp8"].numpy()


def test_real_teacher_is_read_as_torch_reads_it(teacher_path):
    expected = torch.load(teacher_path, map_location="cpu", weights_only=True)
    read = torch_zip.load(teacher_path)
    assert read["cfg"] == expected["cfg"] and list(read["model"]) == list(expected["model"])
    assert all(same(read["model"][name], tensor) for name, tensor in expected["model"].items())


def test_big_endian_files(saved, tmp_path):
    path, value = saved
    sizes = {"data/0": 4, "data/1": 8}

    def swap(name, data):
        if name in sizes:
            return np.frombuffer(data, f"u{sizes[name]}").byteswap().tobytes()
        return b"big" if name == "byteorder" else data

    read = torch_zip.load(rewrite(path, tmp_path / "big.pt", swap))
    assert same(read["a"], value["a"]) and same(read["b"], value["b"]) and same(read["n"], value["n"])
    with pytest.raises(ValueError, match="byteorder: expected 'little' or 'big', got 'middle'"):
        torch_zip.load(rewrite(path, tmp_path / "x.pt", lambda n, d: b"middle" if n == "byteorder" else d))
    old = rewrite(path, tmp_path / "old.pt", lambda n, d: None if n == "byteorder" else d)
    assert same(torch_zip.load(old)["a"], value["a"])


def test_files_without_checksums(tmp_path):
    tensor = torch.randn(10)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(torch_zip.load(tmp_path / "x.pt"), tensor)


def test_what_is_not_asked_for_is_not_read(saved):
    path, value = saved
    read = torch_zip.load(path)
    damaged = bytearray(path.read_bytes())
    at = damaged.index(value["n"].numpy().tobytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    assert same(read["a"], value["a"])
    with pytest.raises(ValueError,
                       match=r"model\.pt: entry 'data/1': its checksum is wrong, the file is damaged"):
        read["n"].numpy()


def test_other_kinds_of_file(tmp_path):
    torch.save([1], tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError,
                       match=r"legacy\.pt: .*legacy format.*re-save it.*torch\.save\(torch\.load\("):
        torch_zip.load(tmp_path / "legacy.pt")
    (tmp_path / "tar.pt").write_bytes(b"sys_info".ljust(257, b"\0") + b"ustar" + bytes(250))
    with pytest.raises(ValueError, match="legacy format"):
        torch_zip.load(tmp_path / "tar.pt")
    (tmp_path / "text.pt").write_text("hello, world")
    with pytest.raises(ValueError,
                       match=r"text\.pt: not a file of torch\.save: expected a zip, got 12 bytes"):
        torch_zip.load(tmp_path / "text.pt")
    (tmp_path / "none.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a zip, got 0 bytes"):
        torch_zip.load(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a/b.txt", "text")
    with pytest.raises(ValueError, match=r"expected one entry NAME/data\.pkl, got 0 in a zip of 1 entries"):
        torch_zip.load(tmp_path / "zip.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/version"):
            archive.writestr(name, b"\x80\x02N.")
    with pytest.raises(ValueError, match=r"script\.pt: a TorchScript archive"):
        torch_zip.load(tmp_path / "script.pt")
    with pytest.raises(FileNotFoundError):
        torch_zip.load(tmp_path / "absent.pt")
    with pytest.raises(OSError):
        torch_zip.load(tmp_path)


def test_an_error_of_the_disk_is_no_damage(saved, monkeypatch):
    for number, kind in ((errno.EIO, OSError), (errno.EINVAL, ValueError)):  # zipfile seeks where a file says
        def fail(stream, number=number):
            raise OSError(number, "no such place")
        monkeypatch.setattr(zipfile, "ZipFile", fail)
        with pytest.raises(kind, match="no such place"):
            torch_zip.load(saved[0])


def test_compressed_entries_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="entry '.*': expected an uncompressed, unencrypted entry"):
        torch_zip.load(rewrite(saved[0], tmp_path / "x.pt", compression=zipfile.ZIP_DEFLATED))
    content = bytearray(saved[0].read_bytes())
    entry = content.index(b"model/data.pkl", content.index(b"PK\x01\x02")) - 46
    content[entry + 10] = zipfile.ZIP_BZIP2  # the method, though the data is plain
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match="entry 'data.pkl': expected an uncompressed, unencrypted entry"):
        torch_zip.load(tmp_path / "x.pt")


def test_two_entries_of_one_name_are_refused(saved, tmp_path):
    target = rewrite(saved[0], tmp_path / "x.pt")
    with zipfile.ZipFile(target, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("model/data.pkl", b"\x80\x02N.")
    with pytest.raises(ValueError, match="two entries of one name"):
        torch_zip.load(target)


def write(path, pickled: bytes, **entries: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"x/data/{name[1:]}", data)
    return path


class Named:
    """Pickles as a global of any name."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Called:
    def __init__(self, target, args):
        self.target, self.args = target, args


class Stored(tuple):
    """A persistent id."""


def pickled(value) -> bytes:
    """A pickle in which Named, Called and Stored stand for GLOBAL, REDUCE and BINPERSID."""
    if isinstance(value, Named):
        return b"c" + f"{value.module}\n{value.name}\n".encode()
    if isinstance(value, Called):
        return pickled(value.target) + pickled(value.args) + b"R"
    if isinstance(value, Stored):
        return pickled(tuple(value)) + b"Q"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(pickled, value)) + b"t"
    return pickle.dumps(value, 2)[2:-1]


FLOATS = Named("torch", "FloatStorage")


def rebuilt(storage=Stored(("storage", FLOATS, "0", "cpu", 6)), offset=0, shape=(2, 3), stride=(3, 1),
            more=(False, ())):
    return Called(Named("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, stride, *more))


@pytest.mark.parametrize("tensor, message", [
    (rebuilt(offset=1), r"a tensor of shape \(2, 3\) reaches beyond its storage '0'"),
    (rebuilt(stride=(4, 1)), "reaches beyond its storage"),
    (rebuilt(stride=(1 << 61, 1)), "reaches beyond its storage"),
    (rebuilt(shape=(1 << 61, 1 << 61), stride=(1, 1)), "reaches beyond its storage"),
    (rebuilt(stride=(-3, 1)), "whose shape, stride or offset is none"),
    (rebuilt(offset=-1), "whose shape, stride or offset is none"),
    (rebuilt(offset=True), "whose shape, stride or offset is none"),
    (rebuilt(shape=(2, 3, 1)), "whose shape, stride or offset is none"),
    (rebuilt(shape="ab", stride="cd"), "whose shape, stride or offset is none"),
    (rebuilt(shape=(1,) * 33, stride=(1,) * 33), "whose shape, stride or offset is none"),
    (rebuilt(storage=None), "a tensor without a storage"),
    (Called(Named("torch._utils", "_rebuild_tensor_v2"), ()), "a tensor without a storage"),
    (Called(Named("torch._utils", "_rebuild_parameter"), ()), "a parameter without data"),
    (Called(Named("torch", "Size"), (3,)), "a torch.Size of something else"),
    (Called(Named("torch._utils", "_rebuild_tensor_v3"),
            (Stored(("storage", FLOATS, "0", "cpu", 6)), 0, (1,), (1,), False, (),
             Named("torch", "float99"))),
     "a tensor of unknown dtype 'float99'"),
    (Stored(("storage", FLOATS, "0", "cpu", 7)), "storage '0': expected 28 bytes, got 24"),
    (Stored(("storage", FLOATS, "0", "cpu", 1 << 61)),
     "storage '0': expected 9223372036854775808 bytes, got 24"),
    (Stored(("storage", FLOATS, "1", "cpu", 6)), "the entry 'data/1' is missing"),
    (Stored(("storage", FLOATS, "../data.pkl", "cpu", 6)), "the entry 'data/../data.pkl' is missing"),
    (Stored(("storage", FLOATS, 0, "cpu", 6)), "a persistent id that is no storage"),
    (Stored(("storage", FLOATS, "0", "cpu", -6)), "a persistent id that is no storage"),
    (Stored(("module", FLOATS, "0", "cpu", 6)), "a persistent id that is no storage"),
    (Stored(("storage", "FloatStorage", "0", "cpu", 6)), "a persistent id that is no storage"),
    (Stored(("storage", Named("os", "system"), "0", "cpu", 6)), "a storage of unknown type 'os.system'"),
    ((Stored(("storage", FLOATS, "0", "cpu", 6)), Stored(("storage", Named("torch", "IntStorage"), "0", "cpu",
                                                          6))),
     "storage '0': described in two ways"),
])
def test_wrong_tensors_and_storages(tensor, message, tmp_path):
    path = write(tmp_path / "x.pt", b"\x80\x02" + pickled(tensor) + b".", _0=bytes(24))
    with pytest.raises(ValueError, match=rf"x\.pt: damaged pickle \(byte \d+\): .*{message}"):
        torch_zip.load(path)


def test_crafted_files_can_be_right(tmp_path):
    data = np.arange(6, dtype="<f4").tobytes()
    path = write(tmp_path / "x.pt", b"\x80\x02" + pickled((rebuilt(),
                                                           rebuilt(shape=(), stride=(), offset=5))) + b".",
                 _0=data)
    matrix, number = torch_zip.load(path)
    assert matrix.numpy().tolist() == [[0, 1, 2], [3, 4, 5]] and number.numpy() == 5


def test_expanded_tensors_are_not_multiplied(tmp_path):
    torch.save({"e": torch.ones(1).expand(1 << 40), "ok": torch.ones(2)}, tmp_path / "x.pt")
    read = torch_zip.load(tmp_path / "x.pt")
    assert read["ok"].numpy().tolist() == [1, 1]
    with pytest.raises(ValueError, match="expected a tensor no larger than its storage of 1 elements, got"):
        read["e"].numpy()


def test_nothing_in_a_file_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    system = Called(Named("posix", "system"), ("touch ran",))
    evil = {
        "x": system, "rebuilt": rebuilt(storage=system), "state": Called(Named("builtins", "eval"),
                                                                         ("open('ran','w')",)),
        "hooks": rebuilt(more=(False, system)), "type": Stored(("storage", system, "0", "cpu", 6)),
        "dtype": Called(Named("torch._utils", "_rebuild_tensor_v3"),
                        (Stored(("storage", FLOATS, "0", "cpu", 6)), 0, (1,), (1,), False, (), system)),
        "chained": Called(Called(Named("builtins", "getattr"), (Named("os", "path"), "os")), ("touch ran",)),
    }
    for name, value in evil.items():
        path = write(tmp_path / f"{name}.pt", b"\x80\x02" + pickled(value) + b".", _0=bytes(24))
        try:
            torch_zip.load(path)
        except ValueError:
            pass
        path.unlink()
    assert os.listdir(tmp_path) == []


def test_reading_imports_no_torch(saved):
    code = ("import sys; from gendistiller_ext.checkpoints import torch_zip; "
            f"torch_zip.load({str(saved[0])!r})['a'].numpy(); print('torch' in sys.modules)")
    root = os.path.dirname(os.path.dirname(os.path.abspath(gendistiller_ext.__file__)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": root})
    assert done.stdout.strip() == "False"


def everything(path):
    """Reads a file whole, as a caller would."""
    def visit(value, depth=0):
        if isinstance(value, torch_zip.Tensor):
            value.numpy()
        elif isinstance(value, dict) and depth < 5:
            for item in value.values():
                visit(item, depth + 1)
        elif isinstance(value, (list, tuple)) and depth < 5:
            for item in value:
                visit(item, depth + 1)
    visit(torch_zip.load(path))


def test_truncated_files_raise_value_error(saved, tmp_path):
    content = saved[0].read_bytes()
    target = tmp_path / "cut.pt"
    for size in [*range(0, 200), *range(200, len(content), 37), *range(len(content) - 60, len(content))]:
        target.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut\.pt: "):
            everything(target)


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_files_raise_value_error_only(seed, saved, tmp_path):
    content = saved[0].read_bytes()
    random_ = random.Random(seed)
    target = tmp_path / "fuzzed.pt"
    directory = content.index(b"PK\x01\x02")
    refused = 0
    for _ in range(400):
        data = bytearray(content)
        # Half the damage goes to the directory at the end, which everything else depends on.
        low = directory if random_.random() < 0.5 else 0
        for _ in range(random_.randrange(1, 5)):
            at = random_.randrange(low, len(data) - 8)
            kind = random_.randrange(3)
            if kind == 0:
                data[at] ^= 1 << random_.randrange(8)
            elif kind == 1:
                data[at:at + 4] = struct.pack("<I", random_.choice([0, 1, 0xFFFFFFFF, 0x80000000,
                                                                    len(content)]))
            else:
                del data[at:at + random_.randrange(1, 20)]
        target.write_bytes(data)
        try:
            everything(target)
        except ValueError as error:
            assert str(target) in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("seed", range(4))
def test_fuzzed_pickles_with_right_checksums_raise_value_error_only(seed, saved, tmp_path):
    random_ = random.Random(seed)
    with zipfile.ZipFile(saved[0]) as archive:
        good = archive.read("model/data.pkl")
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(random_.randrange(1, 4)):
            at = random_.randrange(len(data))
            data[at] = random_.randrange(256)
        path = rewrite(saved[0], tmp_path / "x.pt", lambda n, d: bytes(data) if n == "data.pkl" else d)
        try:
            everything(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 100


def test_a_wrong_local_header_is_found(saved, tmp_path):
    content = bytearray(saved[0].read_bytes())
    header = content.index(b"model/data/0") - 30
    assert content[header:header + 4] == b"PK\x03\x04"
    content[header] = 0
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.pt: entry 'data/0': no local header at byte {header}"):
        everything(tmp_path / "x.pt")


def test_overlapping_entries_are_refused(tmp_path):
    """A directory that lists one run of bytes many times would read as more data than the file has."""
    name, data = b"x/data.pkl", b"\x80\x02N."
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data),
                        len(name),
                        0) + name + data
    entries = b""
    for i in range(50):
        entry = name if i == 0 else b"x/data/%04d" % i
        entries += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, zlib.crc32(data), 1 << 20,
                               1 << 20,
                               len(entry), 0, 0, 0, 0, 0, 0) + entry
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 50, 50, len(entries), len(local), 0)
    (tmp_path / "x.pt").write_bytes(local + entries + end)
    with pytest.raises(ValueError, match="a damaged zip: "):
        torch_zip.load(tmp_path / "x.pt")
