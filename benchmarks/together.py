#!/usr/bin/env python3
"""What else runs: threads against one, PyTorch in the same process, and more processes than cores.

* threads: a forward pass with each number of threads.
* PyTorch beside it: the same pass in a process without PyTorch; in one where PyTorch has multiplied matrices with as
  many threads, and has come to rest; and right after it has, while its threads still spin for more.
* processes: two at once, as a DataLoader's workers are, each with all threads or with its share of them, against one.

Every process waits while another is timed, and they take turns. Figures are medians.

    python benchmarks/together.py --seconds 2,15

Writes together.json as figures come, and together.md, into --out; after an interrupt with what there is.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, Iterable

import numpy as np

import bounds
import machine
import report
from bounds import progress, repeats
from process import BUILDING, Failed, Process, cpu_seconds
from serve import serve
from states import RATE

FOREIGN = 0.05  # of the machine: what other programs may take before the figures are called doubtful
INTERRUPTED = 130
CASES = {"alone": {"rest": 0.1}, "PyTorch at rest": {"before": 4, "rest": 0.1}, "right after PyTorch": {"before": 4}}
CHILDREN = {"alone": ("alone",), "PyTorch at rest": ("PyTorch",), "right after PyTorch": ("PyTorch",),
            "one process": ("alone",), "two processes": ("alone", "second")}


class Child:
    """What each process does."""

    def load(self, pytorch: bool) -> dict:
        """-> {}; with PyTorch in the same process."""
        import gendistiller_ext as gd
        if pytorch:
            import torch
            self.torch, self.a, self.b = torch, torch.randn(1024, 1024), torch.randn(1024, 1024)
        self.model, self.noise = gd.Model(gd.Config.preset("gendistiller")), np.random.default_rng(0)
        return {}

    def run(self, seconds: float, precision: str, threads: int, runs: int, before: int = 0, rest: float = 0) -> dict:
        """{"times"} of so many passes after one that makes ready. before: PyTorch's products before each; rest:
        seconds of sleep before each."""
        wav = self.noise.standard_normal((1, round(seconds * RATE)), np.float32)
        times = []
        for _ in range(runs + 1):
            if before:
                self.torch.set_num_threads(threads)
                for _ in range(before):
                    self.torch.mm(self.a, self.b)
            time.sleep(rest)
            begin = time.perf_counter()
            self.model.forward(wav, precision=precision, num_threads=threads)
            times.append(time.perf_counter() - begin)
        return {"times": times[1:]}


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out).resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.children: dict[str, Process] = {}
        self.result = {"program": "together", "machine": machine.describe(["torch", "numpy"]), "times": [],
                       "processes": [], "skipped": {}, "foreign_limit": FOREIGN}

    def child(self, name: str) -> Process:
        if name not in self.children:
            self.children[name] = Process(self.out / "together.log", self.args.limit, Path(__file__), "--child")
            self.children[name].ask(BUILDING * self.args.limit, do="load", pytorch=name == "PyTorch")
        return self.children[name]

    def leave_out(self, what: str, error: Failed) -> None:
        """With fresh processes for what comes next."""
        print(f"without {what}: {error.reason()}", flush=True)
        self.result["skipped"][what] = error.reason()
        self.close()

    def save(self) -> None:
        report.save(self.result, self.out / "together.json")

    def take_turns(self, settings: Iterable[tuple], precision: str, seconds: float, measure: Callable[..., list[float]],
                   values: dict[tuple, list[float]]) -> None:
        """Adds to `values` what measure(processes, *setting) returns, for each setting in turn, as often as fits the
        budget. A setting is a name of CHILDREN and a number of threads."""
        counts = dict.fromkeys(settings, self.args.rounds)
        for turn in range(self.args.rounds):
            for setting in [setting for setting, count in counts.items() if turn < count]:
                name, threads = setting
                progress(f"{name}, turn {turn + 1} of {counts[setting]}", precision=precision, seconds=seconds,
                         threads=threads)
                try:
                    processes = [self.child(child) for child in CHILDREN[name]]
                    begin = time.perf_counter()
                    values.setdefault(setting, []).extend(measure(processes, *setting))
                except Failed as error:
                    counts[setting] = 0
                    values.pop(setting, None)
                    self.leave_out(f"{name}, {precision}, {seconds:g} s, {threads} threads", error)
                    continue
                if turn == 0:
                    counts[setting] = repeats(time.perf_counter() - begin, self.args.rounds, self.args.budget)

    def compare(self, precision: str, seconds: float) -> None:
        """Threads, and PyTorch beside it."""
        def measure(processes: list[Process], case: str, threads: int) -> list[float]:
            return processes[0].ask(do="run", seconds=seconds, precision=precision, threads=threads, runs=2,
                                    **CASES[case])["times"]

        times: dict[tuple, list[float]] = {}
        settings = [(case, threads) for threads in self.args.threads for case in CASES]
        try:
            self.take_turns(settings, precision, seconds, measure, times)
        finally:
            self.result["times"] += [
                {"case": case, "precision": precision, "seconds": seconds, "threads": threads,
                 "median": statistics.median(values), "times": values}
                for (case, threads), values in times.items() if values]
            self.save()

    def processes(self, precision: str, seconds: float) -> None:
        """Two processes at once: utterances a second of both, against one process with all threads."""
        runs, most, rates = max(4, round(20 / seconds)), max(self.args.threads), {}

        def measure(processes: list[Process], name: str, threads: int) -> list[float]:
            for process in processes:
                process.send(do="run", seconds=seconds, precision=precision, threads=threads, runs=runs)
            got = [process.answer()["times"] for process in processes]
            return [sum(runs / sum(times) for times in got)]

        settings = [("one process", most), ("two processes", most), ("two processes", max(1, most // 2))]
        try:
            self.take_turns(settings, precision, seconds, measure, rates)
        finally:
            self.result["processes"] += [
                {"processes": len(CHILDREN[name]), "precision": precision, "seconds": seconds, "threads": threads,
                 "rate": statistics.median(values), "rates": values}
                for (name, threads), values in rates.items() if values]
            self.save()

    def close(self) -> None:
        while self.children:
            self.children.popitem()[1].close()

    def all(self) -> int:
        status, begin, busy = 0, time.perf_counter(), machine.busy_seconds()
        try:
            for measure in (self.compare, self.processes):
                for precision, seconds in itertools.product(self.args.precision, self.args.seconds):
                    measure(precision, seconds)
        except KeyboardInterrupt:
            print("\ninterrupted: reporting what was measured")
            status = INTERRUPTED
        self.close()
        if busy is not None:
            others = machine.busy_seconds() - busy - cpu_seconds([])
            self.result["foreign"] = max(0.0, others / ((time.perf_counter() - begin) * (os.cpu_count() or 1)))
        self.save()
        print(report.write(self.out / "together.json")[0])
        return status


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=lambda text: [float(word) for word in text.split(",")], default=[2.0, 15.0],
                        metavar="S,...", help="of audio (default: 2,15)")
    parser.add_argument("--threads", type=lambda text: [int(word) for word in text.split(",")],
                        default=sorted({1, min(2, machine.cores())}), metavar="N,...", help="default: 1,2")
    parser.add_argument("--precision", type=lambda text: text.split(","), default=["float32"], metavar="P,...",
                        help="of float32,bfloat16,int8 (default: float32)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each at most, of two passes (default: 8)")
    bounds.add_options(parser, limit=120, budget=30)
    parser.add_argument("--out", default="build/bench", help="default: build/bench")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = options(words)
    bounds.interruptible()
    return Run(args).all()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        serve(Child())
    else:
        sys.exit(main())
