"""A worker.py in a process of its own, as speed.py and training.py drive it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

ENDED = "Ended"  # kind of failure of a worker that is no more
MISSING = ("ModuleNotFoundError", "ImportError", "Unavailable")


class Failed(Exception):
    """A worker answered with an error; `kind` is the exception's class there."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Process:
    """A worker with `threads` threads; ask() sends a request and waits for the answer."""

    def __init__(self, threads: int, log: Path) -> None:
        # OPENBLAS_*: an override of the kernel choice would be NumPy's alone.
        env = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}
        env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        self.log = open(log, "ab")
        command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        self.child = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=self.log, text=True)

    def ask(self, **request) -> dict:
        try:
            self.child.stdin.write(json.dumps(request) + "\n")
            self.child.stdin.flush()
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process ended with status {self.child.wait()}", "kind": ENDED}
        return json.loads(line)

    def must(self, **request) -> dict:
        answer = self.ask(**request)
        if "error" in answer:
            raise Failed(answer["kind"], answer["error"])
        return answer

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.close()
        try:
            self.child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()
        self.log.close()
