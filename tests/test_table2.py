"""`gendistiller bench --table2`: the paper's Table 2, on a few seconds of audio."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
for module in ("soxr", "tqdm"):
    pytest.importorskip(module)

import gendistiller_ext as gd
from conftest import SMALL, SMALL_TEACHERS
from gendistiller_ext import cli
from gendistiller_ext.audio.files import AudioFile
from gendistiller_ext.superb.inference_time import TABLE2, measure, spread


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table2")
    (folder / "audio" / "a").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        soundfile.write(str(folder / "audio" / "a" / f"{i}.wav"), rng.uniform(-0.5, 0.5, 4000 + 800 * i), 16000)
    soundfile.write(str(folder / "audio" / "short.wav"), np.zeros(399), 16000)
    gd.Model(gd.Config(**SMALL_TEACHERS["wavlm"]), seed=1).save(folder / "teacher.safetensors")
    gd.Model(gd.Config(**SMALL), seed=1).save(folder / "student.safetensors")
    return folder


def bench(capsys, *words):
    code = cli.main(["bench", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_models_that_are_given(corpus, capsys):
    models = [corpus / "teacher.safetensors", corpus / "student.safetensors"]
    words = (*models, "--table2", corpus / "audio", "--threads", 1)
    code, out, err = bench(capsys, *words, "--json")
    facts = json.loads(out)
    assert code == 0 and "skipped short.wav: too short" in err
    assert facts["files"] == 4 and facts["skipped"] == 1 and facts["threads"] == 1 and facts["repeat"] == 3
    assert facts["audio_seconds"] == pytest.approx((4 * 4000 + 6 * 800) / 16000)
    assert [row["model"] for row in facts["rows"]] == list(map(str, models))
    for row, path in zip(facts["rows"], models):
        assert row["parameters"] == gd.Model.load(path).num_params
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert row["mean"] == pytest.approx(np.mean(row["seconds"]))
        assert row["ratio"] == pytest.approx(facts["rows"][0]["mean"] / row["mean"])
    code, out, _ = bench(capsys, *words, "--limit", 2, "--repeat", 1)
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("2 files, 0.6 s of audio, 1 skipped") and "runs: 1, threads: 1" in lines[0]
    assert lines[1].split() == ["model", "parameters", "mean", "s", "least", "most", "speed"]
    assert lines[2].endswith("1.00x") and "100.0%" in lines[2] and len(lines) == 4


def test_the_papers_three_by_default(corpus, capsys):
    assert TABLE2 == ("wavlm_base", "distilwavlm", "gendistiller")
    code, out, _ = bench(capsys, "--table2", corpus / "audio", "--limit", 1, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and [row["parameters"] for row in rows] == [94_381_168, 27_034_752, 17_589_908]
    assert rows[0]["ratio"] == 1.0
    fastest = [min(row["seconds"]) for row in rows]
    assert fastest[1] < fastest[0] and fastest[2] < fastest[0]  # a third of the work, and less


def test_every_model_hears_every_file_once_a_run(monkeypatch, corpus):
    heard = []

    class Spy:
        def __init__(self, name):
            self.name, self.config = name, gd.Config(**SMALL)

        def forward(self, wavs, precision, num_threads):
            heard.append((self.name, len(wavs[0]), precision, num_threads))
    files = [AudioFile(f"{i}.wav", str(corpus / "audio" / "a" / f"{i}.wav")) for i in range(3)]
    gone = AudioFile("gone.wav", str(corpus / "gone.wav"))
    failures, done = [], []
    found = measure([Spy("A"), Spy("B")], [files[0], gone, *files[1:]], 2, 5, "float32", failures.append,
                    lambda: done.append(1))
    assert len(heard) == 2 + 2 * 2 * 3 and len(done) == 8  # the warm-up; models, runs, files
    assert {entry[2:] for entry in heard} == {("float32", 5)}
    for name in "AB":
        assert sorted(length for who, length, *_ in heard[2:] if who == name) == [4000, 4000, 4800, 4800, 5600, 5600]
    first = [heard[2 + i][0] for i in range(0, 12, 2)]
    assert set(first) == {"A", "B"}, "each has its turn to be first"
    assert [error.name for error in failures] == ["gone.wav"]
    assert found["files"] == 3 and found["seconds"].shape == (2, 2) and (found["seconds"] > 0).all()
    assert found["audio_seconds"] == (4000 + 4800 + 5600) / 16000
    with pytest.raises(ValueError, match="audio: none of 1 files could be read"):
        measure([Spy("A")], [gone])


def test_a_part_of_a_set_is_spread_over_it():
    files = [AudioFile(f"{i:02d}", "") for i in range(10)]
    assert [file.name for file in spread(files, 4)] == ["00", "02", "05", "07"]
    assert spread(files, None) == spread(files, 10) == spread(files, 99) == files


@pytest.mark.parametrize("words, message", [
    (("--table2", "AUDIO", "--seconds", "2"), "seconds: expected none with --table2"),
    (("--table2", "AUDIO", "--num-layers", "2"), "num-layers: expected none with --table2"),
    (("--table2", "AUDIO", "--threads", "1,2"), "threads: expected one number with --table2, got [1, 2]"),
    (("--table2", "AUDIO", "--limit", "0"), "limit: expected at least 1, got 0"),
    (("--table2", "/none/such"), "audio: no such file or folder"),
    (("--limit", "2", "gendistiller"), "limit: expected --table2 with it"),
    ((), "model: expected one checkpoint, or --table2 DIR, got 0"),
    (("a", "b"), "model: expected one checkpoint, or --table2 DIR, got 2"),
    (("gendistiller", "--repeat", "0"), "repeat: expected at least 1, got 0"),
])
def test_wrong_arguments_are_one_line(words, message, corpus, capsys):
    # A small model: the default three take a moment to make.
    given = [str(corpus / "student.safetensors")] if "--table2" in words else []
    code, out, err = bench(capsys, *given, *(os.fspath(corpus / "audio") if w == "AUDIO" else w for w in words))
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err


def test_a_preset_can_be_timed(capsys):
    code, out, _ = bench(capsys, "table4_conv256", "--seconds", "0.1", "--repeat", "1")
    assert code == 0 and out.startswith("table4_conv256: 14,243,988 parameters")
