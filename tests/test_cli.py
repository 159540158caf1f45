"""The `gendistiller` command: what it prints, its exit codes, its one-line errors."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
for module in ("soxr", "yaml", "tqdm", "tensorboardX", "matplotlib"):
    pytest.importorskip(module)

import gendistiller_ext as gd  # noqa: E402
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import safetensors  # noqa: E402
from gendistiller_ext.commands import extract as extract_module  # noqa: E402
from gendistiller_ext.modelinfo import macs, model_hash, parameter_groups, superb_macs  # noqa: E402

CONV = ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2
SIZES = dict(conv_feature_layers=CONV, encoder_embed_dim=16, encoder_ffn_embed_dim=24, encoder_attention_heads=2,
             conv_pos=8, conv_pos_groups=2, num_buckets=8, max_distance=16)
TEACHER = dict(SIZES, architecture="encoder", encoder_layers=4, skip_connection=False, output_layer=False,
               target_layers=())
OWN = ("distill", "extract", "info", "convert", "bench")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for i, (name, rate) in enumerate((("a/0.wav", 16000), ("a/1.flac", 16000), ("b/2.wav", 8000), ("b/3.wav", 44100),
                                      ("4.wav", 16000))):
        path = folder / "audio" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (int(rate * (0.2 + 0.1 * i)), 2) if rate == 44100 else int(rate * (0.2 + 0.1 * i))
        soundfile.write(str(path), rng.uniform(-0.5, 0.5, shape), rate)
    gd.Model(gd.Config(**TEACHER), seed=1).save(str(folder / "teacher.safetensors"))
    gd.Model(gd.Config(**SIZES, target_layers=(1, 3)), seed=2).save(str(folder / "student.safetensors"))
    return folder


def run(capsys, *words):
    """(exit code, stdout, stderr)"""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return code or 0, captured.out, captured.err


def fails(capsys, *words):
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "", (code, out, err)
    assert err.count("\n") == 1 and err.endswith("\n"), err
    return err


# ---- The command itself ------------------------------------------------------------------------------------

def test_help_lists_every_command(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", OWN)
def test_each_help_has_an_example(capsys, name):
    code, out, err = run(capsys, name, "--help")
    assert code == 0 and f"example:\n  gendistiller {name} " in out and "--json" in out


def test_distill_help_has_every_flag_of_the_recipe(capsys):
    import dataclasses

    from gendistiller_ext.training.recipe import Recipe
    _, out, _ = run(capsys, "distill", "--help")
    for item in dataclasses.fields(Recipe):
        flag = "--set" if item.name == "model" else "--" + item.name.replace("_", "-")
        assert re.search(rf"{flag}[ ,\n]", out), flag


@pytest.mark.parametrize("words,message", [
    ((), "required: COMMAND"), (("distil",), "invalid choice: 'distil'"), (("info",), "required: FILE"),
    (("info", "x", "--jso"), "unrecognized arguments: --jso"),
    (("info", "/none/such.safetensors"), "such"),
    (("bench", "x", "--seconds", "2,-1"), "expected positive numbers"),
    (("distill",), "teacher: expected a value"),
    (("distill", "--steps", "many"), "invalid int value: 'many'"),
    (("distill", "--config", "/none.yaml"), "/none.yaml"),
    (("distill", "--set", "dropout"), "set: expected KEY=VALUE, got 'dropout'"),
    (("distill", "--set", "droput=0"), "droput: unknown key"),
    (("extract", "--model", "m", "--audio", "a", "--out", "o", "--layers", "0,0"), "different numbers"),
    (("extract", "--model", "m", "--audio", "a", "--out", "o", "--batch-size", "0"), "batch-size: expected at least 1"),
    (("extract", "--model", "m", "--audio", "a", "--out", "o", "--chunk-seconds", "0"),
     "chunk-seconds: expected more than 0, got 0"),
    (("extract", "--model", "m", "--audio", "a", "--out", "o", "--chunk-seconds", "1", "--context-seconds", "nan"),
     "context-seconds: expected 0 or more, got nan"),
    (("extract", "--model", "m", "--audio", "a", "--out", "o", "--context-seconds", "1"),
     "context-seconds: expected chunk-seconds with it"),
])
def test_errors_are_one_line(capsys, words, message):
    assert message in fails(capsys, *words)


def test_a_command_imports_nothing_of_the_others():
    code = ("import sys; from gendistiller_ext import cli\n"
            "try: cli.main(['bench', '--help'])\n"
            "except SystemExit: pass\n"
            "bad = [m for m in ('torch', 's3prl', 'soundfile', 'matplotlib', 'yaml', 'tqdm', 'tensorboardX', "
            "'gendistiller_ext.training.trainer', 'gendistiller_ext.commands.distill') if m in sys.modules]\n"
            "sys.exit(str(bad) if bad else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- info, convert, bench ----------------------------------------------------------------------------------

def test_macs_are_superbs():
    """The sum that the SUPERB challenge's profiler prints for HuBERT Base (its README), to the last digit."""
    assert superb_macs(gd.Config.preset("hubert_base"))["total"] == 1669156022848


