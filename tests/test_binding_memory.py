"""Leaks, what weights and working memory take, exported symbols, and what importing the package costs."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import subprocess
import sys
import time
import tracemalloc
import weakref
from pathlib import Path
from typing import Callable

import numpy as np
import pytest

import gendistiller_ext as gd
from binding_inputs import CONFIG, TARGETS, WAVS, Raises, spoilt
from conftest import SMALL


@pytest.fixture(scope="module")
def model() -> gd.Model:
    return gd.Model(CONFIG, seed=1)


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
        "forward of a list": lambda: model.forward(list(WAVS), [1000, 1200], num_layers=1),
        "dropout": lambda: model.forward(WAVS, dropout_seed=(1, 2, 3)),
        "statistics": lambda: model.forward(WAVS, statistics=np.stack(
            [model._add_statistics(None, WAVS[0], 0)] * len(WAVS))),
        "kept statistics": lambda: setattr(model, "statistics", model._add_statistics(model.statistics, WAVS[0], 9)),
        "wrong statistics": lambda: model.forward(WAVS, statistics=np.zeros((len(WAVS), 113))),
        "misshapen statistics": lambda: setattr(model, "statistics", WAVS),
        "NaN in statistics' audio": lambda: model._add_statistics(None, np.full(9, np.nan, np.float32), 0),
        "forward of a copy": lambda: model.forward(WAVS.astype(">f4")),
        "states": lambda: model.forward(WAVS, states=[0, 2]),
        "states beyond": lambda: model.forward(WAVS, states=[0, 3]),
        "backward": lambda: model.backward(WAVS, [None, TARGETS[0], None]),
        "distill_step": lambda: model.distill_step(WAVS, TARGETS, lengths=[1000, 1200], into=grads).grads,
        "distill_loss": lambda: gd.distill_loss(TARGETS, TARGETS, [1, 2]),
        "AdamW": lambda: gd.AdamW(model, betas=[0.5, 0.5]).betas,
        "step": lambda: optimizer.step(grads),
        "state": lambda: optimizer.load_state(optimizer.state()),
        "load_params": lambda: model.load_params(params),
        "parameters": lambda: (model.params, model.tensors, model.num_params, model.flat_params()),
        "attributes": lambda: (model.config_json, model.device, repr(model)),
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
    python, memory = tracemalloc.get_traced_memory()[0], resident()
    references = [sys.getrefcount(thing) for thing in things]
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
    command = [nm, "-D", "--defined-only", gd._core.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
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
    command = [sys.executable, "-c", script]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout.split()
            for _ in range(5)]
    assert all(len(run) == 1 for run in runs), runs
    assert min(float(run[0]) for run in runs) < 0.05


def test_the_student_loads_fast(tmp_path):
    """17.6 million float32 from a warm cache. The least of several times: other programs only add to it."""
    gd.Model(gd.Config.preset("gendistiller")).save(tmp_path / "student.safetensors")
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        gd.Model.load(tmp_path / "student.safetensors")
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.15


def measure(*arguments: object) -> list[int]:
    """A process of its own: the full student without a word of the tests' own memory. Arguments are forward passes,
    seconds and precision; bytes that the process holds before the first and after each, then its peak after each."""
    script = """
import sys
import numpy as np
import gendistiller_ext as gd

def field(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name)) << 10

model = gd.Model(gd.Config.preset("gendistiller"))
held, peak = [field("VmRSS")], []
for seconds, precision in zip(sys.argv[1::2], sys.argv[2::2]):
    wav = np.random.default_rng(0).standard_normal((1, round(16000 * float(seconds))), np.float32)
    model.forward(wav, num_threads=2, precision=precision)
    held.append(field("VmRSS"))
    peak.append(field("VmHWM"))
print(*held, *peak)
"""
    root = str(Path(gd.__file__).resolve().parent.parent)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True,
                                                 cwd=root).stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_derived_weights_and_working_memory(precision):
    """One frame needs next to no workspace, so what the process holds more after it are packed, filtered, spectral
    and low-precision weights; no more is taken while they are made. A working set for 15 s comes on top."""
    before, ready, _, packing, working = measure(1 / 40, precision, 15, precision)
    weights = 4 * gd.Model(gd.Config.preset("gendistiller")).num_params
    assert 0.5 * weights < ready - before <= packing - before < 1.6 * weights
    assert working - packing < 100e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_derived_weights_of_one_precision_at_a_time():
    before, *rest = measure(1 / 40, "float32", 1 / 40, "bfloat16", 1 / 40, "int8", 1 / 40, "float32")
    weights = 4 * gd.Model(gd.Config.preset("gendistiller")).num_params
    assert max(rest) - before < 1.6 * weights
    assert rest[2] < rest[1] < rest[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_ten_minutes_take_less_than_a_gibibyte():
    """The full student, three states returned. Memory is linear in the length, so that a quarter of a minute and a
    whole one tell what ten take."""
    short, minute = (measure(seconds, "float32")[-1] for seconds in (15, 60))
    assert minute + (600 - 60) * (minute - short) / (60 - 15) < 1 << 30


def in_a_process(script: str) -> list[str]:
    """The lines that a Python of its own prints, without what other tests left in this one's memory."""
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


GROWING = """
import os
import numpy as np, gendistiller_ext as gd
from binding_inputs import CONFIG

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def train(model, seconds):
    wav = np.zeros((1, 16000 * seconds), np.float32)
    frames = gd.num_frames(CONFIG, 16000 * seconds)
    model.distill_step(wav, np.ones((2, 1, frames, CONFIG.encoder_embed_dim), np.float32))

longest, growing = gd.Model(CONFIG), gd.Model(CONFIG)
before = resident()
train(longest, 30)
print(resident() - before)
for seconds in range(1, 31):
    train(growing, seconds)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_workspace_that_grows_is_one_workspace():
    """Of batches each longer than the one before, the last one's working set stays."""
    once, both = map(int, in_a_process(GROWING))
    assert once > 5e6 and both < 4 * once


WITHOUT_MEMORY = """
import resource, sys
import numpy as np, gendistiller_ext as gd
from binding_inputs import CONFIG, WAVS
model, minute = gd.Model(CONFIG, seed=1), np.zeros(960000, np.float32)
expected = model.forward(WAVS)[0]
size = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 25), size + (1 << 25)))
for _ in range(2):
    try:
        model.forward([minute] * 100, states=[])
    except MemoryError as error:
        print(str(error)[:29])
    assert all(np.array_equal(a, b) for a, b in zip(model.forward(WAVS)[0], expected))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_model_goes_on_after_a_batch_that_is_too_large():
    assert in_a_process(WITHOUT_MEMORY) == ["out of memory for a workspace"] * 2


def test_version():
    assert gd.__version__ == gd._core.__version__
    assert gd.cpu_features()[0] == "generic"
