"""An engine in a process of its own: a JSON request a line, an answer a line, each within a limit."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterable

WORKER = Path(__file__).with_name("worker.py")
ENDED, LATE = "Ended", "Late"  # kinds of failure: the process is no more, by itself or for it took too long
BUILDING = 5  # times the limit: to start and load, to compile, to export
MISSING = ("ModuleNotFoundError", "ImportError", "Unavailable")


class Failed(Exception):
    """A process answered with an error; `kind` is the exception's class there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def reason(self) -> str:
        return str(self) if self.kind in (*MISSING, ENDED, LATE) else f"{self.kind}: {self}"


class Process:
    """`script` run by this Python; its standard error goes to the file `log`. limit: seconds for an answer."""

    def __init__(self, log: Path, limit: float, script: Path, *words: str, env: dict[str, str] | None = None) -> None:
        self.limit, self.received, self.waiting = limit, b"", False
        with open(log, "ab") as stream:
            # In a session of its own: an interrupt from the terminal is for who drives it, and what it starts itself
            # (compilers) ends with it.
            self.child = subprocess.Popen([sys.executable, str(script), *words], env=env, stdin=subprocess.PIPE,
                                          stdout=subprocess.PIPE, stderr=stream, bufsize=0, start_new_session=True)

    def send(self, **request: Any) -> None:
        self.waiting = True
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write(json.dumps(request).encode() + b"\n")

    def _line(self, limit: float) -> bytes:
        """The next line of its output; empty where it has ended. TimeoutError where none comes."""
        end = time.monotonic() + limit
        while b"\n" not in self.received:
            if not select.select([self.child.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self.child.stdout.fileno(), 1 << 16)
            if not part:
                return b""
            self.received += part
        line, _, self.received = self.received.partition(b"\n")
        return line

    def answer(self, limit: float | None = None) -> dict:
        """To what was sent last. Raises Failed for an error there, an end, or an answer later than the limit."""
        limit = self.limit if limit is None else limit
        try:
            line = self._line(limit)
        except TimeoutError:
            self.kill()
            raise Failed(LATE, f"took longer than {limit:g} s") from None
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(timeout=5)
            self.kill()
            raise Failed(ENDED, f"the process ended with status {self.child.returncode}")
        self.waiting = False
        try:
            answer = json.loads(line)
        except ValueError:
            self.kill()
            raise Failed("ValueError", f"expected a line of JSON, got {line[:80]!r}") from None
        if "error" in answer:
            raise Failed(answer["kind"], answer["error"])
        return answer

    def ask(self, limit: float | None = None, **request: Any) -> dict:
        self.send(**request)
        return self.answer(limit)

    def kill(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()

    def close(self) -> None:
        """Lets it end by itself, unless it is busy still."""
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(timeout=0 if self.waiting else 30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.child.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def worker(threads: int, log: Path, limit: float) -> Process:
    """A worker.py with so many threads that has started. Raises Failed where it doesn't."""
    # OPENBLAS_*: an override of the kernel choice would be NumPy's alone.
    env = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
    env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    process = Process(log, limit, WORKER, env=env)
    process.ask(BUILDING * limit, do="cpu")
    return process


def cpu_seconds(processes: Iterable[Process]) -> float:
    """CPU time so far of this process, of those of its children that have ended, and of `processes`, spinning
    threads included."""
    seconds = sum(os.times()[:4])
    for process in processes:
        with contextlib.suppress(Failed):
            seconds += process.ask(do="cpu")["seconds"]
    return seconds
