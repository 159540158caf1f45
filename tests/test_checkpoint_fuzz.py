"""Checkpoints damaged at random: an error or a sound model, in Python, and in C under sanitizers."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import time
from pathlib import Path

import pytest

import gendistiller_ext as gd
from checkpoint_bytes import unpack
from conftest import SEED, SMALL

WORDS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b'\\"', b"\\u0000", b"\\ud800", b"0", b"-1",
         b"1e9", b"null", b"true", b"[[[[[[[[[[[[[[[[[[[[", b"9223372036854775807",
         b"18446744073709551616", b"dtype", b"shape", b"data_offsets", b"F32", b"BF16", b"I8",
         b"__metadata__", b"gendistiller", b".scale", b"65536", b"encoder", b"\xff", b"\xc0\x80", b" ",
         b"\n"]


def mutate(rng, content, header):
    at = rng.randrange(header if rng.random() < 0.75 else len(content))
    kind = rng.randrange(6)
    if kind == 0:
        changed = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]
    elif kind == 1:
        changed = content[:at]
    elif kind == 2:
        changed = content[:at] + content[at + rng.randrange(1, 40):]
    elif kind == 3:
        other = rng.randrange(len(content))
        changed = content[:at] + content[other:other + rng.randrange(40)] + content[at:]
    else:
        changed = content[:at] + rng.choice(WORDS) + content[at + rng.randrange(8):]
    if kind > 1 and rng.random() < 0.8:  # the header's length is right again
        length = int.from_bytes(content[:8], "little") + len(changed) - len(content)
        changed = (length % 2**64).to_bytes(8, "little") + changed[8:]
    return changed


def test_random_damage_is_an_error_or_a_model(tmp_path):
    path = tmp_path / "model.safetensors"
    gd.Model(gd.Config(**SMALL), seed=1).save(path)
    content = path.read_bytes()
    rng = random.Random(SEED)
    header = len(content) - len(unpack(content)[1])
    end = time.monotonic() + 2.5
    loaded = refused = 0
    while time.monotonic() < end:
        damaged = content
        for _ in range(rng.randrange(1, 4)):
            if len(damaged) > 8:
                damaged = mutate(rng, damaged, min(header, len(damaged)))
        path.write_bytes(damaged)
        try:
            model = gd.Model.load(path)
        except (ValueError, OSError, NotImplementedError) as error:
            assert str(error)
            refused += 1
        else:
            assert model.num_params == sum(values.size for values in model.params.values())
            loaded += 1
    assert loaded and refused


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    """tests/fuzz/fuzz_checkpoint.c and what it needs of csrc, with sanitizers."""
    root, folder = Path(__file__).resolve().parent.parent, tmp_path_factory.mktemp("fuzz")
    cc = shlex.split(os.environ.get("CC", "cc"))
    cc += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (folder / "empty.c").write_text("int main(void) { return 0; }")
    if subprocess.run([*cc, folder / "empty.c", "-o", folder / "empty"], capture_output=True).returncode:
        pytest.skip(f"{cc[0]} has no sanitizers")
    sources = [*sorted((root / "csrc").glob("*.c")), root / "tests" / "fuzz" / "fuzz_checkpoint.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-I", root / "csrc"]
    done = subprocess.run([*cc, *flags, *sources, "-lm", "-ldl", "-o", folder / "fuzz"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return folder / "fuzz"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_damage_with_sanitizers(fuzz, seed):
    folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(fuzz.parent)
    # A number of the process's own names the file too, so that two runs don't share it.
    done = subprocess.run([fuzz, folder, "3", f"{os.getpid()}{seed}"], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    files, loaded, damaged = [int(word) for word in done.stdout.split() if word.isdigit()][:3]
    assert 0 < loaded < files and 0 < damaged < files
