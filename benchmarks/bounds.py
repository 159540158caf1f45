"""How long a measurement may take, and what standard error says meanwhile.

A measurement is timed runs of one engine. Its first run tells how many fit the budget; a request to an engine's
process that takes longer than the limit ends that process (process.py), and the report says so by name.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

_began = time.perf_counter()


def progress(what: str, *, engine: str = "", precision: str = "", seconds: float | None = None, batch: int = 1,
             threads: int | None = None) -> None:
    """A line on standard error, before what it names begins: `[  12.3 s] one pass: PyTorch, int8, 7 s of audio,
    2 threads`."""
    details = [engine, precision]
    if seconds is not None:
        details.append(f"{f'{batch} x ' if batch > 1 else ''}{seconds:g} s of audio")
    if threads is not None:
        details.append(f"{threads} thread{'s' if threads > 1 else ''}")
    listed = ", ".join(filter(None, details))
    print(f"[{time.perf_counter() - _began:6.1f} s] {what}{': ' if listed else ''}{listed}", file=sys.stderr,
          flush=True)


def repeats(first: float, most: int, budget: float) -> int:
    """How many runs fit `budget` seconds where the first took `first`: 1 to `most`."""
    return max(1, min(most, int(budget / max(first, 1e-9))))


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def add_options(parser: argparse.ArgumentParser, limit: float, budget: float) -> None:
    parser.add_argument("--limit", type=positive, default=limit, metavar="S", help="seconds that an engine may take "
                        "for one run, or five times that to load or compile; it is left out beyond that (default: "
                        "%(default)g)")
    parser.add_argument("--budget", type=positive, default=budget, metavar="S", help="seconds for the timed runs of "
                        "one engine in one setting: fewer where they are long (default: %(default)g)")


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def interruptible() -> None:
    """SIGTERM is an interrupt as Ctrl-C is: what was measured is reported."""
    signal.signal(signal.SIGTERM, _interrupt)
