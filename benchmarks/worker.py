"""A peer in a process of its own, driven by speed.py: reads a JSON request a line, answers with a line.

    {"do": "load", "folder", "model", "peer", "threads"[, "training"]} -> {}; of peers.py, or trainers.py
    {"do": "prepare", "wavs": FILE.npy, "states": FILE.npz[, "limit"]}  -> {}; runs twice and writes the hidden
                                                                states; more than `limit` bytes are refused
    {"do": "release"}                                        -> {}; gives up what was prepared
    {"do": "take", "wavs": FILE.npy}                         -> {}; of trainers.py, in place of prepare
    {"do": "run"}                                            -> {"seconds"}
    {"do": "cpu"}                                            -> {"seconds"}: what its threads took so far
    {"do": "memory"}                                         -> {"now", "peak"} in bytes
    {"do": "forget_peak"}                                    -> {}
    {"do": "export", "folder", "model", "batch", "samples"}  -> {}
    {"do": "gemm", "library", "precision", "threads", "shape"} -> {"name", "seconds"}
    {"do": "peak", "library", "precision", "threads"}        -> {"per_second"}

A request that fails is answered with {"error", "kind"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

# Libraries write on standard output: the answers get a descriptor of their own.
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

import numpy as np  # noqa: E402

import measures  # noqa: E402
import peers  # noqa: E402
import trainers  # noqa: E402


class Worker:
    def load(self, folder: str, model: str, peer: str, threads: int, training: bool = False) -> dict:
        engines = trainers.TRAINERS if training else peers.PEERS
        self.peer = engines[peer](Path(folder), model, threads)
        return {}

    def prepare(self, wavs: str, states: str, limit: int | None = None) -> dict:
        if limit is not None:
            measures.limit_memory(limit)
        self.peer.prepare(np.load(wavs))
        self.peer.run()
        np.savez(states, *(np.asarray(state) for state in self.peer.run()))
        return {}

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

    def cpu(self) -> dict:
        return {"seconds": time.process_time()}

    def memory(self) -> dict:
        return measures.peak_memory()

    def forget_peak(self) -> dict:
        measures.forget_peak()
        return {}

    def export(self, folder: str, model: str, batch: int, samples: int) -> dict:
        peers.export_onnx(Path(folder), model, batch, samples)
        return {}

    def gemm(self, library: str, precision: str, threads: int, shape: list) -> dict:
        multiply, name = measures.library_gemm(library, precision, threads, *shape)
        times = []
        for _ in range(24):
            begin = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - begin)
        return {"name": name, "seconds": min(times)}

    def peak(self, library: str, precision: str, threads: int) -> dict:
        return {"per_second": measures.register_peak(library, precision, threads)}


def main() -> None:
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            answer = {"error": " ".join(str(error).split())[:300], "kind": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
