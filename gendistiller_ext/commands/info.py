"""gendistiller info: what a checkpoint is and costs."""
from __future__ import annotations

import argparse
import json
import os
from typing import Any

from ..safetensors import read_header

_DESCRIPTION = """\
Shows a checkpoint's format, config, parameters by part, and multiply-accumulates (MACs).

MACs are counted as in the SUPERB challenge (SLT 2022): linear layers, convolutions and attention as its
profiler counts them, over its 32 utterances of LibriSpeech test-clean (1.28 to 20.38 s, 224.86 s in all).
HuBERT Base has 1,669,156,022,848 by that count."""

_EPILOG = """\
example:
  gendistiller info runs/a/student.safetensors --teacher WavLM-Base+.pt"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("info", help="show what a checkpoint is and costs",
                                   description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("model", metavar="FILE", help="checkpoint of any readable format, or a preset's name")
    parser.add_argument("--teacher", metavar="FILE", help="checkpoint or preset to compare with")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def describe(source: str) -> dict[str, Any]:
    """Everything that `info` shows of one checkpoint or preset, as JSON takes it."""
    import gendistiller_ext as gd

    from .. import foreign
    from ..modelinfo import model_hash, parameter_groups, superb_macs
    facts: dict[str, Any] = {"source": source, "bytes": None, "hash": None, "ignored": []}
    if not os.path.exists(source) and source in gd.Config.presets():
        model = gd.Model(gd.Config.preset(source), seed=0)
        facts["format"] = "preset"
    elif (own := _own_format(source)):
        model = gd.Model.load(source)
        facts.update(format=own, bytes=_size(source), hash=model_hash(model))
    else:
        content = foreign.read(source)
        model = gd.Model(content.config, seed=0)
        model.load_params(content.tensors)
        facts.update(format=content.format, bytes=_size(source), hash=model_hash(model),
                     ignored=content.ignored)
    return {**facts, "config": model.config.to_dict(), "parameters": int(model.num_params),
            "parameter_groups": parameter_groups(model), "macs": superb_macs(model.config)}


def _own_format(source: str) -> str:
    """"gendistiller float32" and the like; "" for another project's checkpoint."""
    if os.path.isdir(source):
        return ""
    try:
        metadata, tensors = read_header(source)
    except ValueError:
        if source.endswith(".safetensors"):
            raise
        return ""
    if "gendistiller" not in metadata:
        return ""
    codes = {dtype for dtype, _ in tensors.values()}
    return "gendistiller " + ("int8" if "I8" in codes else "bfloat16" if "BF16" in codes else "float32")


def _size(path: str) -> int:
    if os.path.isdir(path):
        return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
    return os.path.getsize(path)


def run(args: argparse.Namespace) -> int:
    facts = describe(args.model)
    teacher = describe(args.teacher) if args.teacher else None
    if args.json:
        print(json.dumps({**facts, **({"teacher": teacher} if teacher else {})}))
    else:
        print(_text(facts, teacher))
    return 0


def _text(facts: dict[str, Any], teacher: Any) -> str:
    from ..report import table
    size = f", {facts['bytes'] / 1e6:.1f} MB" if facts["bytes"] else ""
    lines = [f"{facts['source']}: {facts['format']}{size}"]
    if facts["hash"]:
        lines.append(f"hash {facts['hash']}")
    lines += ["", "config"] + [f"  {key}: {json.dumps(value)}" for key, value in facts["config"].items()]
    if facts["ignored"]:
        lines += ["", f"ignored tensors: {', '.join(facts['ignored'])}"]
    columns = [facts] + ([teacher] if teacher else [])
    parts = list(dict.fromkeys(part for column in columns for part in column["parameter_groups"]))
    rows = [[part] for part in [*parts, "total"]]
    for column in columns:
        for row in rows[:-1]:
            row += [f"{column['parameter_groups'].get(row[0], 0):,}", _giga(column["macs"]["parts"].get(row[0]))]
        rows[-1] += [f"{column['parameters']:,}", _giga(column["macs"]["per_second"])]
    header = ["part", "parameters", "GMAC/s"] + (["teacher's", "GMAC/s"] if teacher else [])
    lines += ["", table(rows, header), "",
              f"MACs over SUPERB's 32 utterances: {facts['macs']['total']:,}"]
    if teacher:
        lines.append(f"of the teacher: {facts['parameters'] / teacher['parameters']:.1%} of the parameters, "
                     f"{facts['macs']['total'] / teacher['macs']['total']:.1%} of the MACs")
    return "\n".join(lines)


def _giga(count: Any) -> str:
    return "" if count is None else f"{count / 1e9:.3f}"
