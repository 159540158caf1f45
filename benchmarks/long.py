"""Long audio: memory of one pass, how far chunks are from it, and what a stream takes.

    python benchmarks/long.py                            # memory and time of ten minutes in one pass
    python benchmarks/long.py --data DIR                 # chunks of ten seconds against one pass, on speech in DIR
    python benchmarks/long.py --stream                   # a stream's latency and time for each chunk

Memory and time are those of the preset `gendistiller`, with random weights; the distances are those of the
trained student of the package. What runs beside this changes times, not distances or memory. Lines come as they are
measured; a pass that takes longer than --limit is given up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Iterator

import numpy as np

import bounds
import gendistiller_ext as gd
from bounds import progress, repeats
from gendistiller_ext.stream import Stream, chunks
from gendistiller_ext.stream import statistics as audio_statistics

RATE = 16000


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10


def one_pass(seconds: float, limit: float) -> dict:
    """In a fresh process: see `--worker`."""
    progress("one pass and its memory", engine="gendistiller", precision="float32", seconds=seconds)
    command = [sys.executable, __file__, "--worker", "--seconds", str(seconds)]
    try:
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=limit).stdout)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"long.py: one pass of {seconds:g} s took longer than {limit:g} s (--limit)") from None


def run_one_pass(seconds: float) -> None:
    model = gd.Model(gd.Config.preset("gendistiller"))
    model.forward(np.zeros((1, 400), np.float32))
    weights = peak_bytes()
    wav = np.random.default_rng(0).standard_normal((1, round(seconds * RATE)), np.float32)
    begin = time.perf_counter()
    hidden, _ = model.forward(wav)
    print(json.dumps({"seconds": time.perf_counter() - begin, "weights": weights, "peak": peak_bytes(),
                      "states": sum(state.nbytes for state in hidden)}))


def speech(folder: str, seconds: float) -> np.ndarray:
    import soundfile
    wavs, samples = [], 0
    for path in sorted(Path(folder).rglob("*.flac")):
        wav, rate = soundfile.read(str(path), dtype="float32")
        if rate == RATE and wav.ndim == 1:
            wavs.append(wav)
            samples += len(wav)
        if samples >= seconds * RATE:
            return np.concatenate(wavs)[:round(seconds * RATE)]
    raise SystemExit(f"{folder}: expected {seconds:g} s of FLAC at 16 kHz, found {samples / RATE:.0f}")


def distances(wav: np.ndarray, chunk: float, contexts: list[float]) -> Iterator[tuple[float, list[float], list[float]]]:
    """Context, |chunks - one pass| / |one pass| of each state, and the mean cosine of their frames."""
    from gendistiller_ext.weights import student_tiny
    model = gd.Model.load(student_tiny())
    progress("one pass", seconds=len(wav) / RATE)
    whole = [state[0] for state in model.forward(wav[None])[0]]
    given = audio_statistics(model, [wav])
    for context in contexts:
        progress(f"chunks of {chunk:g} s with a context of {context:g} s", seconds=len(wav) / RATE)
        parts = chunks(model, [wav], chunk, context, stats="fixed", statistics=given)
        states = [np.concatenate(state) for state in zip(*parts)]
        yield (context, [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(states, whole)],
               [float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))
                for a, b in zip(states, whole)])


def latencies(settings: list[tuple[float, float]], budget: float) -> Iterator[tuple[Stream, float]]:
    """A stream with each (chunk, context), and the median time of a chunk amid the audio, of 9 or what fits the
    budget."""
    model, noise = gd.Model(gd.Config.preset("gendistiller")), np.random.default_rng(0)
    for chunk, context in settings:
        progress(f"a stream in chunks of {chunk:g} s with a context of {context:g} s", engine="gendistiller",
                 precision="float32")
        stream, times = model.stream(chunk, context), []
        stream.feed(noise.standard_normal(round(RATE * (chunk + 2 * context + 1)), np.float32))
        while len(times) < (repeats(times[0], 9, budget) if times else 1):
            begin = time.perf_counter()
            states = stream.feed(noise.standard_normal(round(RATE * stream.chunk_seconds), np.float32))
            assert len(states[0]) == round(stream.chunk_seconds * 50)
            times.append(time.perf_counter() - begin)
        yield stream, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="speech to compare chunks and one pass on")
    parser.add_argument("--stream", action="store_true", help="time a stream's chunks")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="of audio (default: 600)")
    parser.add_argument("--chunk", type=float, default=10, metavar="S", help="chunks compared (default: 10)")
    bounds.add_options(parser, limit=300, budget=30)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_one_pass(args.seconds)
    elif args.data:
        print(f"chunks of {args.chunk:g} s against one pass of {args.seconds:g} s\n\n| context | distance of f, h1, h2 "
              "| cosine |\n|---|---|---|")
        for context, errors, cosines in distances(speech(args.data, args.seconds), args.chunk, [0, 2, 5, 10]):
            print(f"| {context:g} s | {', '.join(f'{e:.3g}' for e in errors)} | "
                  f"{', '.join(f'{c:.4f}' for c in cosines)} |", flush=True)
    elif args.stream:
        print("| chunk | context | latency | time for a chunk |\n|---|---|---|---|")
        for stream, seconds in latencies([(0.48, 0.48), (1, 1), (2, 1), (4, 2), (10, 5)], args.budget):
            print(f"| {stream.chunk_seconds:g} s | {stream.context_seconds:g} s | {stream.latency_seconds:.3f} s | "
                  f"{seconds * 1e3:.0f} ms |", flush=True)
    else:
        row = one_pass(args.seconds, args.limit)
        print(f"{args.seconds:g} s in one pass: {row['seconds']:.1f} s, peak {row['peak'] / 2**20:.0f} MiB in all, "
              f"of which {row['weights'] / 2**20:.0f} Python and weights, {row['states'] / 2**20:.0f} hidden states")


if __name__ == "__main__":
    bounds.interruptible()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("long.py: interrupted")
