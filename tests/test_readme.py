"""The documents: README's examples run, its commands are understood, and the files that are named exist."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gendistiller_ext as gd
from gendistiller_ext import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "MODEL.md", "CONTRIBUTING.md", "NEWS.md", "gendistiller_ext/weights/README.md")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def blocks(heading: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(section(heading)) if name == language]


def run(command: list[str], folder: Path, **env: str) -> str:
    path = os.pathsep.join(filter(None, [str(Path(gd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": path, **env})
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("needs,headings", [("numpy", ["Python"]), ("torch", ["Python", "PyTorch"]),
                                            ("s3prl", ["Use it in S3PRL"])], ids=["numpy", "torch", "s3prl"])
def test_python_examples(needs, headings, tmp_path):
    if not importlib.util.find_spec(needs):
        pytest.skip(f"{needs} is not installed")
    code = "\n".join(sum((blocks(heading, "python") for heading in headings), []))
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    run([sys.executable, "example.py"], tmp_path)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the commands are x86-64's")
@pytest.mark.skipif(shutil.which("cc") is None, reason="cc is absent")
def test_c_example(tmp_path):
    [code], [commands] = blocks("C", "c"), blocks("C", "sh")
    (tmp_path / "features.c").write_text(code, encoding="utf-8")
    assert run(["sh", "-e", "-c", commands], tmp_path, SRC=str(ROOT)) == "13 states, frames 49 and 21 of width 192\n"


def commands() -> list[str]:
    lines = "\n".join(code for name, code in FENCE.findall(README) if name == "sh").replace("\\\n", "").splitlines()
    inline = re.findall(r"`(gendistiller \w[^`]* --(?!help)[^`]*)`", FENCE.sub("", README))
    return [line for line in lines if line.startswith("gendistiller ")] + inline


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command):
    words = shlex.split(command)[1:]
    cli.build_parser(words[0]).parse_args(words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    text = FENCE.sub("", (ROOT / document).read_text(encoding="utf-8"))
    links = [(ROOT / document).parent / target for target in re.findall(r"\]\((?!\w+:|#)([^)#]+)", text)]
    named = re.findall(r"`((?:csrc|cuda|gendistiller_ext|s3prl_upstream|tests)/[\w./*-]*\w)`", text)
    missing = [str(path) for path in links if not path.exists()]
    missing += [name for name in named if not any(ROOT.glob(name.replace("NAME", "*")))]
    assert not missing


def test_every_command_is_in_the_table():
    rows = re.findall(r"^\| `(\w+)", section("Commands"), re.MULTILINE)
    assert sorted(rows) == sorted(["gendistiller", *cli.COMMANDS])
