"""The C library alone: built from its sources by one command, what it exports, and plans that overflow."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "csrc").glob("*.c")), *sorted((ROOT / "csrc" / "cpu").glob("*.c"))]
FLAGS = ["-std=gnu11", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC", "-fvisibility=hidden"]
SANITIZERS = ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


def run(*command: "str | Path") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libgendistiller.so, with UndefinedBehaviorSanitizer."""
    folder = tmp_path_factory.mktemp("library")
    cc = shlex.split(os.environ.get("CC", "cc"))
    run(*cc, *FLAGS, *SANITIZERS, "-O0", "-DGD_EXPORT", "-shared", *SOURCES, "-lm", "-ldl", "-o",
        folder / "libgendistiller.so")
    return folder / "libgendistiller.so"


def test_it_exports_what_the_header_declares(library):
    header = (ROOT / "csrc" / "gendistiller.h").read_text(encoding="utf-8")
    header = re.sub(r"/\*.*?\*/|typedef[^;{]*;", "", header, flags=re.S)
    declared = set(re.findall(r"\b(gd_[a-z0-9_]+)\(", header))
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.splitlines()}
    assert exported == declared


def test_plans_that_no_memory_holds(library, tmp_path):
    cc = shlex.split(os.environ.get("CC", "cc"))
    run(*cc, *FLAGS, "-O1", "-I", ROOT / "csrc", ROOT / "tests" / "library" / "plan_test.c", library,
        f"-Wl,-rpath,{library.parent}", *SANITIZERS, "-o", tmp_path / "plan_test")
    assert run(tmp_path / "plan_test").stdout == "passed\n"


@pytest.mark.skipif(not shutil.which("clang"), reason="clang is not installed")
def test_clang_compiles_it_without_a_warning(tmp_path):
    run("clang", *FLAGS, "-O0", "-shared", *SOURCES, "-lm", "-ldl", "-o", tmp_path / "libgendistiller.so")
