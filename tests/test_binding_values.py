"""What the CPython module takes and gives: layouts, views, copies, files."""

from __future__ import annotations

import copy
import gc
import json
import pickle

import numpy as np
import pytest

import gendistiller_ext as gd
from binding_inputs import CONFIG, FRAMES, P, TARGETS, WAVS, audio, read_only


@pytest.fixture(scope="module")
def model() -> gd.Model:
    return gd.Model(CONFIG, seed=1)


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a[0], b[0])) and np.array_equal(a[1], b[1])


def test_initial_values_have_the_stated_spread():
    """Within five standard errors of an estimate from so many values, all tensors of a kind together."""
    model = gd.Model(gd.Config.preset("gendistiller"), seed=2 ** 64 - 1)
    config, scaled = model.config, {}
    for name, value in model.params.items():
        if name.startswith("feature_extractor") and value.ndim == 3:
            kind, spread = "convolutions", (2 / (value.shape[1] * value.shape[2])) ** 0.5
        elif name == "encoder.pos_conv.0.weight_v":
            kind, spread = "pos_conv", (4 / (config.conv_pos * config.encoder_embed_dim)) ** 0.5
        elif name in ("post_extract_proj.weight", "output_layer.0.weight"):
            kind, spread = "linear", (1 / 3 / value.shape[1]) ** 0.5
            assert np.abs(value).max() * value.shape[1] ** 0.5 == pytest.approx(1, rel=1e-3)
        elif name.startswith("encoder.layers") and value.ndim == 2 and "grep" not in name:
            kind, spread = "encoder", 0.02
        else:
            continue
        scaled.setdefault(kind, []).append(value.ravel().astype(np.float64) / spread)
    assert len(scaled) == 4
    for kind, parts in scaled.items():
        values = np.concatenate(parts)
        assert abs(values.mean()) < 5 * values.size ** -0.5, kind
        assert abs(values.std() - 1) < 5 * (2 * values.size) ** -0.5, kind


def test_layouts(model):
    expected = model.forward(WAVS)
    wide = np.zeros((2, 2400), np.float32)
    wide[:, ::2] = WAVS
    longer = np.concatenate([WAVS, WAVS * 3], axis=1)
    for wavs in (WAVS.copy(order="F"), WAVS.astype(">f4"), wide[:, ::2], WAVS[::-1].copy()[::-1],
                 longer[:, :1200], WAVS.copy().view(np.matrix), np.ma.masked_array(WAVS), list(WAVS),
                 tuple(WAVS), [WAVS[0], wide[1, ::2]],
                 [WAVS[0].astype(">f4"), WAVS[1, ::-1].copy()[::-1]], read_only(WAVS.copy())):
        assert same(model.forward(wavs), expected)
    for lengths in ([1200, 1200], np.array([1200, 1200], np.uint16), np.array([1200, 0, 1200])[::2]):
        assert same(model.forward(longer, lengths), expected)
    assert same(model.forward(np.broadcast_to(WAVS[:1], (3, 1200))), model.forward([WAVS[0]] * 3))
    memory = np.zeros(4 * 2400 + 1, np.uint8)
    memory[1:] = np.frombuffer(WAVS.tobytes(), np.uint8)
    assert same(model.forward(memory[1:].view(np.float32).reshape(2, 1200)), expected)


def test_step_layouts(model):
    expected = model.distill_step(WAVS, TARGETS)
    into = np.ones(P, np.float32)
    for targets in (TARGETS.astype(">f4"), TARGETS.copy(order="F"), list(TARGETS), read_only(TARGETS.copy())):
        out = model.distill_step(WAVS, targets)
        assert out.loss == expected.loss and np.array_equal(out.flat_grads, expected.flat_grads)
    out = model.distill_step(WAVS, TARGETS, into=into)
    assert out.flat_grads is into
    np.testing.assert_allclose(into - 1, expected.flat_grads, atol=1e-6)
    assert out.l1.shape == out.cos.shape == out.similarity.shape == (2,)
    assert isinstance(out.loss, float)


def test_results_are_fresh(model):
    hidden, frames = model.forward(WAVS)
    kept = [state.copy() for state in hidden]
    for array in (*hidden, frames):
        assert array.flags.owndata and array.flags.writeable and array.flags.c_contiguous
    model.forward(WAVS * 2)
    assert all(np.array_equal(a, b) for a, b in zip(hidden, kept))
    assert frames.dtype == np.int64 and frames.tolist() == [FRAMES, FRAMES]


def test_padding_is_zero_and_alone_is_the_same(model):
    wavs = audio(400, 5000, 1999)
    hidden, frames = model.forward(wavs)
    assert frames.tolist() == [1, 15, 5]
    for i, wav in enumerate(wavs):
        alone, _ = model.forward([wav])
        for state, single in zip(hidden, alone):
            assert np.array_equal(state[i, :frames[i]], single[0])
            assert not state[i, frames[i]:].any()


def test_params(model):
    params = model.params
    assert list(params) == [tensor.name for tensor in model.tensors]
    assert sum(value.size for value in params.values()) == model.num_params == P
    flat = model.flat_params()
    for name, shape, offset in model.tensors:
        view = params[name]
        assert view.shape == shape and view.dtype == np.float32 and not view.flags.writeable
        assert view.__array_interface__["data"][0] == flat.__array_interface__["data"][0] + 4 * offset
        with pytest.raises(ValueError):
            view.flags.writeable = True
    decaying = {tensor.name for tensor in model.tensors if tensor.decay}
    assert "encoder.layers.0.fc1.weight" in decaying and "encoder.layers.0.fc1.bias" not in decaying


