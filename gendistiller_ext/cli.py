"""The `gendistiller` command. A subcommand's module is imported only when it is the one called.

Exit codes: 0; 1 where all was done but for files that could not be used; 2 for an error, of which one line is on
stderr; 130 after Ctrl-C, 143 after SIGTERM.
GENDISTILLER_TRACEBACK=1 shows where an error came from.
"""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import Optional, Sequence

COMMANDS = {
    "distill": "distil a teacher into a student",
    "extract": "write hidden states of audio files",
    "info": "show what a checkpoint is and costs",
    "convert": "write a checkpoint in another format",
    "bench": "time a model",
    "superb": "run a SUPERB task from a corpus folder",
    "s3prl": "run S3PRL's own programs with the upstream registered",
    "demo": "distil a small teacher on real speech and use the student",
}
_ERRORS = (ValueError, TypeError, ArithmeticError, OSError, MemoryError, ImportError, RuntimeError)


class Parser(argparse.ArgumentParser):
    """Errors are one line; flags are not abbreviated; descriptions keep their line breaks."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _version() -> str:
    import gendistiller_ext
    return f"gendistiller {gendistiller_ext.__version__}"


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(_version())
        parser.exit()


def build_parser(command: Optional[str]) -> Parser:
    """The parser, with the arguments of `command` alone."""
    parser = Parser(
        prog="gendistiller", description="GenDistiller: distil speech encoders, use the students.",
        epilog="example: gendistiller distill --teacher wavlm.pt --audio LibriSpeech --out runs/a")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f"gendistiller_ext.commands.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs a command line (sys.argv[1:] by default); returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names need not be text, nor fit a terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    command = next((word for word in argv if not word.startswith("-")), None)
    try:
        args = build_parser(command).parse_args(argv)
        code = importlib.import_module(f"gendistiller_ext.commands.{args.command}").run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"gendistiller {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as head, is gone: so is the reason to go on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except _ERRORS as error:
        if os.environ.get("GENDISTILLER_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or ("out of memory" if isinstance(error, MemoryError)
                                                else type(error).__name__)
        print(f"gendistiller {command or ''}".rstrip() + f": error: {text}", file=sys.stderr)
        return 2
