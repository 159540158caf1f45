"""gendistiller superb: a SUPERB task, trained and tested by S3PRL from a corpus folder."""
from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Optional

TASKS = {"KS": "keyword spotting"}
# Of hidden states kept by the upstream (s3prl_upstream.cache): the features are frozen, and S3PRL asks for
# them anew.
CACHE_MEGABYTES = 4000

_DESCRIPTION = """\
Lays the corpus out for S3PRL, trains its downstream model on an upstream's frozen features, with a rate
that falls to zero, and tests it at the end. No speaker is in two parts. Clips that can't be read are named
on stderr and left out, and the exit code is 1.

KS  keyword spotting: DATA has WORD/SPEAKER_REST.wav (Google's Speech Commands; train/, val/ and test/
    above, or its lists, are followed), or a manifest.tsv (path, tasks, speaker, label). Ten words, the
    rest, and silence."""

_EPILOG = """\
example:
  gendistiller superb KS --data speech_commands --upstream gendistiller -k student.safetensors
  gendistiller superb KS --data speech_commands --seeds 3 \\
      --upstream gendistiller=student.safetensors --upstream gendistiller=WavLM-Base+.pt --upstream fbank"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("superb", help="run a SUPERB task from a corpus folder",
                                   description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("task", metavar="TASK", choices=[*TASKS, "all"], help=f"{', '.join(TASKS)}, or all")
    parser.add_argument("--data", required=True, metavar="DIR", help="the corpus")
    parser.add_argument("--upstream", action="append", metavar="NAME[=CKPT]",
                        help="upstream of S3PRL; may be given several times (default: gendistiller)")
    parser.add_argument("-k", "--ckpt", metavar="CKPT",
                        help="checkpoint of the upstream, where only one is named")
    parser.add_argument("--out", metavar="DIR",
                        help="keep the corpus and S3PRL's folders here (default: keep nothing)")
    parser.add_argument("--keywords", metavar="W,W,...",
                        help="KS: the words to spot (default: S3PRL's ten as far as they are there, then the "
                             "most frequent)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N",
                        help="runs, with seeds 0 .. N - 1 (default: 1)")
    parser.add_argument("--steps", type=int, default=1200, metavar="N", help="of training (default: 1200)")
    parser.add_argument("--eval-every", type=int, metavar="N",
                        help="steps between tests, of which the best on the validation part counts (default: "
                             "the last alone)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="clips a step (default: 32)")
    parser.add_argument("--lr", type=float, default=3e-3, metavar="LR",
                        help="Adam's highest rate (default: 3e-3)")
    parser.add_argument("--device", default="cpu", metavar="DEVICE",
                        help="of the downstream model (default: cpu)")
    parser.add_argument("--verbose", action="store_true", help="show what S3PRL prints")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _upstreams(args: argparse.Namespace) -> list[tuple[str, Optional[str]]]:
    named = [text.partition("=") for text in args.upstream or ["gendistiller"]]
    upstreams = [(name, ckpt or None) for name, _, ckpt in named]
    if args.ckpt is not None:
        if len(upstreams) > 1 or upstreams[0][1] is not None:
            raise ValueError("ckpt: expected with one upstream only; give several as --upstream NAME=CKPT")
        upstreams = [(upstreams[0][0], args.ckpt)]
    for _, ckpt in upstreams:
        if ckpt is not None and "://" not in ckpt and not os.path.exists(ckpt):
            raise FileNotFoundError(f"ckpt: no such checkpoint: {ckpt}")
    return upstreams


def _check(args: argparse.Namespace) -> None:
    if args.eval_every is None:
        args.eval_every = args.steps
    for name in ("seeds", "steps", "eval_every", "batch_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(args, name)}")
    if args.eval_every > args.steps:
        raise ValueError(f"eval_every: expected at most steps ({args.steps}), got {args.eval_every}")
    needed = ("torch", "s3prl", "soundfile", "yaml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: pip install 'gendistiller_ext[s3prl]'")


def _reason(output: str) -> str:
    """The last exception among a program's output, which progress bars run through; else its last line."""
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line] or ["no output"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt|Exit)\b", line)]
    return (errors or lines)[-1]


