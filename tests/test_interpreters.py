"""What the module tells interpreters of itself: that it needs the GIL, and one interpreter a process."""

from __future__ import annotations

import subprocess
import sys
import sysconfig

import pytest

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not FREE_THREADED, reason="this Python always has a GIL")
def test_the_import_turns_the_gil_on() -> None:
    done = python("import sys, numpy; print(sys._is_gil_enabled()); import gendistiller_ext; "
                  "print(sys._is_gil_enabled())")
    assert done.stdout.split() == ["False", "True"], done.stderr
    assert "GIL) has been enabled to load module 'gendistiller_ext._core'" in done.stderr
    forced = python("import sys, gendistiller_ext; print(sys._is_gil_enabled())", "-X", "gil=0")
    assert forced.stdout.split() == ["False"], forced.stderr


@pytest.mark.skipif(sys.version_info < (3, 13), reason="this Python has no interpreters with a GIL of their own")
def test_another_interpreter_is_refused() -> None:
    done = python("""
import _interpreters
import gendistiller_ext
made = _interpreters.create('isolated')
error = _interpreters.exec(made, 'import gendistiller_ext._core')
print(error.formatted if error else 'imported')
""")
    assert "gendistiller_ext._core does not support loading in subinterpreters" in done.stdout, done.stdout + done.stderr
