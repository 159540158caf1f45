#!/usr/bin/env python3
"""Times gendistiller_ext against PyTorch, ONNX Runtime and OpenVINO with the same weights and audio.

Every peer runs in a process of its own with the same number of threads, and they take turns: A B C A B C.
Before anything is timed, each peer's hidden states are compared with gendistiller_ext's in float32 at that
very shape. Figures are medians; a short pass follows one that is not timed. Shares are of what the registers can do at
most, and of the best matrix product of the libraries (PyTorch's and NumPy's), both measured in the same run. What is
not installed, can't do something, takes longer than --limit or more memory than the machine has left, or is of a
precision that the processor has no instructions for, is named, with the reason, and left out.

    python benchmarks/speed.py --quick
    python benchmarks/speed.py --all                     # every model, length, batch, precision; an hour
    python benchmarks/report.py build/bench/speed.json   # the report again

Writes speed.json as figures come, then speed.md and speed.png, into --out; after an interrupt with what there is.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
from pathlib import Path

import bounds
import machine
import process
import report
from bounds import progress
from peers import PEERS
from process import BUILDING, MISSING, Failed
from states import RATE, make_audio, make_checkpoint
from turns import Engines, Shape, memory_left, rows

FOREIGN = 0.05  # of the machine: what other programs may take before the figures are called doubtful
MODELS = ("gendistiller", "distilhubert", "wavlm_base")
INTERRUPTED = 130  # exit status, as shells have it


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out).resolve()
        self.work = self.out / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.result = {"program": "speed", "finished": False, "machine": {}, "peak": {}, "gemm": [],
                       "rounds": args.rounds, "budget": args.budget, "limit": args.limit, "foreign_limit": FOREIGN,
                       "lacking": {}, "skipped": {}, "wrong": [], "figures": []}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def save(self) -> None:
        report.save(self.result, self.out / "speed.json")

    def start(self, threads: int) -> process.Process:
        return process.worker(threads, self.work / "log.txt", self.args.limit)

    def skip(self, name: str, what: str, error: Failed) -> None:
        """Notes once why a peer is left out of `what`, or of everything where it isn't here."""
        key, skipped = name if error.kind in MISSING else f"{name}, {what}", self.result["skipped"]
        if key not in skipped:
            self.say(f"without {key}: {error.reason()}")
            skipped[key] = error.reason()
            self.save()

    def lacks(self, precision: str, what: str) -> bool:
        """Whether the processor has no instructions for that precision; then `what` is left out by name."""
        if self.args.emulated or precision not in machine.lacking():
            return False
        named = self.result["lacking"].setdefault(precision, [])
        if what not in named:
            named.append(what)
        return True

    def peers_of(self, config) -> list[str]:
        """Teachers are compared with PyTorch alone: that is what they run in."""
        names = [name for name, peer in PEERS.items() if peer.precision in self.args.precision
                 and (name in self.args.peers or peer.package == "gendistiller_ext")]
        if not self.args.compile:
            names = [name for name in names if "compiled" not in name]
        if config.architecture == "encoder":
            names = [name for name in names if PEERS[name].package in ("gendistiller_ext", "torch")]
        return [name for name in names
                if PEERS[name].package == "gendistiller_ext" or not self.lacks(PEERS[name].precision, name)]

    def export(self, model: str, names: list[str], batch: int, seconds: float) -> None:
        """Writes the ONNX file of a shape; the peers that read it find none where that fails."""
        if any(PEERS[name].package in ("onnxruntime", "openvino") for name in names):
            progress(f"writing the ONNX file, preset {model}", seconds=seconds, batch=batch)
            try:
                with self.start(machine.cores()) as exporter:
                    exporter.ask(BUILDING * self.args.limit, do="export", folder=str(self.work), model=model,
                                 batch=batch, samples=round(seconds * RATE))
            except Failed as error:
                self.skip("ONNX file", f"{model}, {batch} x {seconds:g} s", error)

    def measure_machine(self) -> None:
        """The registers' peak, and the libraries' products in the precisions that are timed."""
        library = machine.build_peak(self.work)
        if library is None:
            self.skip("registers' peak", "all", Failed("OSError", "no C compiler that takes peak.c"))
        for threads in self.args.threads:
            try:
                rates = machine.registers(self.start, library, self.args.precision, threads) if library else {}
                for precision, rate in rates.items():
                    self.result["peak"].setdefault(precision, {})[str(threads)] = rate
            except Failed as error:
                self.skip("registers' peak", f"{threads} threads", error)
            for name, precision in [("NumPy", "float32"), *(("PyTorch", each) for each in self.args.precision)]:
                if self.lacks(precision, f"{name}'s matrix products"):
                    continue
                try:
                    self.result["gemm"] += machine.products(self.start, name, precision, threads, self.args.budget / 4)
                except Failed as error:
                    self.skip(f"{name}'s matrix products", f"{precision}, {threads} threads", error)
            self.save()

    def time_shape(self, engines: Engines, shape: Shape) -> None:
        ready, times, foreign, done = engines.prepare(shape), {}, None, []
        for name, found in engines.wrong(ready).items():
            ready.pop(name)
            self.result["wrong"].append(f"{name}, {shape}: difference {found['difference']:.1e}, cosine "
                                        f"{found['cosine']:.6f}")
            self.say(f"WRONG, not timed: {self.result['wrong'][-1]}")
        engines.fit(ready, shape)
        try:
            foreign = engines.take_turns(ready, shape, self.args.rounds, self.args.budget, times)
        finally:
            done = rows(shape, ready, times, foreign)
            self.result["figures"] += done
            self.save()
        shown = "  ".join(f"{row['peer']} {row['median'] * 1e3:.1f}" for row in done)
        if foreign is not None and foreign > FOREIGN:
            shown += f"  (other programs took {foreign:.0%} of the machine)"
        self.say(f"{shape}, {shape.threads} threads, ms: {shown}")

    def time_model(self, model: str) -> None:
        config = make_checkpoint(self.work, model)
        names = self.peers_of(config)
        shapes = list(itertools.product(self.args.batch, self.args.seconds))
        for batch, seconds in shapes:
            self.export(model, names, batch, seconds)
        for threads in self.args.threads:
            with Engines(self.work, model, names, threads, self.args.limit, self.skip) as engines:
                for batch, seconds in shapes:
                    self.time_shape(engines, Shape(model, config, batch, seconds, threads))

    def measure_memory(self, row: dict) -> None:
        """A figure again in a fresh process that does nothing else: the peak of a forward pass once
        everything is loaded and built, and what the process held before it loaded anything."""
        progress(f"peak memory, preset {row['model']}", engine=row["peer"], seconds=row["seconds"], batch=row["batch"],
                 threads=row["threads"])
        wavs, building = self.work / "wavs.npy", BUILDING * self.args.limit
        make_audio(wavs, row["batch"], row["seconds"], seed=0)
        with self.start(row["threads"]) as worker:
            empty = worker.ask(do="memory")["now"]
            worker.ask(building, do="load", folder=str(self.work), model=row["model"], peer=row["peer"],
                       threads=row["threads"])
            worker.ask(building if PEERS[row["peer"]].builds else None, do="prepare", wavs=str(wavs),
                       memory=memory_left())
            worker.ask(do="forget_peak")
            worker.ask(do="run")
            row.update(empty_memory=empty, peak_memory=worker.ask(do="memory")["peak"])

    def measure(self) -> None:
        self.measure_machine()
        for model in self.args.models:
            self.time_model(model)
        for row in self.result["figures"] if self.args.memory else ():
            if row["threads"] == max(self.args.threads):
                try:
                    self.measure_memory(row)
                except Failed as error:
                    self.skip(f"memory of {row['peer']}", f"{row['model']}, {row['batch']} x {row['seconds']:g} s",
                              error)
                self.save()

    def all(self) -> int:
        packages = sorted({peer.package for peer in PEERS.values()} - {"gendistiller_ext"}) + ["numpy"]
        described = self.result["machine"] = {**machine.describe(packages), "load": os.getloadavg()[0]}
        self.say(f"{described['processor']}, {described['cores']} cores, {' '.join(described['isa'])}")
        try:
            self.measure()
            self.result["finished"] = True
        except KeyboardInterrupt:
            self.say("\ninterrupted: reporting what was measured")
        described["load_after"] = os.getloadavg()[0]
        self.save()
        shutil.rmtree(self.work, ignore_errors=True)
        text, written = report.write(self.out / "speed.json")
        self.say(f"\n{text}\n{', '.join(map(str, written))}")
        if not self.result["finished"]:
            return INTERRUPTED
        return 1 if self.result["wrong"] or not self.result["figures"] else 0


