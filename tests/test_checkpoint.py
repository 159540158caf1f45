"""Checkpoints: what save() writes is what load() and the `safetensors` package read, and the other way."""

from __future__ import annotations

import json
import os
import stat
import threading

import numpy as np
import pytest

import gendistiller_ext as gd
from checkpoint_bytes import assemble, bits, tensors, unpack
from conftest import SEED, SMALL, SMALL_CONFIGS, SMALL_TEACHERS, SMALL_VARIANTS

ALL_CONFIGS = {**SMALL_CONFIGS, **SMALL_TEACHERS, **SMALL_VARIANTS}


def make(name="small", seed=1):
    return gd.Model(gd.Config(**ALL_CONFIGS[name]), seed=seed)


def same_params(a, b):
    assert list(a.params) == list(b.params)
    for name, values in a.params.items():
        np.testing.assert_array_equal(bits(values), bits(b.params[name]), err_msg=name)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.safetensors")


def read(path):
    with open(path, "rb") as stream:
        return stream.read()


def write(path, content):
    with open(path, "wb") as stream:
        stream.write(content)
    return path


# ---- Our own round trip


@pytest.mark.parametrize("name", ALL_CONFIGS)
def test_save_and_load_keep_config_and_parameters(name, path):
    model = make(name)
    model.save(path)
    loaded = gd.Model.load(path)
    assert loaded.config == model.config == gd.Config(**ALL_CONFIGS[name])
    same_params(loaded, model)
    before = read(path)
    loaded.save(path)
    assert read(path) == before


@pytest.mark.parametrize("values", [
    {"dropout": 0.1 + 0.2, "attention_dropout": 5e-324, "activation_dropout": 1 - 2**-53,
     "feature_grad_mult": 1e300},
    {"dropout": 0.0, "attention_dropout": 1 / 3, "activation_dropout": 2**-1030,
     "feature_grad_mult": 123456789012345680.0},
    {"padding": "s3prl", "normalize": True, "target_layers": tuple(range(64))},
])
def test_config_values_survive(values, path):
    config = gd.Config(**{**SMALL, **values})
    gd.Model(config, seed=0).save(path)
    assert gd.Model.load(path).config == config


def test_numbers_in_a_locale_with_a_decimal_comma(path):
    """A C library that heeds the locale would write 0,1 and read 0 from 0.1."""
    import locale
    old = locale.setlocale(locale.LC_NUMERIC)
    for name in ("de_DE.UTF-8", "de_DE.utf8", "fr_FR.UTF-8", "fr_FR.utf8", "it_IT.UTF-8", "de_DE", "fr_FR"):
        try:
            locale.setlocale(locale.LC_NUMERIC, name)
            break
        except locale.Error:
            continue
    else:
        pytest.skip("no locale with a decimal comma is installed")
    try:
        assert locale.localeconv()["decimal_point"] == ","
        model = make()
        model.save(path)
        loaded = gd.Model.load(path)
    finally:
        locale.setlocale(locale.LC_NUMERIC, old)
    assert json.loads(unpack(read(path))[0]["__metadata__"]["gendistiller"])["dropout"] == 0.1
    assert loaded.config == model.config


def test_loaded_model_computes_what_the_saved_one_does(path):
    model = make()
    wavs = np.random.default_rng(SEED).standard_normal((2, 2000)).astype(np.float32)
    model.save(path)
    expected, frames = model.forward(wavs)
    hidden, loaded_frames = gd.Model.load(path).forward(wavs)
    np.testing.assert_array_equal(loaded_frames, frames)
    for a, b in zip(hidden, expected):
        np.testing.assert_array_equal(a, b)


# ---- Layout


@pytest.mark.parametrize("dtype, code, size", [("float32", "F32", 4), ("bfloat16", "BF16", 2)])
def test_layout(dtype, code, size, path):
    model = make()
    model.save(path, dtype=dtype)
    content = read(path)
    header, data = unpack(content)
    assert (len(content) - len(data)) % 8 == 0 and content[8:9] == b"{"
    assert list(header)[0] == "__metadata__" and list(header)[1:] == list(model.params)
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pt" and set(metadata) == {"format", "gendistiller"}
    written = json.loads(metadata["gendistiller"])
    assert written == model.config.to_dict()
    # 1 and 1.0, true and 1 are equal in Python, but not in a file.
    assert {k: type(v) for k, v in written.items()} == {k: type(v) for k, v in model.config.to_dict().items()}
    end = 0
    for name, entry in header.items():
        values = model.params[name]
        offsets = [end, end + size * values.size]
        assert entry == {"dtype": code, "shape": list(values.shape), "data_offsets": offsets}
        end += size * values.size
    assert end == len(data)


