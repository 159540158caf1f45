"""What a worker measures beside the engines: matrix products of the libraries, registers, its own memory."""

from __future__ import annotations

import ctypes
import os

import numpy as np


def library_gemm(library: str, precision: str, threads: int, m: int, k: int, n: int):
    """A function that multiplies (m, k) by (k, n) with PyTorch's library for that precision, or in float32 with
    NumPy's, and its name."""
    a, b = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
    if library == "NumPy":
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)
        info = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        name = "its BLAS"
        if info:
            name = f"{info[0]['internal_api']} {info[0]['version']} ({info[0].get('architecture')})"
        out = np.empty((m, n), np.float32)
        return (lambda: np.matmul(a, b, out=out)), f"NumPy: {name}"
    import torch

    torch.set_num_threads(threads)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    if precision == "int8":
        x, y = (x * 20).to(torch.int8), (y * 20).to(torch.int8)
        return (lambda: torch._int_mm(x, y)), "PyTorch: oneDNN"
    x, y = (value.to(getattr(torch, precision)) for value in (x, y))
    out = torch.empty(m, n, dtype=x.dtype)
    name = "oneDNN" if precision == "bfloat16" else "MKL" if torch.backends.mkl.is_available() else "its BLAS"
    return (lambda: torch.mm(x, y, out=out)), f"PyTorch: {name}"


def peak_memory() -> dict[str, int]:
    """Bytes of this process: now, and at most so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return {"now": int(fields["VmRSS"].split()[0]) * 1024, "peak": int(fields["VmHWM"].split()[0]) * 1024}
    except (OSError, KeyError):
        import resource

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"now": peak, "peak": peak}


def forget_peak() -> None:
    """Lets the peak start again from now, where the system can (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")
    except OSError:
        pass


def limit_memory(more: int) -> None:
    """Lets allocations fail that would take this process `more` bytes beyond what it has (Linux), so that an engine
    reports what it can't have rather than the system ending some process."""
    try:
        import resource
        with open("/proc/self/status", encoding="ascii") as stream:
            held = next(int(line.split()[1]) << 10 for line in stream if line.startswith("VmData"))
    except (ImportError, OSError, StopIteration):
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    soft = min(held + more, 2**62)
    resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def register_peak(library: str, precision: str, threads: int) -> float:
    """Operations a second of `threads` threads at once, best of 10 runs of about 50 ms: the system takes a
    while to give each thread a core. 0 without the instructions."""
    import time
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial
    from threading import Barrier

    peak_run = ctypes.CDLL(library).peak_run
    peak_run.restype, peak_run.argtypes = ctypes.c_double, [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64]
    run = partial(peak_run, precision.encode(), None)
    barrier, rounds = Barrier(threads), 1000
    begin = time.perf_counter()
    if not run(rounds):
        return 0.0
    while time.perf_counter() - begin < 0.05:
        begin, rounds = time.perf_counter(), 2 * rounds
        run(rounds)

    def one(_) -> tuple[float, float, float]:
        barrier.wait()
        begin = time.perf_counter()
        done = run(rounds)
        return done, begin, time.perf_counter()

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            done, begins, ends = zip(*pool.map(one, range(threads)))
            best = max(best, sum(done) / (max(ends) - min(begins)))
    return best
