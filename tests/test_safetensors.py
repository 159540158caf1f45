"""The Python reader and writer of safetensors, against the package; a damaged header is named, whoever asks."""

from __future__ import annotations

import json
import os
import random
import struct

import numpy as np
import pytest

from checkpoint_bytes import pack, unpack
from gendistiller_ext.checkpoints import safetensors


def read_whole(path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in safetensors.read(str(path))[0].items()}


def both_raise(content: bytes, path, message: str) -> None:
    """A file and its bytes are refused alike, with the file's name."""
    path.write_bytes(content)
    for call in (lambda: read_whole(path), lambda: safetensors.parse(content, str(path))):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: ") and len(str(caught.value)) < 700


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def test_against_the_package(path, tmp_path):
    theirs = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {"half": rng.standard_normal(3).astype(np.float16),
              "single": rng.standard_normal((2, 3, 4)).astype(np.float32),
              "turned": rng.standard_normal((4, 3)).astype(np.float64).T, "scalar": np.float32(2.5).reshape(()),
              "none": np.zeros((0, 5), np.float32), "bytes": rng.integers(0, 255, 7).astype(np.uint8),
              "long": rng.integers(-9, 9, 5), "flags": np.array([True, False])}
    safetensors.write(str(path), arrays, {"hop": "320", "text": "é\"\n"})
    loaded = theirs.load_file(path)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        assert np.array_equal(loaded[name], array), name
    from safetensors import safe_open
    with safe_open(path, "np") as stream:
        assert stream.metadata() == {"hop": "320", "text": "é\"\n"}
    theirs.save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, str(path), {"a": "b"})
    tensors, metadata = safetensors.read(str(path))
    parsed, again = safetensors.parse(path.read_bytes())
    assert metadata == again == {"a": "b"} and list(tensors) == list(parsed)
    for name, array in arrays.items():
        for got in (parsed[name], tensors[name].numpy()):
            assert np.array_equal(got.reshape(array.shape), array) and got.dtype == array.dtype, name
            assert not got.flags.writeable
        assert tensors[name].dtype == array.dtype.name