def test_same_model_same_bytes(tmp_path):
    for name in "ab":
        make(seed=7).save(str(tmp_path / name))
    assert read(tmp_path / "a") == read(tmp_path / "b")


# ---- Against the safetensors package


def test_safetensors_package_reads_float32(path):
    safetensors = pytest.importorskip("safetensors")
    from safetensors.numpy import load_file
    model = make("odd_widths")
    model.save(path)
    loaded = load_file(path)
    assert set(loaded) == set(model.params)
    for name, values in model.params.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], values, err_msg=name)
    with safetensors.safe_open(path, "numpy") as opened:
        assert json.loads(opened.metadata()["gendistiller"]) == model.config.to_dict()


def test_safetensors_package_reads_bfloat16(path):
    torch = pytest.importorskip("torch")
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = make("odd_widths")
    model.save(path, dtype="bfloat16")
    loaded = load_file(path)
    assert set(loaded) == set(model.params)
    for name, values in model.params.items():
        expected = torch.from_numpy(np.array(values)).to(torch.bfloat16)
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(loaded[name], expected), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_load_what_the_safetensors_package_wrote(dtype, path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = make("vector_widths")
    given = {name: torch.from_numpy(np.array(values)).to(getattr(torch, dtype))
             for name, values in model.params.items()}
    save_file(given, path, metadata={"gendistiller": json.dumps(model.config.to_dict()), "by": "é \"\\\n"})
    assert list(tensors(read(path))) != list(model.params)  # it writes in an order of its own
    loaded = gd.Model.load(path)
    assert loaded.config == model.config
    for name, values in loaded.params.items():
        np.testing.assert_array_equal(values, given[name].float().numpy(), err_msg=name)


# ---- Bits


def with_bits(path, name, code, raw):
    """A checkpoint of the small model with `raw` values in one tensor; returns what load() makes of them."""
    metadata = {"gendistiller": json.dumps(make_wide().config.to_dict())}
    arrays = {key: ("F32", values) for key, values in make_wide().params.items()}
    arrays[name] = (code, raw.reshape(arrays[name][1].shape))
    write(path, assemble(arrays, metadata))
    return gd.Model.load(path)


def make_wide():
    """fc1.weight has as many elements as 16 bits have values."""
    return gd.Model(gd.Config(**{**SMALL, "encoder_embed_dim": 64, "encoder_attention_heads": 2,
                                 "encoder_ffn_embed_dim": 1024}), seed=0)


FC1 = "encoder.layers.0.fc1.weight"
EVERY_16_BITS = np.arange(65536, dtype="<u2")


def test_every_bfloat16(path):
    loaded = with_bits(path, FC1, "BF16", EVERY_16_BITS)
    np.testing.assert_array_equal(bits(loaded.params[FC1]).ravel(), EVERY_16_BITS.astype("<u4") << 16)
    loaded.save(path, dtype="bfloat16")
    written = tensors(read(path))[FC1].ravel()
    nan = EVERY_16_BITS & 0x7fff > 0x7f80
    np.testing.assert_array_equal(written[~nan], EVERY_16_BITS[~nan])
    np.testing.assert_array_equal(written[nan], EVERY_16_BITS[nan] | 0x40)


def test_every_float16(path):
    loaded = with_bits(path, FC1, "F16", EVERY_16_BITS).params[FC1].ravel()
    expected = EVERY_16_BITS.view("<f2").astype(np.float32)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(bits(loaded)[~nan], bits(expected)[~nan])
    wide = EVERY_16_BITS.astype("<u4")
    payload = (wide & 0x8000) << 16 | 0x7f800000 | (wide & 0x3ff) << 13
    np.testing.assert_array_equal(bits(loaded)[nan], payload[nan])


def test_float32_bits_are_kept_and_rounded_to_even(path):
    rng = np.random.default_rng(SEED)
    raw = rng.integers(0, 1 << 32, 65536, dtype=np.uint32)
    # Ties between bfloat16s, their neighbours, NaNs, infinities, the largest, zero, a subnormal.
    raw[:20000] = raw[:20000] & 0xffff0000 | 0x8000
    raw[20000:21000] += 1
    raw[21000:22000] -= 1
    raw[22000:22012] = [0x7f800001, 0xff800001, 0x7fc00000, 0x7f80ffff, 0x7fffffff, 0xffffffff, 0x7f800000,
                        0xff800000, 0x7f7fffff, 0x7f7f7fff, 0x80000000, 0x00000001]
    loaded = with_bits(path, FC1, "F32", raw)
    np.testing.assert_array_equal(bits(loaded.params[FC1]).ravel(), raw)
    loaded.save(path)
    np.testing.assert_array_equal(tensors(read(path))[FC1].ravel(), raw)

    loaded.save(path, dtype="bfloat16")
    written = tensors(read(path))[FC1].ravel()
    nan = raw & 0x7fffffff > 0x7f800000
    np.testing.assert_array_equal(written[nan], (raw[nan] >> 16 | 0x40).astype(np.uint16))
    low, high = raw & 0xffff, raw >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (high % 2 == 1))
    np.testing.assert_array_equal(written[~nan], (high + up)[~nan].astype(np.uint16))


