"""The machine's name and what bounds it: the registers' peak and the libraries' matrix products."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Iterable

from bounds import progress

PRECISIONS = ("float32", "bfloat16", "int8")
# The second convolution on 2 s of audio, and the FFN on 7 s: (m, k, n).
GEMM_SHAPES = ((3199, 1536, 512), (349, 768, 3072))
# What multiplies in a precision, as gd.cpu_features() and Linux's list of features (of ARM) name it.
INSTRUCTIONS = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16"),
                "int8": ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")}
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8", "asimd")


def _first_line(path: str, start: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return next((line.split(":", 1)[1].strip() for line in stream if line.startswith(start)), "")
    except OSError:
        return ""


def cores() -> int:
    from gendistiller_ext import _core

    return _core.usable_cores()


def busy_seconds() -> float | None:
    """CPU time that the machine has spent on anything since it started; None where it doesn't say."""
    try:
        with open("/proc/stat", encoding="ascii") as stream:
            ticks = [int(word) for word in stream.readline().split()[1:9]]
    except OSError:
        return None
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def available_memory() -> int | None:
    """Bytes that programs can still have without swapping; None where the system doesn't say."""
    words = _first_line("/proc/meminfo", "MemAvailable").split()
    return int(words[0]) << 10 if words else None


def describe(packages: list[str]) -> dict:
    """Processor, instruction sets, caches, memory, system, versions: what the figures belong to."""
    info = "/proc/cpuinfo"
    flags = (_first_line(info, "flags") or _first_line(info, "Features")).split()
    family, number = _first_line(info, "cpu family"), _first_line(info, "model\t")
    name = _first_line(info, "model name") or platform.processor() or platform.machine()
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    import gendistiller_ext as gd

    versions["gendistiller_ext"] = gd.__version__
    memory = _first_line("/proc/meminfo", "MemTotal").split()
    return {
        "processor": f"{name}, family {family} model {number}" if family else name,
        "cores": cores(),
        "isa": [flag for flag in _FLAGS if flag in flags],
        "chosen": list(gd.cpu_features()),
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": versions,
    }


def lacking() -> list[str]:
    """The precisions for whose products the processor has no instructions, as far as GENDISTILLER_DISABLE_CPU leaves
    it any; none where the system doesn't say."""
    import gendistiller_ext as gd

    if platform.machine().lower() in ("x86_64", "amd64", "i686"):
        features = set(gd.cpu_features())
    else:
        features = set(_first_line("/proc/cpuinfo", "Features").split())
    return [precision for precision, names in INSTRUCTIONS.items() if features and not features & set(names)]


def build_peak(folder: Path) -> Path | None:
    """Compiles peak.c; None without a compiler that takes it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    library = folder / "peak.so"
    if compiler is None:
        return None
    source = str(Path(__file__).with_name("peak.c"))
    command = [*compiler.split(), "-O2", "-shared", "-fPIC", source, "-o", str(library)]
    built = subprocess.run(command, stderr=subprocess.DEVNULL, check=False)
    return library if built.returncode == 0 else None


def registers(start, library: Path, precisions: Iterable[str], threads: int) -> dict[str, float]:
    """{precision: operations a second}, without those for which there is no instruction. start(threads) starts a
    worker."""
    rates = {}
    with start(threads) as process:
        for precision in precisions:
            progress("registers' peak", precision=precision, threads=threads)
            rates[precision] = process.ask(do="peak", library=str(library), precision=precision,
                                           threads=threads)["per_second"]
    return {precision: rate for precision, rate in rates.items() if rate}


def products(start, library: str, precision: str, threads: int, budget: float) -> list[dict]:
    """[{library, precision, threads, shape, per_second}] of GEMM_SHAPES."""
    rows = []
    with start(threads) as process:
        for shape in GEMM_SHAPES:
            progress(f"matrix product {' x '.join(map(str, shape))}", engine=library, precision=precision,
                     threads=threads)
            answer = process.ask(do="gemm", library=library, precision=precision, threads=threads, shape=shape,
                                 budget=budget)
            m, k, n = shape
            rows.append({"library": answer["name"], "precision": precision, "threads": threads, "shape": list(shape),
                         "per_second": 2 * m * k * n / answer["seconds"]})
    return rows
