"""gendistiller distill: train a student."""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from typing import Any

from ..training.recipe import Recipe, load_yaml, model_value

_EXIT_CODES = {None: 0, "SIGINT": 130, "SIGTERM": 143}

_DESCRIPTION = """\
Distils a teacher (WavLM, HuBERT, wav2vec 2.0) into a student on unlabelled speech.

OUT gets student.safetensors (the newest), state/ (to go on from), config.yaml, log.csv, curves.png and tb/
(TensorBoard). Ctrl-C and SIGTERM save first and exit with 130 and 143; --resume then goes on, and ends in
the same weights as a run that was never interrupted.

More processes: torchrun --nproc-per-node N -m gendistiller_ext distill ... --batch-size is the whole batch,
which they share; loss and gradient are those of one process. A run that torchrun restarts (--max-restarts)
goes on from its newest state. Audio and teacher have to be there on every machine, --out on the first."""

_EPILOG = """\
example:
  gendistiller distill --teacher WavLM-Base+.pt --audio LibriSpeech --out runs/a \\
      --steps 50000 --batch-size 8 --crop-seconds 8 --set target_layers=4,8,12
  gendistiller distill --config runs/a/config.yaml --resume"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "distill", help="distil a teacher into a student", description=_DESCRIPTION, epilog=_EPILOG,
        argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", default=None,
                        help="settings by the flags' names, with underscores; flags go before it")
    for item in dataclasses.fields(Recipe):
        if item.name != "model":
            _add_flag(parser, item)
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[],
                        help="a field of the student's config, such as dropout=0 or target_layers=4,8,12")
    parser.add_argument("--quiet", action="store_true", default=False, help="no progress")
    parser.add_argument("--json", action="store_true", default=False,
                        help="print every row of the log as a line of JSON, then the summary")


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field) -> None:
    rule = item.metadata
    kind, flag = rule["kind"], "--" + item.name.replace("_", "-")
    default = item.default_factory() if item.default is dataclasses.MISSING else item.default
    shown = rule["help"]
    if kind is bool:
        if item.name != "resume":
            shown += f" (default: {'on' if default else 'off'})"
        action = "store_true" if item.name == "resume" else argparse.BooleanOptionalAction
        parser.add_argument(flag, action=action, help=shown)
        return
    options: dict[str, Any] = {"metavar": rule["metavar"]}
    if kind is list:
        pair = item.name == "betas"
        options.update(dict(nargs=2, type=float) if pair else dict(nargs="+", action="extend"))
    elif rule["choices"]:
        options.update(choices=rule["choices"], metavar=None)
    else:
        options.update(type=kind, metavar=rule["metavar"] or {int: "N", float: "X", str: "NAME"}[kind])
    if default not in (None, []):
        shown += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    parser.add_argument(flag, help=shown, **options)


def recipe_from_args(args: argparse.Namespace) -> Recipe:
    """Defaults, then the config file, then flags."""
    settings = load_yaml(args.config) if args.config else {}
    names = {item.name for item in dataclasses.fields(Recipe)}
    settings.update({name: value for name, value in vars(args).items() if name in names})
    model = dict(settings.get("model", {}))
    for entry in args.set:
        key, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"set: expected KEY=VALUE, got {entry!r}")
        model[key.strip()] = model_value(key.strip(), value.strip())
    settings["model"] = model
    return Recipe(**settings).validate()


def run(args: argparse.Namespace) -> int:
    recipe = recipe_from_args(args)
    from ..training.distributed import Processes
    with Processes.from_environment(recipe.process_timeout, recipe.device) as processes:
        return _run(args, recipe, processes)


def _run(args: argparse.Namespace, recipe: Recipe, processes) -> int:
    from ..training.trainer import Trainer

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    trainer = Trainer(recipe, say, quiet=args.quiet, processes=processes,
                      rows=_print_json if args.json else None)
    if processes.first and not args.quiet:
        seconds = sum(file.samples for file in trainer.train_files) / 16000
        say(f"student {recipe.preset}: {trainer.student.num_params:,} parameters "
            f"({trainer.student.num_params / trainer.teacher.num_params:.1%} of the teacher's), targets "
            f"{', '.join(map(str, trainer.layers))}; {len(trainer.copied)} tensors from the teacher, "
            f"{len(trainer.random)} random")
        say(f"audio: {len(trainer.train_files)} files, {seconds / 3600:.2f} h; held out: "
            f"{len(trainer.valid_files)} files")
    summary = trainer.train()
    if not processes.first:
        pass
    elif args.json:
        _print_json(summary)
    else:
        print(_describe(summary, trainer.layers))
    return _EXIT_CODES[summary["stopped_by"]]


def _print_json(values: dict[str, Any]) -> None:
    """One line; NaN and infinities, which JSON lacks, as null."""
    print(json.dumps({key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in values.items()}), flush=True)


def _describe(summary: dict[str, Any], layers) -> str:
    from ..training.report import table
    stopped = f" ({summary['stopped_by']}; go on with --resume)" if summary["stopped_by"] else ""
    lines = [f"{summary['steps']} steps{stopped}, {summary['audio_seconds'] / 3600:.2f} h of audio in "
             f"{summary['seconds']:.0f} s; {summary['skipped_steps']} steps and {summary['skipped_files']} files "
             "skipped"]
    first, last = summary["valid_first"], summary["valid_last"]
    if last:
        names = [("loss", "valid_loss")]
        names += [(f"cosine with layer {layer}", f"valid_similarity_{layer}") for layer in layers]
        lines.append(table([(label, f"{first[key]:.4f}", f"{last[key]:.4f}") for label, key in names],
                           ("held-out audio", "before", "now")))
    lines.append(f"student: {summary['student']}")
    return "\n".join(lines)
