"""What the CPython module refuses, in which words, and that a refusal changes nothing."""

from __future__ import annotations

import os

import numpy as np
import pytest

import gendistiller_ext as gd
from binding_inputs import CONFIG, P, TARGETS, WAVS, Raises, audio, read_only, spoilt, unaligned
from conftest import SMALL, SMALL_TEACHERS, SMALL_VARIANTS

ARRAY = "wavs: expected float32 (batch, samples), got "
ROW = "expected float32 (samples,), got "
SEED_TUPLE = "dropout_seed: expected None or (seed, step, first_utterance), got "
TARGETS_ANY = "targets: expected float32 (layers, batch, frames, width), got "
TARGETS_HERE = "targets: expected float32 (2, 2, 3, 12), got "
CONTIGUOUS = "into: expected a contiguous, writable array, got one that is "
SHARED = "into: expected memory of its own, got memory shared with "


@pytest.fixture(scope="module")
def model() -> gd.Model:
    return gd.Model(CONFIG, seed=1)


# (argument, exception, message)
WRONG_WAVS = {
    "float64": (WAVS.astype(np.float64)[0, :3], ValueError, ARRAY + "float64 (3,)"),
    "one row": (WAVS[0], ValueError, ARRAY + "float32 (1200,)"),
    "three dimensions": (WAVS[None], ValueError, ARRAY + "float32 (1, 2, 1200)"),
    "float16": (WAVS.astype(np.float16), ValueError, ARRAY + "float16 (2, 1200)"),
    "int16": ((WAVS * 99).astype(np.int16), ValueError, ARRAY + "int16 (2, 1200)"),
    "complex": (WAVS.astype(np.complex64), ValueError, ARRAY + "complex64 (2, 1200)"),
    "bool": (WAVS > 0, ValueError, ARRAY + "bool (2, 1200)"),
    "objects": (WAVS.astype(object), ValueError, ARRAY + "object (2, 1200)"),
    "None": (None, TypeError, ARRAY + "NoneType"),
    "a string": ("speech.wav", ValueError, ARRAY + "<U10 ()"),
    "a number": (1.0, ValueError, ARRAY + "float64 ()"),
    "a dict": ({"a": 1}, TypeError, ARRAY + "dict"),
    "no rows": (WAVS[:0], ValueError, "wavs: expected at least one utterance, got float32 (0, 1200)"),
    "no samples": (WAVS[:, :0], ValueError, "wavs[0]: expected at least 400 samples, got 0"),
    "short": (WAVS[:, :399], ValueError, "wavs[0]: expected at least 400 samples, got 399"),
    "empty list": ([], ValueError, "wavs: expected at least one utterance, got an empty list"),
    "short in a list": (audio(400, 399), ValueError, "wavs[1]: expected at least 400 samples, got 399"),
    "float64 in a list": ([WAVS[0], WAVS[1].astype(float)], ValueError,
                          f"wavs[1]: {ROW}float64 (1200,)"),
    "matrix in a list": ([WAVS], ValueError, f"wavs[0]: {ROW}float32 (2, 1200)"),
    "None in a list": ([WAVS[0], None], TypeError, f"wavs[1]: {ROW}NoneType"),
    "numbers in a list": ([0.5, 0.5], ValueError, f"wavs[0]: {ROW}float64 ()"),
    "NaN": (spoilt(WAVS, (1, 1199), np.nan), ValueError,
            "wavs[1]: expected finite samples, got NaN at sample 1199"),
    "infinity": (spoilt(WAVS, (0, 0), -np.inf), ValueError,
                 "wavs[0]: expected finite samples, got infinity at sample 0"),
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
    "num_layers 65": (dict(num_layers=65), ValueError,
                      "num_layers: expected 1 to 64 layers to generate, got 65"),
    "num_layers float": (dict(num_layers=2.0), TypeError, "num_layers: expected an integer, got float"),
    "num_layers bool": (dict(num_layers=True), TypeError, "num_layers: expected an integer, got bool"),
    "num_threads 0": (dict(num_threads=0), ValueError, "num_threads: expected 1 to 2147483647, got 0"),
    "num_threads string": (dict(num_threads="2"), TypeError, "num_threads: expected an integer, got str"),
    "precision": (dict(precision="float64"), ValueError,
                  "precision: expected 'float32', 'bfloat16' or 'int8', got 'float64'"),
    "precision type": (dict(precision=32), TypeError, "precision: expected a string, got int"),
    "dropout_seed number": (dict(dropout_seed=3), TypeError,
                            SEED_TUPLE + "int"),
    "dropout_seed pair": (dict(dropout_seed=(1, 2)), ValueError,
                          SEED_TUPLE + "2 items"),
    "dropout_seed negative": (dict(dropout_seed=(-1, 2, 3)), ValueError,
                              "dropout_seed[0]: expected 0 to 18446744073709551615, got -1"),
    "dropout_seed beyond": (dict(dropout_seed=(1, 2 ** 64, 3)), ValueError,
                            f"dropout_seed[1]: expected 0 to 18446744073709551615, got {2 ** 64}"),
    "dropout_seed first": (dict(dropout_seed=(1, 2, -3)), ValueError,
                           "dropout_seed[2]: expected 0 or more, got -3"),
    "dropout_seed float": (dict(dropout_seed=(1, 2, 3.0)), TypeError,
                           "dropout_seed[2]: expected an integer, got float"),
}

