"""int8 checkpoints: their layout, that rounding again changes nothing, and what is refused."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest

import gendistiller_ext as gd
from checkpoint_bytes import bits, pack, unpack
from conftest import SEED, SMALL_CONFIGS
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import safetensors
from reference.layout import random_wavs

FC1, CONV0 = "encoder.layers.0.fc1.weight", "feature_extractor.conv_layers.0.0.weight"
HEADS, POS_CONV = "output_layer.2.weight", "encoder.pos_conv.0.weight_v"
CONFIGS = {
    "generative": {**SMALL_CONFIGS["vector_widths"], "conv_feature_layers": ((24, 10, 5),) + ((33, 3, 2),) * 2},
    "multi_head": {**SMALL_CONFIGS["vector_widths"], "architecture": "multi_head", "encoder_layers": 2,
                   "skip_connection": False, "relative_position_embedding": False, "gru_rel_pos": False},
}
#: Of two dimensions or more, but no factor of a product over 16 channels or more.
FLOAT = (".relative_attention_bias.weight", ".grep_linear.weight", ".grep_a", ".weight_g", CONV0)


def make(name):
    model = gd.Model(gd.Config(**CONFIGS[name]), seed=SEED)
    model.precision = "int8"
    return model


def saved(model, path):
    model.save(path, dtype="int8")
    with open(path, "rb") as stream:
        return stream.read()


def channels_first(name, value):
    """Rows of one scale each."""
    if name == HEADS and value.ndim == 3:
        value = value.transpose(0, 2, 1).reshape(-1, value.shape[1])
    return value.reshape(value.shape[0], -1)


@pytest.mark.parametrize("name", CONFIGS)
def test_layout(name, tmp_path):
    """Integers and scales against the formula, computed in float64; the rest bit for bit."""
    model = make(name)
    arrays, metadata = safetensors.parse(saved(model, tmp_path / "x.safetensors"))
    assert metadata["gendistiller.precision"] == "int8" and json.loads(metadata["gendistiller"]) is not None
    params, rounded = model.params, 0
    assert {key.removesuffix(".scale") for key in arrays} == set(params)
    for key, value in params.items():
        float32 = value.ndim < 2 or key.endswith(FLOAT) or not key.endswith(("weight", "weight_v"))
        if float32 or key.startswith(FLOAT):
            assert f"{key}.scale" not in arrays and np.array_equal(bits(arrays[key]), bits(value)), key
            continue
        rounded += value.size
        assert arrays[key].dtype == np.int8 and arrays[key].shape == value.shape
        heads = key == HEADS and value.ndim == 3
        assert arrays[f"{key}.scale"].shape == ((value.shape[0], value.shape[2]) if heads else value.shape[:1])
        rows, integers = channels_first(key, value).astype(np.float64), channels_first(key, arrays[key])
        scale = arrays[f"{key}.scale"].astype(np.float64).reshape(-1, 1)
        largest = np.abs(rows).max(1, keepdims=True)
        assert ((scale >= largest / 127 * (1 - 2**-23)) & (scale <= largest / 127 * (1 + 2**-15))).all(), key
        assert (np.abs(integers.astype(int)).max(1) == 127).all()
        assert (np.abs(integers * scale - rows) <= scale * (0.5 + 1e-4)).all(), key
    assert rounded > 0.8 * model.num_params


@pytest.mark.parametrize("name", CONFIGS)
def test_rounding_again_changes_nothing(name, tmp_path):
    """The loaded float32 values are exact multiples: the same file comes out again, and products see the integers
    that they see without the file."""
    model = make(name)
    content = saved(model, tmp_path / "x.safetensors")
    loaded = gd.Model.load(tmp_path / "x.safetensors")
    assert loaded.precision == "int8"
    assert saved(loaded, tmp_path / "y.safetensors") == content
    arrays, _ = safetensors.parse(content)
    for key, value in loaded.params.items():
        if f"{key}.scale" in arrays:
            scale = arrays[f"{key}.scale"]
            scale = scale[:, None] if scale.ndim == 2 else scale.reshape(-1, *[1] * (value.ndim - 1))
            assert np.array_equal(value.astype(np.float64), arrays[key] * scale.astype(np.float64)), key
    # pos_conv's products are float32, of the weight as the file has it.
    model.load_params({POS_CONV: loaded.params[POS_CONV]})
    wavs = random_wavs([5000, 720], SEED)
    for a, b in zip(model.forward(wavs)[0], loaded.forward(wavs)[0], strict=True):
        assert np.array_equal(bits(a), bits(b))


def test_the_precision_is_kept(tmp_path):
    """Beside tensors of any dtype, and in a copy; without one it is float32, as the tensors' dtype says nothing."""
    model, wavs = make("generative"), random_wavs([5000], SEED)
    assert np.array_equal(model.forward(wavs)[0][0], model.forward(wavs, precision="int8")[0][0])
    for dtype in ("float32", "bfloat16", "int8"):
        for precision in ("float32", "bfloat16", "int8"):
            model.precision = precision
            model.save(tmp_path / "x.safetensors", dtype=dtype)
            assert gd.Model.load(tmp_path / "x.safetensors").precision == precision
    copy = pickle.loads(pickle.dumps(model))
    assert copy.precision == "int8" and np.array_equal(copy.forward(wavs)[0][1], model.forward(wavs)[0][1])
    with pytest.raises(ValueError, match="precision: expected 'float32', 'bfloat16' or 'int8', got 'int4'"):
        model.precision = "int4"
    model.precision = None
    assert model.precision == "float32"


