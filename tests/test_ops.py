"""The backend's operations against float64, the crew of threads, and what a plan holds a call to: tests/ops,
tests/threads and tests/plan, which are C."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [*(ROOT / "csrc" / name for name in ("context.c", "cores.c", "device.c", "plugin.c")),
           *sorted((ROOT / "csrc" / "cpu").glob("*.c"))]
#: What only the whole library has.
ABOVE = sorted({*(ROOT / "csrc").glob("*.c")} - {*LIBRARY})
CC = shlex.split(os.environ.get("CC", "cc"))
FLAGS = ["-std=gnu11", "-O3", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-pthread"]


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900,
                          env={**os.environ, **env})


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test programs, compiled from the sources as they are."""
    folder = tmp_path_factory.mktemp("programs")

    def compile_file(source: Path) -> Path:
        target = folder / f"{source.parent.name}-{source.stem}.o"
        done = run(*CC, *FLAGS, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        library = list(pool.map(compile_file, LIBRARY))
        tests = {name: list(pool.map(compile_file, sorted((ROOT / "tests" / name).glob("*.c"))))
                 for name in ("ops", "threads", "plan")}
        tests["plan"] += pool.map(compile_file, ABOVE)
    for name, objects in tests.items():
        done = run(*CC, *objects, *library, "-o", folder / name, "-pthread", "-lm", "-ldl")
        assert done.returncode == 0, done.stderr
    return {name: folder / name for name in tests}


# An extension brings products of a precision, which these operations have; the rest is the set's that it extends.
REDUCED = ["_reduced", "conv"]


@pytest.mark.parametrize("masked, cases", [
    ("", []), ("amx_bf16,amx_int8", REDUCED), ("amx_bf16,amx_int8,avx512_bf16,avx512_vnni", REDUCED), ("avx512", []),
    ("avx512,avx2,neon", [])])
def test_ops(programs: dict[str, Path], masked: str, cases: list[str]) -> None:
    done = run(programs["ops"], *cases, GENDISTILLER_DISABLE_CPU=masked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed", done.stdout.splitlines()[-1])


# An extension of a set goes with it.
EXTENSIONS = {"avx2": {"avx_vnni"}, "avx512": {"avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"}}


@pytest.mark.parametrize("masked", ["avx2", "avx512", " avx512 , avx2", "avx512_bf16", "avx512_vnni,avx_vnni",
                                    "amx_bf16", "neon,,nonsense", "avx", ","])
def test_masked_instruction_sets(programs: dict[str, Path], masked: str) -> None:
    def features(mask: str) -> set[str]:
        done = run(programs["ops"], "bias_backward rows=1 ", GENDISTILLER_DISABLE_CPU=mask)
        assert done.returncode == 0, done.stdout + done.stderr
        return set(done.stdout.splitlines()[0].removeprefix("cpu: ").split())

    names = {name.strip() for name in masked.split(",")}
    assert features(masked) == features("") - names - set().union(*(EXTENSIONS.get(name, ()) for name in names))
    assert "generic" in features(masked)


def test_every_operation_has_cases(programs: dict[str, Path]) -> None:
    header = (ROOT / "csrc" / "backend.h").read_text(encoding="utf-8")
    table = re.search(r"struct gd_backend \{.*?\n\};", header, re.DOTALL)[0]
    operations = set(re.findall(r"\(\*(\w+)\)\(", table))
    cases = {line.split()[0] for line in run(programs["ops"], "--list").stdout.splitlines()}
    # Memory, threads, sizes, and what other operations' cases cannot do without.
    infrastructure = {"allocate", "release", "upload", "download", "zero", "synchronize", "for_each", "scratch_size",
                      "packed_size", "pack", "packed_pos_conv_size", "pack_pos_conv", "conv_taps_size", "split_taps",
                      "merge_taps", "conv_backward_scratch", "close"}
    assert operations - infrastructure <= cases


def test_a_filter_that_fits_nothing_fails(programs: dict[str, Path]) -> None:
    assert run(programs["ops"], "no such case").returncode == 1
    assert run(programs["ops"], "--no-such-option").returncode == 2
    assert run(programs["ops"], "--backend", "abacus").returncode == 2


def test_threads(programs: dict[str, Path]) -> None:
    done = run(programs["threads"])
    assert done.returncode == 0 and done.stdout == "passed\n", done.stdout + done.stderr


def test_plan(programs: dict[str, Path]) -> None:
    """A batch of other lengths, or another number of utterances or threads than planned is refused, whichever the
    padding."""
    done = run(programs["plan"])
    assert done.returncode == 0 and done.stdout == "passed\n", done.stdout + done.stderr
