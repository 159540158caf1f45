"""A peer in a process of its own, as speed.py and training.py drive it through process.py.

    {"do": "load", "folder", "model", "peer", "threads"[, "training"]} -> {}; of peers.py, or trainers.py
    {"do": "prepare", "wavs": FILE.npy[, "memory"]}          -> {}; builds what this shape needs and runs once; more
                                                                than `memory` bytes are refused
    {"do": "states", "states": FILE.npz}                     -> {"seconds"}: of a run, whose hidden states it writes
    {"do": "release"}                                        -> {}; gives up what was prepared
    {"do": "take", "wavs": FILE.npy}                         -> {}; of trainers.py, in place of prepare
    {"do": "run"}                                            -> {"seconds"}
    {"do": "memory"}                                         -> {"now", "peak"} in bytes
    {"do": "forget_peak"}                                    -> {}
    {"do": "export", "folder", "model", "batch", "samples"}  -> {}
    {"do": "gemm", "library", "precision", "threads", "shape", "budget"} -> {"name", "seconds"}
    {"do": "peak", "library", "precision", "threads"}        -> {"per_second"}
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

import bounds
import measures
import peers
import trainers
from serve import serve


class Worker:
    def load(self, folder: str, model: str, peer: str, threads: int, training: bool = False) -> dict:
        engines = trainers.TRAINERS if training else peers.PEERS
        self.peer = engines[peer](Path(folder), model, threads)
        return {}

    def prepare(self, wavs: str, memory: int | None = None) -> dict:
        if memory is not None:
            measures.limit_memory(memory)
        self.peer.prepare(np.load(wavs))
        self.peer.run()
        return {}

    def states(self, states: str) -> dict:
        begin = time.perf_counter()
        found = self.peer.run()
        seconds = time.perf_counter() - begin
        np.savez(states, *(np.asarray(state) for state in found))
        return {"seconds": seconds}

    def release(self) -> dict:
        self.peer.release()
        return {}

    def take(self, wavs: str) -> dict:
        self.peer.take(np.load(wavs))
        return {}

    def run(self) -> dict:
        begin = time.perf_counter()
        self.peer.run()
        return {"seconds": time.perf_counter() - begin}

    def memory(self) -> dict:
        return measures.peak_memory()

    def forget_peak(self) -> dict:
        measures.forget_peak()
        return {}

    def export(self, folder: str, model: str, batch: int, samples: int) -> dict:
        peers.export_onnx(Path(folder), model, batch, samples)
        return {}

    def gemm(self, library: str, precision: str, threads: int, shape: list, budget: float) -> dict:
        multiply, name = measures.library_gemm(library, precision, threads, *shape)
        times: list[float] = []
        while len(times) < (bounds.repeats(times[0], 24, budget) if times else 1):
            begin = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - begin)
        return {"name": name, "seconds": min(times)}

    def peak(self, library: str, precision: str, threads: int) -> dict:
        return {"per_second": measures.register_peak(library, precision, threads)}


if __name__ == "__main__":
    serve(Worker())
