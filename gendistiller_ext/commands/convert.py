"""gendistiller convert: any readable checkpoint to our .safetensors."""
from __future__ import annotations

import argparse
import json
import os

_EPILOG = """\
example:
  gendistiller convert WavLM-Base+.pt wavlm_base_plus.safetensors --dtype bfloat16"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert", help="write any readable checkpoint as .safetensors", epilog=_EPILOG,
        description="Reads a checkpoint of any known format (see `info`) and writes it as .safetensors.")
    parser.add_argument("source", metavar="SOURCE", help="checkpoint file or Hugging Face folder")
    parser.add_argument("target", metavar="TARGET", help="file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the tensors")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    import gendistiller_ext as gd
    if os.path.exists(args.target) and not args.force:
        raise ValueError(f"target: expected a new file, got {args.target}, which exists (--force: replace it)")
    model = gd.Model.load(args.source)
    model.save(args.target, dtype=args.dtype)
    size = os.path.getsize(args.target)
    if args.json:
        print(json.dumps({"target": args.target, "dtype": args.dtype, "parameters": int(model.num_params),
                          "bytes": size}))
    else:
        print(f"{args.target}: {model.num_params:,} parameters, {args.dtype}, {size / 1e6:.1f} MB")
    return 0
