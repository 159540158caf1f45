"""Types: the package passes mypy, the stub says what the extension is, and a user's mistakes are found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gendistiller_ext as gd

pytest.importorskip("mypy")
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(gd.__file__).resolve().parent
INSTALLED = PACKAGE.parent != ROOT
TYPING = ROOT / "tests" / "typing"


def run(*words: "str | Path", cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True, timeout=300,
                          cwd=cwd)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> "list[tuple[str, int, str]]":
    """(file, line, code) of all that mypy finds in the package's checked rooms and in tests/typing. The package is the
    one that is imported: where it is installed, a copy of it, since mypy takes no others' packages beside what it
    checks."""
    package, cwd = PACKAGE, ROOT
    if INSTALLED:
        cwd = tmp_path_factory.mktemp("copy")
        package = shutil.copytree(PACKAGE, cwd / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "*.safetensors"))
    said = run("mypy", "--config-file", ROOT / "pyproject.toml", "--cache-dir", tmp_path_factory.mktemp("cache"),
               "--no-pretty", "--hide-error-context", TYPING / "right.py", TYPING / "wrong.py",
               *(package / f"{name}.py" for name in ("__init__", "torch", "training/trainer")), cwd=cwd)
    found = re.findall(r"^(\S+?):(\d+): error: .*\[([\w-]+)\]$", said, re.MULTILINE)
    assert said.count(": error:") == len(found), said
    assert re.search(r"^Found \d+ errors? in", said, re.MULTILINE), said
    return [(Path(file).name, int(line), code) for file, line, code in found]


def test_the_package_and_right_programs_have_no_errors(errors: "list[tuple[str, int, str]]") -> None:
    assert [error for error in errors if error[0] != "wrong.py"] == []


def test_each_wrong_line_is_found(errors: "list[tuple[str, int, str]]") -> None:
    lines = (TYPING / "wrong.py").read_text(encoding="utf-8").splitlines()
    expected = [("wrong.py", number, line.rpartition("# error: ")[2])
                for number, line in enumerate(lines, 1) if "  # error: " in line]
    assert len(expected) > 15
    assert sorted(errors) == sorted(expected)


def test_the_stub_is_the_extension(tmp_path: Path) -> None:
    """Every public name, every parameter's name, kind and default, by the signatures in the docstrings."""
    said = run("mypy.stubtest", "gendistiller_ext._core", "--mypy-config-file", ROOT / "pyproject.toml",
               cwd=tmp_path if INSTALLED else ROOT)
    assert re.search(r"^Success: no issues found", said, re.MULTILINE), said
