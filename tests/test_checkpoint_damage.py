"""Damaged checkpoints: each is refused by an error that says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

import gendistiller_ext as gd
from checkpoint_bytes import pack, tensors, unpack
from conftest import SMALL

FIRST = "feature_extractor.conv_layers.0.0.weight"  # (8, 1, 10)
FC1 = "encoder.layers.0.fc1.weight"  # (20, 12)
FC2_BIAS = "encoder.layers.0.fc2.bias"  # (12,)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("sound") / "model.safetensors")
    gd.Model(gd.Config(**SMALL), seed=1).save(path)
    with open(path, "rb") as stream:
        return stream.read()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


def load(path, content):
    with open(path, "wb") as stream:
        stream.write(content)
    return gd.Model.load(path)


def refuse(path, content, match, error=ValueError):
    with pytest.raises(error, match=match) as caught:
        load(path, content)
    assert path in str(caught.value)


# ---- The file


def test_truncated_anywhere(content, path):
    header, data = unpack(content)
    start = len(content) - len(data)
    boundaries = {start + offset for name, entry in header.items() if name != "__metadata__"
                  for offset in entry["data_offsets"]}
    places = {*range(20), start // 2, *boundaries}
    places = sorted({place + shift for place in places for shift in (-1, 0, 1)} & set(range(len(content))))
    assert len(places) > 100
    for place in places:
        refuse(path, content[:place], "truncated|expected a safetensors file")


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 8, b"x" * 1000])
def test_more_than_the_data(content, path, extra):
    size = len(unpack(content)[1])
    refuse(path, content + extra, f"expected {size} bytes of data, got {size + len(extra)}")


@pytest.mark.parametrize("length", [2**20 + 1, 2**31, 2**32 + 8, 2**63 - 1, 2**63, 2**64 - 1])
def test_huge_header_length(content, path, length):
    refuse(path, length.to_bytes(8, "little") + content[8:],
           f"at most 1048576 bytes, got a length of {length}$")


def test_largest_header(content, path):
    """1 MiB of header is the most that is read."""
    header, data = unpack(content)
    text = json.dumps(header).encode()
    loaded = load(path, pack(text.ljust(2**20), data))
    np.testing.assert_array_equal(loaded.params[FC1].view("<u4"), tensors(content)[FC1])
    refuse(path, pack(text.ljust(2**20 + 1), data), "at most 1048576 bytes")


@pytest.mark.parametrize("other", [b"", b"PK\3\4" + b"\0" * 100, b"\x89PNG\r\n\x1a\n" * 20, b"{}", b"\0" * 8,
                                   b"\0" * 100])
def test_another_kind_of_file(path, other):
    refuse(path, other, "expected a|truncated")


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        gd.Model.load(str(tmp_path / "absent.safetensors"))
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="pipe.safetensors: expected a file, got a device, pipe or socket"):
        gd.Model.load(str(tmp_path / "pipe.safetensors"))
    with pytest.raises((ValueError, OSError)):
        gd.Model.load(str(tmp_path))


# ---- The header as text


@pytest.mark.parametrize("old, new, match", [
    (b'{"__metadata__"', b'["__metadata__"', "begins with '{'"),
    (b'{"__metadata__"', b' {"__metadata__"', "begins with '{'"),
    (b'{"__metadata__"', b'\xef\xbb\xbf{"__metadata__"', "begins with '{'"),
    (b'{"__metadata__"', b'{,"__metadata__"', r"expected a key, got , \(byte 1\)"),
    (b'{"__metadata__"', b"{'__metadata__'", r"expected a key, got '__metadata__':\{\S* \(byte 1\)"),
    (b'{"__metadata__"', b'{/**/"__metadata__"', "expected a key"),
    (b'{"__metadata__":', b'{"__metadata__"', r"expected ':', got an object"),
    (b'}}', b'}', r"expected ',' or '}', got the end"),
    (b'}}', b'},}', "expected a key, got }"),
    (b'}}', b'}}}', "expected nothing more, got }"),
    (b'}}', b'}} {}', "expected nothing more, got an object"),
    (b'}}', b'}}\0', "expected nothing more"),
    (b'"format"', b'"\\u0066ormat":"pt","format"', 'expected each key once, got "'),
    (b'"format"', b'"for\\mat"', "wrong escape"),
    (b'"format"', b'"for\nmat"', "control character"),
    (b'"format"', b'"\\ud800"', "wrong escape"),
    (b'"format"', b'"\\udc00\\ud800"', "wrong escape"),
    (b'"format"', b'"\\u0000"', "wrong escape"),
    (b'"format"', b'"\\u12g4"', "wrong escape"),
    (b'"format"', b'"\xff"', "no UTF-8"),
    (b'"format"', b'"\xc0\xaf"', "no UTF-8"),
    (b'"format"', b'"\xe0\x80\xaf"', "no UTF-8"),
    (b'"format"', b'"\xed\xa0\x80"', "no UTF-8"),
    (b'"format"', b'"\xf4\x90\x80\x80"', "no UTF-8"),
    (b'"format"', b'"\xe2\x82"', "no UTF-8"),
    (b'"format":"pt"', b'"format":null', "expected a string, got null"),
    (b'"format":"pt"', b'"format":1', r"expected a string, got 1 \(byte \d+\)"),
    (b'"format":"pt"', b'"format":{"a":"b"}', "expected a string, got an object"),
    (b'"shape":[8,1,10]', b'"shape":[8,1,10', "expected"),
    (b'"shape":[8,1,10]', b'"shape":[8,1,10,]', "expected a value, got ]"),
    (b'"shape":[8,1,10]', b'"shape":[8 1,10]', "expected ',' or ']', got 1"),
    (b'"shape":[8,1,10]', b'"shape":[08,1,10]', "expected ',' or ']', got 8"),
    (b'"shape":[8,1,10]', b'"shape":[+8,1,10]', r"expected a value, got \+8"),
    (b'"shape":[8,1,10]', b'"shape":[0x8,1,10]', "expected ',' or ']', got x8"),
    (b'"shape":[8,1,10]', b'"shape":[8.,1,10]', r"got 8\."),
    (b'"shape":[8,1,10]', b'"shape":[NaN,1,10]', "got NaN"),
    (b'"shape":[8,1,10]', b'"shape":[' + b"[" * 30 + b"]" * 30 + b"]", "at most 16 levels"),
])
def test_header_that_is_no_json(content, path, old, new, match):
    header, data = unpack(content)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert old in text
    refuse(path, pack(text.replace(old, new, 1), data), match)


@pytest.mark.parametrize("levels, match", [(15, 'unexpected tensor "x"$'), (16, "at most 16 levels")])
def test_deepest_header(content, path, levels, match):
    header, data = unpack(content)
    text = json.dumps(header)[:-1] + ', "x": ' + "[" * levels + "]" * levels + "}"
    refuse(path, pack(text.encode(), data), match)


def test_escapes_mean_what_they_say(content, path):
    header, data = unpack(content)
    text = json.dumps(header, separators=(",", ":"))
    text = text.replace("encoder.", "\\u0065nc\\u006Fder.").replace("F32", "\\u004632")
    text = text.replace('"format"', '"\\ud83d\\ude00 é 中 \U0001f600 \U0010ffff \\"\\\\\\/\\b\\f\\n\\r\\t"')
    text = text.replace('"dtype"', '\n\t "\\u0064type" \r')
    loaded = load(path, pack(text.encode() + b" \n\r\t", data))
    np.testing.assert_array_equal(loaded.params[FC1].view("<u4"), tensors(content)[FC1])


# ---- What the header says


def _set(name, **values):
    return lambda header: header[name].update(values)


def _metadata(**values):
    return lambda header: header["__metadata__"].update(values)


def _config(**values):
    def change(header):
        config = json.loads(header["__metadata__"]["gendistiller"])
        header["__metadata__"]["gendistiller"] = json.dumps({**config, **values})
    return change


def _swap_offsets(header):
    a, b = header[FC1], header[FIRST]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def _shift(start, by):
    def change(header):
        for name, entry in header.items():
            if name != "__metadata__" and entry["data_offsets"][0] >= header[start]["data_offsets"][0]:
                entry["data_offsets"] = [offset + by for offset in entry["data_offsets"]]
    return change


#: name -> (what is done to the header, what the error says)
DAMAGE = {
    "no metadata": (lambda h: h.pop("__metadata__"), "expected config.json beside it"),
    "no config": (lambda h: h["__metadata__"].pop("gendistiller"), "expected config.json beside it"),
    "metadata a list": (lambda h: h.update(__metadata__=[]), r"expected an object, got an array"),
    "too much metadata": (_metadata(**{str(i): "" for i in range(64)}), "less than 64 keys"),
    "config empty": (_metadata(gendistiller=""), "config: expected an object, got the end"),
    "config a list": (_metadata(gendistiller="[]"), "config: expected an object, got an array"),
    "config cut": (_metadata(gendistiller='{"dropout": 0.1'), "config: expected ',' or '}', got the end"),
    "config twice": (_metadata(gendistiller='{"dropout": 0.1, "dropout": 0.1}'), 'once, got "dropout" again'),
    "config with more": (_metadata(gendistiller="{}{}"), "nothing more, got an object"),
    "statistics empty": (_metadata(**{"gendistiller.statistics": ""}), "statistics: expected an array, got the end"),
    "statistics cut": (_metadata(**{"gendistiller.statistics": "[1, 2"}),
                       "statistics: expected ',' or ']', got the end"),
    "statistics few": (_metadata(**{"gendistiller.statistics": "[1, 2]"}), r"statistics: expected \d+ numbers, got 2"),
    "statistics many": (_metadata(**{"gendistiller.statistics": str([1] * 20000)}),
                        r"statistics: expected \d+ numbers, got 20000"),
    "statistics a text": (_metadata(**{"gendistiller.statistics": '["1"]'}),
                          "statistics: expected a number, got \"1\""),
    "unknown field": (_config(widht=3), 'config: unknown field "widht"'),
    "architecture": (_config(architecture="gru"),
                     'expected one of "generative", "self_hidden", "multi_head", "encoder", got "gru"'),
    "position null": (_config(position=None), "position: expected a string, got null"),
    "padding 1": (_config(padding=1), "padding: expected a string, got 1"),
    "bool 1": (_config(conv_bias=1), "conv_bias: expected true or false, got 1"),
    "bool text": (_config(normalize="true"), 'normalize: expected true or false, got "true"'),
    "int text": (_config(conv_pos="128"), 'conv_pos: expected an integer, got "128"'),
    "int fraction": (_config(conv_pos=8.0), "conv_pos: expected an integer, got 8.0"),
    "int exponent": (_metadata(gendistiller='{"conv_pos": 1e2}'), "conv_pos: expected an integer, got 1e2"),
    "int zero": (_config(encoder_embed_dim=0), "encoder_embed_dim: expected 1 to"),
    "int negative": (_config(encoder_layers=-1), "encoder_layers: expected 1 to"),
    "int of 33 bits": (_config(encoder_layers=2**32 + 1), "an integer of 32 bits, got 4294967297"),
    "int of 64 bits": (_config(encoder_layers=2**63), "an integer of 64 bits, got 9223372036854775808"),
    "int of 1000 digits": (_config(encoder_layers=int("9" * 1000)), "number of at most 63 characters"),
    "float text": (_config(dropout="0.1"), 'dropout: expected a number, got "0.1"'),
    "float true": (_config(dropout=True), "dropout: expected a number, got true"),
    "float 1": (_config(dropout=1), "dropout: expected at least 0 and below 1, got 1"),
    "float NaN": (_config(dropout=float("nan")), "dropout: expected a number, got NaN"),
    "float 1e999": (_metadata(gendistiller='{"dropout": 1e999}'), "within float64's range, got 1e999"),
    "heads": (_config(encoder_attention_heads=5), "encoder_attention_heads: expected a divisor of"),
    "no convolution": (_config(conv_feature_layers=[]), "conv_feature_layers: expected 1 to 16"),
    "17 convolutions": (_config(conv_feature_layers=[[8, 10, 5]] * 17),
                        "conv_feature_layers: expected at most 16 layers"),
    "a pair": (_config(conv_feature_layers=[[8, 10]]), r"\[dim, kernel, stride\], got 2 numbers in layer 0"),
    "a quadruple": (_config(conv_feature_layers=[[8, 10, 5, 1]]), "got more than 3 numbers in layer 0"),
    "a number": (_config(conv_feature_layers=[8]), "conv_feature_layers: expected an array, got 8"),
    "convolutions in a string": (_config(conv_feature_layers="[(8,10,5)]"), "expected an array, got"),
    "65 targets": (_config(target_layers=list(range(65))), "target_layers: expected at most 64 layers"),
    "another width": (_config(encoder_embed_dim=24), "shape|parameters for its config"),
    "an enormous width": (_config(encoder_ffn_embed_dim=65536), "parameters for its config, got"),
    "an enormous depth": (_config(architecture="encoder", encoder_layers=1024, encoder_embed_dim=65472,
                                  encoder_ffn_embed_dim=65536, skip_connection=False, output_layer=False,
                                  target_layers=[]), r"encoder_layers, .*: expected at most 2\^36 parameters"),
    "an enormous frame": (_config(conv_feature_layers=[[4, 4096, 4096]] * 6), r"conv_feature_layers: expected a frame"),
    "another architecture": (_config(output_layer=False), 'unexpected tensor "output_layer.0.weight"'),

    "unexpected tensor": (lambda h: h.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
                          'unexpected tensor "x"$'),
    "empty name": (lambda h: h.update({"": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}),
                   'unexpected tensor ""$'),
    "endless name": (lambda h: h.update({"x" * 5000: 0}), r'unexpected tensor "x{90,}\.\.\."$'),
    "missing tensor": (lambda h: h.pop(FC1), f"tensor {FC1} is missing"),
    "missing tensors": (lambda h: [h.pop(FC1), h.pop(FC2_BIAS)], f"{FC1} and 1 other tensor"),
    "no tensors": (lambda h: [h.pop(name) for name in list(h) if name != "__metadata__"],
                   f"{FIRST} and .* other tensors"),
    "entry a list": (lambda h: h.update({FC1: []}), f"{FC1}: expected an object, got an array"),
    "entry null": (lambda h: h.update({FC1: None}), f"{FC1}: expected an object, got null"),
    "entry empty": (lambda h: h.update({FC1: {}}), f"{FC1}: expected dtype, shape and two data_offsets"),
    "no dtype": (lambda h: h[FC1].pop("dtype"), f"{FC1}: expected dtype, shape and two data_offsets"),
    "one more key": (_set(FC1, scale=1), f'{FC1}: expected dtype, shape and data_offsets once, got "scale"'),
    "dtype float64": (_set(FC1, dtype="F64"), f"{FC1}: expected dtype F32, BF16 or F16, got F64"),
    "dtype a number": (_set(FC1, dtype=32), f"{FC1}: expected a string, got 32"),
    "dtype lower": (_set(FC1, dtype="f32"), f"{FC1}: expected dtype F32, BF16 or F16, got f32"),
    "dtype of another size": (_set(FC1, dtype="BF16"), f"{FC1}: expected data_offsets 480 bytes apart"),
    "shape transposed": (_set(FC1, shape=[12, 20]), rf"{FC1}: expected shape \(20, 12\), got \(12, 20\)"),
    "shape flat": (_set(FC1, shape=[240]), rf"{FC1}: expected shape \(20, 12\), got \(240,\)"),
    "shape scalar": (_set(FC2_BIAS, shape=[]), rf"{FC2_BIAS}: expected shape \(12,\), got \(\)"),
    "shape of one more": (_set(FC1, shape=[20, 12, 1]), r"expected shape \(20, 12\), got \(20, 12, 1\)"),
    "shape of five": (_set(FC1, shape=[20, 12, 1, 1, 1]), f"{FC1}: expected at most 4 numbers"),
    "shape negative": (_set(FC1, shape=[-20, -12]), r"got \(-20, -12\)"),
    "shape overflowing": (_set(FC1, shape=[2**62, 4, 15]), r"got \(4611686018427387904, 4, 15\)"),
    "shape of 64 bits": (_set(FC1, shape=[2**63, 12]), "expected an integer of 64 bits"),
    "shape float": (_set(FC1, shape=[20.0, 12]), f"{FC1}: expected an integer, got 20.0"),
    "shape bool": (_set(FC1, shape=[True, 12]), f"{FC1}: expected an integer, got true"),
    "shape text": (_set(FC1, shape="20,12"), f"{FC1}: expected an array, got"),
    "one offset": (_set(FC1, data_offsets=[0]), "two data_offsets"),
    "three offsets": (_set(FC1, data_offsets=[0, 960, 960]), "at most 2 numbers"),
    "offsets reversed": (lambda h: h[FC1]["data_offsets"].reverse(), "expected data_offsets 960 bytes apart"),
    "offsets negative": (_set(FC1, data_offsets=[-960, 0]), r"960 bytes apart, got \[-960, 0\]"),
    "offsets too near": (lambda h: h[FC1].update(data_offsets=[0, 959]), r"960 bytes apart, got \[0, 959\]"),
    "offsets overflowing": (_set(FC1, data_offsets=[-2**63, 2**63 - 1]), "960 bytes apart"),
    "offsets far": (_set(FC1, data_offsets=[2**62, 2**62 + 960]), "without gap or overlap, got a gap"),
    "overlap": (lambda h: h[FC1].update(data_offsets=[0, 960]), "without gap or overlap, got an overlap"),
    "aliases": (lambda h: h[FC2_BIAS].update(data_offsets=h["encoder.layer_norm.bias"]["data_offsets"]),
                "got an overlap"),
    "gap": (_shift(FC1, 4), "without gap or overlap, got a gap at byte"),
    "gap at the start": (_shift(FIRST, 8), "got a gap at byte 0 of the data"),
    "swapped": (_swap_offsets, "bytes apart"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_header_that_says_wrong(content, path, name):
    change, match = DAMAGE[name]
    header, data = unpack(content)
    change(header)
    refuse(path, pack(header, data), match)


def test_the_c_reader_alone_wants_our_metadata(content, path):
    """Model.load takes a file without it for another program's; C has no other reader."""
    header, data = unpack(content)
    header["__metadata__"] = {"format": "pt"}
    with open(path, "wb") as stream:
        stream.write(pack(header, data))
    with pytest.raises(ValueError, match='got a safetensors file without metadata key "gendistiller"'):
        gd.Model._load(path)


