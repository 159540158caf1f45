"""NumPy's numbers in a pickle are the numbers that they are; what is damaged or no number is no number."""

from __future__ import annotations

import pickle
import random
import struct

import numpy as np
import pytest

from gendistiller_ext.checkpoints import torch_zip
from gendistiller_ext.checkpoints.inert_pickle import Opaque, loads
from gendistiller_ext.checkpoints.numpy_scalars import KNOWN

NUMBERS = {"bool": [False, True], "int8": [-128, 5], "int16": [-300], "int32": [-70000], "int64": [-(1 << 60), 0],
           "uint8": [200], "uint16": [60000], "uint32": [1 << 31], "uint64": [(1 << 64) - 1],
           "float16": [0.5, -65504.0], "float32": [0.1, float("inf")], "float64": [0.1, -1e300]}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, protocol):
    for number in NUMBERS[name]:
        scalar = getattr(np, name)(number)
        [read] = loads(pickle.dumps([scalar], protocol), KNOWN)
        assert type(read) is type(number) and read == scalar.item()


@pytest.mark.parametrize("old", [False, True])
def test_both_of_numpys_modules_and_nan(old):
    data = pickle.dumps({"a": [np.float64(0.25)] * 2, "b": (np.int64(3), np.float32("nan"))}, 2)
    data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if old else data
    read = loads(data, KNOWN)
    assert read["a"] == [0.25, 0.25] and read["b"][0] == 3 and np.isnan(read["b"][1])


def test_big_endian():
    for order in "<>":
        dtype = np.dtype(f"{order}f4")
        data = pickle.dumps(np.array([0.1], dtype)[0], 2)
        # NumPy's scalars are native: the file is one of another machine.
        data = data.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>") if order == ">" else data
        number = loads(data, KNOWN)
        raw = np.float32(0.1).tobytes()
        assert number == struct.unpack(f"{order}f", raw)[0]


@pytest.mark.parametrize("value", [np.str_("text"), np.complex64(1 + 2j), np.datetime64("2026-01-01"),
                                   np.array([1, 2]), np.dtype("f8"), np.bytes_(b"ab")])
def test_what_is_no_number_stays_inert(value):
    assert isinstance(loads(pickle.dumps(value, 2), KNOWN), (Opaque, bytes)) or value.dtype.kind == "S"


def scalar(code, payload, state=(3, "<", None, None, None, -1, -1, 0), args=None):
    """A pickled number with anything for its parts."""
    def plain(value):
        return pickle.dumps(value, 3)[2:-1]
    dtype = b"cnumpy\ndtype\n" + plain((code, False, True)) + b"R" + (plain(state) + b"b" if state is not None else b"")
    inner = dtype + plain(payload) + b"\x86" if args is None else plain(args)
    return b"\x80\x03cnumpy._core.multiarray\nscalar\n" + inner + b"R."


@pytest.mark.parametrize("data, message", [
    (scalar("f8", bytes(7)), "a NumPy number of dtype f8: expected 8 bytes"),
    (scalar("f8", bytes(9)), "expected 8 bytes"), (scalar("i4", b""), "expected 4 bytes"),
    (scalar("b1", bytes(2)), "expected 1 bytes"), (scalar("f4", "1234"), "expected 4 bytes"),
    (scalar("f4", 4), "expected 4 bytes"), (scalar("f4", None), "expected 4 bytes"),
    (scalar("f8", bytes(8), (3, "!")), "without a byte order"),
    (scalar("f8", bytes(8), (3, 5)), "without a byte order"),
    (b"\x80\x02c_codecs\nencode\nX\x02\x00\x00\x00\xc4\x80X\x06\x00\x00\x00latin1\x86R.",
     "bytes of a text with other characters"),
])
def test_damaged_numbers_are_value_errors(data, message):
    with pytest.raises(ValueError, match=rf"damaged pickle \(byte \d+\): .*{message}"):
        loads(data, KNOWN)


@pytest.mark.parametrize("data", [
    scalar("O8", b"\x80\x02N."), scalar("O", None), scalar("V8", bytes(8)), scalar("U1", b"abcd"),
    scalar("f16", bytes(16)), scalar(3, b""), scalar("f8", b"", args=()), scalar("f8", b"", args=("f8", bytes(8)))])
def test_objects_and_other_dtypes_are_not_decoded(data):
    assert isinstance(loads(data, KNOWN), Opaque)


def test_in_a_checkpoint_of_torch(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"cfg": {"dropout": np.float64(0.1), "layers": [np.int64(3)]}}, tmp_path / "x.pt")
    assert torch_zip.load(tmp_path / "x.pt") == {"cfg": {"dropout": 0.1, "layers": [3]}}


def test_random_damage_raises_value_error_only():
    good = pickle.dumps({"a": [np.float64(0.1), np.bool_(True)], "b": np.int32(7), "c": np.str_("x")}, 2)
    chance = random.Random(0)
    refused = read = 0
    for _ in range(5000):
        data = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            if chance.random() < 0.6:
                data[at] = chance.randrange(256)
            else:
                del data[at:at + chance.randrange(1, 5)]
        try:
            loads(bytes(data), KNOWN)
            read += 1
        except ValueError:
            refused += 1
    assert refused > 1000 and read > 100
