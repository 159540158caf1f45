#!/usr/bin/env python3
"""What else runs: threads against one, PyTorch in the same process, and more processes than cores.

* threads: a forward pass with each number of threads.
* PyTorch beside it: the same pass in a process without PyTorch; in one where PyTorch has multiplied matrices with as
  many threads, and has come to rest; and right after it has, while its threads still spin for more.
* processes: two at once, as a DataLoader's workers are, each with all threads or with its share of them, against one.

Every process waits while another is timed, and they take turns. Figures are medians.

    python benchmarks/together.py --seconds 2,15

Writes together.json into --out, and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import machine

RATE = 16000
FOREIGN = 0.05  # of the machine: what other programs may take before the figures are called doubtful


class Child:
    """This file as a process that runs what it is told to."""

    cpu: dict[int, float] = {}  # seconds that each has taken

    def __init__(self, *libraries: str) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--child", *libraries], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def send(self, **request) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def answer(self) -> list[float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a process ended with status {self.process.wait()}")
        answer = json.loads(line)
        Child.cpu[self.process.pid] = answer["cpu"]
        return answer["times"]

    def times(self, **request) -> list[float]:
        self.send(**request)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def child(libraries: list[str]) -> None:
    """Requests {"seconds", "precision", "threads", "runs"}: times of so many passes after one that makes ready.
    "before": PyTorch's products before each; "rest": seconds of sleep before each."""
    import gendistiller_ext as gd
    if "torch" in libraries:
        import torch
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    model, noise = gd.Model(gd.Config.preset("gendistiller")), np.random.default_rng(0)
    for line in sys.stdin:
        request = json.loads(line)
        wav = noise.standard_normal((1, round(request["seconds"] * RATE)), np.float32)
        options = {"precision": request["precision"], "num_threads": request["threads"]}
        times = []
        for _ in range(request["runs"] + 1):
            if request.get("before"):
                torch.set_num_threads(request["threads"])
                for _ in range(request["before"]):
                    torch.mm(a, b)
            time.sleep(request.get("rest", 0))
            begin = time.perf_counter()
            model.forward(wav, **options)
            times.append(time.perf_counter() - begin)
        print(json.dumps({"times": times[1:], "cpu": time.process_time()}), flush=True)


def compare(args: argparse.Namespace) -> list[dict]:
    """Threads, and PyTorch beside it."""
    children = {"alone": Child(), "PyTorch": Child("torch")}
    cases = {"alone": {"rest": 0.1}, "PyTorch at rest": {"before": 4, "rest": 0.1},
             "right after PyTorch": {"before": 4}}
    rows = []
    for precision, seconds in itertools.product(args.precision, args.seconds):
        times: dict[tuple[str, int], list[float]] = {}
        for _ in range(args.rounds):
            for threads, (case, options) in itertools.product(args.threads, cases.items()):
                process = children["alone" if case == "alone" else "PyTorch"]
                times.setdefault((case, threads), []).extend(process.times(
                    seconds=seconds, precision=precision, threads=threads, runs=2, **options))
        for (case, threads), values in times.items():
            rows.append({"case": case, "precision": precision, "seconds": seconds, "threads": threads,
                         "median": statistics.median(values), "times": values})
    for process in children.values():
        process.close()
    return rows


def processes(args: argparse.Namespace) -> list[dict]:
    """Two processes at once: utterances a second of both, against one process with all threads."""
    most, children, rows = max(args.threads), [Child(), Child()], []
    for precision in args.precision:
        for seconds in args.seconds:
            rates: dict[tuple[int, int], list[float]] = {}
            for _ in range(args.rounds):
                for count, threads in ((1, most), (2, most), (2, max(1, most // 2))):
                    runs = max(4, round(20 / seconds))
                    for process in children[:count]:
                        process.send(seconds=seconds, precision=precision, threads=threads, runs=runs)
                    got = [process.answer() for process in children[:count]]
                    rates.setdefault((count, threads), []).append(sum(runs / sum(times) for times in got))
            for (count, threads), values in rates.items():
                rows.append({"processes": count, "precision": precision, "seconds": seconds, "threads": threads,
                             "rate": statistics.median(values), "rates": values})
    for process in children:
        process.close()
    return rows


def show(result: dict) -> str:
    lines = ["| audio | precision | threads | alone, ms | against 1 thread | PyTorch at rest | right after PyTorch |",
             "|---|---|---|---|---|---|---|"]
    found = {(row["case"], row["precision"], row["seconds"], row["threads"]): row["median"]
             for row in result["times"]}
    for (case, *key), alone in found.items():
        if case == "alone":
            precision, seconds, threads = key
            single = found.get((case, precision, seconds, 1), float("nan"))
            slower = (f"{found[(other, *key)] / alone - 1:+.1%}"
                      for other in ("PyTorch at rest", "right after PyTorch"))
            lines.append(f"| {seconds:g} s | {precision} | {threads} | {alone * 1e3:.1f} | {single / alone:.2f} x | "
                         f"{' | '.join(slower)} |")
    lines += ["", "| audio | precision | processes | threads of each | utterances a second | against one process |",
              "|---|---|---|---|---|---|"]
    for row in result["processes"]:
        single = next(other["rate"] for other in result["processes"] if other["processes"] == 1
                      and all(other[key] == row[key] for key in ("precision", "seconds")))
        lines.append(f"| {row['seconds']:g} s | {row['precision']} | {row['processes']} | {row['threads']} | "
                     f"{row['rate']:.2f} | {row['rate'] / single:.2f} x |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=lambda text: [float(word) for word in text.split(",")], default=[2.0, 15.0],
                        metavar="S,...", help="of audio (default: 2,15)")
    parser.add_argument("--threads", type=lambda text: [int(word) for word in text.split(",")],
                        default=sorted({1, min(2, machine.cores())}), metavar="N,...", help="default: 1,2")
    parser.add_argument("--precision", type=lambda text: text.split(","), default=["float32"], metavar="P,...",
                        help="of float32,bfloat16,int8 (default: float32)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each, of two passes (default: 8)")
    parser.add_argument("--out", default="build/bench", help="default: build/bench")
    args = parser.parse_args()
    begin, busy = time.perf_counter(), machine.busy_seconds()
    result = {"machine": machine.describe(["torch", "numpy"]), "times": compare(args), "processes": processes(args)}
    if busy is not None:
        others = machine.busy_seconds() - busy - sum(Child.cpu.values()) - time.process_time()
        result["foreign"] = max(0.0, others / ((time.perf_counter() - begin) * os.cpu_count()))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "together.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(show(result))
    if result.get("foreign", 0) > FOREIGN:
        print(f"\nDoubtful: other programs took {result['foreign']:.0%} of the machine.")


if __name__ == "__main__":
    main()