def test_dtypes_may_differ_and_order_is_free(path):
    model = make()
    rng = np.random.default_rng(SEED)
    arrays, expected = {}, {}
    for i in rng.permutation(len(model.params)):
        name = list(model.params)[i]
        values = model.params[name]
        code = ("F32", "BF16", "F16")[i % 3]
        if code == "F32":
            raw, expected[name] = bits(values), values
        elif code == "BF16":
            raw = (bits(values) >> 16).astype("<u2")
            expected[name] = (bits(values) & 0xffff0000).view("<f4")
        else:
            half = values.astype("<f2")
            raw, expected[name] = half.view("<u2"), half.astype("<f4")
        arrays[name] = (code, raw)
    metadata = {"z": "", "gendistiller": json.dumps(model.config.to_dict())}
    write(path, assemble(arrays, metadata))
    loaded = gd.Model.load(path)
    for name, values in loaded.params.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


# ---- Saving: whole or not at all


def test_save_errors(tmp_path, path):
    model = make()
    with pytest.raises(ValueError, match=r'dtype: expected "float32", "bfloat16" or "int8", got "float16"'):
        model.save(path, dtype="float16")
    with pytest.raises(FileNotFoundError):
        model.save(str(tmp_path / "absent" / "model.safetensors"))
    with pytest.raises(IsADirectoryError):
        model.save(str(tmp_path))
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").write_bytes(b"")
        model.save(str(tmp_path / "file" / "model.safetensors"))
    with pytest.raises(OSError, match="too long"):
        model.save(str(tmp_path / ("x" * 300)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a file, got a device, pipe or socket"):
        model.save(str(tmp_path / "pipe"))
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_umask(mask, mode, path):
    model = make()
    old = os.umask(mask)
    try:
        model.save(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(path).st_mode) == mode


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make()
    model.save("model.safetensors")
    same_params(gd.Model.load("model.safetensors"), model)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_longest_name(tmp_path):
    path = str(tmp_path / ("x" * 255))
    make().save(path)
    same_params(gd.Model.load(path), make())


def test_full_disk_leaves_the_old_file(path):
    """A limit on the size of files stands for a full disk; Python ignores the signal that comes with it."""
    resource = pytest.importorskip("resource")
    make(seed=1).save(path)
    old = read(path)
    model = make(seed=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    header = len(old) - len(unpack(old)[1])
    for size in (0, 1, 8, header - 1, header, header + 1, len(old) // 2, len(old) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                model.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert read(path) == old
        assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old), limits[1]))
    try:
        model.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    same_params(gd.Model.load(path), model)


def test_readers_and_writers_of_one_path(path):
    """Whoever loads meets one model or another, never a mixture or a piece."""
    models = [make(seed=seed) for seed in range(3)]
    models[0].save(path)
    failures, stop = [], threading.Event()

    def save(model):
        while not stop.is_set():
            model.save(path)

    writers = [threading.Thread(target=save, args=(model,)) for model in models]
    for writer in writers:
        writer.start()
    try:
        for _ in range(50):
            loaded = gd.Model.load(path)
            params = loaded.params
            if not any(all(np.array_equal(params[name], values) for name, values in model.params.items())
                       for model in models):
                failures.append("a mixture")
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not failures
    assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
