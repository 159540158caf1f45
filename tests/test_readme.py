"""The documents: their examples run, the commands are understood, links and named files lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import gendistiller_ext as gd
from gendistiller_ext import cli
from gendistiller_ext.weights import student_tiny

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]
TOLD = [*GUIDES, "benchmarks/RESULTS.md"]  # what a user types; CONTRIBUTING.md's commands are a developer's
DOCUMENTS = [*TOLD, "MODEL.md", "CONTRIBUTING.md", "NEWS.md", "gendistiller_ext/weights/README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = ("numpy", "torch", "s3prl")  # what an example imports at most
C_WRAPPER = """#include <stdio.h>
#include <stdlib.h>
#include "gendistiller.h"

int main(void)
{
    static float noise[16000], states[3][49 * 192];
    for (int i = 0; i < 16000; i++)
        noise[i] = (float)rand() / (float)RAND_MAX - 0.5f;
    const float *wavs[] = {noise};
    const int64_t lengths[] = {16000};
    const gd_batch batch = {1, wavs, lengths};
    float *hidden[] = {states[0], states[1], states[2]};
    char message[512];
    gd_context *context;
    gd_model *model;
    gd_workspace *workspace;
    if (%s)
        return 1;
    printf("%%d states, %%d frames\\n", gd_workspace_num_states(workspace), (int)gd_workspace_frames(workspace)[0]);
    for (int i = 0; i < 49 * 192; i++)
        if (states[0][i] == 0 || states[2][i] == 0)
            return 1;
    return 0;
}
"""


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return [code for name, code in FENCE.findall(read(document)) if name == language]


def prose(document: str) -> str:
    return FENCE.sub("", read(document))


def run(command: list[str], folder: Path, **env: str) -> str:
    path = os.pathsep.join(filter(None, [str(Path(gd.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": path, **env})
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- Examples ---------------------------------------------------------------------------------------


def rank(code: str) -> int:
    return max([NEEDS.index(name) for name in re.findall(r"^(?:import|from) (torch|s3prl)\b", code, re.MULTILINE)],
               default=0)


def examples() -> list[tuple[str, int]]:
    """A document's blocks of Python are one program; where some need PyTorch, those that don't are one too."""
    return [(document, needs) for document in GUIDES for needs in sorted({*map(rank, blocks(document, "python"))})]


@pytest.mark.parametrize("document,needs", examples(),
                         ids=lambda value: value if isinstance(value, str) else NEEDS[value])
def test_python_examples(document, needs, tmp_path):
    if not importlib.util.find_spec(NEEDS[needs]):
        pytest.skip(f"{NEEDS[needs]} is not installed")
    code = "\n".join(code for code in blocks(document, "python") if rank(code) <= needs)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    run([sys.executable, "example.py"], tmp_path)


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="the commands are x86-64's")
@pytest.mark.skipif(shutil.which("cc") is None, reason="cc is absent")
def test_c_examples(tmp_path):
    """docs/c.md's program by its commands, then README's calls, each of which must succeed, by the same."""
    [code], [commands], [calls] = blocks("docs/c.md", "c"), blocks("docs/c.md", "sh"), blocks("README.md", "c")
    (tmp_path / "features.c").write_text(code, encoding="utf-8")
    assert run(["sh", "-e", "-c", commands], tmp_path, SRC=str(ROOT)) == "13 states, frames 49 and 21 of width 192\n"
    calls = re.sub(r"/\*.*?\*/", "", calls).replace('"student.safetensors"', f'"{student_tiny()}"')
    steps = [call.strip() for call in calls.split(";") if call.strip()]
    (tmp_path / "features.c").write_text(C_WRAPPER % " ||\n        ".join(steps), encoding="utf-8")
    link = [line for line in commands.splitlines() if "features.c" in line or "=" in line.split()[0]]
    assert run(["sh", "-e", "-c", "\n".join([*link, "./features"])], tmp_path, SRC=str(ROOT)) == "3 states, 49 frames\n"


def test_the_picture_is_of_the_preset():
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg")
    texts = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    layers = [int(text.split()[1]) for text in texts if text.startswith("layer ")]
    assert tuple(layers) == tuple(gd.Config.preset("gendistiller").target_layers)
    assert "docs/architecture.svg" in read("README.md")


# ---- Commands ---------------------------------------------------------------------------------------


def shell_lines() -> list[str]:
    """Every command of the guides: lines of sh blocks, and what stands between backticks with an option or operand."""
    found = []
    for document in TOLD:
        found += "\n".join(blocks(document, "sh")).replace("\\\n", " ").splitlines()
        inline = re.findall(r"`((?:gendistiller|make|python|torchrun|pip) [^`]*)`", prose(document))
        found += [line for line in inline if not re.fullmatch(r"gendistiller [\w ]+", line) and "..." not in line]
    return list(dict.fromkeys(" ".join(shlex.split(line, comments=True)) and line for line in found if line.strip()))


def lines_of(pattern: str) -> list[str]:
    return [line for line in shell_lines() if re.search(pattern, line)]


OUR_COMMAND = re.compile(r"^(?:gendistiller|(?:torchrun .*|python )-m gendistiller_ext) ")


@pytest.mark.parametrize("line", lines_of(OUR_COMMAND.pattern))
def test_commands_are_understood(line):
    words = shlex.split(OUR_COMMAND.sub("", line), comments=True)
    if "--help" not in words:
        cli.build_parser(words[0]).parse_args(words)
    assert words[0] in cli.COMMANDS


@pytest.mark.parametrize("line", lines_of(r"^torchrun "))
def test_torchrun_is_understood(line):
    launcher = pytest.importorskip("torch.distributed.run")
    args = launcher.get_args_parser().parse_args(shlex.split(line, comments=True)[1:])
    assert args.module and args.training_script == "gendistiller_ext"


@pytest.mark.parametrize("document", TOLD)
def test_options_exist(document):
    """An option between backticks is one of our commands', or of a benchmark."""
    known = " ".join(cli.build_parser(name)._subparsers._group_actions[0].choices[name].format_help()
                     for name in cli.COMMANDS)
    known += " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    named = {option for code in re.findall(r"`([^`]+)`", prose(document))
             for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert not [option for option in named if not re.search(rf"(?<![\w-]){option}(?![\w-])", known)]


PARSE_AND_STOP = """import argparse, runpy, sys
parse = argparse.ArgumentParser.parse_args
def parse_and_stop(self, *args):
    parse(self, *args)
    sys.exit(0)
argparse.ArgumentParser.parse_args = parse_and_stop
sys.path.insert(0, 'benchmarks')
sys.argv = sys.argv[1:]
if sys.argv[0].endswith('.py'):
    runpy.run_path(sys.argv[0], run_name='__main__')
else:
    runpy.run_module(sys.argv[0], run_name='__main__')
sys.exit('the program took no arguments')
"""


@pytest.mark.parametrize("line", lines_of(r"^python benchmarks/|run_downstream "))
def test_other_programs_understand(line):
    """Benchmarks and S3PRL's own program parse their arguments and are stopped there."""
    command = re.sub(r"^(?:python (?:-m )?|gendistiller s3prl )(?:s3prl\.)?", "", line)
    program, *words = shlex.split(command, comments=True)
    needs = "s3prl" if "run_downstream" in program else "torch"
    if not importlib.util.find_spec(needs):
        pytest.skip(f"{needs} is not installed")
    if needs == "s3prl":
        program = f"s3prl.{program.replace('.py', '')}"
    # The package under test, not the sources in this folder.
    code = f"import sys; sys.path.remove('')\nimport s3prl_upstream; s3prl_upstream.register()\n{PARSE_AND_STOP}"
    run([sys.executable, "-c", code, program, *words], ROOT)


@pytest.mark.parametrize("line", lines_of(r"^make "))
def test_make_targets_and_variables_exist(line):
    makefile = read("Makefile")
    for word in shlex.split(line.replace(" --silent -C $SRC", ""), comments=True)[1:]:
        name, is_variable, value = word.partition("=")
        if is_variable:
            assert re.search(rf"\b{name}\b", makefile), name
        else:
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), name
        if name == "BENCH":
            assert all(option in read("benchmarks/speed.py") for option in re.findall(r"--\w+", value)), value


def test_extras_exist():
    extras = set(re.findall(r"^(\w+) = \[", read("pyproject.toml").split("[project.optional-dependencies]")[1]
                            .split("[project.scripts]")[0], re.MULTILINE))
    named = {name for line in lines_of(r"^pip install") for some in re.findall(r"\[([\w,]+)\]", line)
             for name in some.split(",")}
    rows = set(re.findall(r"^\| `(\w+)`", read("README.md").split("| extra |")[1].split("\n\n")[0], re.MULTILINE))
    assert named <= extras and rows == extras


def test_every_command_is_in_the_table():
    table = read("README.md").split("### Command line\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    assert sorted(rows) == sorted(["gendistiller", *cli.COMMANDS])


# ---- Links, names, figures --------------------------------------------------------------------------


def anchors(document: str) -> set[str]:
    """As GitHub makes them of headings: lower case, spaces as hyphens, no other punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    wrong = []
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)", prose(document)):
        path = ((ROOT / document).parent / target).resolve() if target else ROOT / document
        if not path.exists() or anchor and anchor not in anchors(path.relative_to(ROOT).as_posix()):
            wrong.append(f"{target}#{anchor}")
    assert not wrong


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    named = re.findall(r"`((?:csrc|cuda|docs|benchmarks|gendistiller_ext|s3prl_upstream|tests)/[\w./*-]*\w)`",
                       prose(document))
    assert not [name for name in named if not any(ROOT.glob(name.replace("NAME", "*")))]


def test_readme_leads_to_every_guide():
    assert not [document for document in TOLD[1:] if f"]({document})" not in read("README.md")]


def test_readme_states_no_figure_of_its_own():
    """Times, factors and accuracies in README are those of RESULTS.md."""
    section = read("README.md").split("## Figures\n")[1].split("\n## ")[0]
    results = read("benchmarks/RESULTS.md")
    figures = set(re.findall(r"\b\d+\.\d+\b", section))
    assert len(figures) > 20 and not {figure for figure in figures if not re.search(rf"\b{figure}\b", results)}


def test_readme_stays_short():
    assert len(read("README.md").splitlines()) <= 220
