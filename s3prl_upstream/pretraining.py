"""`run_pretrain.py -u gendistiller` in an unmodified S3PRL, which looks for upstreams in its own folder alone:

    choices=os.listdir('pretrain/')                       the program's `os` lists ours too
    import pretrain.NAME.pretrain_expert                  our folder is on the package's path
    pretrain/NAME/config_{runner,model}.yaml              arguments -c and -g where the user gave none
"""
from __future__ import annotations

import os
import sys
from typing import Any

from . import compat

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pretrain")
NAME = "gendistiller"


class _Listing:
    """The module os, with NAME in `pretrain/`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    def listdir(path: Any = ".") -> list:
        names = os.listdir(path)
        ours = isinstance(path, str) and os.path.basename(path.rstrip("/")) == "pretrain" and NAME not in names
        return [*names, NAME] if ours else names


def add_to(package: Any) -> None:
    """package: S3PRL's `pretrain`, just imported by run_pretrain.py."""
    main = sys.modules.get("__main__")
    program = os.path.basename(getattr(main, "__file__", None) or "")
    if program != "run_pretrain.py" or not hasattr(main, "os"):
        return
    if FOLDER not in package.__path__:
        package.__path__.append(FOLDER)  # last: a folder of that name in the user's checkout comes first
    main.os = _Listing()
    compat.allow_checkpoints("optimizers")
    words = sys.argv[1:]
    if _value(words, "-u", "--upstream") != NAME or _value(words, "-e", "--past_exp"):
        return
    if os.path.isdir(os.path.join("pretrain", NAME)):
        return
    for short, long, file in (("-c", "--config", "config_runner.yaml"),
                              ("-g", "--upstream_config", "config_model.yaml")):
        if _value(words, short, long) is None:
            sys.argv += [short, os.path.join(FOLDER, NAME, file)]


def _value(words: list, short: str, long: str) -> Any:
    """The value of an option as argparse would find it, written apart or joined."""
    for at, word in enumerate(words):
        if word in (short, long):
            return words[at + 1] if at + 1 < len(words) else ""
        if word.startswith(long + "="):
            return word[len(long) + 1:]
        if word.startswith(short) and not word.startswith("--") and len(word) > 2:
            return word[2:]
    return None