def test_macs_by_hand():
    config = gd.Config(**SIZES, target_layers=(1, 3))
    frames, channels, convolutions = 4000, 1, 0
    for dim, kernel, stride in CONV:
        frames = (frames - kernel) // stride + 1
        convolutions += frames * channels * kernel * dim
        channels = dim
    attention = 4 * 16 * 16 * frames + 2 * 16 * frames ** 2 + 4 * 16 * frames + 4 * 2 * frames ** 2 + frames * 2 * 8 * 8
    assert macs(config, 4000) == {
        "extractor": convolutions, "projection": frames * 8 * 16, "pos_conv": (frames + 1) * 16 * 8 * 8,
        "blocks": 2 * (attention + 2 * 16 * 24 * frames), "output layer": 2 * 2 * 16 * 16 * frames}
    assert macs(config, 4000, 1)["blocks"] * 2 == macs(config, 4000)["blocks"]


def test_info_as_json(capsys, corpus):
    code, out, err = run(capsys, "info", corpus / "student.safetensors", "--teacher", corpus / "teacher.safetensors",
                         "--json")
    facts = json.loads(out)
    model = gd.Model.load(str(corpus / "student.safetensors"))
    assert code == 0 and facts["format"] == "gendistiller float32" and facts["hash"] == model_hash(model)
    assert facts["parameters"] == model.num_params == sum(facts["parameter_groups"].values())
    assert gd.Config.from_dict(facts["config"]) == model.config
    assert facts["macs"]["total"] == superb_macs(model.config)["total"]
    assert facts["bytes"] == os.path.getsize(corpus / "student.safetensors")
    assert facts["teacher"]["parameters"] > facts["parameters"]


def test_info_as_text(capsys, corpus):
    code, out, _ = run(capsys, "info", corpus / "student.safetensors", "--teacher", corpus / "teacher.safetensors")
    model, teacher = (gd.Model.load(str(corpus / f"{name}.safetensors")) for name in ("student", "teacher"))
    assert code == 0 and "target_layers: [1, 3]" in out and f"{model.num_params:,}" in out
    assert f"of the teacher: {model.num_params / teacher.num_params:.1%} of the parameters" in out
    assert set(parameter_groups(model)) <= {line.split("  ")[0] for line in out.splitlines()}


def test_model_hash_follows_the_weights(corpus):
    model, same = (gd.Model.load(str(corpus / "student.safetensors")) for _ in range(2))
    assert model_hash(model) == model_hash(same)
    changed = np.array(same.params["layer_norm.bias"])
    changed[0] += 1
    same.load_params({"layer_norm.bias": changed})
    assert model_hash(model) != model_hash(same)


