#!/usr/bin/env python3
"""Times one step of distillation at the paper's sizes (teacher forward, student forward and backward, AdamW)
against PyTorch running the same step with S3PRL's modules.

Each engine runs in a process of its own and they take turns; their losses at the first weights are compared
before anything is timed. Figures are medians. --memory measures the peak of each engine's first two steps, in a
fresh process: the second has the optimiser's state and all workspaces. With --rounds 0 that is all.

    python benchmarks/training.py --batch 4 --seconds 4
    python benchmarks/training.py --batch 24 --seconds 15.6 --rounds 0 --memory

Writes training.json and training.md into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

import machine
from speed import MISSING, PAUSE, RATE, Failed, Process, compare, make_checkpoint
from trainers import STUDENT, TEACHER, TRAINERS

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss before the first step


def start(name: str, args: argparse.Namespace, work: Path) -> Process:
    process = Process(args.threads, work / "log.txt")
    process.must(do="load", folder=str(work), model=STUDENT, peer=name, threads=args.threads, training=True)
    return process


def measure_memory(row: dict, args: argparse.Namespace, work: Path) -> None:
    with start(row["peer"], args, work) as process:
        process.must(do="take", wavs=str(work / "wavs.npy"))
        process.must(do="forget_peak")
        for _ in range(2):
            process.must(do="run")
        row["peak_memory"] = process.must(do="memory")["peak"]


def time_steps(args: argparse.Namespace, work: Path) -> list[dict]:
    workers, rows = {}, []
    try:
        for name in args.engines:
            try:
                workers[name] = start(name, args, work)
                states = work / ("reference.npz" if name == "gendistiller" else "states.npz")
                workers[name].must(do="prepare", wavs=str(work / "wavs.npy"), states=str(states))
            except Failed as error:
                if error.kind not in (*MISSING, "NotImplementedError"):
                    raise
                print(f"without {name}: {error}")
                workers.pop(name, None)
                continue
            difference = compare(states, work / "reference.npz")["difference"]
            precision = TRAINERS[name].precision
            if difference > TOLERANCE[precision]:
                raise Failed("ValueError",
                             f"{name}: expected the same loss within {TOLERANCE[precision]}, got {difference}")
            rows.append({"peer": name, "precision": precision, "difference": difference, "times": []})
        for _ in range(args.rounds):
            for row in rows:
                time.sleep(PAUSE)
                row["times"].append(workers[row["peer"]].must(do="run")["seconds"])
    finally:
        for process in workers.values():
            process.__exit__()
    for row in rows:
        row["median"] = float(np.median(row["times"]))
    return rows


def measure(args: argparse.Namespace, work: Path) -> list[dict]:
    for preset in (TEACHER, STUDENT):
        make_checkpoint(work, preset)
    noise = np.random.default_rng(0).standard_normal((args.batch, round(args.seconds * RATE)))
    np.save(work / "wavs.npy", (0.1 * noise).astype(np.float32))
    if args.rounds:
        rows = time_steps(args, work)
    else:
        rows = [{"peer": name, "precision": TRAINERS[name].precision} for name in args.engines]
    for row in rows if args.memory else ():
        measure_memory(row, args, work)
    return rows


def table(rows: list[dict], args: argparse.Namespace) -> str:
    torch = {row["precision"]: row["median"] for row in rows if row["peer"].startswith("PyTorch") and "median" in row}
    lines = [
        f"{machine.describe([])['processor']}, {args.threads} threads; batch {args.batch} x {args.seconds:g} s", "",
        "| engine | s / step | audio s / s | against PyTorch float32 | against PyTorch bfloat16 | peak memory, MiB |",
        "|---|---|---|---|---|---|"]
    for row in rows:
        memory = f"{row['peak_memory'] / 2**20:.0f}" if "peak_memory" in row else ""
        speed = ["", "", "", ""]
        if "median" in row:
            speed = [f"{row['median']:.3f}", f"{args.batch * args.seconds / row['median']:.1f}"]
            speed += [f"{torch[precision] / row['median']:.2f} x" if precision in torch else ""
                      for precision in TOLERANCE]
        lines.append(f"| {' | '.join([row['peer'], *speed, memory])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, default=4, help="utterances of a step (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads (default: one a core)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="steps timed of each engine (default %(default)s; 0: none)")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(TRAINERS),
                        help=f"some of {','.join(TRAINERS)} (default: all)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--out", default="build/bench", help="folder (default %(default)s)")
    args = parser.parse_args()
    if set(args.engines) - set(TRAINERS) or (args.rounds and args.engines[0] != "gendistiller"):
        parser.error(f"--engines: expected some of {','.join(TRAINERS)}, gendistiller first where steps are timed")
    work = Path(args.out).resolve() / "training"
    work.mkdir(parents=True, exist_ok=True)
    try:
        rows = measure(args, work)
    except Failed as error:
        print(f"training.py: {error}", file=sys.stderr)
        return 1
    text = table(rows, args)
    print(text, end="")
    (work.parent / "training.md").write_text(text, encoding="utf-8")
    (work.parent / "training.json").write_text(json.dumps({"options": vars(args), "rows": rows}, indent=1),
                                               encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
