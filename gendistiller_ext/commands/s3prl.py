"""gendistiller s3prl: S3PRL's own programs, with the upstreams registered."""
from __future__ import annotations

import argparse
import importlib.util
import runpy
import sys
import traceback

_EPILOG = """\
example:
  gendistiller s3prl run_downstream -m train -u gendistiller -k student.safetensors \\
      -d speech_commands -c ks.yaml -p result/ks --device cpu"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "s3prl", help="run S3PRL's own programs with the upstream registered", epilog=_EPILOG,
        description="Runs `python -m s3prl.PROGRAM ARGS...` with the upstreams gendistiller,\n"
                    "gendistiller_local and gendistiller_url added, also where the installed package does\n"
                    "not add them by itself (an editable install, GENDISTILLER_S3PRL=0). All ARGS are\n"
                    "S3PRL's; PROGRAM --help lists them.")
    parser.add_argument("program", metavar="PROGRAM",
                        help="a program of the s3prl package, such as run_downstream")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    import s3prl_upstream

    if importlib.util.find_spec("s3prl") is None:
        raise ImportError("S3PRL is not installed: pip install 'gendistiller_ext[s3prl]'")
    s3prl_upstream.register()
    module = f"s3prl.{args.program}"
    if not args.program.isidentifier() or importlib.util.find_spec(module) is None:
        raise ValueError("program: expected a program of the s3prl package such as run_downstream, got "
                         f"{args.program!r}")
    argv = sys.argv
    sys.argv = [f"gendistiller s3prl {args.program}", *args.arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Exception:  # as Python itself would end the program; one line would say too little of foreign code
        traceback.print_exc()
        return 1
    finally:
        sys.argv = argv
    return 0
