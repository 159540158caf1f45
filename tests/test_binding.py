"""The CPython module: what it takes, what it refuses and in which words, and that a refusal changes nothing."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

import gendistiller_ext as gd
from conftest import SEED, SMALL, SMALL_TEACHERS, SMALL_VARIANTS

D = SMALL["encoder_embed_dim"]
CONFIG = gd.Config(**SMALL)


def audio(*samples: int, seed: int = SEED) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(n).astype(np.float32) for n in samples]


@pytest.fixture(scope="module")
def model() -> gd.Model:
    return gd.Model(CONFIG, seed=1)


WAVS = np.stack(audio(1200, 1200))
FRAMES = 3
TARGETS = np.random.default_rng(SEED).standard_normal((2, 2, FRAMES, D)).astype(np.float32)


class Raises:
    def __array__(self, *args, **kwargs):
        raise KeyError("not today")


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def spoilt(array: np.ndarray, place, value) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def unaligned(count: int) -> np.ndarray:
    return np.zeros(4 * count + 1, np.uint8)[1:].view(np.float32)


# (call of (model), exception, message)
WRONG_WAVS = {
    "float64": (WAVS.astype(np.float64)[0, :3], ValueError, "wavs: expected float32 (batch, samples), got float64 (3,)"),
    "one row": (WAVS[0], ValueError, "wavs: expected float32 (batch, samples), got float32 (1200,)"),
    "three dimensions": (WAVS[None], ValueError, "wavs: expected float32 (batch, samples), got float32 (1, 2, 1200)"),
    "float16": (WAVS.astype(np.float16), ValueError, "wavs: expected float32 (batch, samples), got float16 (2, 1200)"),
    "int16": ((WAVS * 99).astype(np.int16), ValueError, "wavs: expected float32 (batch, samples), got int16 (2, 1200)"),
    "complex": (WAVS.astype(np.complex64), ValueError, "wavs: expected float32 (batch, samples), got complex64 (2, 1200)"),
    "bool": (WAVS > 0, ValueError, "wavs: expected float32 (batch, samples), got bool (2, 1200)"),
    "objects": (WAVS.astype(object), ValueError, "wavs: expected float32 (batch, samples), got object (2, 1200)"),
    "None": (None, TypeError, "wavs: expected float32 (batch, samples), got NoneType"),
    "a string": ("speech.wav", ValueError, "wavs: expected float32 (batch, samples), got <U10 ()"),
    "a number": (1.0, ValueError, "wavs: expected float32 (batch, samples), got float64 ()"),
    "a dict": ({"a": 1}, TypeError, "wavs: expected float32 (batch, samples), got dict"),
    "no rows": (WAVS[:0], ValueError, "wavs: expected at least one utterance, got float32 (0, 1200)"),
    "no samples": (WAVS[:, :0], ValueError, "wavs[0]: expected at least 400 samples, got 0"),
    "short": (WAVS[:, :399], ValueError, "wavs[0]: expected at least 400 samples, got 399"),
    "empty list": ([], ValueError, "wavs: expected at least one utterance, got an empty list"),
    "short in a list": (audio(400, 399), ValueError, "wavs[1]: expected at least 400 samples, got 399"),
    "float64 in a list": ([WAVS[0], WAVS[1].astype(float)], ValueError,
                          "wavs[1]: expected float32 (samples,), got float64 (1200,)"),
    "matrix in a list": ([WAVS], ValueError, "wavs[0]: expected float32 (samples,), got float32 (2, 1200)"),
    "None in a list": ([WAVS[0], None], TypeError, "wavs[1]: expected float32 (samples,), got NoneType"),
    "numbers in a list": ([0.5, 0.5], ValueError, "wavs[0]: expected float32 (samples,), got float64 ()"),
    "NaN": (spoilt(WAVS, (1, 1199), np.nan), ValueError, "wavs[1]: expected finite samples, got NaN at sample 1199"),
    "infinity": (spoilt(WAVS, (0, 0), -np.inf), ValueError, "wavs[0]: expected finite samples, got infinity at sample 0"),
    "NaN in a list": ([WAVS[0], spoilt(WAVS[1], 700, np.nan)], ValueError,
                      "wavs[1]: expected finite samples, got NaN at sample 700"),
    "raises": (Raises(), KeyError, "'not today'"),
    "raises in a list": ([WAVS[0], Raises()], KeyError, "'not today'"),
}

WRONG_LENGTHS = {
    "too long": ([1200, 1201], ValueError, "lengths[1]: expected 400 to 1200 samples, got 1201"),
    "too short": ([399, 1200], ValueError, "lengths[0]: expected 400 to 1200 samples, got 399"),
    "negative": ([1200, -5], ValueError, "lengths[1]: expected 400 to 1200 samples, got -5"),
    "beyond int64": (np.array([1200, 2 ** 63], np.uint64), ValueError,
                     "lengths[1]: expected 400 to 1200 samples, got -9223372036854775808"),
    "floats": ([1200.0, 1200.0], ValueError, "lengths: expected int64 (2,), got float64 (2,)"),
    "bools": ([True, True], ValueError, "lengths: expected int64 (2,), got bool (2,)"),
    "one": ([1200], ValueError, "lengths: expected int64 (2,), got int64 (1,)"),
    "a number": (1200, ValueError, "lengths: expected int64 (2,), got int64 ()"),
    "an object": (object(), TypeError, "lengths: expected int64 (batch,), got object"),
    "raises": (Raises(), KeyError, "'not today'"),
}

WRONG_OPTIONS = {
    "num_layers 0": (dict(num_layers=0), ValueError, "num_layers: expected 1 to 2147483647, got 0"),
    "num_layers negative": (dict(num_layers=-1), ValueError, "num_layers: expected 1 to 2147483647, got -1"),
    "num_layers huge": (dict(num_layers=10 ** 30), ValueError,
                        f"num_layers: expected 1 to 2147483647, got {10 ** 30}"),
    "num_layers 65": (dict(num_layers=65), ValueError, "num_layers: expected 1 to 64 layers to generate, got 65"),
    "num_layers float": (dict(num_layers=2.0), TypeError, "num_layers: expected an integer, got float"),
    "num_layers bool": (dict(num_layers=True), TypeError, "num_layers: expected an integer, got bool"),
    "num_threads 0": (dict(num_threads=0), ValueError, "num_threads: expected 1 to 2147483647, got 0"),
    "num_threads string": (dict(num_threads="2"), TypeError, "num_threads: expected an integer, got str"),
    "precision": (dict(precision="float64"), ValueError,
                  "precision: expected 'float32', 'bfloat16' or 'int8', got 'float64'"),
    "precision type": (dict(precision=32), TypeError, "precision: expected a string, got int"),
    "bfloat16": (dict(precision="bfloat16"), NotImplementedError,
                 "precision: this build computes in 'float32' alone, it has no bfloat16 kernels"),
    "int8": (dict(precision="int8"), NotImplementedError,
             "precision: this build computes in 'float32' alone, it has no int8 kernels"),
    "dropout_seed number": (dict(dropout_seed=3), TypeError,
                            "dropout_seed: expected None or (seed, step, first_utterance), got int"),
    "dropout_seed pair": (dict(dropout_seed=(1, 2)), ValueError,
                          "dropout_seed: expected None or (seed, step, first_utterance), got 2 items"),
    "dropout_seed negative": (dict(dropout_seed=(-1, 2, 3)), ValueError,
                              "dropout_seed[0]: expected 0 to 18446744073709551615, got -1"),
    "dropout_seed beyond": (dict(dropout_seed=(1, 2 ** 64, 3)), ValueError,
                            f"dropout_seed[1]: expected 0 to 18446744073709551615, got {2 ** 64}"),
    "dropout_seed first": (dict(dropout_seed=(1, 2, -3)), ValueError, "dropout_seed[2]: expected 0 or more, got -3"),
    "dropout_seed float": (dict(dropout_seed=(1, 2, 3.0)), TypeError, "dropout_seed[2]: expected an integer, got float"),
}

P = gd.Model(CONFIG).num_params
INTO = np.zeros(P, np.float32)

WRONG_STEP = {
    "targets float64": (dict(targets=TARGETS.astype(float)), ValueError,
                        "targets: expected float32 (layers, batch, frames, width), got float64 (2, 2, 3, 12)"),
    "targets three": (dict(targets=TARGETS[0]), ValueError,
                      "targets: expected float32 (layers, batch, frames, width), got float32 (2, 3, 12)"),
    "targets frames": (dict(targets=TARGETS[:, :, :2]), ValueError,
                       "targets: expected float32 (2, 2, 3, 12), got float32 (2, 2, 2, 12)"),
    "targets layers": (dict(targets=TARGETS[:1]), ValueError,
                       "targets: expected float32 (2, 2, 3, 12), got float32 (1, 2, 3, 12)"),
    "targets empty": (dict(targets=TARGETS[:, :, :, :0]), ValueError,
                      "targets: expected float32 (2, 2, 3, 12), got float32 (2, 2, 3, 0)"),
    "targets None": (dict(targets=None), TypeError,
                     "targets: expected float32 (layers, batch, frames, width), got NoneType"),
    "targets NaN": (dict(targets=spoilt(TARGETS, (1, 0, 2, 5), np.nan)), ValueError,
                    "targets[1, 0]: expected finite values, got NaN in frame 2"),
    "lam": (dict(lam=np.inf), ValueError, "lam: expected a finite number of 0 or more, got inf"),
    "lam negative": (dict(lam=-1), ValueError, "lam: expected a finite number of 0 or more, got -1"),
    "lam string": (dict(lam="1"), TypeError, "lam: expected a number, got str"),
    "reduction": (dict(reduction="max"), ValueError, "reduction: expected 'mean' or 'sum', got 'max'"),
    "reduction type": (dict(reduction=1), TypeError, "reduction: expected a string, got int"),
    "history": (dict(history="past"), ValueError, "history: expected 'free' or 'teacher', got 'past'"),
    "mask_padding": (dict(mask_padding=False, lengths=[1200, 400]), ValueError,
                     'mask_padding: expected True with padding "exact", which has no padded frames to count'),
    "into list": (dict(into=[0.0]), TypeError, "into: expected a float32 array, got list"),
    "into float64": (dict(into=np.zeros(P)), ValueError, f"into: expected float32 ({P},), got float64 ({P},)"),
    "into short": (dict(into=INTO[1:]), ValueError, f"into: expected float32 ({P},), got float32 ({P - 1},)"),
    "into read-only": (dict(into=read_only(np.zeros(P, np.float32))), ValueError,
                       "into: expected a contiguous, writable array, got one that is read-only"),
    "into strided": (dict(into=np.zeros(2 * P, np.float32)[::2]), ValueError,
                     "into: expected a contiguous, writable array, got one that is not contiguous"),
    "into byte-swapped": (dict(into=np.zeros(P, ">f4")), ValueError,
                          "into: expected a contiguous, writable array, got one that is byte-swapped"),
    "into unaligned": (dict(into=unaligned(P)), ValueError,
                       "into: expected a contiguous, writable array, got one that is not aligned"),
}


def check(call, kind: type, message: str, state: gd.Model) -> None:
    before = state.flat_params().copy()
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == message
    assert np.array_equal(state.flat_params(), before)


@pytest.mark.parametrize("case", WRONG_WAVS)
def test_wrong_wavs(model, case):
    wavs, kind, message = WRONG_WAVS[case]
    check(lambda: model.forward(wavs), kind, message, model)
    into = np.full(P, 7, np.float32)
    check(lambda: model.distill_step(wavs, TARGETS, into=into), kind, message, model)
    check(lambda: model.backward(wavs, [None, None, TARGETS[0]], into=into), kind, message, model)
    assert (into == 7).all()


@pytest.mark.parametrize("case", WRONG_LENGTHS)
def test_wrong_lengths(model, case):
    lengths, kind, message = WRONG_LENGTHS[case]
    check(lambda: model.forward(WAVS, lengths), kind, message, model)
    check(lambda: model.forward(list(WAVS), lengths), kind, message, model)
    check(lambda: model.distill_step(WAVS, TARGETS, lengths), kind, message, model)


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(model, case):
    options, kind, message = WRONG_OPTIONS[case]
    check(lambda: model.forward(WAVS, **options), kind, message, model)


@pytest.mark.parametrize("case", WRONG_STEP)
def test_wrong_step(model, case):
    options, kind, message = WRONG_STEP[case]
    into = np.full(P, 7, np.float32)
    check(lambda: model.distill_step(**{"wavs": WAVS, "targets": TARGETS, "into": into, **options}), kind, message, model)
    assert (into == 7).all()


def test_wrong_gradients(model):
    grad = TARGETS[0]
    cases = [
        (grad, TypeError, "grad_hidden: expected a list of float32 arrays or None, got numpy.ndarray"),
        ([grad], ValueError, "grad_hidden: expected 3 items, one for each hidden state, got 1"),
        ([grad, None, grad[:, :2]], ValueError, "grad_hidden[2]: expected float32 (2, 3, 12), got float32 (2, 2, 12)"),
        ([grad, grad.astype(float), None], ValueError,
         "grad_hidden[1]: expected float32 (batch, frames, width), got float64 (2, 3, 12)"),
        ([grad, "x", None], ValueError, "grad_hidden[1]: expected float32 (batch, frames, width), got <U1 ()"),
    ]
    for gradients, kind, message in cases:
        into = np.full(P, 7, np.float32)
        check(lambda: model.backward(WAVS, gradients, into=into), kind, message, model)
        assert (into == 7).all()


def test_into_may_not_overlap(model):
    flat = model.flat_params()
    check(lambda: model.distill_step(WAVS, TARGETS, into=flat), ValueError,
          "into: expected memory of its own, got memory shared with the model's parameters", model)
    memory = np.zeros(P, np.float32)
    memory[:2400] = WAVS.reshape(-1)
    check(lambda: model.distill_step(memory[:2400].reshape(2, 1200), TARGETS, into=memory), ValueError,
          "into: expected memory of its own, got memory shared with wavs", model)
    check(lambda: model.distill_step(WAVS, memory[:TARGETS.size].reshape(TARGETS.shape), into=memory), ValueError,
          "into: expected memory of its own, got memory shared with targets", model)
    check(lambda: model.backward(WAVS, [None, None, memory[:72].reshape(2, 3, 12)], into=memory), ValueError,
          "into: expected memory of its own, got memory shared with grad_hidden", model)


def test_wrong_params(model):
    name = "encoder.layers.0.fc1.weight"
    good = model.params[name] + 1
    cases = [
        ({name: good, "fc1": good}, ValueError, "params: unknown tensor 'fc1'"),
        ({name: good.T}, ValueError, f"params['{name}']: expected float32 (20, 12), got float32 (12, 20)"),
        ({"encoder.layer_norm.bias": np.ones(12), name: good.astype(complex)}, ValueError,
         f"params['{name}']: expected float32 (20, 12), got complex128 (20, 12)"),
        ({"encoder.layer_norm.bias": np.ones(12), name: None}, TypeError,
         f"params['{name}']: expected a float32 array, got NoneType"),
        ({"encoder.layer_norm.bias": np.ones(12), 3: good}, TypeError,
         "params: expected names and arrays, got a key that is no string"),
        ({"encoder.layer_norm.bias": np.ones(12), name: Raises()}, KeyError, "'not today'"),
        ([good], TypeError, "params: expected a dict of arrays, got list"),
        (None, TypeError, "params: expected a dict of arrays, got NoneType"),
    ]
    for params, kind, message in cases:
        check(lambda: model.load_params(params), kind, message, model)


def test_wrong_constructor(tmp_path):
    cases = [
        (lambda: gd.Model(SMALL), TypeError, "config: expected a Config, got dict"),
        (lambda: gd.Model(CONFIG, seed=-1), ValueError, "seed: expected 0 to 18446744073709551615, got -1"),
        (lambda: gd.Model(CONFIG, seed=1.0), TypeError, "seed: expected an integer, got float"),
        (lambda: gd.Model(CONFIG, device=0), TypeError, "device: expected a string, got int"),
        (lambda: gd.Model(CONFIG, device="tpu"), ValueError, 'device: expected "cpu", "cuda" or "cuda:N", got "tpu"'),
        (lambda: gd.Model(CONFIG, device="cpu\0"), ValueError,
         "device: expected 'cpu', 'cuda' or 'cuda:N', got 'cpu\\x00'"),
        (lambda: gd.num_frames(None, 400), TypeError, "config: expected a Config, got NoneType"),
        (lambda: gd.num_frames(CONFIG, -1), ValueError, "num_samples: expected 0 or more, got -1"),
        (lambda: gd.num_frames(CONFIG, 400.0), TypeError, "num_samples: expected an integer, got float"),
        (lambda: gd.num_frames(CONFIG, np.zeros(3)), ValueError, "num_samples: expected integers, got float64 (3,)"),
        (lambda: gd.Model(CONFIG).save(3), TypeError, "path: expected str, bytes or os.PathLike, got int"),
        (lambda: gd.Model(CONFIG).save(tmp_path / "x", dtype="float64"), ValueError,
         'dtype: expected "float32" or "bfloat16", got "float64"'),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_system_errors(tmp_path, model):
    for call in (lambda: gd.Model.load(tmp_path / "absent.safetensors"), lambda: gd.Model._load(tmp_path / "absent"),
                 lambda: model.save(tmp_path / "no" / "folder.safetensors")):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert str(tmp_path) in os.fspath(caught.value.filename)


@pytest.mark.skipif("cuda:0" in gd.devices(), reason="this machine has a CUDA device")
def test_no_device():
    with pytest.raises(gd.DeviceError, match="^device: ") as caught:
        gd.Model(CONFIG, device="cuda")
    assert isinstance(caught.value, RuntimeError)
    assert gd.devices() == ["cpu"]


def test_untrainable_and_fixed_layers():
    teacher = gd.Model(gd.Config(**SMALL_TEACHERS["wavlm"]))
    hidden, _ = teacher.forward(WAVS, num_layers=2)
    assert len(hidden) == 3
    with pytest.raises(ValueError, match="^num_layers: expected 1 to 3 blocks, got 4$"):
        teacher.forward(WAVS, num_layers=4)
    with pytest.raises(NotImplementedError, match='architecture "encoder" runs forward only'):
        teacher.distill_step(WAVS, TARGETS)


@pytest.mark.parametrize("name", ["self_hidden", "multi_head"])
def test_other_architectures_take_no_num_layers(name):
    try:
        model = gd.Model(gd.Config(**SMALL_VARIANTS[name]))
        model.forward(WAVS)
    except NotImplementedError as error:
        pytest.skip(str(error))
    with pytest.raises(ValueError, match="^num_layers: expected none with this architecture, got 1$"):
        model.forward(WAVS, num_layers=1)


# ---- What is taken -------------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a[0], b[0])) and np.array_equal(a[1], b[1])


def test_layouts(model):
    expected = model.forward(WAVS)
    wide = np.zeros((2, 2400), np.float32)
    wide[:, ::2] = WAVS
    longer = np.concatenate([WAVS, WAVS * 3], axis=1)
    for wavs in (WAVS.copy(order="F"), WAVS.astype(">f4"), wide[:, ::2], WAVS[::-1].copy()[::-1], longer[:, :1200],
                 WAVS.copy().view(np.matrix), np.ma.masked_array(WAVS), list(WAVS), tuple(WAVS), [WAVS[0], wide[1, ::2]],
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
        (dict(target=target[:1]), ValueError, "target: expected float32 (2, 2, 3, 12), got float32 (1, 2, 3, 12)"),
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
        (dict(reduction="none"), ValueError, "reduction: expected 'mean' or 'sum', got 'none'"),
    ]
    for options, kind, message in wrong:
        with pytest.raises(kind) as caught:
            gd.distill_loss(**{"pred": pred, "target": target, **options})
        assert str(caught.value) == message


# ---- Memory, symbols, import ---------------------------------------------------------------------------------------


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def calls(model: gd.Model) -> dict[str, Callable]:
    """A call of everything, right and wrong."""
    optimizer = gd.AdamW(model, lr=0.0)
    grads = model.distill_step(WAVS, TARGETS).flat_grads
    params = {name: value.astype(np.float64) for name, value in model.params.items()}
    first = model.tensors[0].name
    return {
        "forward": lambda: model.forward(WAVS),
        "forward of a list": lambda: model.forward(list(WAVS), [1000, 1200], num_layers=1, dropout_seed=(1, 2, 3)),
        "forward of a copy": lambda: model.forward(WAVS.astype(">f4")),
        "backward": lambda: model.backward(WAVS, [None, TARGETS[0], None]),
        "distill_step": lambda: model.distill_step(WAVS, TARGETS, lengths=[1000, 1200], into=grads).grads,
        "distill_loss": lambda: gd.distill_loss(TARGETS, TARGETS, [1, 2]),
        "AdamW": lambda: gd.AdamW(model, betas=[0.5, 0.5]).betas,
        "step": lambda: optimizer.step(grads),
        "state": lambda: optimizer.load_state(optimizer.state()),
        "load_params": lambda: model.load_params(params),
        "attributes": lambda: (model.params, model.tensors, model.config_json, model.device, model.num_params, repr(model)),
        "functions": lambda: (gd.cpu_features(), gd.devices(), gd.num_frames(CONFIG, np.array([400, 500]))),
        "copy": lambda: copy.deepcopy(model),
        "short": lambda: model.forward(WAVS[:, :300]),
        "NaN": lambda: model.forward(spoilt(WAVS, (0, 0), np.nan)),
        "None in a list": lambda: model.forward([WAVS[0], None]),
        "raises": lambda: model.forward([WAVS[0], Raises()]),
        "lengths": lambda: model.forward(WAVS, [1200, 1]),
        "num_layers": lambda: model.forward(WAVS, num_layers=99),
        "seed": lambda: model.forward(WAVS, dropout_seed=(1, 2, -1)),
        "targets": lambda: model.distill_step(WAVS, TARGETS[:1]),
        "targets NaN": lambda: model.distill_step(WAVS, spoilt(TARGETS, 0, np.nan)),
        "history": lambda: model.distill_step(WAVS, TARGETS, history="x"),
        "into": lambda: model.distill_step(WAVS, TARGETS, into=model.flat_params()),
        "grad_hidden": lambda: model.backward(WAVS, [TARGETS[0], TARGETS[0][:1], None]),
        "too few": lambda: model.backward(WAVS, [TARGETS[0]]),
        "unknown tensor": lambda: model.load_params({first: params[first], "x": 1}),
        "misshapen tensor": lambda: model.load_params({first: WAVS}),
        "state entries": lambda: optimizer.load_state({**optimizer.state(), "x": 1}),
        "state values": lambda: optimizer.load_state({**optimizer.state(), "v": -grads ** 2 - 1}),
        "grads": lambda: optimizer.step(WAVS),
        "device": lambda: gd.Model(CONFIG, device="x"),
        "no file": lambda: gd.Model._load("/nowhere/x"),
        "loss": lambda: gd.distill_loss(TARGETS, WAVS),
        "frames": lambda: gd.distill_loss(TARGETS, TARGETS, [9, 9]),
    }


def attempt(call: Callable) -> None:
    try:
        call()
    except (ValueError, TypeError, KeyError, OSError):
        pass


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", calls(gd.Model(CONFIG)))
def test_nothing_leaks(model, name):
    runs, call = 300, calls(model)[name]
    things = (WAVS, TARGETS, model, None, gd.Model, type(model.tensors[0]))
    tracemalloc.start()
    for _ in range(runs):
        attempt(call)
    gc.collect()
    python, memory, references = tracemalloc.get_traced_memory()[0], resident(), [sys.getrefcount(thing) for thing in things]
    for _ in range(runs):
        attempt(call)
    gc.collect()
    python = tracemalloc.get_traced_memory()[0] - python
    tracemalloc.stop()
    assert python < 20 * runs  # a float takes 24 bytes, an array 112
    assert resident() - memory < 1 << 20
    assert all(abs(sys.getrefcount(thing) - before) < runs // 10 for thing, before in zip(things, references))


def test_models_are_freed():
    config = gd.Config(**{**SMALL, "encoder_ffn_embed_dim": 40000})  # 4 MB of parameters

    def make() -> None:
        model = gd.Model(config)
        model.forward(WAVS)
        model.optimizer = gd.AdamW(model)  # a cycle through C
        alive.add(model)
        del model
        gc.collect()

    alive = weakref.WeakSet()
    for _ in range(5):
        make()
    memory = resident()
    for _ in range(20):
        make()
    assert not alive
    assert resident() - memory < 40 << 20


def test_exported_symbols():
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm is absent")
    listed = subprocess.run([nm, "-D", "--defined-only", gd._core.__file__], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert names - {"_init", "_fini"} == {"PyInit__core"}


def test_import_is_light():
    root = str(Path(gd.__file__).resolve().parent.parent)
    script = """
import sys, time
import numpy
begin = time.perf_counter()
import gendistiller_ext
seconds = time.perf_counter() - begin
heavy = {"torch", "s3prl", "soundfile", "yaml", "tqdm", "matplotlib", "scipy"} & set(sys.modules)
print(seconds, *heavy)
"""
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root).stdout.split()
            for _ in range(5)]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.05


def test_version():
    assert gd.__version__ == gd._core.__version__
    assert gd.cpu_features()[0] == "generic"
