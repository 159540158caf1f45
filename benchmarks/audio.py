#!/usr/bin/env python3
"""What training does with audio: listing a large set, and targets of whole files in place of crops'.

    python benchmarks/audio.py list --files 280692
    python benchmarks/audio.py targets --data LibriSpeech

list: time and memory of finding so many FLAC files, of which headers alone are read. They are names of a few files
in a folder that is removed again, so the system has them cached.
targets: how like a teacher's states of a crop are to the frames that the crop covers of its states of the whole file,
which --teacher-cache keeps; and what keeping them in bfloat16 changes. The small teacher of the package; of as many
files as --budget allows, or as were done at an interrupt.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import bounds
from bounds import progress

RATE, HOP = 16000, 320
NAMES = 30_000  # of one file, of which a file system may allow no more than so many
LAYERS = (4, 8, 12)
ENDS = 10  # frames


def list_files(count: int, limit: float) -> None:
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        progress(f"making {count:,} names")
        for first in range(0, count, NAMES):
            part = Path(folder, str(first))
            part.mkdir()
            original = part / f"{first}.flac"
            soundfile.write(original, np.random.default_rng(first).uniform(-0.5, 0.5, RATE), RATE)
            for number in range(first + 1, min(count, first + NAMES)):
                os.link(original, part / f"{number}.flac")
        progress("finding them")
        try:
            subprocess.run([sys.executable, __file__, "find", folder], check=True, timeout=limit)
        except subprocess.TimeoutExpired:
            sys.exit(f"audio.py: finding {count:,} files took longer than {limit:g} s (--limit)")


def find_files(folder: str) -> None:
    from gendistiller_ext.audio.find import find_audio
    from measures import peak_memory

    begin = time.perf_counter()
    files, _ = find_audio([folder])
    print(f"{len(files):,} files: {time.perf_counter() - begin:.1f} s, {peak_memory()['peak'] / 2**20:.0f} MiB")


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(layers, frames) of two (layers, frames, width)."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def compare_file(teacher, wav: np.ndarray, crop: int, draw: np.random.Generator) -> tuple[np.ndarray, float, float]:
    """Of a crop drawn from `wav`: cosines (layers, frames); bfloat16's change of the whole's targets; wav's seconds."""
    from gendistiller_ext.training.target_cache import from_bfloat16, to_bfloat16

    first = int(draw.integers((len(wav) - crop) // HOP + 1))
    whole = teacher.targets([wav], LAYERS)[0][:, 0]
    alone = teacher.targets([wav[first * HOP:first * HOP + crop]], LAYERS)[0][:, 0]
    change = np.linalg.norm(from_bfloat16(to_bfloat16(whole)) - whole) / np.linalg.norm(whole)
    return cosine(alone, whole[:, first:first + alone.shape[1]]), float(change), len(wav) / RATE


def compare_targets(data: str, seconds: float, budget: float) -> None:
    import soundfile

    from gendistiller_ext.training.teachers import load_teacher
    from gendistiller_ext.weights import wavlm_tiny

    teacher, draw, crop = load_teacher(str(wavlm_tiny())), np.random.default_rng(0), round(seconds * RATE)
    files, found, began, told = sorted(Path(data).rglob("*.flac")), [], time.perf_counter(), -10.0
    with contextlib.suppress(KeyboardInterrupt):
        for number, path in enumerate(files):
            spent = time.perf_counter() - began
            if spent > budget:
                break
            if spent > told + 10:
                told = spent
                progress(f"targets of whole files and of crops, file {number + 1} of {len(files)}")
            wav, rate = soundfile.read(str(path), dtype="float32")
            if rate == RATE and wav.ndim == 1 and len(wav) >= 2 * crop:
                found.append(compare_file(teacher, wav, crop, draw))
    if not found:
        sys.exit(f"audio.py: expected mono FLAC of {RATE} Hz and at least {2 * seconds:g} s in {data}, got none")
    everywhere, rounded, lengths = zip(*found)
    ends = [np.concatenate([alike[:, :ENDS], alike[:, -ENDS:]], axis=1) for alike in everywhere]
    print(f"{len(lengths)} of {len(files)} files, {np.mean(lengths):.1f} s on average; crops of {seconds:g} s; layers "
          f"{', '.join(map(str, LAYERS))}")
    for name, values in (("all frames", everywhere), (f"the first and last {ENDS}", ends)):
        means = np.concatenate(values, axis=1).mean(axis=1)
        print(f"cosine over {name}: {', '.join(f'{mean:.3f}' for mean in means)}")
    print(f"bfloat16 changes a file's targets by {np.mean(rounded):.2%} of their norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | targets")
    listing = commands.add_parser("list")
    listing.add_argument("--files", type=int, default=280_692, metavar="N", help="default: %(default)s")
    targets = commands.add_parser("targets")
    targets.add_argument("--data", required=True, metavar="DIR", help="speech, FLAC of 16 kHz")
    targets.add_argument("--crop-seconds", type=float, default=4, metavar="S", help="default: %(default)s")
    listing.add_argument("--limit", type=bounds.positive, default=300, metavar="S",
                         help="seconds that finding them may take (default: %(default)s)")
    targets.add_argument("--budget", type=bounds.positive, default=900, metavar="S",
                         help="seconds after which no file is begun (default: %(default)s)")
    commands.add_parser("find").add_argument("folder")
    args = parser.parse_args()
    if args.command == "list":
        list_files(args.files, args.limit)
    elif args.command == "find":
        find_files(args.folder)
    else:
        compare_targets(args.data, args.crop_seconds, args.budget)


if __name__ == "__main__":
    bounds.interruptible()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("audio.py: interrupted")
