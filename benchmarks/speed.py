#!/usr/bin/env python3
"""Times gendistiller_ext against PyTorch, ONNX Runtime and OpenVINO with the same weights and audio.

Every peer runs in a process of its own with the same number of threads, and they take turns: A B C A B C.
Before anything is timed, each peer's hidden states are compared with gendistiller_ext's in float32 at that
very shape. Figures are medians; a short pass follows one that is not timed. Shares are of what the registers can do at
most, and of the best matrix product of the libraries (PyTorch's and NumPy's), both measured in the same run. What is
not installed, can't do something or needs more memory than the machine has left is named, with the reason, and left
out.

    python benchmarks/speed.py --quick
    python benchmarks/speed.py --all                     # every model, length, batch, precision; an hour

Writes speed.json, speed.md and speed.png into --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

import counts
import machine
import report
from peers import PEERS, checkpoint
from process import MISSING, Failed, Process

RATE = 16000
TOLERANCE = 2e-4  # float32: largest difference of a hidden state
COSINE = {"bfloat16": 0.999, "int8": 0.9}  # smallest of a state; the figures themselves are in the table
FOREIGN = 0.05  # of the machine: what other programs may take before the figures are called doubtful
PAUSE = 0.1  # seconds between turns, in which the last one's threads stop spinning (ONNX Runtime: 45 ms)
WARM = 0.5  # seconds: a shorter pass follows one that is not timed, for after a pause the system may leave all threads
# on one core for some 10 ms
SPARE = 1 << 30  # bytes that the peers leave to the rest of the machine
MODELS = ("gendistiller", "distilhubert", "wavlm_base")


def make_checkpoint(folder: Path, preset: str):
    """Random weights with every bias, norm and gate away from where initialisation puts it, so that a peer
    that forgot one would not agree."""
    import gendistiller_ext as gd

    model, noise = gd.Model(gd.Config.preset(preset), seed=0), np.random.default_rng(1)
    params = {}
    for name, value in model.params.items():
        spread = 1.0 if "relative_attention_bias" in name else 0.1 if value.std() == 0 else 0.0
        params[name] = (value + spread * noise.standard_normal(value.shape)).astype(np.float32)
    model.load_params(params)
    model.save(checkpoint(folder, preset))
    return model.config


def compare(states: Path, reference: Path) -> dict:
    """{"difference": largest, "cosine": smallest of a state} against the reference; shapes must agree."""
    with np.load(states) as got, np.load(reference) as expected:
        if got.files != expected.files:
            raise Failed("ValueError", f"expected {len(expected.files)} hidden states, got {len(got.files)}")
        difference, cosine = 0.0, 1.0
        for name in expected.files:
            a, b = got[name].astype(np.float64), expected[name].astype(np.float64)
            if a.shape != b.shape:
                raise Failed("ValueError", f"expected hidden states {b.shape}, got {a.shape}")
            difference = max(difference, float(np.abs(a - b).max()))
            cosine = min(cosine, float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())))
    return {"difference": difference, "cosine": cosine}


def shape_of(model: str, batch: int, seconds: float) -> str:
    return f"{model}, {batch} x {seconds:g} s"


class Run:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = Path(args.out).resolve()
        self.work = self.out / "work"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        self.rows: list[dict] = []
        self.skipped: dict[str, str] = {}
        self.wrong: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)

    def start(self, threads: int) -> Process:
        return Process(threads, self.work / "log.txt")

    def skip(self, name: str, what: str, error: Failed) -> None:
        """Notes once why a peer is left out of `what`, or of everything where it isn't here."""
        reason = str(error) if error.kind in MISSING else f"{error.kind}: {error}"
        key = name if error.kind in MISSING else f"{name}, {what}"
        if key not in self.skipped:
            self.say(f"without {key}: {reason}")
        self.skipped.setdefault(key, reason)

    def peers_of(self, config) -> list[str]:
        """Teachers are compared with PyTorch alone: that is what they run in."""
        names = [name for name, peer in PEERS.items() if peer.precision in self.args.precision
                 and (name in self.args.peers or peer.package == "gendistiller_ext")]
        if not self.args.compile:
            names = [name for name in names if "compiled" not in name]
        if config.architecture == "encoder":
            names = [name for name in names if PEERS[name].package in ("gendistiller_ext", "torch")]
        return names

    def export(self, model: str, names: list[str], batch: int, seconds: float) -> None:
        """Writes the ONNX file of a shape; the peers that read it find none where that fails."""
        if any(PEERS[name].package in ("onnxruntime", "openvino") for name in names):
            with self.start(machine.cores()) as process:
                try:
                    process.must(do="export", folder=str(self.work), model=model, batch=batch,
                                 samples=round(seconds * RATE))
                except Failed as error:
                    self.skip("ONNX file", shape_of(model, batch, seconds), error)

    def load(self, workers: dict[str, Process], name: str, model: str, threads: int) -> None:
        workers[name] = self.start(threads)
        try:
            workers[name].must(do="load", folder=str(self.work), model=model, peer=name, threads=threads)
        except Failed as error:
            if name == "gendistiller":
                raise
            self.skip(name, model, error)
            workers.pop(name).__exit__()

    def drop(self, workers: dict[str, Process], name: str, model: str, shape: str, threads: int,
             error: Failed) -> None:
        """Leaves a peer out of this shape; for the next it is there again, in a fresh process: after a failure for want
        of memory PyTorch goes on failing."""
        self.skip(name, shape, error)
        workers.pop(name).__exit__()
        self.load(workers, name, model, threads)

    def memory_left(self) -> int:
        """Bytes that one process more may take."""
        left = machine.available_memory()
        return max(0, left - SPARE) if left else 1 << 62

    def own_seconds(self, workers: dict) -> float:
        """CPU time of the benchmark so far: its own, and the workers', spinning threads included."""
        return time.process_time() + sum(process.must(do="cpu")["seconds"] for process in workers.values())

    def time_shape(self, model: str, config, workers: dict, batch: int, seconds: float, threads: int) -> None:
        samples = round(seconds * RATE)
        wavs, reference = self.work / "wavs.npy", self.work / "reference.npz"
        noise = np.random.default_rng(batch * 1000 + round(seconds))
        np.save(wavs, (0.1 * noise.standard_normal((batch, samples))).astype(np.float32))
        ready: dict[str, dict] = {}
        shape = shape_of(model, batch, seconds)
        for process in workers.values():
            process.must(do="release")
        for name, process in list(workers.items()):
            states = self.work / "states.npz" if name != "gendistiller" else reference
            limit = self.memory_left()
            try:
                process.must(do="forget_peak")
                process.must(do="prepare", wavs=str(wavs), states=str(states), limit=limit)
                found = compare(states, reference)
            except Failed as error:
                if name == "gendistiller":
                    raise
                if error.kind not in MISSING:
                    error = Failed(error.kind, f"{error} (it had {limit / 2**30:.1f} GiB to take)")
                self.drop(workers, name, model, shape, threads, error)
                continue
            precision = PEERS[name].precision
            right = found["difference"] <= TOLERANCE if precision == "float32" else \
                found["cosine"] >= COSINE[precision]
            if not right:
                self.wrong.append(f"{name}, {shape}: {found}")
                self.say(f"WRONG, not timed: {self.wrong[-1]}")
                continue
            ready[name] = found
        for name in [name for name in ready if name != "gendistiller"]:
            memory = workers[name].must(do="memory")
            if memory["peak"] - memory["now"] > self.memory_left():
                ready.pop(name)
                self.drop(workers, name, model, shape, threads, Failed(
                    "Memory", f"takes {memory['peak'] / 2**30:.1f} GiB, too much beside the other engines"))
        times: dict[str, list] = {name: [] for name in ready}
        busy, begin, own = machine.busy_seconds(), time.perf_counter(), self.own_seconds(workers)
        for _ in range(self.args.rounds):
            for name in list(ready):
                time.sleep(PAUSE)
                try:
                    taken = workers[name].must(do="run")["seconds"]
                    if taken < WARM:
                        taken = workers[name].must(do="run")["seconds"]
                    times[name].append(taken)
                except Failed as error:
                    ready.pop(name)
                    self.drop(workers, name, model, shape, threads, error)
        foreign = None
        if busy is not None:
            others = machine.busy_seconds() - busy - (self.own_seconds(workers) - own)
            foreign = max(0.0, others / ((time.perf_counter() - begin) * (os.cpu_count() or 1)))
        work = batch * counts.flops(config, samples)
        for name, found in ready.items():
            median = float(np.median(times[name]))
            self.rows.append({
                "model": model, "peer": name, "precision": PEERS[name].precision, "seconds": seconds,
                "batch": batch, "threads": threads, "median": median, "best": min(times[name]),
                "times": times[name], "flops": work, "per_second": work / median, "foreign": foreign,
                **found})
        shown = "  ".join(f"{row['peer']} {row['median'] * 1e3:.1f}" for row in self.rows[-len(ready):])
        if foreign is not None and foreign > FOREIGN:
            shown += f"  (other programs took {foreign:.0%} of the machine)"
        self.say(f"{shape}, {threads} threads, ms: {shown}")

    def time_model(self, model: str) -> None:
        config = make_checkpoint(self.work, model)
        names = self.peers_of(config)
        for batch, seconds in itertools.product(self.args.batch, self.args.seconds):
            self.export(model, names, batch, seconds)
        for threads in self.args.threads:
            workers: dict[str, Process] = {}
            try:
                for name in names:
                    self.load(workers, name, model, threads)
                for batch, seconds in itertools.product(self.args.batch, self.args.seconds):
                    self.time_shape(model, config, workers, batch, seconds, threads)
            finally:
                for process in workers.values():
                    process.__exit__()

    def measure_memory(self) -> None:
        """Each figure again in a fresh process that does nothing else: the peak of a forward pass once
        everything is loaded and built, and what the process held before it loaded anything."""
        wavs = self.work / "wavs.npy"
        for row in self.rows:
            if row["threads"] != max(self.args.threads):
                continue
            np.save(wavs, np.zeros((row["batch"], round(row["seconds"] * RATE)), np.float32) + 0.1)
            with self.start(row["threads"]) as process:
                row["empty_memory"] = process.must(do="memory")["now"]
                process.must(do="load", folder=str(self.work), model=row["model"], peer=row["peer"],
                             threads=row["threads"])
                process.must(do="prepare", wavs=str(wavs), states=str(self.work / "states.npz"),
                             limit=self.memory_left())
                process.must(do="forget_peak")
                process.must(do="run")
                row["peak_memory"] = process.must(do="memory")["peak"]

    def all(self) -> int:
        load = os.getloadavg()[0]
        packages = sorted({peer.package for peer in PEERS.values()} - {"gendistiller_ext"}) + ["numpy"]
        described = {**machine.describe(packages), "load": load}
        self.say(f"{described['processor']}, {described['cores']} cores, {' '.join(described['isa'])}")
        bounds = machine.measure(self.start, self.work, self.args.threads)
        for model in self.args.models:
            self.time_model(model)
        if self.args.memory:
            self.measure_memory()
        described["load_after"] = os.getloadavg()[0]
        for row in self.rows:
            peak = bounds["peak"].get(row["precision"], {}).get(row["threads"])
            row["share_of_peak"] = row["per_second"] / peak if peak else None
            gemm = max((found["per_second"] for found in bounds["gemm"] if found["precision"] == row["precision"]
                        and found["threads"] == row["threads"]), default=None)
            row["share_of_gemm"] = row["per_second"] / gemm if gemm else None
        result = {"machine": described, **bounds, "rounds": self.args.rounds, "foreign_limit": FOREIGN,
                  "skipped": self.skipped, "wrong": self.wrong, "figures": self.rows}
        (self.out / "speed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        text = report.markdown(result)
        (self.out / "speed.md").write_text(text, encoding="utf-8")
        written = ["speed.json", "speed.md"]
        if report.plot(result, self.out / "speed.png"):
            written.append("speed.png")
        shutil.rmtree(self.work)
        self.say(f"\n{text}\n{', '.join(str(self.out / name) for name in written)}")
        return 1 if self.wrong else 0


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


def main() -> int:
    cores = machine.cores()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names_of(MODELS),
                        default=["gendistiller", "wavlm_base"], help="default: gendistiller,wavlm_base")
    parser.add_argument("--seconds", type=numbers(float), default=[2.0, 7.0, 15.0], help="default: 2,7,15")
    parser.add_argument("--batch", type=numbers(int), default=[1], help="default: 1")
    parser.add_argument("--threads", type=numbers(int), default=sorted({1, min(2, cores)}),
                        help="default: 1,2")
    parser.add_argument("--precision", type=names_of(machine.PRECISIONS), default=["float32"],
                        help="of float32,bfloat16,int8; float32 is always there: it is compared with")
    parser.add_argument("--peers", type=names_of(PEERS), default=[*PEERS], metavar="NAME,...",
                        help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each (default: 9)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too (minutes)")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each in a fresh process")
    parser.add_argument("--quick", action="store_true", help="2 and 7 s, all the threads, 5 rounds")
    parser.add_argument("--all", action="store_true", help="all models and precisions; 2, 7, 15 and 60 s; batches of "
                        "1 and 8; compiled; memory")
    parser.add_argument("--out", default="build/bench", help="default: build/bench")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.threads, args.rounds = [2.0, 7.0], [max(args.threads)], min(args.rounds, 5)
    if args.all:
        args.models, args.precision, args.compile, args.memory = [*MODELS], [*machine.PRECISIONS], True, True
        args.seconds, args.batch = [2.0, 7.0, 15.0, 60.0], [1, 8]
    if "float32" not in args.precision:
        args.precision.insert(0, "float32")
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    try:
        return Run(args).all()
    except Failed as error:
        print(f"speed.py: {error.kind}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
