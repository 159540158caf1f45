"""gendistiller demo: the whole road on real speech, in minutes."""
from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.files import RATE

# Packages of PyPI that carry recordings of speech; they are fetched, not installed, and nothing of them is run.
# The last one is held out: two speakers of the AMI corpus (CC BY 4.0), of which nothing else is heard.
RECORDINGS = (
    ("moonshine-voice==0.1.5", "moonshine_voice/assets/two_cities.wav"),
    ("moonshine-voice==0.1.5", "moonshine_voice/assets/endgame_nagg_nell.wav"),
    ("moonshine-voice==0.1.5", "moonshine_voice/assets/beckett.wav"),
    ("pyannote-audio==4.0.7", "pyannote/audio/sample/sample.wav"),
)
PIECE_SECONDS = 4

_DESCRIPTION = """\
Distils the small teacher that is part of the package on real speech, compares student and teacher, and lets S3PRL's
upstream and featurizer consume the student. Without --audio and --data, two minutes of speech come from
two packages of PyPI (21 MB). With --data it goes on to keyword spotting in S3PRL, against fbank."""

_EPILOG = """\
example:
  gendistiller demo --audio LibriSpeech --out demo"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("demo", help="distil a small teacher on real speech and use the student",
                                   description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--out", required=True, metavar="DIR", help="new or empty folder for the run")
    parser.add_argument("--audio", metavar="DIR", help="speech to distil on (default: --data's, else PyPI's)")
    parser.add_argument("--data", metavar="DIR", help="labelled speech for keyword spotting, see `superb KS`")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of distillation (default: 400)")
    parser.add_argument("--pip-args", default="", metavar="ARGS", help="options of the pip that fetches the speech")
    parser.add_argument("--no-s3prl", action="store_true", help="leave S3PRL out")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


# ---- Speech -----------------------------------------------------------------------------------------------

def fetch_speech(folder: Path, pip_args: str) -> tuple[Path, Path]:
    """Pieces of RECORDINGS as 16 kHz WAV files, in (training, held out) folders under `folder`."""
    wheels = folder / "wheels"
    packages = sorted({package for package, _ in RECORDINGS})
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                    "--disable-pip-version-check", "--dest", str(wheels), *shlex.split(pip_args), *packages],
                   check=True)
    for package, name in RECORDINGS:
        stem = package.split("==")[0].replace("-", "_")
        [wheel] = wheels.glob(f"{stem}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(name, wheels)
        part = folder / ("held_out" if (package, name) == RECORDINGS[-1] else "train")
        _cut(wheels / name, part)
    return folder / "train", folder / "held_out"


def _cut(source: Path, folder: Path) -> None:
    import soundfile

    from ..audio.files import read_audio
    folder.mkdir(parents=True, exist_ok=True)
    samples = read_audio(str(source))
    for number, first in enumerate(range(0, len(samples) - RATE, PIECE_SECONDS * RATE)):
        soundfile.write(folder / f"{source.stem}-{number:02d}.wav", samples[first:first + PIECE_SECONDS * RATE], RATE)


def find_speech(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """The settings of `distill` that say which speech."""
    if args.audio:
        return {"audio": [args.audio], "valid_fraction": 0.05}
    if args.data:
        corpus = Path(args.data) / "LibriSpeech"
        return {"audio": [str(corpus if corpus.is_dir() else args.data)], "valid_fraction": 0.05}
    train, held_out = fetch_speech(out / "speech", args.pip_args)
    return {"audio": [str(train)], "valid_audio": [str(held_out)]}


# ---- Figures ----------------------------------------------------------------------------------------------

def milliseconds(models: list[Any], wav: np.ndarray, repeats: int = 7) -> list[float]:
    """Median time of each model's forward, taken in turn."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats):
        for model, its in zip(models, times):
            begin = time.perf_counter()
            model.forward([wav])
            its.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(its) for its in times]


