#!/usr/bin/env python3
"""Times one step of distillation at the paper's sizes (teacher forward, student forward and backward, AdamW)
against PyTorch running the same step with S3PRL's modules.

Each engine runs in a process of its own and they take turns; their losses at the first weights are compared
before anything is timed. Figures are medians. --memory measures the peak of each engine's first two steps, in a
fresh process: the second has the optimiser's state and all workspaces. With --rounds 0 that is all. An engine that
isn't installed, fails, or takes longer than --limit for a step is left out by name.

    python benchmarks/training.py --batch 4 --seconds 4
    python benchmarks/training.py --batch 24 --seconds 15.6 --rounds 0 --memory --limit 900

Writes training.json as figures come, and training.md, into --out; after an interrupt with what there is.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

import bounds
import machine
import report
from bounds import progress, repeats
from process import BUILDING, Failed, Process, worker
from states import compare, make_audio, make_checkpoint
from trainers import STUDENT, TEACHER, TRAINERS
from turns import LONG, OURS, PAUSE

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the loss before the first step
INTERRUPTED = 130


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out).resolve()
        self.work = self.out / "training"
        self.work.mkdir(parents=True, exist_ok=True)
        self.workers: dict[str, Process] = {}
        self.rows: list[dict] = []
        self.result = {"program": "training", "machine": machine.describe(["torch", "s3prl", "numpy"]),
                       "options": vars(args), "skipped": {}, "wrong": [], "rows": self.rows}

    def save(self) -> None:
        report.save(self.result, self.out / "training.json")

    def say(self, what: str, name: str) -> None:
        progress(what, engine=name, precision=TRAINERS[name].precision, seconds=self.args.seconds,
                 batch=self.args.batch, threads=self.args.threads)

    def leave_out(self, name: str, error: Failed) -> None:
        print(f"without {name}: {error.reason()}", flush=True)
        self.result["skipped"][name] = error.reason()
        self.rows[:] = [row for row in self.rows if row["peer"] != name]
        if name in self.workers:
            self.workers.pop(name).close()
        self.save()

    def start(self, name: str) -> Process:
        self.workers[name] = worker(self.args.threads, self.work / "log.txt", self.args.limit)
        self.workers[name].ask(BUILDING * self.args.limit, do="load", folder=str(self.work), model=STUDENT, peer=name,
                               threads=self.args.threads, training=True)
        return self.workers[name]

    def prepare(self, name: str) -> dict:
        """A row without times yet, but the first step's."""
        self.say("first steps", name)
        states, process = self.work / ("reference.npz" if name == OURS else "states.npz"), self.start(name)
        process.ask(2 * self.args.limit, do="prepare", wavs=str(self.work / "wavs.npy"))  # a loss, and a step
        first = process.ask(do="states", states=str(states))["seconds"]
        difference, precision = compare(states, self.work / "reference.npz")["difference"], TRAINERS[name].precision
        if difference > TOLERANCE[precision]:
            self.result["wrong"].append(f"{name}: the first loss differs by {difference:.1e}")
            raise Failed("ValueError", f"expected the same loss within {TOLERANCE[precision]}, got {difference}")
        return {"peer": name, "precision": precision, "difference": difference, "first": first, "times": []}

    def time_steps(self) -> None:
        for name in self.args.engines:
            try:
                self.rows.append(self.prepare(name))
            except Failed as error:
                self.leave_out(name, error)
                if name == OURS:
                    return
        for turn in range(self.args.rounds):
            due = [row for row in self.rows if turn < repeats(row["first"], self.args.rounds, self.args.budget)]
            if due:
                expected = sum(PAUSE + row["first"] for row in due)
                progress(f"turn {turn + 1} of at most {self.args.rounds}, about {expected:.0f} s",
                         engine=", ".join(row["peer"] for row in due))
            for row in due:
                if row["first"] > LONG:
                    self.say(f"a step of about {row['first']:.0f} s", row["peer"])
                time.sleep(PAUSE)
                try:
                    row["times"].append(self.workers[row["peer"]].ask(do="run")["seconds"])
                    row["median"] = float(np.median(row["times"]))
                except Failed as error:
                    self.leave_out(row["peer"], error)
            self.save()

    def measure_memory(self, row: dict) -> None:
        self.say("peak memory of two steps", row["peer"])
        process = self.start(row["peer"])
        process.ask(do="take", wavs=str(self.work / "wavs.npy"))
        process.ask(do="forget_peak")
        for _ in range(2):
            process.ask(do="run")
        row["peak_memory"] = process.ask(do="memory")["peak"]

    def close(self) -> None:
        while self.workers:
            self.workers.popitem()[1].close()

    def measure(self) -> None:
        progress("writing weights and audio")
        for preset in (TEACHER, STUDENT):
            make_checkpoint(self.work, preset)
        make_audio(self.work / "wavs.npy", self.args.batch, self.args.seconds, seed=0)
        try:
            if self.args.rounds:
                self.time_steps()
            else:
                self.rows += [{"peer": name, "precision": TRAINERS[name].precision} for name in self.args.engines]
            self.close()
            for row in list(self.rows) if self.args.memory else ():
                try:
                    self.measure_memory(row)
                except Failed as error:
                    self.leave_out(row["peer"], error)
                self.close()
                self.save()
        finally:
            self.close()

    def all(self) -> int:
        status = 0
        try:
            self.measure()
        except KeyboardInterrupt:
            print("\ninterrupted: reporting what was measured")
            status = INTERRUPTED
        self.save()
        print(report.write(self.out / "training.json")[0], end="")
        return status or (1 if self.result["wrong"] or OURS in self.result["skipped"] else 0)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="utterances of a step (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="seconds of each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="threads (default: one a core)")
    parser.add_argument("--rounds", type=int, default=5,
                        help="steps timed of each engine at most (default %(default)s; 0: none)")
    bounds.add_options(parser, limit=120, budget=60)
    parser.add_argument("--engines", type=lambda text: text.split(","), default=list(TRAINERS),
                        help=f"some of {','.join(TRAINERS)} (default: all)")
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--out", default="build/bench", help="folder (default %(default)s)")
    args = parser.parse_args(words)
    if set(args.engines) - set(TRAINERS) or (args.rounds and args.engines[0] != OURS):
        parser.error(f"--engines: expected some of {','.join(TRAINERS)}, {OURS} first where steps are timed")
    bounds.interruptible()
    return Run(args).all()


if __name__ == "__main__":
    sys.exit(main())
