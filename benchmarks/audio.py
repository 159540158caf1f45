#!/usr/bin/env python3
"""What training does with audio: listing a large set, and targets of whole files in place of crops'.

    python benchmarks/audio.py list --files 280692
    python benchmarks/audio.py targets --data LibriSpeech

list: time and memory of finding so many FLAC files, of which headers alone are read. They are names of a few files
in a folder that is removed again, so the system has them cached.
targets: how like a teacher's states of a crop are to the frames that the crop covers of its states of the whole file,
which --teacher-cache keeps; and what keeping them in bfloat16 changes. The small teacher of the package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RATE, HOP = 16000, 320
NAMES = 30_000  # of one file, of which a file system may allow no more than so many
LAYERS = (4, 8, 12)
ENDS = 10  # frames


def list_files(count: int) -> None:
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        for first in range(0, count, NAMES):
            part = Path(folder, str(first))
            part.mkdir()
            original = part / f"{first}.flac"
            soundfile.write(original, np.random.default_rng(first).uniform(-0.5, 0.5, RATE), RATE)
            for number in range(first + 1, min(count, first + NAMES)):
                os.link(original, part / f"{number}.flac")
        subprocess.run([sys.executable, __file__, "find", folder], check=True)


def find_files(folder: str) -> None:
    from gendistiller_ext.audio.files import find_audio
    from measures import peak_memory

    begin = time.perf_counter()
    files, _ = find_audio([folder])
    print(f"{len(files):,} files: {time.perf_counter() - begin:.1f} s, {peak_memory()['peak'] / 2**20:.0f} MiB")


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(layers, frames) of two (layers, frames, width)."""
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def compare_targets(data: str, seconds: float) -> None:
    import soundfile

    from gendistiller_ext.training.target_cache import from_bfloat16, to_bfloat16
    from gendistiller_ext.training.teachers import load_teacher
    from gendistiller_ext.weights import wavlm_tiny

    teacher, draw, crop = load_teacher(str(wavlm_tiny())), np.random.default_rng(0), round(seconds * RATE)
    everywhere, ends, rounded, lengths = [], [], [], []
    for path in sorted(Path(data).rglob("*.flac")):
        wav, rate = soundfile.read(str(path), dtype="float32")
        if rate != RATE or wav.ndim > 1 or len(wav) < 2 * crop:
            continue
        first = int(draw.integers((len(wav) - crop) // HOP + 1))
        whole = teacher.targets([wav], LAYERS)[0][:, 0]
        alone = teacher.targets([wav[first * HOP:first * HOP + crop]], LAYERS)[0][:, 0]
        kept = from_bfloat16(to_bfloat16(whole))
        alike = cosine(alone, whole[:, first:first + alone.shape[1]])
        everywhere.append(alike)
        ends.append(np.concatenate([alike[:, :ENDS], alike[:, -ENDS:]], axis=1))
        rounded.append(np.linalg.norm(kept - whole) / np.linalg.norm(whole))
        lengths.append(len(wav) / RATE)
    if not lengths:
        sys.exit(f"audio.py: expected mono FLAC of {RATE} Hz and at least {2 * seconds:g} s in {data}, got none")
    print(f"{len(lengths)} files of {np.mean(lengths):.1f} s on average, crops of {seconds:g} s; layers "
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
    commands.add_parser("find").add_argument("folder")
    args = parser.parse_args()
    if args.command == "list":
        list_files(args.files)
    elif args.command == "find":
        find_files(args.folder)
    else:
        compare_targets(args.data, args.crop_seconds)


if __name__ == "__main__":
    main()
