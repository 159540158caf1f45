"""AdamW's arguments and state. Its updates are compared with PyTorch's and S3PRL's in test_curve.py."""

from __future__ import annotations

import numpy as np
import pytest

import gendistiller_ext as gd
from conftest import SEED, SMALL

CONFIG = gd.Config(**SMALL)
P = gd.Model(CONFIG).num_params
GRADS = np.random.default_rng(SEED).standard_normal(P).astype(np.float32)


@pytest.fixture
def model() -> gd.Model:
    return gd.Model(CONFIG, seed=1)


def test_defaults(model):
    optimizer = gd.AdamW(model)
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (2e-4, (0.9, 0.98), 1e-6)
    assert (optimizer.weight_decay, optimizer.clip, optimizer.variant) == (1e-6, 5.0, "adamw")
    assert optimizer.model is model
    state = optimizer.state()
    assert (state["variant"], state["step"]) == ("adamw", 0)
    assert not state["m"].any() and not state["v"].any() and state["m"].shape == (P,)


def test_wrong_arguments(model):
    cases = [
        (dict(model=CONFIG), TypeError, "model: expected a gendistiller_ext.Model, got Config"),
        (dict(lr=-1.0), ValueError, "lr: expected a finite number of 0 or more, got -1"),
        (dict(lr=float("nan")), ValueError, "lr: expected a finite number of 0 or more, got nan"),
        (dict(lr="1e-3"), TypeError, "lr: expected a number, got str"),
        (dict(lr=np.ones(1)), TypeError, "lr: expected a number, got numpy.ndarray"),
        (dict(betas=0.9), TypeError, "betas: expected a pair of numbers, got float"),
        (dict(betas=(0.9,)), ValueError, "betas: expected a pair of numbers, got 1 items"),
        (dict(betas=(1.0, 0.9)), ValueError, "betas[0]: expected 0 to below 1, got 1"),
        (dict(betas=(0.9, -0.1)), ValueError, "betas[1]: expected 0 to below 1, got -0.1"),
        (dict(eps=10 ** 400), ValueError, "eps: expected a finite number of 0 or more, got inf"),
        (dict(weight_decay=-1), ValueError, "weight_decay: expected a finite number of 0 or more, got -1"),
        (dict(clip=None), TypeError, "clip: expected a number, got NoneType"),
        (dict(variant="sgd"), ValueError, "variant: expected 'adamw' or 'adamw_s3prl', got 'sgd'"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind) as caught:
            gd.AdamW(**{"model": model, **options})
        assert str(caught.value) == message
    assert gd.AdamW(model, lr=1, betas=[np.float32(0.5), 0], clip=0).betas == (0.5, 0.0)
    zeros = gd.AdamW(model, lr=0, eps=0, weight_decay=0)
    assert zeros.lr == zeros.eps == zeros.weight_decay == 0


def test_settings_beyond_all_sense(model):
    for name, message in (("lr", "below 1e+30, got 1e+30"), ("eps", "below 1e+30, got 1e+30")):
        with pytest.raises(ValueError) as caught:
            gd.AdamW(model, **{name: 1e30}).step(GRADS)
        assert str(caught.value) == f"{name}: expected at least 0 and {message}"


def test_it_may_be_subclassed(model):
    class Mine(gd.AdamW):
        pass

    assert isinstance(Mine(model), gd.AdamW) and Mine(model).model is model


def everything(optimizer: gd.AdamW) -> list:
    state = optimizer.state()
    return [optimizer.model.flat_params().copy(), state["m"], state["v"], state["step"]]


def same(a: list, b: list) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b))


def test_wrong_gradients_change_nothing(model):
    optimizer = gd.AdamW(model)
    optimizer.step(GRADS)
    before = everything(optimizer)
    nan, infinite = GRADS.copy(), GRADS.copy()
    nan[-1], infinite[0] = np.nan, np.inf
    cases = [
        (GRADS.astype(float), {}, ValueError, f"grads: expected float32 ({P},), got float64 ({P},)"),
        (GRADS[:-1], {}, ValueError, f"grads: expected float32 ({P},), got float32 ({P - 1},)"),
        (GRADS[None], {}, ValueError, f"grads: expected float32 ({P},), got float32 (1, {P})"),
        (None, {}, TypeError, "grads: expected a float32 array, got NoneType"),
        (nan, {}, ValueError, "grads: expected finite numbers, got a norm of nan"),
        (infinite, {}, ValueError, "grads: expected finite numbers, got a norm of inf"),
        (GRADS, dict(lr=-1), ValueError, "lr: expected a finite number of 0 or more, got -1"),
        (GRADS, dict(num_threads=0), ValueError, "num_threads: expected 1 to 2147483647, got 0"),
    ]
    for grads, options, kind, message in cases:
        with pytest.raises(kind) as caught:
            optimizer.step(grads, **options)
        assert str(caught.value).replace("-nan", "nan") == message
        assert same(everything(optimizer), before)