def test_views_outlive_the_model():
    model = gd.Model(CONFIG, seed=3)
    params, flat = model.params, model.flat_params()
    expected = flat.copy()
    del model
    gc.collect()
    [gd.Model(CONFIG, seed=seed) for seed in range(5)]
    assert np.array_equal(flat, expected)
    assert np.array_equal(np.concatenate([value.reshape(-1) for value in params.values()]), expected)


def test_writes_are_seen():
    model, other = gd.Model(CONFIG, seed=1), gd.Model(CONFIG, seed=2)
    model.forward(WAVS)
    model.flat_params()[:] = other.flat_params()
    model.touch()
    assert same(model.forward(WAVS), other.forward(WAVS))
    model = gd.Model(CONFIG, seed=1)
    model.forward(WAVS)
    model.load_params(other.params)
    assert same(model.forward(WAVS), other.forward(WAVS))


def test_load_params_casts_and_swaps():
    model = gd.Model(CONFIG, seed=1)
    q, k = "encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.self_attn.k_proj.weight"
    before = {name: value.copy() for name, value in model.params.items()}
    model.load_params({q: model.params[k], k: model.params[q]})  # views of what is overwritten
    assert np.array_equal(model.params[q], before[k]) and np.array_equal(model.params[k], before[q])
    for dtype in (np.float64, np.float16, np.int32, ">f4"):
        values = np.arange(144).reshape(12, 12).astype(dtype)
        model.load_params({q: values.T})
        assert np.array_equal(model.params[q], values.T.astype(np.float32))
    rest = set(before) - {q, k}
    assert all(np.array_equal(model.params[name], before[name]) for name in rest)


def test_config_and_files(tmp_path, model):
    assert model.config == CONFIG and model.config is model.config
    assert gd.Config.from_dict(json.loads(model.config_json)) == CONFIG
    for name in ("ours.safetensors", "no_suffix", "\u00fc\u4e2d.safetensors"):
        model.save(tmp_path / name)
        loaded = gd.Model.load(str(tmp_path / name))
        assert type(loaded) is gd.Model and loaded.config == CONFIG
        assert np.array_equal(loaded.flat_params(), model.flat_params())


def test_pickle_and_copy(model):
    class Mine(gd.Model):
        pass

    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), copy.copy(model)):
        assert twin.config == CONFIG and np.array_equal(twin.flat_params(), model.flat_params())
        twin.flat_params()[:] = 0
    assert model.flat_params().any()
    assert isinstance(Mine(CONFIG), Mine) and isinstance(copy.deepcopy(Mine(CONFIG)), Mine)
    with pytest.raises(TypeError, match="cannot pickle 'gendistiller_ext.AdamW' object"):
        pickle.dumps(gd.AdamW(model))


def test_num_frames():
    samples = np.array([[0, 399, 400], [719, 720, 16000]], np.int32)
    frames = gd.num_frames(CONFIG, samples)
    assert frames.dtype == np.int64 and frames.tolist() == [[0, 0, 1], [1, 2, 49]]
    assert [gd.num_frames(CONFIG, int(n)) for n in samples.reshape(-1)] == frames.reshape(-1).tolist()
    assert samples[1, 2] == 16000
    assert gd.num_frames(CONFIG, np.int64(400)) == 1


def test_distill_loss_arguments():
    pred, target = TARGETS, TARGETS[::-1].copy()
    loss, l1, cos, grad = gd.distill_loss(pred, target)
    assert isinstance(loss, float) and l1.shape == cos.shape == (2,) and grad.shape == pred.shape
    wrong = [
        (dict(target=target[:1]), ValueError,
         "target: expected float32 (2, 2, 3, 12), got float32 (1, 2, 3, 12)"),
        (dict(target=target.astype(float)), ValueError,
         "target: expected float32 (2, 2, 3, 12), got float64 (2, 2, 3, 12)"),
        (dict(target=None), TypeError, "target: expected a float32 array, got NoneType"),
        (dict(pred=pred[0]), ValueError,
         "pred: expected float32 (layers, batch, frames, width), got float32 (2, 3, 12)"),
        (dict(pred=pred[:0]), ValueError,
         "pred: expected 1 to 64 layers and no empty dimension, got float32 (0, 2, 3, 12)"),
        (dict(pred=np.zeros((65, 1, 1, 1), np.float32)), ValueError,
         "pred: expected 1 to 64 layers and no empty dimension, got float32 (65, 1, 1, 1)"),
        (dict(frames=[3, 4]), ValueError, "frames[1]: expected 1 to 3, got 4"),
        (dict(frames=[0, 3]), ValueError, "frames[0]: expected 1 to 3, got 0"),
        (dict(frames=[3]), ValueError, "frames: expected int64 (2,), got int64 (1,)"),
        (dict(lam=np.nan), ValueError, "lam: expected a finite number of 0 or more, got nan"),
        (dict(loss_type=2), TypeError, "loss_type: expected a string, got int"),
        (dict(reduction="none"), ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
    ]
    for options, kind, message in wrong:
        with pytest.raises(kind) as caught:
            gd.distill_loss(**{"pred": pred, "target": target, **options})
        assert str(caught.value) == message