def test_convert(capsys, corpus, tmp_path):
    target = tmp_path / "copy.safetensors"
    code, out, _ = run(capsys, "convert", corpus / "student.safetensors", target, "--json")
    assert code == 0 and json.loads(out)["bytes"] == os.path.getsize(target)
    assert model_hash(gd.Model.load(str(target))) == model_hash(gd.Model.load(str(corpus / "student.safetensors")))
    assert "target: expected a new file" in fails(capsys, "convert", corpus / "student.safetensors", target)
    code, out, _ = run(capsys, "convert", corpus / "student.safetensors", target, "--force", "--dtype", "bfloat16")
    assert code == 0 and "bfloat16" in out


def test_convert_reads_a_foreign_teacher(capsys, teacher_path, tmp_path):
    target = tmp_path / "teacher.safetensors"
    assert run(capsys, "convert", teacher_path, target)[0] == 0
    theirs, ours = (json.loads(run(capsys, "info", path, "--json")[1]) for path in (teacher_path, target))
    assert theirs["format"] == "unilm" and ours["format"] == "gendistiller float32"
    assert theirs["hash"] == ours["hash"] and theirs["ignored"] == ["mask_emb"] and ours["ignored"] == []


def test_bench(capsys, corpus):
    code, out, _ = run(capsys, "bench", corpus / "student.safetensors", "--seconds", "0.1,0.2", "--batch", "1,2",
                       "--threads", "1", "--repeat", "3", "--json")
    figures = json.loads(out)["figures"]
    assert code == 0 and [(row["batch"], row["seconds"]) for row in figures] == [(1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2)]
    for row in figures:
        assert 0 < row["min"] <= row["median"]
        assert row["audio_per_second"] == pytest.approx(row["batch"] * row["seconds"] / row["median"])
    code, out, _ = run(capsys, "bench", corpus / "student.safetensors", "--seconds", "0.1", "--repeat", "1")
    assert code == 0 and "audio s/s" in out


# ---- extract -----------------------------------------------------------------------------------------------

NAMES = ["4.wav", "a/0.wav", "a/1.flac", "b/2.wav", "b/3.wav"]


def features(folder):
    found = {}
    for name in NAMES:
        arrays, metadata = safetensors.parse((folder / f"{name}.safetensors").read_bytes())
        found[name] = arrays["hidden_states"], metadata
    return found


def test_extract(capsys, corpus, tmp_path):
    model = gd.Model.load(str(corpus / "student.safetensors"))
    code, out, err = run(capsys, "extract", "--model", corpus / "student.safetensors", "--audio", corpus / "audio",
                         "--out", tmp_path / "one", "--batch-size", 1)
    assert code == 0 and "5 files written, 0 already there, 0 skipped" in out
    run(capsys, "extract", "--model", corpus / "student.safetensors", "--audio", corpus / "audio", "--out",
        tmp_path / "four", "--batch-size", 4, "--quiet")
    one, four = features(tmp_path / "one"), features(tmp_path / "four")
    from gendistiller_ext.audio.files import read_audio
    for name, (states, metadata) in one.items():
        hidden, frames = model.forward([read_audio(str(corpus / "audio" / name))])
        assert states.dtype == np.float32 and states.shape == (3, frames[0], 16)
        assert np.array_equal(states, np.stack([state[0] for state in hidden]))
        assert states.tobytes() == four[name][0].tobytes()
        assert metadata == {"model": model_hash(model), "hop": "320", "rate": "16000", "layers": "0,1,2",
                            "precision": "float32"}


def test_extract_layers_and_npz(capsys, corpus, tmp_path):
    common = ("extract", "--model", corpus / "teacher.safetensors", "--audio", corpus / "audio" / "a")
    assert run(capsys, *common, "--out", tmp_path, "--layers", "2,0", "--format", "npz")[0] == 0
    teacher = gd.Model.load(str(corpus / "teacher.safetensors"))
    wav, _ = soundfile.read(str(corpus / "audio" / "a" / "0.wav"), dtype="float32")
    hidden, _ = teacher.forward([wav])
    with np.load(tmp_path / "0.wav.npz") as content:
        assert np.array_equal(content["hidden_states"], np.stack([hidden[2][0], hidden[0][0]]))
        assert str(content["layers"]) == "2,0" and str(content["hop"]) == "320"
    code, out, _ = run(capsys, *common, "--out", tmp_path, "--layers", "2,0", "--format", "npz", "--json")
    assert json.loads(out) == {"out": str(tmp_path), "written": 0, "kept": 2, "skipped": 0}
    assert "layers: expected 0 to 4, which this model has, got 5" in fails(capsys, *common, "--out", tmp_path,
                                                                           "--layers", "5")