def _train(out: Path, expdir: Path, upstream: str, ckpt: Optional[str], seed: int,
           args: argparse.Namespace) -> None:
    """S3PRL's run_downstream in a process of its own; RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "gendistiller_ext", "s3prl", "run_downstream", "-m", "train",
               "-u", upstream, "-d", "speech_commands", "-c", str(out / "config.yaml"), "-p", str(expdir),
               "--seed", str(seed), "--device", args.device, *(["-k", ckpt] if ckpt else [])]
    if upstream.startswith("gendistiller"):
        command += ["-g", str(out / "upstream.yaml")]
    expdir.mkdir(parents=True)
    if args.verbose:
        code = subprocess.run(command, stdout=sys.stderr).returncode
        words = "see above"
    else:
        with (expdir / "output.txt").open("w+", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
            output.seek(0)
            words = _reason(output.read())
    if code < 0:
        words = f"ended by {signal.Signals(-code).name}"
    if code:
        raise RuntimeError(f"S3PRL failed with {upstream}, seed {seed}: {words}")


def keyword_spotting(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """{corpus, upstreams: [{upstream, ckpt, test (mean), runs: [{seed, step, valid, test, seconds}]}]}."""
    import yaml

    from ..superb.ks import config, prepare, result

    upstreams = _upstreams(args)
    corpus = prepare(args.data, out / "corpus", args.keywords.split(",") if args.keywords else None)
    for error in corpus.skipped:
        print(f"skipped {error}", file=sys.stderr)
    (out / "upstream.yaml").write_text(f"cache_megabytes: {CACHE_MEGABYTES}\n", encoding="utf-8")
    settings = config(corpus, steps=args.steps, eval_every=args.eval_every, batch_size=args.batch_size,
                      lr=args.lr)
    (out / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    figures = []
    for number, (upstream, ckpt) in enumerate(upstreams):
        runs = []
        for seed in range(args.seeds):
            begin = time.perf_counter()
            expdir = out / f"{number}-{upstream}-seed{seed}"
            _train(out, expdir, upstream, ckpt, seed, args)
            runs.append({"seed": seed, **result(expdir), "seconds": round(time.perf_counter() - begin, 1)})
            print("{0} {1} seed {seed}: test accuracy {test:.4f}, validation {valid:.4f} at step {step} "
                  "({seconds:.0f} s)".format(upstream, ckpt or "", **runs[-1]), file=sys.stderr)
        figures.append({"upstream": upstream, "ckpt": ckpt,
                        "test": statistics.mean(run["test"] for run in runs), "runs": runs})
    return {"task": "KS", "metric": "accuracy", "classes": corpus.classes, "clips": corpus.clips,
            "skipped": len(corpus.skipped),
            "upstreams": figures}


def _show(figures: dict[str, Any]) -> None:
    from ..training.report import table

    clips = figures["clips"]
    print(f"{figures['task']}: {TASKS[figures['task']]}, {len(figures['classes'])} classes; "
          f"{clips['train']} clips to train on, {clips['valid']} to validate, {clips['test']} to test")
    rows = []
    for entry in figures["upstreams"]:
        scores = [run["test"] for run in entry["runs"]]
        spread = f"{100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
        seconds = statistics.mean(run["seconds"] for run in entry["runs"])
        rows.append((entry["upstream"], os.path.basename(entry["ckpt"] or ""), f"{100 * entry['test']:.2f}",
                     spread, len(scores), f"{seconds:.0f}"))
    print(table(rows, ("upstream", "checkpoint", "accuracy %", "std", "seeds", "s a run")))


def run(args: argparse.Namespace) -> int:
    _check(args)
    with tempfile.TemporaryDirectory(prefix="gendistiller-superb-") as scratch:
        out = Path(args.out or scratch)
        figures = keyword_spotting(args, out)
        if args.out:
            (out / "KS.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(figures))
    else:
        _show(figures)
    return 1 if figures["skipped"] else 0
