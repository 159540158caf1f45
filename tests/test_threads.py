"""Threads and processes: models side by side, a model shared, other numbers of threads, fork()."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import gendistiller_ext as gd
from conftest import SEED, SMALL_CONFIGS

CONFIG = gd.Config(**SMALL_CONFIGS["vector_widths"])
WAVS = [
    np.random.default_rng(SEED + n).standard_normal(n).astype(np.float32) for n in (16000, 400, 9000, 12345)
]
L, D = len(CONFIG.target_layers), CONFIG.encoder_embed_dim
TARGETS = np.random.default_rng(SEED).standard_normal((L, len(WAVS), 49, D)).astype(np.float32)
SEEDED = dict(dropout_seed=(7, 3, 0))


def results(model: gd.Model, **options) -> list[np.ndarray]:
    """Everything that a model computes, as arrays."""
    hidden, frames = model.forward(WAVS, **options)
    step = model.distill_step(WAVS, TARGETS, **SEEDED, **options)
    gradient = model.backward(WAVS, [None, TARGETS[0]] + [None] * (L - 1), **SEEDED, **options)
    return [*hidden, frames, np.array(step.loss), step.l1, step.cos, step.flat_grads, gradient]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def in_threads(tasks: list) -> list:
    """Results of functions that run at once, each in a thread; all start together."""
    out: list = [None] * len(tasks)
    barrier = threading.Barrier(len(tasks))

    def run(i: int) -> None:
        barrier.wait()
        try:
            out[i] = tasks[i]()
        except BaseException as error:
            out[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in out:
        if isinstance(result, BaseException):
            raise result
    return out


@pytest.fixture(scope="module")
def model() -> gd.Model:
    return gd.Model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def expected(model) -> list[np.ndarray]:
    return results(model)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(model, expected, num_threads):
    assert same(results(model, num_threads=num_threads), expected)
    assert same(results(model), expected)


def test_two_models_at_once(expected):
    models = [gd.Model(CONFIG, seed=seed) for seed in (1, 2)]
    serial = [results(model) for model in models]
    assert same(serial[0], expected) and not same(serial[0], serial[1])
    for _ in range(5):
        parallel = in_threads([lambda model=model: results(model, num_threads=2) for model in models])
        assert all(same(a, b) for a, b in zip(parallel, serial))


def test_one_model_shared(model, expected):
    for got in in_threads([lambda n=n: results(model, num_threads=n) for n in (1, 2, 1, 3)]):
        assert same(got, expected)


def test_training_at_once():
    """Each thread trains a model of its own: the same curve as alone, bit for bit."""
    def train(seed: int) -> np.ndarray:
        model = gd.Model(CONFIG, seed=seed)
        optimizer = gd.AdamW(model, lr=1e-3)
        for step in range(4):
            optimizer.step(model.distill_step(WAVS, TARGETS, dropout_seed=(seed, step, 0)).flat_grads)
        return model.flat_params().copy()

    alone = [train(1), train(2)]
    at_once = in_threads([lambda: train(1), lambda: train(2)])
    assert all(np.array_equal(a, b) for a, b in zip(alone, at_once))


def test_readers_and_a_writer():
    """While one thread exchanges the parameters, others see the old or the new ones, never both."""
    model = gd.Model(CONFIG, seed=1)
    choices = [
        {name: value.copy() for name, value in gd.Model(CONFIG, seed=seed).params.items()} for seed in (1, 2)
    ]
    states = []
    for params in choices:
        model.load_params(params)
        states.append(model.forward(WAVS)[0][-1])

    def read() -> list[bool]:
        got = [model.forward(WAVS, num_threads=1)[0][-1] for _ in range(20)]
        return [any(np.array_equal(state, one) for one in states) for state in got]

    def write() -> None:
        for i in range(60):
            model.load_params(choices[i % 2])

    one, two, _ = in_threads([read, read, write])
    assert all(one) and all(two)


def test_the_lock_is_free_after_errors(model, expected):
    def wrong() -> None:
        for _ in range(50):
            for call in (
                lambda: model.forward(WAVS, num_layers=99),
                lambda: model.distill_step(WAVS, TARGETS[:1]),
                lambda: model.backward(WAVS, [None]),
                lambda: model.forward([WAVS[0] * np.nan]),
            ):
                with pytest.raises(ValueError):
                    call()

    in_threads([wrong, wrong, lambda: results(model)])
    assert same(results(model), expected)


def test_the_gil_is_released():
    """A Python thread goes on while another is within one C call."""
    model = gd.Model(gd.Config.preset("gendistiller"))
    wav = [np.random.default_rng(SEED).standard_normal(160000).astype(np.float32)]
    model.forward(wav, num_threads=1)
    ticks, done = [], threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    model.forward(wav, num_threads=1)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(begin < moment < end for moment in ticks) > (end - begin) / 0.1


def test_no_deadlock_in_a_finaliser():
    """Arguments of a subclass whose destructor calls the model that converts them."""
    model = gd.Model(CONFIG, seed=1)
    calls = []

    class Calls(np.ndarray):
        def __del__(self) -> None:
            calls.append(model.forward([WAVS[1]])[1])

    for _ in range(3):
        model.forward([np.array(WAVS[1]).view(Calls), WAVS[1].astype(">f4").view(Calls)])
    assert len(calls) >= 3


def _child(model: gd.Model, expected: list[np.ndarray], queue) -> None:
    queue.put(
        same(results(model, num_threads=2), expected) and same(results(gd.Model(CONFIG, seed=1)), expected)
    )


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork(model, expected):
    """A child process uses a model that the parent's threads have used, and the parent goes on."""
    results(model, num_threads=2)
    gd.distill_loss(TARGETS, TARGETS)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(model, expected, queue)) for _ in range(2)]
    for child in children:
        child.start()
    assert same(results(model, num_threads=2), expected)
    assert [queue.get(timeout=60) for _ in children] == [True, True]
    for child in children:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_amid_a_call():
    """A fork while another thread holds the model's lock: the child's lock is free."""
    model = gd.Model(gd.Config.preset("gendistiller"))
    wav = [np.random.default_rng(SEED).standard_normal(320000).astype(np.float32)]
    short = [WAVS[1]]
    expected = model.forward(short)[0][-1]
    for num_threads in (1, 2):
        thread = threading.Thread(target=lambda: model.forward(wav, num_threads=num_threads))
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if np.array_equal(model.forward(short, num_threads=2)[0][-1], expected) else 1)
        thread.join()
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to count threads in")
def test_as_many_threads_as_asked_for_are_there():
    model = gd.Model(CONFIG, seed=1)
    before = len(os.listdir("/proc/self/task"))
    for num_threads in (1, 3, 2, 5, 1):
        model.forward(WAVS, num_threads=num_threads)
        assert len(os.listdir("/proc/self/task")) - before == num_threads - 1


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc to read masks in")
def test_workers_take_no_signals_of_the_process():
    """They block all but faults, which a handler of crashes wants to see in whichever thread they are."""
    model = gd.Model(CONFIG, seed=1)
    before = set(os.listdir("/proc/self/task"))
    own = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    model.forward(WAVS, num_threads=3)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == own
    workers = set(os.listdir("/proc/self/task")) - before
    assert len(workers) == 2
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS,
              signal.SIGABRT}
    def taken(worker: str) -> set[int]:
        with open(f"/proc/self/task/{worker}/status", encoding="ascii") as stream:
            blocked = int(next(line for line in stream if line.startswith("SigBlk:")).split()[1], 16)
        return {number for number in signal.valid_signals() if not blocked >> (number - 1) & 1}

    for worker in workers:
        end = time.monotonic() + 20  # until it has begun the C library blocks everything in it
        while taken(worker) <= {signal.SIGKILL, signal.SIGSTOP} and time.monotonic() < end:
            time.sleep(0.01)
        assert taken(worker) - {signal.SIGKILL, signal.SIGSTOP} == faults


def test_a_storm_of_signals_changes_nothing(model, expected):
    """Python's handlers run, in the main thread, while passes do."""
    where = []
    former = {number: signal.signal(number, lambda *_: where.append(threading.current_thread()))
              for number in (signal.SIGALRM, signal.SIGUSR1)}
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert same(results(model, num_threads=3), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in former.items():
            signal.signal(number, handler)
    assert len(where) > 5 and set(where) == {threading.main_thread()}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
def test_default_is_the_cores_of_this_process():
    """A process that is confined to one core starts no thread of its own."""
    script = """
import os, sys
import numpy as np, gendistiller_ext as gd
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before = len(os.listdir("/proc/self/task"))
model = gd.Model(gd.Config.preset("gendistiller"))
model.forward(np.zeros((2, 8000), np.float32))
print(len(os.listdir("/proc/self/task")) - before)
"""
    root = os.path.dirname(os.path.dirname(gd.__file__))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