def test_extract_goes_on_where_it_stopped(capsys, corpus, tmp_path, monkeypatch):
    words = ("extract", "--audio", corpus / "audio", "--out", tmp_path, "--batch-size", 1, "--quiet", "--json",
             "--model")
    original, written = extract_module._write, []

    def stop_at_third(path, states, tags):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        original(path, states, tags)
    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "_write", stop_at_third)
        assert run(capsys, *words, corpus / "student.safetensors")[0] == 130
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.endswith(".tmp")]
    stamps = {path: os.stat(path).st_mtime_ns for path in written}
    with open(written[1], "r+b") as stream:
        stream.truncate(100)  # damaged: must be written again
    code, out, _ = run(capsys, *words, corpus / "student.safetensors")
    assert code == 0 and json.loads(out) == {"out": str(tmp_path), "written": 4, "kept": 1, "skipped": 0}
    assert os.stat(written[0]).st_mtime_ns == stamps[written[0]]
    assert len(features(tmp_path)) == 5
    gd.Model(gd.Config(**SIZES, target_layers=(1, 3)), seed=3).save(str(tmp_path / "other.safetensors"))
    code, out, _ = run(capsys, *words, tmp_path / "other.safetensors")
    assert json.loads(out)["written"] == 5, "another model's features must not be kept"


def test_extract_skips_what_cannot_be_read(capsys, corpus, tmp_path):
    (tmp_path / "in").mkdir()
    soundfile.write(str(tmp_path / "in" / "good.wav"), np.zeros(8000), 16000)
    soundfile.write(str(tmp_path / "in" / "short.wav"), np.zeros(399), 16000)
    (tmp_path / "in" / "bad.wav").write_bytes(b"junk")
    flac = tmp_path / "in" / "cut.flac"
    soundfile.write(str(flac), np.random.default_rng(0).uniform(-1, 1, 9000), 16000)
    flac.write_bytes(flac.read_bytes()[:5000])
    code, out, err = run(capsys, "extract", "--model", corpus / "student.safetensors", "--audio", tmp_path / "in",
                         "--out", tmp_path / "out", "--json")
    assert code == 1 and json.loads(out) == {"out": str(tmp_path / "out"), "written": 1, "kept": 0, "skipped": 3}
    assert all(f"skipped {name}: " in err for name in ("short.wav", "bad.wav", "cut.flac"))
    os.unlink(tmp_path / "in" / "good.wav")
    code, out, err = run(capsys, "extract", "--model", corpus / "student.safetensors", "--audio", tmp_path / "in",
                         "--out", tmp_path / "out2")
    assert code == 2 and "audio: none of 1 files could be read" in err.splitlines()[-1]


