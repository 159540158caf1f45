"""Random objects for every argument: an exception of the few kinds that are promised, or a result; no crash,
and no change of the model with an exception."""

from __future__ import annotations

import numpy as np
import pytest

import gendistiller_ext as gd
from conftest import SEED, SMALL

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings, strategies as st  # noqa: E402

CONFIG = gd.Config(**SMALL)
MODEL = gd.Model(CONFIG, seed=1)
OPTIMIZER = gd.AdamW(MODEL, lr=0.0)
D, P = CONFIG.encoder_embed_dim, MODEL.num_params
WAVS = np.random.default_rng(SEED).standard_normal((2, 900)).astype(np.float32)
PROMISED = (ValueError, TypeError, NotImplementedError, MemoryError, OverflowError)

fuzz = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


class Array(np.ndarray):
    pass


class Sized:
    def __len__(self):
        return 10 ** 9


class Index:
    def __index__(self):
        raise ValueError("no index")


dtypes = st.sampled_from(["f4", ">f4", "f8", "f2", "i8", "u8", "?", "c8", "O", "S3", "U2", "M8[s]",
                          [("a", "f4")], "V4"])
sizes = st.one_of(st.integers(0, 3), st.sampled_from([12, 399, 400, 401, 900, P]))
lists = st.lists


@st.composite
def arrays(draw):
    shape = tuple(draw(lists(sizes, max_size=4)))
    if np.prod(shape, dtype=float) > 50000:
        shape = shape[:1]
    array = np.zeros(shape, draw(dtypes))
    for axis in range(array.ndim):
        array = array[(slice(None),) * axis + (slice(None, None, draw(st.sampled_from([1, 1, 2, -1]))),)]
    if draw(st.booleans()):
        array = array.T
    if array.dtype.kind == "f" and array.size and draw(st.booleans()):
        array[...] = draw(st.sampled_from([np.nan, np.inf, 1e30, 1.0]))
    if draw(st.booleans()):
        array = array.view(Array)
    if draw(st.booleans()):
        array.flags.writeable = False
    return array


# More than any machine's memory, over one float.
huge = st.sampled_from([(10 ** 17,), (1, 10 ** 17), (10 ** 17, 1), (10 ** 8, 10 ** 9), (400, 10 ** 15),
                        (10 ** 7, 2)]).map(lambda shape: np.broadcast_to(np.zeros(1, "f4"), shape))
scalars = st.one_of(st.none(), st.booleans(), st.integers(-2 ** 70, 2 ** 70), st.integers(-2, 5), st.floats(),
                    st.text(max_size=5), st.binary(max_size=5), st.builds(object), st.builds(Sized),
                    st.builds(Index), st.builds(np.float32), st.builds(np.int64), st.complex_numbers(),
                    st.sampled_from(["float32", "mean", "sum", "\ud800"]))
anything = st.recursive(st.one_of(scalars, arrays(), huge),
                        lambda inner: st.one_of(
                            lists(inner, max_size=3), lists(inner, max_size=3).map(tuple),
                            st.dictionaries(st.text(max_size=3), inner, max_size=2)), max_leaves=5)


def state() -> list:
    optimizer = OPTIMIZER.state()
    return [MODEL.flat_params().copy(), optimizer["m"], optimizer["v"], optimizer["step"]]


def attempt(call, *promised, into: np.ndarray = np.zeros(0)) -> None:
    before = [*state(), into.copy()]
    try:
        call()
    except (*PROMISED, *promised):
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip([*state(), into], before))


def one_odd(data, right: dict) -> dict:
    """The right arguments, one of them replaced by anything (or two)."""
    for name in data.draw(lists(st.sampled_from(sorted(right)), min_size=1, max_size=2)):
        right[name] = data.draw(anything)
    return right


@fuzz
@given(st.data())
def test_forward(data):
    options = one_odd(data, dict(wavs=WAVS, lengths=None, num_layers=None, num_threads=1, precision=None,
                                 dropout_seed=None, states=None))
    if isinstance(options["num_threads"], int) and options["num_threads"] > 16:
        options["num_threads"] = 2
    attempt(lambda: MODEL.forward(**options))


@fuzz
@given(st.data())
def test_distill_step(data):
    into = np.zeros(P, np.float32)
    attempt(lambda: MODEL.distill_step(**one_odd(data, dict(
        wavs=WAVS, targets=np.zeros((2, 2, 2, D), np.float32), lengths=None, lam=1.0, loss_type="l2", feat_pen_loss=1.0,
        reduction="mean", history="free", dropout_seed=None, precision=None, into=into))), into=into)


@fuzz
@given(st.data())
def test_backward(data):
    grad, into = np.zeros((2, 2, D), np.float32), np.zeros(P, np.float32)
    attempt(lambda: MODEL.backward(**one_odd(data, dict(
        wavs=WAVS, grad_hidden=[None, grad, grad], lengths=None, num_layers=None, dropout_seed=None,
        into=into))), into=into)


@fuzz
@given(st.data())
def test_optimizer(data):
    attempt(lambda: OPTIMIZER.step(**one_odd(data, dict(grads=np.zeros(P, np.float32), lr=0.0))))
    attempt(lambda: gd.AdamW(**one_odd(data, dict(
        model=MODEL, lr=0.1, betas=(0.9, 0.9), eps=1e-6, weight_decay=0, clip=0, variant="adamw"))))
    attempt(lambda: OPTIMIZER.load_state(one_odd(data, OPTIMIZER.state())))
    attempt(lambda: OPTIMIZER.load_state(data.draw(anything)))


@fuzz
@given(st.data())
def test_functions(data):
    right = np.zeros((2, 2, 2, D), np.float32)
    attempt(lambda: gd.distill_loss(**one_odd(data, dict(
        pred=right, target=right, frames=[1, 2], lam=1.0, loss_type="l2",
        reduction="mean"))))
    attempt(lambda: gd.num_frames(CONFIG, data.draw(anything)))
    attempt(lambda: MODEL.load_params(data.draw(anything)))
    name = MODEL.tensors[0].name
    odd = {data.draw(st.text(max_size=3)): data.draw(anything)}
    attempt(lambda: MODEL.load_params({name: MODEL.params[name], **odd}))
    config = data.draw(st.one_of(st.just(CONFIG), anything))
    attempt(lambda: gd.Model(config, data.draw(anything), data.draw(anything)), gd.DeviceError)
    texts = st.sampled_from([MODEL.config_json, "[]", "{\"encoder_layers\": 9}"])
    attempt(lambda: gd._core.Model(data.draw(st.one_of(st.text(), texts))))
    attempt(lambda: gd._core.Model._load(data.draw(anything)), OSError)
