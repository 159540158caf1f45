"""gendistiller convert: any readable checkpoint to our .safetensors, and back where it fits."""
from __future__ import annotations

import argparse
import json
import os

_DESCRIPTION = """\
Reads a checkpoint of any known format (see `info`) and writes it as

  gendistiller      FILE.safetensors, float32, bfloat16 or int8: any model
  huggingface       FOLDER of WavLM or HuBERT (float32): encoders, and students of several blocks. Prediction
                    heads have no place there and are left out, as in ntu-spml/distilhubert. Audio is normalized with
                    normalize_eps 1e-7 there: models with fairseq's 1e-5 do not fit
  s3prl-distiller   FILE.ckpt of S3PRL's distiller (-u distiller_local): students of plain blocks with parallel
                    heads, such as the preset distilhubert, or predicting by their hidden layers. Needs torch

TARGET's name decides which; --to says otherwise."""

_EPILOG = """\
example:
  gendistiller convert WavLM-Base+.pt wavlm_base_plus.safetensors --dtype bfloat16
  gendistiller convert student.safetensors student_int8.safetensors --precision int8
  gendistiller convert runs/distilhubert/student.safetensors student.ckpt"""

OWN = "gendistiller"
FORMATS = (OWN, "huggingface", "s3prl-distiller")
PRECISIONS = ("float32", "bfloat16", "int8")


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert", help="write a checkpoint in another format", epilog=_EPILOG, description=_DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="checkpoint file or Hugging Face folder")
    parser.add_argument("target", metavar="TARGET", help="file or folder to write")
    parser.add_argument("--to", choices=FORMATS, help="format (default: by TARGET's name)")
    parser.add_argument("--precision", choices=PRECISIONS,
                        help="what the written .safetensors is run in unless told otherwise (default: as the source)")
    parser.add_argument("--dtype", choices=PRECISIONS,
                        help="of the tensors of a .safetensors file; int8: of matrices and convolutions, with a\n"
                             "float32 scale for each output channel (default: as --precision says, else float32)")
    parser.add_argument("--fix-stats", metavar="AUDIO", nargs="+",
                        help="store the statistics of this audio (folders, files, lists) in a .safetensors file, "
                             "for streams with stats 'fixed'")
    parser.add_argument("--force", action="store_true", help="replace what exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def target_format(target: str) -> str:
    """The format that a target's name asks for."""
    suffix = os.path.splitext(target)[1].lower()
    if os.path.isdir(target) or target.endswith("/") or not suffix:
        return "huggingface"
    if suffix in (".safetensors", ".ckpt"):
        return OWN if suffix == ".safetensors" else "s3prl-distiller"
    raise ValueError(f"target: expected FILE.safetensors, FILE.ckpt or a folder (FOLDER/), or --to, got {target}")


def run(args: argparse.Namespace) -> int:
    import gendistiller_ext as gd

    from ..modelinfo import file_size
    kind = args.to or target_format(args.target)
    if os.path.exists(args.target) and not args.force:
        raise ValueError(f"target: expected a new file, got {args.target}, which exists (--force: replace it)")
    if os.path.isdir(args.target) != (kind == "huggingface") and os.path.exists(args.target):
        raise ValueError(f"target: expected a {'folder' if kind == 'huggingface' else 'file'}, got {args.target}")
    dtype = args.dtype or args.precision or "float32"
    if kind != OWN and dtype != "float32":
        raise ValueError(f"dtype: expected float32 for {kind}, got {dtype}")
    if kind != OWN and args.fix_stats:
        raise ValueError(f"fix-stats: expected none for {kind}")
    model = gd.Model.load(args.source)
    if args.fix_stats:
        from ..audio.chunked import audio_statistics
        model.statistics = audio_statistics(model, args.fix_stats)
    left_out: list[str] = []
    if args.precision is not None:
        model.precision = args.precision
    if kind == OWN:
        model.save(args.target, dtype=dtype)
    else:
        from ..checkpoints.export import WRITERS
        left_out = WRITERS[kind](model, args.target)
    size = file_size(args.target)
    if args.json:
        print(json.dumps({"target": args.target, "format": kind, "dtype": dtype, "precision": model.precision,
                          "parameters": int(model.num_params), "bytes": size, "left_out": left_out}))
        return 0
    print(f"{args.target}: {kind}, {model.num_params:,} parameters, {dtype}, {size / 1e6:.1f} MB")
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    return 0
