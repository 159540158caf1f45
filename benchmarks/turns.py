"""Engines at one shape: their hidden states are compared, then they take turns, A B C A B C."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

import counts
import machine
from bounds import progress, repeats
from peers import PEERS
from process import BUILDING, LATE, MISSING, Failed, Process, cpu_seconds, worker
from states import RATE, compare, make_audio

OURS = "gendistiller"  # in float32: what the others are compared with
TOLERANCE = 2e-4  # float32: largest difference of a hidden state
COSINE = {"bfloat16": 0.999, "int8": 0.9}  # smallest of a state; the figures themselves are in the table
PAUSE = 0.1  # seconds between turns, in which the last one's threads stop spinning (ONNX Runtime: 45 ms)
WARM = 0.5  # seconds: a shorter pass follows one that is not timed, for after a pause the system may leave all threads
# on one core for some 10 ms
LONG = 5.0  # seconds: a pass that is announced by itself
SPARE = 1 << 30  # bytes that the peers leave to the rest of the machine


@dataclass(frozen=True)
class Shape:
    model: str
    config: Any
    batch: int
    seconds: float
    threads: int

    @property
    def samples(self) -> int:
        return round(self.seconds * RATE)

    @property
    def flops(self) -> int:
        return self.batch * counts.flops(self.config, self.samples)

    def __str__(self) -> str:
        return f"{self.model}, {self.batch} x {self.seconds:g} s"


def progress_at(shape: Shape, what: str, name: str) -> None:
    precision = PEERS[name].precision
    progress(f"{what}, preset {shape.model}", engine=name.removesuffix(f" {precision}"), precision=precision,
             seconds=shape.seconds, batch=shape.batch, threads=shape.threads)


def memory_left() -> int:
    """Bytes that one process more may take."""
    left = machine.available_memory()
    return max(0, left - SPARE) if left else 1 << 62


class Engines:
    """The peers `names` of a model with so many threads, each loaded when it is first asked for. leave_out(name, what,
    error) notes what a peer is not timed at."""

    def __init__(self, folder: Path, model: str, names: list[str], threads: int, limit: float,
                 leave_out: Callable[[str, str, Failed], None]) -> None:
        self.folder, self.model, self.names, self.threads = folder, model, list(names), threads
        self.limit, self.leave_out = limit, leave_out
        self.workers: dict[str, Process] = {}
        self.late: dict[str, Shape] = {}  # of those that took longer than the limit: at what

    def load(self, name: str) -> Process:
        if name not in self.workers:
            process = self.workers[name] = worker(self.threads, self.folder / "log.txt", self.limit)
            process.ask(BUILDING * self.limit, do="load", folder=str(self.folder), model=self.model, peer=name,
                        threads=self.threads)
        return self.workers[name]

    def drop(self, name: str, shape: Shape, error: Failed) -> None:
        """Leaves a peer out of this shape. For the next it is there again, in a fresh process (after a failure for
        want of memory PyTorch goes on failing), unless it isn't installed, or was too slow with less."""
        if name in self.workers:
            self.workers.pop(name).close()
        if error.kind in MISSING:
            self.names.remove(name)
        if error.kind == LATE:
            self.late[name] = shape
        self.leave_out(name, str(shape), error)

    def prepare(self, shape: Shape) -> dict[str, dict]:
        """{peer: {"difference", "cosine", "first": seconds of a pass}} of those that can be timed."""
        wavs, reference = self.folder / "wavs.npy", self.folder / "reference.npz"
        make_audio(wavs, shape.batch, shape.seconds, seed=shape.batch * 1000 + round(shape.seconds))
        for name, process in list(self.workers.items()):
            try:
                process.ask(do="release")
            except Failed:  # it is loaded again
                self.workers.pop(name).close()
        ready: dict[str, dict] = {}
        for name in list(self.names):
            if name in self.late and self.late[name].flops <= shape.flops:
                self.leave_out(name, str(shape), Failed(LATE, f"took too long at {self.late[name]}"))
                continue
            states, memory = self.folder / "states.npz" if name != OURS else reference, memory_left()
            builds = BUILDING if PEERS[name].builds else 1
            try:
                progress_at(shape, "first pass", name)
                process = self.load(name)
                process.ask(do="forget_peak")
                process.ask(builds * self.limit, do="prepare", wavs=str(wavs), memory=memory)
                first = process.ask(do="states", states=str(states))["seconds"]
                ready[name] = {"first": first, **compare(states, reference)}
            except Failed as error:
                if error.kind not in (*MISSING, LATE):
                    error = Failed(error.kind, f"{error} (it had {memory / 2**30:.1f} GiB to take)")
                self.drop(name, shape, error)
                if name == OURS:
                    return {}
        return ready

    def wrong(self, ready: dict[str, dict]) -> dict[str, dict]:
        """Those whose hidden states differ too much from the reference's."""
        def right(name: str, found: dict) -> bool:
            if PEERS[name].precision == "float32":
                return found["difference"] <= TOLERANCE
            return found["cosine"] >= COSINE[PEERS[name].precision]
        return {name: found for name, found in ready.items() if not right(name, found)}

    def fit(self, ready: dict[str, dict], shape: Shape) -> None:
        """Drops those whose pass takes more memory than is left beside the others."""
        for name in [name for name in ready if name != OURS]:
            try:
                memory = self.workers[name].ask(do="memory")
                if memory["peak"] - memory["now"] > memory_left():
                    raise Failed("Memory", f"takes {memory['peak'] / 2**30:.1f} GiB, too much beside the other engines")
            except Failed as error:
                ready.pop(name)
                self.drop(name, shape, error)

    def take_turns(self, ready: dict[str, dict], shape: Shape, rounds: int, budget: float,
                   times: dict[str, list[float]]) -> float | None:
        """Fills `times` with the seconds of each one's passes, as they come. Returns the share of the machine that
        other programs took meanwhile, None where it doesn't say."""
        busy, begin, own = machine.busy_seconds(), time.perf_counter(), cpu_seconds(self.workers.values())
        passes = {name: repeats(found["first"], rounds, budget) for name, found in ready.items()}
        for turn in range(max(passes.values(), default=0)):
            names = [name for name in ready if passes[name] > turn]
            expected = sum(PAUSE + ready[name]["first"] for name in names)
            progress(f"turn {turn + 1} of {max(passes.values())}, about {expected:.1f} s, preset {shape.model}",
                     engine=", ".join(names), seconds=shape.seconds, batch=shape.batch, threads=shape.threads)
            for name in names:
                if ready[name]["first"] > LONG:
                    progress_at(shape, f"a pass of about {ready[name]['first']:.0f} s", name)
                time.sleep(PAUSE)
                try:
                    taken = self.workers[name].ask(do="run")["seconds"]
                    if taken < WARM:
                        taken = self.workers[name].ask(do="run")["seconds"]
                    times.setdefault(name, []).append(taken)
                except Failed as error:
                    ready.pop(name)
                    self.drop(name, shape, error)
        if busy is None:
            return None
        others = machine.busy_seconds() - busy - (cpu_seconds(self.workers.values()) - own)
        return max(0.0, others / ((time.perf_counter() - begin) * (os.cpu_count() or 1)))

    def close(self) -> None:
        for process in self.workers.values():
            process.close()

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rows(shape: Shape, ready: dict[str, dict], times: dict[str, list[float]], foreign: float | None) -> list[dict]:
    """A figure for each peer that was timed."""
    return [{"model": shape.model, "peer": name, "precision": PEERS[name].precision, "seconds": shape.seconds,
             "batch": shape.batch, "threads": shape.threads, "median": float(np.median(values)), "best": min(values),
             "times": values, "flops": shape.flops, "per_second": shape.flops / float(np.median(values)),
             "foreign": foreign, "difference": ready[name]["difference"], "cosine": ready[name]["cosine"]}
            for name, values in times.items() if name in ready]