def test_extract_never_writes_two_files_to_one_place(capsys, corpus, tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        soundfile.write(str(tmp_path / folder / "same.wav"), np.zeros(8000), 16000)
    err = fails(capsys, "extract", "--model", corpus / "student.safetensors", "--audio", tmp_path / "x", tmp_path / "y",
                "--out", tmp_path / "out", "--quiet")
    assert "x/same.wav and " in err and "would both be written to" in err and not (tmp_path / "out").exists()


# ---- distill -----------------------------------------------------------------------------------------------

def distill_words(corpus, out):
    return ["distill", "--teacher", str(corpus / "teacher.safetensors"), "--audio", str(corpus / "audio"),
            "--out", str(out), "--steps", "8", "--batch-size", "2", "--crop-seconds", "0.2", "--lr", "0.01",
            "--log-every", "1", "--set", "target_layers=1,3"]


def test_distill_flags_config_file_and_resume(capsys, corpus, tmp_path):
    code, out, err = run(capsys, *distill_words(corpus, tmp_path / "run"), "--json", "--valid-fraction", "0.3")
    *rows, summary = map(json.loads, out.splitlines())
    assert code == 0 and summary["steps"] == 8 and summary["stopped_by"] is None, err
    assert [row["step"] for row in rows] == list(range(9))  # every row of the log
    assert rows[1]["loss"] > 0 and {"l1_1", "cos_3", "similarity_3", "lr", "grad_norm"} <= rows[1].keys()
    assert "valid_loss" not in rows[1] and {"valid_l1_1", "valid_cos_1", "valid_similarity_3"} <= rows[8].keys()
    assert rows[8]["valid_loss"] == summary["valid_last"]["valid_loss"]
    assert "step 8/8" in err and "targets 1, 3" in err
    assert "expected an empty or new folder" in fails(capsys, *distill_words(corpus, tmp_path / "run"))
    code, out, err = run(capsys, "distill", "--config", tmp_path / "run" / "config.yaml", "--resume")
    assert code == 0 and "resuming after step 8" in err and "cosine with layer 3" in out
    code, out, err = run(capsys, "distill", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again",
                         "--quiet")
    assert code == 0 and err == ""
    first, second = (gd.Model.load(str(tmp_path / name / "student.safetensors")) for name in ("run", "again"))
    assert model_hash(first) == model_hash(second)
    (tmp_path / "bad.yaml").write_text("teacher: x\nsteppes: 4\n")
    assert "unknown key steppes (did you mean steps?)" in fails(capsys, "distill", "--config", tmp_path / "bad.yaml")
    assert "resume: lr: expected 0.01" in fails(capsys, "distill", "--config", tmp_path / "run" / "config.yaml",
                                                "--resume", "--lr", "0.5", "--quiet")


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_distill_as_a_process_that_is_stopped(corpus, tmp_path, number, code):
    words = [sys.executable, "-m", "gendistiller_ext", *distill_words(corpus, tmp_path / "run"), "--json"]
    words[words.index("--steps") + 1] = "100000"
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    *_, summary = map(json.loads, out.splitlines())
    assert summary["stopped_by"] == signal.Signals(number).name and summary["steps"] >= 3
    assert os.listdir(tmp_path / "run" / "state") == [f"step-{summary['steps']:08d}.state"]
    begin = time.monotonic()
    assert gd.Model.load(str(tmp_path / "run" / "student.safetensors")).num_params and time.monotonic() - begin < 30


def test_distill_on_a_full_disk_is_one_line(corpus, tmp_path):
    """A file size limit, which Python turns into OSError, stands in for the full disk."""
    resource = pytest.importorskip("resource")
    size = os.path.getsize(corpus / "student.safetensors")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 2, size * 2))  # a state has weights and two moments
    words = [sys.executable, "-m", "gendistiller_ext", *distill_words(corpus, tmp_path / "run"), "--quiet"]
    done = subprocess.run(words, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and "File too large" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert os.listdir(tmp_path / "run" / "state") == []


def test_real_speech(capsys, data_dir, teacher_path, tmp_path):
    """A few steps of the real thing: a WavLM .pt as teacher, LibriSpeech as audio."""
    folder = data_dir / "LibriSpeech" / "train-clean-100" / "19"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    code, out, err = run(capsys, "distill", "--teacher", teacher_path, "--audio", folder, "--out", tmp_path / "run",
                         "--steps", "6", "--batch-size", "2", "--crop-seconds", "1", "--valid-seconds", "1",
                         "--lr", "5e-4", "--json")
    *_, summary = map(json.loads, out.splitlines())
    assert code == 0, err
    assert summary["parameters"] == 1104779 and summary["skipped_files"] == summary["skipped_steps"] == 0
    assert summary["valid_last"]["valid_loss"] < summary["valid_first"]["valid_loss"]
