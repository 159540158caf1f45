"""gendistiller info: what a checkpoint is and costs."""
from __future__ import annotations

import argparse
import json
import os
from typing import Any, Optional

from ..checkpoints import safetensors

_DESCRIPTION = """\
Shows a checkpoint's format, config, parameters by part, and multiply-accumulates (MACs). FILE is any of
gendistiller's .safetensors, unilm's, fairseq's and S3PRL's .pt, S3PRL's distiller .ckpt, a Hugging Face folder
or a weights file in one, or a preset's name. What stands beside the encoder, such as a head, is listed as
ignored. Tensors of the encoder that are missing, misshapen or unknown are listed, and the exit code is 2: such a
checkpoint can't be used.

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
    """Everything that `info` shows of one checkpoint or preset, as JSON takes it. "problem" is None, or why the
    checkpoint can't be used; parameters and MACs are then what its config asks for."""
    import gendistiller_ext as gd

    from ..modelinfo import file_size, model_hash, parameter_groups, superb_macs
    facts: dict[str, Any] = {"source": source, "format": "preset", "bytes": None, "hash": None, "dtypes": {},
                             "prefix": "", "ignored": [], "missing": [], "misshapen": [], "unexpected": [],
                             "problem": None}
    if not os.path.exists(source) and source in gd.Config.presets():
        model = gd.Model(gd.Config.preset(source), seed=0)
    else:
        facts["bytes"] = file_size(source)
        model = _describe_own(source, facts)
        if model is None:
            model = _describe_foreign(source, facts)
        facts["hash"] = None if facts["problem"] else model_hash(model)
    return {**facts, "config": model.config.to_dict(), "parameters": int(model.num_params),
            "parameter_groups": parameter_groups(model), "macs": superb_macs(model.config)}


def _describe_own(source: str, facts: dict[str, Any]) -> Optional[Any]:
    """The model of one of our files; None for another project's."""
    import gendistiller_ext as gd

    if os.path.isdir(source):
        return None
    try:
        tensors, metadata = safetensors.read(source)
    except ValueError:
        if source.endswith(".safetensors"):
            raise
        return None
    if "gendistiller" not in metadata:
        return None
    dtypes = [tensor.dtype for tensor in tensors.values()]
    kind = next((dtype for dtype in ("int8", "bfloat16") if dtype in dtypes), "float32")
    facts.update(format=f"gendistiller {kind}", dtypes=_counts(dtypes))
    if kind != "int8":  # whose scales are not among the parameters
        try:
            config = gd.Config.from_dict(json.loads(metadata["gendistiller"]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from None
        shapes = config.parameter_shapes()
        facts["missing"] = [f"{name} {shape}" for name, shape in shapes.items() if name not in tensors]
        facts["unexpected"] = [name for name in tensors if name not in shapes]
        facts["misshapen"] = [f"{name}: expected shape {shape}, got {tensors[name].shape}"
                              for name, shape in shapes.items() if name in tensors and tensors[name].shape != shape]
        wrong = next((key for key in ("misshapen", "missing", "unexpected") if facts[key]), None)
        if wrong:
            facts["problem"] = f"{source}: {wrong} {facts[wrong][0]}"
            return gd.Model(config, seed=0)
    return gd.Model.load(source)


def _describe_foreign(source: str, facts: dict[str, Any]) -> Any:
    import gendistiller_ext as gd

    from ..checkpoints import foreign
    contents = foreign.inspect(source)
    used = [contents.state[name].dtype for name in contents.found.values()]
    told = ("prefix", "ignored", "missing", "misshapen", "unexpected")
    facts.update(format=contents.format, dtypes=_counts(used), problem=contents.problem,
                 **{key: getattr(contents, key) for key in told})
    model = gd.Model(contents.config, seed=0)
    if not contents.problem:
        model.load_params(contents.read().tensors)
    return model


def _counts(values: list[str]) -> dict[str, int]:
    return {value: values.count(value) for value in sorted(set(values))}


def run(args: argparse.Namespace) -> int:
    facts = describe(args.model)
    teacher = describe(args.teacher) if args.teacher else None
    if args.json:
        print(json.dumps({**facts, **({"teacher": teacher} if teacher else {})}))
    else:
        print(_text(facts, teacher))
    for model in filter(None, (facts, teacher)):
        if model["problem"]:
            raise ValueError(model["problem"])
    return 0


def _summary(config: dict[str, Any]) -> str:
    """The architecture in a line."""
    convolutions = config["conv_feature_layers"]
    blocks = config["encoder_layers"]
    parts = [config["architecture"],
             f"{len(convolutions)} convolutions to {convolutions[-1][0]} channels ({config['extractor_mode']})",
             f"{blocks} block{'s' if blocks > 1 else ''} of {config['encoder_embed_dim']} x "
             f"{config['encoder_attention_heads']} heads x {config['encoder_ffn_embed_dim']}"]
    if config["target_layers"]:
        parts.append(f"layers {', '.join(map(str, config['target_layers']))} of the teacher")
    return ", ".join(parts)


def _text(facts: dict[str, Any], teacher: Any) -> str:
    from ..training.report import table
    size = f", {facts['bytes'] / 1e6:.1f} MB" if facts["bytes"] else ""
    dtypes = ", ".join(f"{count} tensors {dtype}" for dtype, count in facts["dtypes"].items())
    lines = [f"{facts['source']}: {facts['format']}{size}{', ' if dtypes else ''}{dtypes}", _summary(facts["config"])]
    if facts["hash"]:
        lines.append(f"hash {facts['hash']}")
    if facts["prefix"]:
        lines.append(f"the encoder's names begin with {facts['prefix']}")
    lines += ["", "config"] + [f"  {key}: {json.dumps(value)}" for key, value in facts["config"].items()]
    for key in ("ignored", "missing", "misshapen", "unexpected"):
        if facts[key]:
            lines += ["", f"{key} tensors: {', '.join(facts[key])}"]
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
