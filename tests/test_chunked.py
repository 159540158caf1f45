"""Long files in chunks: `extract --chunk-seconds`, and `convert --fix-stats`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
for module in ("soxr", "tqdm"):
    pytest.importorskip(module)

import gendistiller_ext as gd  # noqa: E402
from conftest import SEED, SMALL_CONFIGS, SMALL_TEACHERS  # noqa: E402
from engine import build  # noqa: E402
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import safetensors  # noqa: E402
from gendistiller_ext.audio.files import AudioError, AudioFile, read_audio  # noqa: E402
from gendistiller_ext.audio.chunked import audio_statistics, extract_long, read_pieces  # noqa: E402
from gendistiller_ext.audio.chunked import Chunking  # noqa: E402
from gendistiller_ext.stream import chunks, statistics  # noqa: E402
from reference.layout import random_state  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chunked")
    rng = np.random.default_rng(0)
    for name, rate, seconds in (("long.wav", 16000, 7), ("short.flac", 16000, 1), ("low.wav", 8000, 5),
                                ("stereo.flac", 44100, 4)):
        shape = (rate * seconds, 2) if name == "stereo.flac" else rate * seconds
        (folder / "audio").mkdir(exist_ok=True)
        soundfile.write(str(folder / "audio" / name), rng.uniform(-0.5, 0.5, shape), rate)
    for name, config in {**SMALL_CONFIGS, **SMALL_TEACHERS}.items():
        if name in ("small", "vector_widths", "wavlm", "normalize"):
            build(config, random_state(config, SEED)).save(folder / f"{name}.safetensors")
    return folder


def run(*words) -> int:
    return cli.main([str(word) for word in words])


def states_of(path: Path) -> np.ndarray:
    if path.suffix == ".npz":
        return np.load(path)["hidden_states"]
    return safetensors.parse(path.read_bytes())[0]["hidden_states"]


@pytest.mark.parametrize("name, kind, precision", [
    ("small", "safetensors", "float32"), ("small", "npz", "float32"), ("wavlm", "safetensors", "float32"),
    ("normalize", "safetensors", "float32"), ("vector_widths", "safetensors", "bfloat16"),
    ("vector_widths", "safetensors", "int8")])
def test_extract_in_chunks(corpus, tmp_path, capsys, name, kind, precision):
    """Each long file's states are those of stream.chunks; a file no longer than a chunk is as ever."""
    words = ("extract", "--model", corpus / f"{name}.safetensors", "--audio", corpus / "audio", "--format", kind,
             "--precision", precision, "--quiet", "--json", "--out")
    cut = ("--chunk-seconds", 1.5, "--context-seconds", 0.4)
    assert run(*words, tmp_path / "cut", *cut) == 0
    assert json.loads(capsys.readouterr().out)["written"] == 4
    assert run(*words, tmp_path / "whole") == 0
    model = gd.Model.load(corpus / f"{name}.safetensors")
    for file in sorted((corpus / "audio").iterdir()):
        result, whole = (states_of(tmp_path / run / f"{file.name}.{kind}") for run in ("cut", "whole"))
        assert result.shape == whole.shape and result.dtype == np.float32
        if file.name == "short.flac":
            assert np.array_equal(result, whole)
            continue
        wav = read_audio(str(file))
        expected = chunks(model, [wav], 1.5, 0.4, stats="fixed", statistics=statistics(model, [wav]),
                          precision=precision)
        expected = np.stack([np.concatenate(states) for states in zip(*expected)])
        if file.name == "long.wav":
            assert np.array_equal(result, expected)
        else:  # resampled in pieces
            np.testing.assert_allclose(result, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        if name != "wavlm":
            np.testing.assert_allclose(result[0], whole[0], rtol=0, atol=2e-3 * np.abs(whole[0]).max())
        assert not np.array_equal(result[-1], whole[-1])
    capsys.readouterr()
    assert run(*words, tmp_path / "cut", *cut) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 4
    assert run(*words, tmp_path / "cut", "--chunk-seconds", 1.5) == 0  # another context
    assert json.loads(capsys.readouterr().out)["written"] == 3


def test_chosen_layers(corpus, tmp_path):
    words = ("extract", "--model", corpus / "wavlm.safetensors", "--audio", corpus / "audio" / "long.wav",
             "--chunk-seconds", 2, "--quiet", "--out")
    assert run(*words, tmp_path / "all") == 0 and run(*words, tmp_path / "two", "--layers", "2,0") == 0
    every, two = (states_of(tmp_path / name / "long.wav.safetensors") for name in ("all", "two"))
    assert np.array_equal(two, every[[2, 0]])


def test_pieces_are_the_file(corpus):
    for file in (corpus / "audio").iterdir():
        whole = read_audio(str(file))
        pieces = np.concatenate(list(read_pieces(AudioFile(file.name, str(file)), 0.3)))
        assert pieces.dtype == np.float32 and len(pieces) == len(whole)
        # At 16 kHz the samples themselves; resampled ones may be rounded otherwise.
        np.testing.assert_allclose(pieces, whole, rtol=0, atol=0 if soundfile.info(file).samplerate == 16000 else 1e-5)


def test_what_cannot_be_read(corpus, tmp_path, capsys):
    """Neither a file that ends early nor one with NaN leaves anything behind."""
    (tmp_path / "in").mkdir()
    soundfile.write(str(tmp_path / "in" / "nan.wav"), np.full(60000, np.nan), 16000, subtype="FLOAT")
    soundfile.write(str(tmp_path / "in" / "good.wav"), np.zeros(60000), 16000)
    flac = tmp_path / "in" / "cut.flac"
    soundfile.write(str(flac), np.random.default_rng(1).uniform(-0.5, 0.5, 80000), 16000)
    flac.write_bytes(flac.read_bytes()[:60000])
    assert run("extract", "--model", corpus / "small.safetensors", "--audio", tmp_path / "in", "--out",
               tmp_path / "out", "--chunk-seconds", 1, "--quiet", "--json") == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"out": str(tmp_path / "out"), "written": 1, "kept": 0, "skipped": 2}
    assert "nan.wav: NaN or Inf samples" in captured.err and "skipped cut.flac: " in captured.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.wav.safetensors"]
    with pytest.raises(AudioError, match="gone.wav: "):
        extract_long(gd.Model.load(corpus / "small.safetensors"), AudioFile("gone.wav", "/nowhere/gone.wav"),
                     str(tmp_path / "x.safetensors"), Chunking(1, 1), layers=[0], tags={})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_file(corpus, tmp_path):
    """Ten minutes take what two do: their samples alone would be 31 MB more."""
    script = """
import sys
from gendistiller_ext import cli
assert cli.main(sys.argv[1:]) == 0
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    root = str(Path(gd.__file__).resolve().parent.parent)
    peaks = []
    for minutes in (2, 10):
        wav = np.random.default_rng(0).integers(-9999, 9999, 960000 * minutes, dtype=np.int16)
        soundfile.write(str(tmp_path / f"{minutes}.wav"), wav, 16000)
        command = [sys.executable, "-c", script, "extract", "--model", str(corpus / "small.safetensors"), "--audio",
                   str(tmp_path / f"{minutes}.wav"), "--out", str(tmp_path / "out"), "--chunk-seconds", "10",
                   "--context-seconds", "2", "--quiet", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 4000  # kB


def test_fix_stats(corpus, tmp_path, capsys):
    words = ("convert", corpus / "small.safetensors", tmp_path / "fixed.safetensors")
    assert run(*words, "--fix-stats", corpus / "audio") == 0
    model = gd.Model.load(tmp_path / "fixed.safetensors")
    assert np.array_equal(model.statistics, audio_statistics(model, [str(corpus / "audio")]))
    assert model.statistics[0] == 16000 * (7 + 1 + 5 + 4)
    stream = model.stream(1, 1, "fixed")
    assert len(stream.feed(np.zeros(40000, np.float32))[0]) == 52
    assert run(*words, "--force") == 0
    assert gd.Model.load(tmp_path / "fixed.safetensors").statistics is None