def numbers(kind):
    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",")]
        if min(values) <= 0:
            raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
        return values
    return parse


def names_of(choices):
    def parse(text: str) -> list[str]:
        values = text.split(",")
        unknown = [value for value in values if value not in choices]
        if unknown:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(choices)}, got {unknown[0]!r}")
        return values
    return parse


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of(MODELS),
                        default=["gendistiller", "wavlm_base"], help="default: gendistiller,wavlm_base")
    parser.add_argument("--seconds", type=numbers(float), default=[2.0, 7.0, 15.0], help="default: 2,7,15")
    parser.add_argument("--batch", type=numbers(int), default=[1], help="default: 1")
    parser.add_argument("--threads", type=numbers(int), default=sorted({1, min(2, machine.cores())}),
                        help="default: 1,2")
    parser.add_argument("--precision", type=names_of(machine.PRECISIONS), default=["float32"],
                        help="of float32,bfloat16,int8; float32 is always there: it is compared with")
    parser.add_argument("--emulated", action="store_true", help="the others' bfloat16 and int8 too where the processor "
                        "has no instructions for them")
    parser.add_argument("--peers", type=names_of(PEERS), default=[*PEERS], metavar="NAME,...",
                        help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each at most (default: 9)")
    bounds.add_options(parser, limit=60, budget=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a fresh process")
    parser.add_argument("--quick", action="store_true", help="2 and 7 s, all the threads, 5 rounds, budget of 10 s")
    parser.add_argument("--all", action="store_true", help="all models and precisions; 2, 7, 15 and 60 s; batches of "
                        "1 and 8; compiled; memory; limit of 300 s, budget of 60")
    parser.add_argument("--out", default="build/bench", help="default: build/bench")
    args = parser.parse_args(words)
    if args.quick:
        args.seconds, args.threads, args.rounds = [2.0, 7.0], [max(args.threads)], min(args.rounds, 5)
        args.budget = min(args.budget, 10)
    if args.all:
        args.models, args.precision, args.compile, args.memory = [*MODELS], [*machine.PRECISIONS], True, True
        args.seconds, args.batch = [2.0, 7.0, 15.0, 60.0], [1, 8]
        args.limit, args.budget = max(args.limit, 300), max(args.budget, 60)
    if "float32" not in args.precision:
        args.precision.insert(0, "float32")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    return args


def main(words: list[str] | None = None) -> int:
    args = options(words)
    bounds.interruptible()
    return Run(args).all()


if __name__ == "__main__":
    sys.exit(main())