def test_rows_of_zeros_and_unfinite_ones(tmp_path):
    model = make("generative")
    weight = model.params[FC1].copy()
    weight[0], weight[1, 3], weight[2] = 0, np.nan, 1e-35
    model.load_params({FC1: weight})
    saved(model, tmp_path / "x.safetensors")
    loaded = gd.Model.load(tmp_path / "x.safetensors").params[FC1]
    assert not loaded[0].any() and np.isnan(loaded[1]).all() and not loaded[2].any()
    assert np.isfinite(loaded[3:]).all()


def damage(content, change):
    header, data = unpack(content)
    change(header)
    return pack(header, data)


def rename(header, name, new):
    header[new] = header.pop(name)


@pytest.mark.parametrize("change, message", [
    (lambda h: rename(h, f"{FC1}.scale", "other"), 'unexpected tensor "other"'),
    (lambda h: rename(h, f"{FC1}.scale", f"{CONV0}.scale"), f'unexpected tensor "{CONV0}.scale"'),
    (lambda h: h.pop(f"{FC1}.scale"), f"tensor {FC1}.scale is missing beside one of dtype I8"),
    (lambda h: h[f"{FC1}.scale"].update(shape=[48, 2]), rf"{FC1}.scale: expected shape \(96,\), got \(48, 2\)"),
    (lambda h: h[f"{FC1}.scale"].update(dtype="BF16"), f"{FC1}.scale: expected dtype F32, got BF16"),
    (lambda h: h[f"{FC1}.scale"].update(dtype="I8"), f"{FC1}.scale: expected dtype F32, got I8"),
    (lambda h: h[FC1].update(dtype="F32"), f"{FC1}: expected data_offsets 24576 bytes apart"),
    (lambda h: h[CONV0].update(dtype="I8"), f"{CONV0}: expected dtype F32, BF16 or F16, got I8"),
    (lambda h: h[FC1].update(dtype="U8"), f"{FC1}: expected dtype F32, BF16, F16 or I8, got U8"),
    (lambda h: h[f"{FC1}.scale"].update(data_offsets=[0, 384]), "without gap or overlap, got an overlap"),
])
def test_damage(change, message, tmp_path):
    content = damage(saved(make("generative"), tmp_path / "x.safetensors"), change)
    (tmp_path / "y.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gd.Model.load(tmp_path / "y.safetensors")


def test_scales_without_int8(tmp_path):
    model = make("generative")
    model.save(tmp_path / "x.safetensors")
    header, data = unpack((tmp_path / "x.safetensors").read_bytes())
    header[f"{FC1}.scale"] = {"dtype": "F32", "shape": [96], "data_offsets": [len(data), len(data) + 384]}
    (tmp_path / "y.safetensors").write_bytes(pack(header, data + bytes(384)))
    with pytest.raises(ValueError, match=f'unexpected tensor "{FC1}.scale" beside one of dtype F32'):
        gd.Model.load(tmp_path / "y.safetensors")


def test_truncated_anywhere(tmp_path):
    content = saved(make("generative"), tmp_path / "x.safetensors")
    for size in range(0, len(content), 997):
        (tmp_path / "y.safetensors").write_bytes(content[:size])
        with pytest.raises(ValueError):
            gd.Model.load(tmp_path / "y.safetensors")


def test_convert(tmp_path, capsys):
    """A quarter of the size; a full-size student."""
    source, target = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    gd.Model(gd.Config.preset("gendistiller"), seed=SEED).save(source)
    assert cli.main(["convert", str(source), str(target), "--precision", "int8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["dtype"], told["precision"], told["bytes"]) == ("int8", "int8", os.path.getsize(target))
    assert os.path.getsize(target) < 0.26 * os.path.getsize(source)
    assert gd.Model.load(target).precision == "int8"
    assert cli.main(["convert", str(target), str(source), "--force", "--dtype", "bfloat16"]) == 0
    assert gd.Model.load(source).precision == "int8"
    assert cli.main(["convert", str(target), str(source), "--force", "--precision", "bfloat16"]) == 0
    assert gd.Model.load(source).precision == "bfloat16"
    assert os.path.getsize(source) < 0.51 * gd.Model.load(source).num_params * 4