INTO = np.zeros(P, np.float32)

WRONG_STEP = {
    "targets float64": (dict(targets=TARGETS.astype(float)), ValueError,
                        TARGETS_ANY + "float64 (2, 2, 3, 12)"),
    "targets three": (dict(targets=TARGETS[0]), ValueError,
                      TARGETS_ANY + "float32 (2, 3, 12)"),
    "targets frames": (dict(targets=TARGETS[:, :, :2]), ValueError,
                       TARGETS_HERE + "float32 (2, 2, 2, 12)"),
    "targets layers": (dict(targets=TARGETS[:1]), ValueError,
                       TARGETS_HERE + "float32 (1, 2, 3, 12)"),
    "targets empty": (dict(targets=TARGETS[:, :, :, :0]), ValueError,
                      TARGETS_HERE + "float32 (2, 2, 3, 0)"),
    "targets None": (dict(targets=None), TypeError,
                     TARGETS_ANY + "NoneType"),
    "targets NaN": (dict(targets=spoilt(TARGETS, (1, 0, 2, 5), np.nan)), ValueError,
                    "targets[1, 0]: expected finite values, got NaN in frame 2"),
    "lam": (dict(lam=np.inf), ValueError, "lam: expected a finite number of 0 or more, got inf"),
    "lam negative": (dict(lam=-1), ValueError, "lam: expected a finite number of 0 or more, got -1"),
    "lam string": (dict(lam="1"), TypeError, "lam: expected a number, got str"),
    "feat_pen_loss": (dict(feat_pen_loss=np.nan), ValueError,
                      "feat_pen_loss: expected a finite number of 0 or more, got nan"),
    "feat_pen_loss negative": (dict(feat_pen_loss=-0.5), ValueError,
                               "feat_pen_loss: expected a finite number of 0 or more, got -0.5"),
    "reduction": (dict(reduction="max"), ValueError, "reduction: expected 'mean' or 'sum', got 'max'"),
    "loss_type": (dict(loss_type="mse"), ValueError, "loss_type: expected 'l1' or 'l2', got 'mse'"),
    "reduction type": (dict(reduction=1), TypeError, "reduction: expected a string, got int"),
    "history": (dict(history="past"), ValueError, "history: expected 'free' or 'teacher', got 'past'"),
    "mask_padding": (dict(mask_padding=False, lengths=[1200, 400]), ValueError,
                     'mask_padding: expected True with padding "exact", which has no padded frames to count'),
    "into list": (dict(into=[0.0]), TypeError, "into: expected a float32 array, got list"),
    "into float64": (dict(into=np.zeros(P)), ValueError,
                     f"into: expected float32 ({P},), got float64 ({P},)"),
    "into short": (dict(into=INTO[1:]), ValueError, f"into: expected float32 ({P},), got float32 ({P - 1},)"),
    "into read-only": (dict(into=read_only(np.zeros(P, np.float32))), ValueError,
                       CONTIGUOUS + "read-only"),
    "into strided": (dict(into=np.zeros(2 * P, np.float32)[::2]), ValueError,
                     CONTIGUOUS + "not contiguous"),
    "into byte-swapped": (dict(into=np.zeros(P, ">f4")), ValueError,
                          CONTIGUOUS + "byte-swapped"),
    "into unaligned": (dict(into=unaligned(P)), ValueError,
                       CONTIGUOUS + "not aligned"),
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
    arguments = {"wavs": WAVS, "targets": TARGETS, "into": into, **options}
    check(lambda: model.distill_step(**arguments), kind, message, model)
    assert (into == 7).all()


def test_wrong_gradients(model):
    grad = TARGETS[0]
    cases = [
        (grad, TypeError, "grad_hidden: expected a list of float32 arrays or None, got numpy.ndarray"),
        ([grad], ValueError, "grad_hidden: expected 3 items, one for each hidden state, got 1"),
        ([grad, None, grad[:, :2]], ValueError,
         "grad_hidden[2]: expected float32 (2, 3, 12), got float32 (2, 2, 12)"),
        ([grad, grad.astype(float), None], ValueError,
         "grad_hidden[1]: expected float32 (batch, frames, width), got float64 (2, 3, 12)"),
        ([grad, "x", None], ValueError,
         "grad_hidden[1]: expected float32 (batch, frames, width), got <U1 ()"),
    ]
    for gradients, kind, message in cases:
        into = np.full(P, 7, np.float32)
        check(lambda: model.backward(WAVS, gradients, into=into), kind, message, model)
        assert (into == 7).all()


def test_into_may_not_overlap(model):
    flat = model.flat_params()
    check(lambda: model.distill_step(WAVS, TARGETS, into=flat), ValueError,
          SHARED + "the model's parameters", model)
    memory = np.zeros(P, np.float32)
    memory[:2400] = WAVS.reshape(-1)
    check(lambda: model.distill_step(memory[:2400].reshape(2, 1200), TARGETS, into=memory), ValueError,
          SHARED + "wavs", model)
    targets = memory[:TARGETS.size].reshape(TARGETS.shape)
    check(lambda: model.distill_step(WAVS, targets, into=memory), ValueError,
          SHARED + "targets", model)
    check(lambda: model.backward(WAVS, [None, None, memory[:72].reshape(2, 3, 12)], into=memory), ValueError,
          SHARED + "grad_hidden", model)


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
        (lambda: gd.Model(CONFIG, device="tpu"), ValueError,
         'device: expected "cpu", "cuda" or "cuda:N", got "tpu"'),
        (lambda: gd.Model(CONFIG, device="cpu\0"), ValueError,
         "device: expected 'cpu', 'cuda' or 'cuda:N', got 'cpu\\x00'"),
        (lambda: gd.num_frames(None, 400), TypeError, "config: expected a Config, got NoneType"),
        (lambda: gd.num_frames(CONFIG, -1), ValueError, "num_samples: expected 0 or more, got -1"),
        (lambda: gd.num_frames(CONFIG, 400.0), TypeError, "num_samples: expected an integer, got float"),
        (lambda: gd.num_frames(CONFIG, np.zeros(3)), ValueError,
         "num_samples: expected integers, got float64 (3,)"),
        (lambda: gd.Model(CONFIG).save(3), TypeError, "path: expected str, bytes or os.PathLike, got int"),
        (lambda: gd.Model(CONFIG).save(tmp_path / "x", dtype="float64"), ValueError,
         'dtype: expected "float32", "bfloat16" or "int8", got "float64"'),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_system_errors(tmp_path, model):
    for call in (lambda: gd.Model.load(tmp_path / "absent.safetensors"),
                 lambda: gd.Model._load(tmp_path / "absent"),
                 lambda: model.save(tmp_path / "no" / "folder.safetensors")):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert str(tmp_path) in os.fspath(caught.value.filename)


@pytest.mark.skipif("cuda:0" in gd.devices(), reason="this machine has a CUDA device")
def test_no_device():
    for device in ("cuda", "cuda:0", "cuda:12"):
        with pytest.raises(gd.DeviceError, match="^device: ") as caught:
            gd.Model(CONFIG, device=device)
        assert isinstance(caught.value, RuntimeError)
    for device in ("cud", "cuda:", "cuda0", "cuda1:", "cuda:x", "cuda:1x", "cuda:-1", "cuda:123"):
        with pytest.raises(ValueError, match=f'^device: expected "cpu", "cuda" or "cuda:N", got "{device}"'):
            gd.Model(CONFIG, device=device)
    assert gd.devices() == ["cpu"]


def test_chosen_states():
    for model in (gd.Model(CONFIG), gd.Model(gd.Config(**SMALL_TEACHERS["wavlm"]))):
        every, frames = model.forward(WAVS)
        for places in ([], [1], (2, 0), [1, 1]):
            hidden, own = model.forward(WAVS, states=places)
            assert np.array_equal(own, frames) and len(hidden) == len(places)
            assert all(np.array_equal(state, every[place]) for state, place in zip(hidden, places))


@pytest.mark.parametrize(("states", "error", "message"), [
    (1, TypeError, "states: expected a list of integers, got int"),
    ([0.0], TypeError, "states: expected an integer, got float"),
    ([-1], ValueError, "states: expected 0 to 2147483647, got -1"),
    ([0, 3], ValueError, "states: expected 0 to 2, got 3"),
])
def test_wrong_states(states, error, message):
    model = gd.Model(CONFIG)
    with pytest.raises(error) as caught:
        model.forward(WAVS, states=states)
    assert str(caught.value) == message
    assert len(model.forward(WAVS)[0]) == 3


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