def show(summary: dict[str, Any], times: list[float], seconds: float) -> None:
    from ..training.report import table
    first, last = summary["valid_first"], summary["valid_last"]
    layers = [key.rsplit("_", 1)[1] for key in last if key.startswith("valid_similarity_")]
    rows = [("loss on held-out speech", f"{first['valid_loss']:.3f}", f"{last['valid_loss']:.3f}", "")]
    rows += [(f"cosine with the teacher's layer {layer}", f"{first[f'valid_similarity_{layer}']:.3f}",
              f"{last[f'valid_similarity_{layer}']:.3f}", "") for layer in layers]
    rows += [("parameters", "", f"{summary['parameters']:,}", f"{summary['teacher_parameters']:,}"),
             (f"ms for {seconds:.0f} s of speech", "", f"{times[0]:.1f}", f"{times[1]:.1f}")]
    print(table(rows, ("", "before", "student", "teacher")), flush=True)


# ---- S3PRL ------------------------------------------------------------------------------------------------

def consume(student: str, wavs: list[np.ndarray]) -> dict[str, Any]:
    """S3PRL's upstream and featurizer on the student: {"dim", "frames", "same"}, `same` telling whether a batch
    gives each clip the very features that it has alone."""
    import s3prl_upstream
    s3prl_upstream.register()
    import torch
    from s3prl.nn import Featurizer, S3PRLUpstream
    upstream = S3PRLUpstream("gendistiller", student).eval()
    featurizer = Featurizer(upstream)
    clips = [torch.from_numpy(wav) for wav in wavs]

    def features(some: list[Any]) -> list[Any]:
        lengths = torch.tensor([len(clip) for clip in some])
        with torch.no_grad():
            states, frames = upstream(torch.nn.utils.rnn.pad_sequence(some, batch_first=True), lengths)
            rows, counts = featurizer(states, frames)
        return [row[:count] for row, count in zip(rows, counts)]

    together, alone = features(clips), [features([clip])[0] for clip in clips]
    return {"dim": featurizer.output_size, "frames": [len(row) for row in together],
            "same": all(torch.equal(a, b) for a, b in zip(together, alone))}


def spot_keywords(student: str, data: str) -> int:
    return subprocess.run([sys.executable, "-m", "gendistiller_ext", "superb", "KS", "--data", data,
                           "--upstream", f"gendistiller={student}", "--upstream", "fbank"]).returncode


def run(args: argparse.Namespace) -> int:
    import gendistiller_ext as gd

    from ..audio.files import read_audio
    from ..audio.find import find_audio
    from ..training.recipe import Recipe
    from ..training.trainer import Trainer
    from ..weights import wavlm_tiny

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"out: expected a new or empty folder, got {out}")
    speech = find_speech(args, out)
    recipe = Recipe(teacher=str(wavlm_tiny()), out=str(out / "run"), steps=args.steps, batch_size=8, crop_seconds=4.0,
                    lr=5e-4, eval_every=max(1, args.steps // 8), save_every=args.steps, **speech).validate()
    summary = Trainer(recipe, say).train()
    if summary["stopped_by"]:
        return 130
    student = summary["student"]
    files = find_audio(speech.get("valid_audio") or speech["audio"])[0]
    wavs = [read_audio(file) for file in files[:8]]
    clip = np.resize(np.concatenate(wavs), 15 * RATE)
    times = milliseconds([gd.Model.load(student), gd.Model.load(wavlm_tiny())], clip)
    figures: dict[str, Any] = {**summary, "student_ms": times[0], "teacher_ms": times[1], "clip_seconds": 15.0}
    if not args.json:
        show(summary, times, 15.0)
        print(f"curves: {os.path.join(summary['out'], 'curves.png')}", flush=True)
    if not args.no_s3prl:
        seen = figures["s3prl"] = consume(student, [wavs[0], wavs[-1][:RATE], wavs[0][:RATE // 20]])
        if not args.json:
            print(f"S3PRL: featurizer of {seen['dim']} dimensions, frames {seen['frames']}; a batch gives each clip "
                  f"{'the very features' if seen['same'] else 'OTHER features than'} it has alone", flush=True)
    if args.json:
        print(json.dumps(figures))
    if args.data and not args.no_s3prl:
        return spot_keywords(student, args.data)
    return 0