@pytest.mark.parametrize(
    "variant, factor", [("adamw", 1 - 0.5 * 0.2), ("adamw_s3prl", 1 - 0.5 * 0.02 ** 0.5 / 0.1 * 0.01)])
def test_without_a_gradient_weights_decay(model, variant, factor):
    """S3PRL's decays all but biases, by 0.01 whatever is asked for, at the rate corrected for the moments' start."""
    before = {name: value.copy() for name, value in model.params.items()}
    gd.AdamW(model, lr=0.5, weight_decay=0.2, variant=variant).step(np.zeros(P, np.float32))
    for name, value in model.params.items():
        matrix = value.ndim > 1 and name.endswith((".weight", ".weight_v"))
        decays = "bias" not in name if variant == "adamw_s3prl" else matrix
        np.testing.assert_allclose(value, before[name] * np.float32(factor if decays else 1), rtol=1e-6, err_msg=name)


def test_step_returns_the_norm_and_keeps_the_gradient(model):
    optimizer, grads = gd.AdamW(model, clip=0.5), GRADS.copy()
    norm = optimizer.step(grads)
    assert isinstance(norm, float)
    assert norm == pytest.approx(np.sqrt(np.sum(GRADS.astype(np.float64) ** 2)), rel=1e-12)
    assert np.array_equal(grads, GRADS)
    assert optimizer.state()["step"] == 1


def test_gradients_of_any_layout(model):
    wide = np.zeros(2 * P, np.float32)
    wide[::2] = GRADS
    expected = None
    for grads in (GRADS, GRADS.astype(">f4"), wide[::2], GRADS[::-1].copy()[::-1]):
        optimizer = gd.AdamW(gd.Model(CONFIG, seed=1))
        optimizer.step(grads)
        expected = expected or everything(optimizer)
        assert same(everything(optimizer), expected)


@pytest.mark.parametrize("variant", ["adamw", "adamw_s3prl"])
def test_resuming_is_exact(model, variant):
    options = dict(lr=1e-2, variant=variant)
    optimizer = gd.AdamW(model, **options)
    for _ in range(3):
        optimizer.step(GRADS)
    params, state = model.flat_params().copy(), optimizer.state()
    kept = {name: np.copy(value) for name, value in state.items()}
    for _ in range(3):
        optimizer.step(GRADS * 2, lr=3e-3)
    expected = everything(optimizer)
    assert all(np.array_equal(state[name], kept[name]) for name in state)  # copies, not views

    other = gd.Model(CONFIG, seed=9)
    resumed = gd.AdamW(other, **options)
    other.flat_params()[:] = params
    other.touch()
    resumed.load_state(state)
    for _ in range(3):
        resumed.step(GRADS * 2, lr=3e-3)
    assert same(everything(resumed), expected) and expected[3] == 6


def test_wrong_states_change_nothing(model):
    optimizer = gd.AdamW(model)
    optimizer.step(GRADS)
    before, good = everything(optimizer), optimizer.state()
    bad = np.full(P, -1, np.float32)
    cases = [
        ([], TypeError, "state: expected a dict, got list"),
        ({}, ValueError, "state: expected 'step', 'm' and 'v', got none under 'step'"),
        ({**good, "lr": 1}, ValueError, "state: unknown entry 'lr'"),
        ({**good, "variant": "adamw_s3prl"}, ValueError,
         "state['variant']: expected 'adamw', as this optimiser is, got 'adamw_s3prl'"),
        ({**good, "variant": None}, TypeError, "state['variant']: expected a string, got NoneType"),
        ({**good, "step": -1}, ValueError, "state['step']: expected 0 to 9007199254740992, got -1"),
        ({**good, "step": 1.0}, TypeError, "state['step']: expected an integer, got float"),
        ({**good, "m": bad[1:]}, ValueError, f"state['m']: expected float32 ({P},), got float32 ({P - 1},)"),
        ({**good, "m": bad * 2, "v": bad}, ValueError, "state['v']: expected finite values of 0 or more"),
        ({**good, "m": bad * np.inf}, ValueError, "state['m']: expected finite values"),
    ]
    for state, kind, message in cases:
        with pytest.raises(kind) as caught:
            optimizer.load_state(state)
        assert str(caught.value) == message
        assert same(everything(optimizer), before)
    optimizer.load_state({name: good[name] for name in ("step", "m", "v")})
    assert same(everything(optimizer), before)