@pytest.mark.parametrize("first, again", [
    (f'"{FC1}"', f"expected each tensor once, got {FC1} again"),
    ('"__metadata__"', 'expected "__metadata__" once'),
    ('"dtype"', 'expected dtype, shape and data_offsets once, got "dtype"'),
])
def test_repeated_keys(content, path, first, again):
    header, data = unpack(content)
    text = json.dumps(header)
    start = text.index(first)
    value = json.JSONDecoder().raw_decode(text, start + len(first) + 2)[1]
    pair = text[start:value]
    refuse(path, pack((text[:value] + ", " + pair + text[value:]).encode(), data), again)


# ---- Nothing is left behind


def test_failed_loads_leave_nothing_open(content, path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc to count open files in")
    header, data = unpack(content)
    header[FC1]["dtype"] = "F64"
    before = len(os.listdir("/proc/self/fd"))
    for damaged in (content[:100], content[:-1], pack(header, data)):
        for _ in range(20):
            with pytest.raises(ValueError):
                load(path, damaged)
    assert len(os.listdir("/proc/self/fd")) == before


def address_space():
    """Bytes: parameters that were never written to are not resident."""
    try:
        with open("/proc/self/status") as stream:
            return int(next(line for line in stream if line.startswith("VmSize:")).split()[1]) * 1024
    except OSError:
        pytest.skip("no /proc to learn the process's size from")


def test_failed_loads_leave_no_memory(path):
    """200 failed loads of a 4 MB model must not take 800 MB."""
    model = gd.Model(gd.Config(**{**SMALL, "encoder_embed_dim": 192, "encoder_ffn_embed_dim": 2048}), seed=0)
    assert model.num_params > 1_000_000
    model.save(path)
    with open(path, "rb") as stream:
        header, data = unpack(stream.read())
    last = list(header)[-1]
    header[last]["data_offsets"] = [0, header[last]["data_offsets"][1] - header[last]["data_offsets"][0]]
    refuse(path, pack(header, data), "overlap")
    before = address_space()
    for _ in range(200):
        with pytest.raises(ValueError):
            gd.Model.load(path)
    assert address_space() - before < 200e6


TOO_LARGE = """
import resource, sys
import gendistiller_ext as gd
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 29), size + (1 << 29)))
for _ in range(3):
    try:
        gd.Model.load(sys.argv[1])
    except MemoryError as error:
        print(error)
"""


def test_model_larger_than_the_memory(path):
    """A sound file of 2.2 GB, all of it a hole, in a process that may take 0.5 GB more."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no /proc to learn the process's size from")
    config = gd.Config(**{**SMALL, "encoder_embed_dim": 8184, "encoder_ffn_embed_dim": 65536})
    header, end = {"__metadata__": {"gendistiller": json.dumps(config.to_dict())}}, 0
    for name, shape in config.parameter_shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    with open(path, "wb") as stream:
        stream.write(pack(header, b""))
        stream.truncate(stream.tell() + end)
    assert end > 2e9
    done = subprocess.run([sys.executable, "-c", TOO_LARGE, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"out of memory for a model of {end // 2} parameters"] * 3