def test_what_torch_writes(path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {name: torch.arange(12).reshape(3, 4).to(getattr(torch, name)) for name in
               ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")}
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 3), torch.tensor(2.5)
    save_file(tensors, path, metadata={"format": "pt"})
    read = safetensors.read(str(path))[0]
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        expected = (tensor.float() if name == "bfloat16" else tensor).numpy()
        array = read[name].numpy()
        assert array.dtype == expected.dtype and np.array_equal(array, expected)
        assert read[name].shape == array.shape and read[name].dtype == str(tensor.dtype).removeprefix("torch.")
    save_file({"a": torch.ones(3).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"x\.safetensors: dtype F8_E4M3 is not supported"):
        read_whole(path)


def test_what_cannot_be_written(path):
    with pytest.raises(TypeError, match="x: expected numbers, got dtype"):
        safetensors.write(str(path), {"x": np.array(["text"])})
    assert os.listdir(path.parent) == []


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, size, message", [
    ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "expected a tensor at byte 8 of the data, got one at 4"),
    ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "expected a tensor at byte 8 of the data, got one at 0"),
    ({"a": entry(0, 8), "b": entry(12, 20)}, 20, "expected a tensor at byte 8 of the data, got one at 12"),
    ({"a": entry(4, 12)}, 12, "expected a tensor at byte 0 of the data, got one at 4"),
    ({"a": entry(0, 8)}, 9, r"expected \d+ bytes, got \d+$"),
    ({"a": entry(0, 8)}, 7, r"expected \d+ bytes, got \d+$"),
    ({}, 1, r"expected \d+ bytes, got \d+$"),
    ({"a": entry(0, 4)}, 8, "a: damaged entry: expected 8 bytes, got offsets int 0 to int 4"),
    ({"a": entry(8, 0)}, 8, "a: damaged entry: expected 8 bytes, got offsets int 8 to int 0"),
    ({"a": entry(-8, 0)}, 8, "a: damaged entry: expected 8 bytes"),
    ({"a": entry(0.0, 8)}, 8, "a: damaged entry: expected 8 bytes, got offsets float 0.0 to int 8"),
    ({"a": entry(False, 8)}, 8, "a: damaged entry: expected 8 bytes, got offsets bool False to int 8"),
    ({"a": entry(0, True, (1,), "U8")}, 1, "a: damaged entry: expected 1 bytes, got offsets int 0 to bool True"),
    ({"a": entry(0, 4, (True,))}, 4, "a: damaged entry: a shape that is none"),
    ({"a": entry(0, 8, dtype="F33")}, 8, "a: damaged entry: unknown dtype str 'F33'"),
    ({"a": entry(0, 8, dtype=["F32"])}, 8, "a: damaged entry: "),
    ({"a": entry(0, 8, (-2,))}, 8, "a: damaged entry: a shape that is none"),
    ({"a": entry(0, 8, (2.0,))}, 8, "a: damaged entry: a shape that is none"),
    ({"a": entry(0, 8, (1,) * 40)}, 8, "a: damaged entry: a shape that is none"),
    ({"a": entry(0, 8, (1 << 62, 1 << 62))}, 8, "a: damaged entry: expected 8507059173023461586584"),
    ({"a": {**entry(0, 8), "data_offsets": [0, 4, 8]}}, 8, "a: damaged entry: "),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: damaged entry: 'data_offsets'"),
    ({"a": 3}, 8, "a: damaged entry: "), ({"a": None}, 8, "a: damaged entry: "), ({"a": []}, 8, "a: damaged entry: "),
    ({"__metadata__": 3, "a": entry(0, 8)}, 8, "__metadata__: expected an object of strings, got int 3"),
    ({"__metadata__": {"x": 3}}, 0, "__metadata__: expected an object of strings"),
    (b'{"a":' + json.dumps(entry(0, 8)).encode() + b',"a":' + json.dumps(entry(0, 8)).encode() + b"}", 8,
     "a key occurs twice"),
    (b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', 8, "a key occurs twice"),
    (b"[]", 0, r"a header that begins with b'\[\]'"), (b" {}", 0, "a header that begins with"),
    (b"{]", 0, "not the JSON"), (b'{"a', 0, "not the JSON"), (b"\xff\xff", 0, "begins with"),
    (b'{"\xff": 3}', 0, "not the JSON"), (b'{"a":' + b"[" * 100_000, 0, "not the JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", 0, "not the JSON|damaged entry"),
])
def test_headers_that_are_wrong(header, size, message, path):
    both_raise(pack(header, bytes(size)), path, message)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, struct.pack("<Q", 3) + b"{}",
                                     struct.pack("<Q", 100_000_001) + b"{}", struct.pack("<Q", 1 << 63) + b"{}"])
def test_lengths_that_are_wrong(content, path):
    both_raise(content, path, "expected a safetensors file, got a header of ")


def test_truncated_anywhere(path):
    safetensors.write(str(path), {"a": np.ones(3), "b": np.arange(5)}, {"k": "v"})
    content = path.read_bytes()
    for size in range(len(content)):
        both_raise(content[:size], path, "x.safetensors: ")
    header, data = unpack(content)
    path.write_bytes(pack(header, data))
    assert list(read_whole(path)) == list(header)[1:]


def test_a_file_that_shrinks_after_its_header(path):
    safetensors.write(str(path), {"a": np.ones(3)})
    tensor = safetensors.read(str(path))[0]["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors: expected 24 bytes at \d+, got 23"):
        tensor.numpy()


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_a_value_error_or_whole_arrays(seed, path):
    safetensors.write(str(path), {"first": np.ones((2, 3), np.float32), "second": np.arange(4)}, {"key": "value"})
    good = path.read_bytes()
    chance = random.Random(seed)
    end = 8 + struct.unpack("<Q", good[:8])[0]
    refused = 0
    for _ in range(1500):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(end)
            if chance.random() < 0.5:
                content[at] = chance.choice(b'0123456789[]{},:"-.eE tfn') if at >= 8 else chance.randrange(256)
            else:
                content[at:at + chance.randrange(3)] = good[chance.randrange(end):][:chance.randrange(3)]
        try:
            arrays, metadata = safetensors.parse(bytes(content), "x")
            assert sum(array.nbytes for array in arrays.values()) <= len(content) and isinstance(metadata, dict)
        except ValueError as error:
            assert str(error).startswith("x: ")
            refused += 1
    assert refused > 1000
