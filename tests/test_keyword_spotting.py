"""Keyword spotting: the corpus as S3PRL reads it, and S3PRL's own programs run on it, unmodified."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import gendistiller_ext as gd
import s3prl_upstream
from conftest import SEED, SMALL
from gendistiller_ext import cli
from gendistiller_ext.superb import ks
from reference.layout import random_state

soundfile = pytest.importorskip("soundfile")

ROOT = Path(s3prl_upstream.__file__).parent.parent
RATE = 16000
SPEAKERS = [f"{i:08x}" for i in range(7, 7 + 20)]
needs_s3prl = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("s3prl", "torch"))),
                                 reason="S3PRL is not installed")


def tone(word, speaker, number):
    """A fifth of a second at the word's pitch, slightly other for each speaker: (samples,) float32."""
    rng = np.random.default_rng([word, speaker, number])
    time = np.arange(RATE // 5) / RATE
    wave = np.sin(2 * np.pi * (200 + 400 * word + 10 * speaker) * time) + 0.1 * rng.standard_normal(time.size)
    return (0.3 * wave).astype(np.float32)


def corpus_of(root, words, speakers=SPEAKERS, clips=2, suffix=".wav", folder=lambda speaker: ""):
    for w, word in enumerate(words):
        for s, speaker in enumerate(speakers):
            for i in range(clips):
                path = root / folder(speaker) / word / f"{speaker}_nohash_{i}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, tone(w, s, i), RATE, subtype="PCM_16")
    return root


def files(folder):
    """class -> names of its files."""
    return {path.name: sorted(file.name for file in path.iterdir()) for path in sorted(folder.iterdir())}


# ---- Parts -------------------------------------------------------------------------------------------------


def test_parts_by_speaker(tmp_path):
    corpus = ks.prepare(corpus_of(tmp_path / "data", ["yes", "no", "cat"]), tmp_path / "out", ["yes", "no"])
    speakers = json.loads((tmp_path / "out" / "corpus.json").read_text())["speakers"]
    assert [len(speakers[part]) for part in ks.PARTS] == [12, 3, 5]
    assert sorted(sum(speakers.values(), [])) == sorted(SPEAKERS)
    # The test has as much silence as of each class.
    assert corpus.clips == {"train": 12 * 6, "valid": 3 * 6, "test": 5 * 6 + 10}
    assert corpus.classes == {"yes": ["yes"], "no": ["no"], "_unknown_": ["_unknown_", "cat"],
                              "_silence_": ["_silence_"]}
    again = ks.prepare(tmp_path / "data", tmp_path / "again", ["yes", "no"])
    assert files(again.folder / "train") == files(corpus.folder / "train")


@needs_s3prl
def test_s3prl_sees_the_same_parts(tmp_path):
    s3prl_upstream.register()
    from s3prl.downstream.speech_commands import dataset
    from s3prl.downstream.speech_commands.expert import split_dataset

    assert tuple(dataset.CLASSES) == (*ks.WORDS, ks.UNKNOWN, ks.SILENCE)
    data = corpus_of(tmp_path / "data", ["yes", "no", "cat", "dog"], suffix=".flac")
    corpus = ks.prepare(data, tmp_path / "out", ["yes", "cat"])
    train, valid = split_dataset(corpus.folder / "train")
    assert (len(train), len(valid)) == (corpus.clips["train"], corpus.clips["valid"])
    speakers = json.loads((tmp_path / "out" / "corpus.json").read_text())["speakers"]
    found = [{path.name.split("_")[0].split(".")[0] for _, path in part} for part in (train, valid)]
    assert found == [set(speakers["train"]), set(speakers["valid"])]
    train = dataset.SpeechCommandsDataset(train, speech_commands_root=corpus.folder / "train")
    assert Counter(label for label, _ in train.data) == {
        "yes": 24, "no": 24, "_unknown_": 48, "_silence_": 60} or corpus.classes["no"] == ["cat"]
    test = dataset.SpeechCommandsTestingDataset(speech_commands_test_root=corpus.folder / "test")
    assert len(test) == corpus.clips["test"]
    for part in (train, test):
        wavs, labels, _ = part.collate_fn([part[i] for i in range(len(part))])
        for wav, label in zip(wavs, labels):
            assert wav.shape == ((RATE if dataset.CLASSES[label] == "_silence_" else RATE // 5),)


@pytest.mark.parametrize("part", ["train", "valid"])
def test_names_fall_into_their_part(part):
    names = [ks.speaker_name(speaker, part) for speaker in SPEAKERS]
    assert all(name.split(".")[0] == speaker for name, speaker in zip(names, SPEAKERS))
    assert any(name == speaker for name, speaker in zip(names, SPEAKERS)) and len(set(names)) == len(names)
    # Google's rule, written out.
    import hashlib
    for name in names:
        percent = (int(hashlib.sha1(name.encode()).hexdigest(), 16) % (2 ** 27)) * (100.0 / (2 ** 27 - 1))
        assert percent < 10 if part == "valid" else percent >= 20


@pytest.mark.parametrize("folders,expected", [
    ({"train": 14, "val": 6}, {"train": 12, "valid": 2, "test": 6}),
    ({"train": 14, "val": 3, "test": 3}, {"train": 14, "valid": 3, "test": 3}),
    ({"training/train": 20}, None)])
def test_official_parts_are_followed(tmp_path, folders, expected):
    where = [folder for folder, count in folders.items() for _ in range(count)]
    root = corpus_of(tmp_path / "data", ["yes", "no"], folder=lambda speaker: where[SPEAKERS.index(speaker)])
    if expected is None:
        with pytest.raises(ValueError, match="data: expected speakers enough"):
            ks.prepare(root, tmp_path / "out")
        return
    ks.prepare(root, tmp_path / "out")
    speakers = json.loads((tmp_path / "out" / "corpus.json").read_text())["speakers"]
    assert {part: len(its) for part, its in speakers.items()} == expected
    last = [speaker for speaker, folder in zip(SPEAKERS, where) if folder == list(folders)[-1]]
    assert speakers["test"] == sorted(last)


def test_official_lists_are_followed(tmp_path):
    root = corpus_of(tmp_path / "data", ["yes", "no"])
    (root / "testing_list.txt").write_text("".join(f"{w}/{s}_nohash_{i}.wav\n" for w in ("yes", "no")
                                                   for s in SPEAKERS[:4] for i in range(2)))
    (root / "validation_list.txt").write_text("".join(f"{w}/{SPEAKERS[5]}_nohash_{i}.wav\n"
                                                      for w in ("yes", "no") for i in range(2)))
    ks.prepare(root, tmp_path / "out")
    speakers = json.loads((tmp_path / "out" / "corpus.json").read_text())["speakers"]
    assert speakers["test"] == SPEAKERS[:4] and speakers["valid"] == [SPEAKERS[5]]


def test_a_speaker_in_two_parts_is_an_error(tmp_path):
    root = corpus_of(tmp_path / "data", ["yes", "no"], folder=lambda speaker: "train")
    corpus_of(root, ["yes"], SPEAKERS[:1], folder=lambda speaker: "test")
    with pytest.raises(ValueError, match=f"data: speaker {SPEAKERS[0]} is in two parts, t.* and t"):
        ks.prepare(root, tmp_path / "out")


def test_manifest(tmp_path):
    root = corpus_of(tmp_path / "data", ["yes", "no", "other"])
    rows = [f"{w}/{s}_nohash_{i}.wav\tKS,SID\tperson {s}\t{w.upper()}"
            for w in ("yes", "no") for s in SPEAKERS for i in range(2)]
    rows += [f"other/{s}_nohash_0.wav\tSID\t{s}\tother" for s in SPEAKERS]
    (root / "manifest.tsv").write_text("path\ttasks\tspeaker\tlabel\n" + "\n".join(rows) + "\n")
    corpus = ks.prepare(root, tmp_path / "out")
    assert corpus.classes["yes"] == ["NO"] and corpus.classes["no"] == ["YES"]  # other words than S3PRL's ten
    assert corpus.clips["train"] == 12 * 4


def test_recorded_noise_is_used(tmp_path):
    root = corpus_of(tmp_path / "data", ["yes", "no"])
    (root / "_background_noise_").mkdir()
    street = ks.noise(5, 2.5, 1, -30)
    soundfile.write(root / "_background_noise_" / "street.wav", street, RATE, subtype="PCM_16")
    corpus = ks.prepare(root, tmp_path / "out")
    seconds = sorted((corpus.folder / "train" / "_background_noise_").iterdir())
    assert [len(soundfile.read(path)[0]) for path in seconds] == [RATE, RATE]
    np.testing.assert_allclose(soundfile.read(seconds[1])[0], street[RATE:2 * RATE], atol=1e-4)
    assert not (corpus.folder / "test" / "_silence_").exists() and corpus.clips["test"] == 20


@pytest.mark.parametrize("colour", [0, 1, 2])
def test_noise_has_its_colour_and_level(colour):
    wave = ks.noise(3, 20, colour, -40)
    assert 20 * np.log10(np.sqrt(np.mean(wave.astype(float) ** 2))) == pytest.approx(-40, abs=0.01)
    power = np.abs(np.fft.rfft(wave)) ** 2
    octave = [power[i:2 * i].mean() for i in (1000, 2000, 4000, 8000, 16000)]
    slope = np.polyfit(range(5), np.log2(octave), 1)[0]
    assert slope == pytest.approx(-colour, abs=0.15)
    assert not np.array_equal(wave, ks.noise(4, 20, colour, -40))


@pytest.mark.parametrize("labels,keywords,expected", [
    (["yes"] * 3 + ["cat"] * 5 + ["no"], None, {"yes": "yes", "no": "no", "cat": "up"}),
    (["yes", "cat", "dog"], ["cat", "dog"], {"cat": "yes", "dog": "no", "yes": "_unknown_"}),
    ([*ks.WORDS, "bed", "bed"], None, {**{word: word for word in ks.WORDS}, "bed": "_unknown_"}),
])
def test_words_and_classes(labels, keywords, expected):
    found = ks.assign(labels, keywords)
    assert {word: found[word] for word in expected} == expected
    assert set(found) == set(expected) | {"_unknown_", "_silence_"}


@pytest.mark.parametrize("keywords", [["yes", "cow"], ["yes"], ["yes", "yes"]])
def test_wrong_keywords(keywords):
    with pytest.raises(ValueError, match="keywords: expected 2 to 10 different words of cat, no, yes, got y"):
        ks.assign(["yes", "no", "cat"], keywords)


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: no such folder"):
        ks.prepare(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="data: expected clips WORD/SPEAKER_REST or a manifest.tsv"):
        ks.prepare(tmp_path / "empty", tmp_path / "out")
    root = corpus_of(tmp_path / "data", ["yes", "no"])
    ks.prepare(root, tmp_path / "out")
    with pytest.raises(ValueError, match="folder: expected a new or empty one"):
        ks.prepare(root, tmp_path / "out")


def test_result_is_the_test_at_the_best_validation(tmp_path):
    (tmp_path / "log.log").write_text(
        "train at step 10: 0.1\ndev at step 10: 0.5\nNew best on dev at step 10: 0.5\ntest at step 10: 0.4\n"
        "dev at step 20: 0.7\ntest at step 20: 0.6\ndev at step 30: 0.7\ntest at step 30: 0.9\n"
        "dev at step 40: 0.9\n")
    assert ks.result(tmp_path) == {"step": 20, "valid": 0.7, "test": 0.6}
    (tmp_path / "log.log").write_text("")
    with pytest.raises(ValueError, match="expected accuracies of dev and test, found none"):
        ks.result(tmp_path)


# ---- S3PRL's programs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """(folder, ckpt): a corpus of tones, a config of a few steps, a student of a few channels."""
    folder = tmp_path_factory.mktemp("ks")
    corpus_of(folder / "data", ["yes", "no", "cat"], SPEAKERS[:8], clips=1)
    corpus = ks.prepare(folder / "data", folder / "corpus", ["yes", "no"])
    settings = ks.config(corpus, steps=4, eval_every=2, batch_size=4, lr=1e-3)
    (folder / "config.yaml").write_text(json.dumps(settings))  # JSON is YAML
    config = gd.Config(**SMALL)
    model = gd.Model(config)
    model.load_params(random_state(config, SEED))
    model.save(folder / "student.safetensors")
    return folder, str(folder / "student.safetensors")


def run(command, folder, **env):
    """(exit code, output) of Python with these arguments, run in `folder`."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """PYTHONPATH of an interpreter that reads the .pth, as it does where the wheel is installed."""
    folder = tmp_path_factory.mktemp("site")
    pth = ROOT / "s3prl_upstream" / "gendistiller_s3prl.pth"
    (folder / pth.name).write_text(pth.read_text())
    (folder / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(folder)!r})")
    return os.pathsep.join((str(folder), str(ROOT)))


def arguments(folder, ckpt, expdir, *more):
    return ["-m", "train", "-u", "gendistiller", "-k", ckpt, "-d", "speech_commands",
            "-c", folder / "config.yaml", "-p", expdir, "--device", "cpu", *more]


def program(way):
    if way == "file":
        return [Path(importlib.util.find_spec("s3prl").origin).parent / "run_downstream.py"]
    return {"module": ["-m", "s3prl.run_downstream"],
            "wrapper": ["-m", "gendistiller_ext", "s3prl", "run_downstream"]}[way]


@needs_s3prl
@pytest.mark.parametrize("way,more", [("file", ()), ("module", ("-f",)), ("wrapper", ())])
def test_unmodified_s3prl_trains(bench, site, tmp_path, way, more):
    folder, ckpt = bench
    env = {"GENDISTILLER_S3PRL": "0"} if way == "wrapper" else {"PYTHONPATH": site}
    code, output = run([*program(way), *arguments(folder, ckpt, tmp_path / "exp", *more)], tmp_path, **env)
    assert code == 0, output
    assert {"valid", "test"} < set(ks.result(tmp_path / "exp"))
    if "-f" not in more:
        return
    # The student was trained, and S3PRL reads back and tests its own checkpoint.
    import torch
    state = torch.load(tmp_path / "exp" / "states-4.ckpt", weights_only=False)
    model = gd.Model.load(ckpt)
    names = {name.removeprefix("model.") for name in state["Upstream"]}
    assert names == {tensor.name for tensor in model.tensors}
    changed = [name for name, value in state["Upstream"].items()
               if not np.array_equal(value.numpy(), model.params[name.removeprefix("model.")])]
    assert len(changed) > 20
    code, output = run([*program(way), "-m", "evaluate", "-e", tmp_path / "exp" / "states-4.ckpt",
                        "--device", "cpu"], tmp_path, **env)
    assert code == 0 and "test acc: " in output, output


@needs_s3prl
def test_superb_command(bench, tmp_path, capsys):
    folder, ckpt = bench
    assert cli.main(["superb", "KS", "--data", str(folder / "data"), "--keywords", "yes,no", "--upstream",
                     f"gendistiller={ckpt}", "--steps", "2", "--eval-every", "1", "--batch-size", "4",
                     "--seeds", "2", "--out", str(tmp_path / "out"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    entry, = figures["upstreams"]
    assert len(entry["runs"]) == 2
    assert entry["test"] == pytest.approx(np.mean([run["test"] for run in entry["runs"]]))
    assert 0 <= entry["test"] <= 1 and figures["metric"] == "accuracy"
    assert json.loads((tmp_path / "out" / "KS.json").read_text()) == figures


@needs_s3prl
@pytest.mark.parametrize("command,message", [
    (["superb", "KS", "--data", "nowhere"], "data: no such folder: nowhere"),
    (["superb", "KS", "--data", ".", "-k", "nothing.pt"], "ckpt: no such checkpoint: nothing.pt"),
    (["superb", "KS", "--data", ".", "--upstream", "a=b", "--upstream", "c", "-k", "d"],
     "ckpt: expected with one upstream"),
    (["superb", "KS", "--data", ".", "--seeds", "0"], "seeds: expected at least 1, got 0"),
    (["superb", "KS", "--data", ".", "--steps", "5", "--eval-every", "100"],
     r"eval_every: expected at most steps \(5\), got 100"),
    (["s3prl", "no_program"],
     "program: expected a program of the s3prl package such as run_downstream, got 'no_program'"),
    (["s3prl", "../x"], "program: expected a program of the s3prl package")])
def test_wrong_commands(command, message, capsys):
    import re
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


@needs_s3prl
def test_a_failing_program_is_told(bench, tmp_path, capsys):
    folder, ckpt = bench
    assert cli.main(["superb", "KS", "--data", str(folder / "data"), "--upstream", "no_such_upstream",
                     "--steps", "1", "--eval-every", "1"]) == 2
    assert "S3PRL failed with no_such_upstream, seed 0: AttributeError" in capsys.readouterr().err


@needs_s3prl
def test_real_words_are_told_apart(data_dir, teacher_path, tmp_path, capsys):
    """The teacher's features, a few steps: far above chance (a twelfth), which is all that `fbank`
    reaches."""
    assert cli.main(["superb", "KS", "--data", str(data_dir), "--upstream", f"gendistiller={teacher_path}",
                     "--steps", "150", "--eval-every", "150", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["upstreams"][0]["test"] > 0.6
