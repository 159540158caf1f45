"""Distillation runs: what they learn and leave, exact resume, accidents."""
import os
import re
import signal

import numpy as np
import pytest

for module in ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib"):
    pytest.importorskip(module)
import soundfile  # noqa: E402
import yaml  # noqa: E402

import gendistiller_ext as gd  # noqa: E402
from disk import full_disk  # noqa: E402
from gendistiller_ext.training import state  # noqa: E402
from gendistiller_ext.training import trainer as trainer_module  # noqa: E402
from gendistiller_ext.training.report import read_log  # noqa: E402
from gendistiller_ext.training.trainer import Trainer, learning_rate  # noqa: E402
from gendistiller_ext.training.validation import similarity  # noqa: E402
from runs import MODEL, TEACHER, assert_same_run, params, recipe, train  # noqa: E402


@pytest.fixture(autouse=True)
def quick_curves(request, monkeypatch):
    """Drawing takes longer than a run: only the test of a run's files does it."""
    if request.function is not test_a_run_learns_and_leaves_its_files:
        monkeypatch.setattr(trainer_module, "draw_curves", lambda *paths: None)


# ---- Schedule, loss of a batch -----------------------------------------------------------------------------

def test_learning_rate():
    rates = [learning_rate(step, 100, 2.0, 0.25) for step in range(1, 101)]
    assert rates[24] == 2.0 and rates[-1] == 0.0
    assert np.allclose(rates[:25], 2.0 * np.arange(1, 26) / 25) and np.allclose(np.diff(rates[24:]), -2.0 / 75)
    assert learning_rate(1, 10, 1.0, 0.0) == 0.9


def test_similarity_counts_valid_frames():
    rng = np.random.default_rng(0)
    pred, target = rng.standard_normal((2, 2, 3, 5, 4)).astype(np.float32)
    frames = np.array([5, 2, 1])
    expected = [np.mean([p @ t / np.linalg.norm(p) / np.linalg.norm(t)
                         for b in range(3) for p, t in zip(pred[layer, b, :frames[b]], target[layer, b, :frames[b]])])
                for layer in range(2)]
    assert np.allclose(similarity(pred, target, frames), expected, atol=1e-6)


def gradient(corpus, out, **changes):
    run = Trainer(recipe(corpus, out, **changes), print, quiet=True)
    wavs = [np.random.default_rng(i).uniform(-0.5, 0.5, n).astype(np.float32) for i, n in enumerate((4000, 3000, 900))]
    loss, terms = run._loss_and_gradient(wavs)
    frames = sum((n - 400) // 320 + 1 for n in (4000, 3000, 900))
    return loss, terms, run.grads.copy(), frames


def test_parts_sum_to_the_whole_batch(corpus, tmp_path):
    penalised = dict(feat_pen_loss=500.0)
    loss, terms, whole, frames = gradient(corpus, tmp_path / "a", **penalised)
    plain, others, without, _ = gradient(corpus, tmp_path / "a")
    assert np.linalg.norm(whole - without) > np.linalg.norm(without) > 0
    assert loss == pytest.approx(plain + 500 * terms["feature_penalty"], rel=1e-9)
    assert terms["feature_penalty"] == others["feature_penalty"] > 0
    for parts in (2, 3):
        part_loss, part_terms, grads, _ = gradient(corpus, tmp_path / "a", accumulate=parts, **penalised)
        assert np.linalg.norm(grads - whole) <= 1e-6 * np.linalg.norm(whole)
        assert part_terms["feature_penalty"] == pytest.approx(terms["feature_penalty"], rel=1e-6)
        assert part_loss == pytest.approx(loss, rel=1e-5)
        for term in terms:
            assert np.allclose(part_terms[term], terms[term], rtol=1e-5), term
        assert np.abs(grads - whole).max() <= 1e-5 * np.abs(whole).max()
    summed, sum_terms, grads, _ = gradient(corpus, tmp_path / "a", reduction="sum", **penalised)
    assert summed == pytest.approx(loss * frames, rel=1e-5)
    assert np.allclose(sum_terms["l1"], terms["l1"], rtol=1e-5)
    assert sum_terms["feature_penalty"] == pytest.approx(terms["feature_penalty"], rel=1e-6)
    assert np.abs(grads - whole * frames).max() <= 1e-5 * np.abs(whole * frames).max()


def test_dropout_is_keyed_by_seed_step_and_place_in_the_batch(corpus, tmp_path):
    keys = []

    class Spy:
        def __init__(self, model):
            self._model = model

        def distill_step(self, *args, **options):
            keys.append(options["dropout_seed"])
            return self._model.distill_step(*args, **options)

        def __getattr__(self, name):
            return getattr(self._model, name)
    wavs = [np.random.default_rng(i).uniform(-0.5, 0.5, 4000).astype(np.float32) for i in range(5)]
    off = dict(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    for model in ({}, {**off, "attention_dropout": 0.1}, off):
        run = Trainer(recipe(corpus, tmp_path, batch_size=5, accumulate=2, seed=7, model={**MODEL, **model}), print)
        run.student, run.counters.step = Spy(run.student), 3
        run._loss_and_gradient(wavs)
    assert keys == [(7, 3, 0), (7, 3, 2)] * 2 + [None, None]


# ---- Runs --------------------------------------------------------------------------------------------------

def test_a_run_learns_and_leaves_its_files(corpus, tmp_path):
    out = tmp_path / "run"
    summary = train(recipe(corpus, out, steps=40, eval_every=20))
    assert sorted(os.listdir(out)) == ["config.yaml", "curves.png", "log.csv", "state", "student.safetensors", "tb"]
    assert sorted(os.listdir(out / "state")) == ["step-00000035.state", "step-00000040.state"]
    assert os.listdir(out / "tb") and open(out / "curves.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
    rows = read_log(str(out / "log.csv"))
    assert [row["step"] for row in rows] == sorted({0, 20, 40} | set(range(3, 40, 3)))
    assert rows[0]["loss"] is None and rows[0]["lr"] == 0.0
    for key in ("loss", "l1_1", "l1_3", "cos_1", "cos_3", "similarity_1", "similarity_3", "grad_norm", "valid_loss",
                "valid_l1_1", "valid_cos_3", "valid_similarity_3", "lr", "epoch", "audio_per_second"):
        assert rows[-1][key] is not None, key
    for row, before in zip(rows[1:], rows):  # the clock stands still while a row is written
        audio = row["audio_seconds"] - before["audio_seconds"]
        assert 0.99 * audio < row["audio_per_second"] * (row["seconds"] - before["seconds"]) < 10 * audio
    assert rows[-1]["valid_loss"] < 0.9 * rows[0]["valid_loss"] and rows[-1]["loss"] < rows[1]["loss"]
    assert rows[-1]["valid_loss"] == pytest.approx(np.mean([rows[-1][f"valid_{term}_{layer}"] for term in ("l1", "cos")
                                                            for layer in (1, 3)]) * 2, rel=1e-6)
    assert summary["steps"] == 40 and summary["stopped_by"] is None
    assert summary["valid_last"]["valid_loss"] == rows[-1]["valid_loss"]
    config = yaml.safe_load(open(out / "config.yaml"))
    assert config["lr"] == 0.01 and config["target_layers"] == [1, 3] and config["encoder_embed_dim"] == 16
    assert gd.Model.load(str(out / "student.safetensors")).config.target_layers == (1, 3)


def test_the_teacher_runs_no_block_without_a_target(corpus, tmp_path):
    run = Trainer(recipe(corpus, tmp_path / "run", model={**MODEL, "target_layers": (1, 2)}), print, quiet=True)
    wav = [np.random.default_rng(0).uniform(-0.5, 0.5, 4000).astype(np.float32)]
    whole, _ = run.teacher.model.forward(wav)
    asked = []

    class Spy:
        def forward(self, wavs, **options):
            asked.append(options["num_layers"])
            return teacher.forward(wavs, **options)
    teacher, run.teacher.model = run.teacher.model, Spy()
    targets, frames = run._targets(wav)
    assert asked == [2] and list(frames) == [12]
    assert np.array_equal(targets, np.stack([whole[1], whole[2]]))


def test_seeds_and_settings_matter_threads_do_not(corpus, tmp_path):
    runs = {}
    for name, changes in {"a": {}, "b": dict(readers=5, threads=1), "c": dict(seed=1), "d": dict(batch_size=2)}.items():
        train(recipe(corpus, tmp_path / name, **changes))
        runs[name] = params(tmp_path / name)["encoder.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(runs["a"], runs["b"])
    assert not np.array_equal(runs["a"], runs["c"]) and not np.array_equal(runs["a"], runs["d"])


def test_squared_differences(corpus, tmp_path):
    summary = train(recipe(corpus, tmp_path / "run", loss_type="l2", steps=30))
    first, last = summary["valid_first"], summary["valid_last"]
    assert last["valid_loss"] < first["valid_loss"]
    assert last["valid_loss"] == pytest.approx(sum(last[f"valid_{term}_{layer}"] for term in ("l1", "cos")
                                                   for layer in (1, 3)) / 2, rel=1e-6)
    loss, terms, whole, _ = gradient(corpus, tmp_path / "a", loss_type="l2")
    other, others, grads, _ = gradient(corpus, tmp_path / "a")
    assert np.allclose(terms["cos"], others["cos"]) and not np.allclose(terms["l1"], others["l1"], rtol=0.01)
    assert np.linalg.norm(whole - grads) > 0.01 * np.linalg.norm(grads)


def test_the_feature_penalty_is_logged_and_falls(corpus, tmp_path):
    """Held-out loss leaves it out, and rows without it are those of a weight of 0."""
    rows = {}
    for weight in (0.0, 300.0):
        train(recipe(corpus, tmp_path / str(weight), steps=30, feat_pen_loss=weight))
        rows[weight] = read_log(str(tmp_path / str(weight) / "log.csv"))
        assert rows[weight][-1]["loss"] == pytest.approx(
            np.mean([rows[weight][-1][f"{term}_{layer}"] for term in ("l1", "cos") for layer in (1, 3)]) * 2
            + weight * rows[weight][-1]["feature_penalty"], rel=1e-6)
    assert rows[0.0][0]["valid_loss"] == rows[300.0][0]["valid_loss"] and rows[0.0][0]["feature_penalty"] is None
    assert rows[300.0][-1]["feature_penalty"] < 0.8 * rows[0.0][-1]["feature_penalty"]


@pytest.mark.parametrize("rounded", [dict(precision="bfloat16"), dict(teacher_precision="int8")])
def test_a_run_with_rounded_products(corpus, tmp_path, rounded):
    """Another run than float32's, and near it; the teacher's products are rounded too, so its targets are others."""
    exact = Trainer(recipe(corpus, tmp_path / "float32"), print, quiet=True)
    rounded = Trainer(recipe(corpus, tmp_path / "rounded", **rounded), print, quiet=True)
    assert exact.teacher.hash != rounded.teacher.hash
    one, other = exact.train(), rounded.train()
    assert 0 < abs(one["valid_last"]["valid_loss"] - other["valid_last"]["valid_loss"]) < 0.02


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_s3prl"])
def test_both_optimizers(corpus, tmp_path, optimizer):
    summary = train(recipe(corpus, tmp_path / "run", optimizer=optimizer, steps=30))
    assert summary["valid_last"]["valid_loss"] < summary["valid_first"]["valid_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_s3prl"])  # both decay what has no gradient
def test_frozen_extractor_stays(corpus, tmp_path, optimizer):
    train(recipe(corpus, tmp_path / "run", freeze_extractor=True, weight_decay=0.1, optimizer=optimizer))
    before = gd.Model.load(corpus[0]).params
    after = params(tmp_path / "run")
    for name in after:
        if name.startswith("feature_extractor."):
            assert np.array_equal(before[name], after[name]), name
    assert not np.array_equal(before["encoder.layers.0.self_attn.q_proj.weight"],
                              after["encoder.layers.0.self_attn.q_proj.weight"])


class Stop(Exception):
    pass


def interrupt_at(monkeypatch, step, action):
    original = Trainer._train_step

    def patched(self, batch):
        loss = original(self, batch)
        if self.counters.step == step:
            action()
        return loss
    monkeypatch.setattr(Trainer, "_train_step", patched)


@pytest.mark.parametrize("number,step", [(signal.SIGINT, 4), (signal.SIGTERM, 7), (signal.SIGINT, 11)])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(corpus, tmp_path, monkeypatch, number, step):
    train(recipe(corpus, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, step, lambda: os.kill(os.getpid(), number))
        summary = train(recipe(corpus, tmp_path / "broken"))
    assert summary["stopped_by"] == signal.Signals(number).name and summary["steps"] == step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert (tmp_path / "broken" / "state" / f"step-{step:08d}.state").exists()
    said = []
    assert train(recipe(corpus, tmp_path / "broken", resume=True), said)["stopped_by"] is None
    assert any(f"resuming after step {step}" in line for line in said)
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_crash_goes_on_from_the_newest_good_state(corpus, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(corpus, whole))

    def crash():
        raise Stop
    with monkeypatch.context() as patch:
        interrupt_at(patch, 11, crash)
        with pytest.raises(Stop):
            train(recipe(corpus, broken))
    newest = broken / "state" / "step-00000010.state"
    content = newest.read_bytes()
    newest.write_bytes(content[:-100])  # as a power failure may leave it
    said = []
    train(recipe(corpus, broken, resume=True, save_every=3), said)
    assert any("step-00000010.state: the checksum is wrong" in line for line in said)
    assert any("resuming after step 5" in line for line in said)
    assert_same_run(whole, broken)


def test_resume_without_a_state_starts_at_0(corpus, tmp_path):
    train(recipe(corpus, tmp_path / "whole"))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "log.csv").write_text("step\n77\n")
    train(recipe(corpus, tmp_path / "new", resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "new")


def test_resume_from_a_state_of_other_counters_names_the_file(corpus, tmp_path):
    train(recipe(corpus, tmp_path / "run", steps=2))
    [(_, path)] = state.state_files(str(tmp_path / "run" / "state"))
    arrays, document = state.read_checked(path)
    del document["counters"]["audio_seconds"]
    state.write_checked(path, arrays, document)
    with pytest.raises(ValueError, match=f"^{re.escape(path)}: counters: expected 'audio_seconds', got none$"):
        train(recipe(corpus, tmp_path / "run", steps=2, resume=True))


def test_resume_of_a_finished_run_changes_nothing(corpus, tmp_path):
    train(recipe(corpus, tmp_path / "run"))
    before = params(tmp_path / "run"), read_log(str(tmp_path / "run" / "log.csv"))
    assert train(recipe(corpus, tmp_path / "run", resume=True))["steps"] == 12
    after = params(tmp_path / "run"), read_log(str(tmp_path / "run" / "log.csv"))
    assert before[1] == after[1] and all(np.array_equal(before[0][name], after[0][name]) for name in before[0])


def test_a_used_folder_needs_resume(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="out: expected an empty or new folder"):
        train(recipe(corpus, tmp_path / "run"))
    assert os.listdir(tmp_path / "run") == ["precious.txt"]
    with pytest.raises(ValueError, match="out: expected a folder, got the file"):
        train(recipe(corpus, tmp_path / "run" / "precious.txt"))


def test_resume_with_other_settings_names_the_key(corpus, tmp_path):
    out = tmp_path / "run"
    train(recipe(corpus, out, steps=5))
    before = (out / "state" / "step-00000005.state").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    soundfile.write(str(other / "x.wav"), np.zeros(8000, np.float32), 16000)
    gd.Model(gd.Config(**TEACHER), seed=9).save(str(other / "teacher.safetensors"))
    for changes, message in [
            (dict(lr=0.02), "resume: lr: expected 0.01, as in the run so far, got 0.02"),
            (dict(steps=6), "resume: steps: expected 5"), (dict(seed=1), "resume: seed: expected 0"),
            (dict(model={**MODEL, "target_layers": (1, 2)}), r"resume: target_layers: expected \[1, 3\]"),
            (dict(freeze_extractor=True), "resume: freeze_extractor: expected False"),
            (dict(audio=[corpus[1], str(other)]), "resume: (valid_)?audio: expected the same files"),
            (dict(teacher=str(other / "teacher.safetensors")), "resume: teacher: expected the same weights")]:
        with pytest.raises(ValueError, match=message):
            train(recipe(corpus, out, resume=True, **{"steps": 5, **changes}))
    assert (out / "state" / "step-00000005.state").read_bytes() == before
    train(recipe(corpus, out, steps=5, resume=True, readers=1, save_every=1, eval_every=2))


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped(corpus, tmp_path, monkeypatch, how):
    original = Trainer._loss_and_gradient

    def patched(self, *args):
        loss, terms = original(self, *args)
        if self.counters.step in (2, 3, 6):
            self.grads[5] = np.inf
            loss = float("nan") if how == "loss" else loss
        return loss, terms
    monkeypatch.setattr(Trainer, "_loss_and_gradient", patched)
    said = []
    summary = train(recipe(corpus, tmp_path / "run", max_bad_steps=3), said)
    assert summary["skipped_steps"] == 3 and summary["steps"] == 12
    assert all(np.isfinite(value).all() for value in params(tmp_path / "run").values())
    rows = read_log(str(tmp_path / "run" / "log.csv"))
    assert all(row["loss"] is None or np.isfinite(row["loss"]) for row in rows) and rows[-1]["skipped_steps"] == 3
    with pytest.raises(ArithmeticError, match="2 steps in a row had to be skipped"):
        train(recipe(corpus, tmp_path / "other", max_bad_steps=2))


def test_steps_that_stop_a_run_leave_the_last_good_weights(corpus, tmp_path, monkeypatch):
    """From step 8 on no gradient is finite: the states hold step 7's weights, and a run resumed from them stops at
    once, or goes on where the cause is gone."""
    original = Trainer._loss_and_gradient

    def patched(self, *args):
        loss, terms = original(self, *args)
        if self.counters.step >= 8:
            self.grads[:] = np.nan
        return loss, terms
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(recipe(corpus, tmp_path / "seven", save_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss_and_gradient", patched)
        for resume, message in (
                (False, "3 steps in a row had to be skipped, the last one for a gradient that is not finite"),
                (True, "3 steps in a row")):
            with pytest.raises(ArithmeticError, match=message):
                train(recipe(corpus, tmp_path / "run", save_every=1, max_bad_steps=3, resume=resume))
            assert sorted(os.listdir(tmp_path / "run" / "state")) == ["step-00000008.state", "step-00000009.state"]
            seven, nine = params(tmp_path / "seven"), params(tmp_path / "run")
            assert all(seven[name].tobytes() == nine[name].tobytes() for name in seven)
    summary = train(recipe(corpus, tmp_path / "run", save_every=1, max_bad_steps=3, resume=True))
    assert summary["steps"] == 12 and summary["skipped_steps"] == 2


def test_a_file_that_breaks_later_is_skipped_and_named(corpus, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for i in range(4):
        soundfile.write(str(tmp_path / "audio" / f"{i}.flac"), rng.uniform(-0.5, 0.5, 8000), 16000)
    content = (tmp_path / "audio" / "2.flac").read_bytes()
    (tmp_path / "audio" / "2.flac").write_bytes(content[:len(content) // 3])  # the header is whole
    (tmp_path / "audio" / "9.wav").write_bytes(b"junk")
    said = []
    summary = train(recipe(corpus, tmp_path / "run", audio=[str(tmp_path / "audio")], valid_fraction=0.0), said)
    assert summary["steps"] == 12 and summary["skipped_files"] == 1 and summary["valid_last"] is None
    assert sum(line.startswith("skipped 2.flac: ") for line in said) == 1
    assert any(line.startswith("skipped 9.wav: ") for line in said)


def test_validation_audio_of_its_own(corpus, tmp_path):
    held = os.path.join(corpus[1], "3.wav")
    run = Trainer(recipe(corpus, tmp_path / "run", valid_audio=[held]), print, quiet=True)
    assert [file.name for file in run.valid_files] == ["3.wav"]
    assert "3.wav" not in [file.name for file in run.train_files] and len(run.train_files) == 8
    with pytest.raises(ValueError, match="audio: expected files that are not in valid_audio"):
        Trainer(recipe(corpus, tmp_path / "run", audio=[held], valid_audio=[held]), print)


def test_full_disk_stops_the_run_and_it_can_go_on(corpus, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe(corpus, whole))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 9, lambda: full_disk(patch, 100))
        with pytest.raises(OSError, match="No space left"):
            train(recipe(corpus, broken))
    assert os.listdir(broken / "state") == ["step-00000005.state"]
    train(recipe(corpus, broken, resume=True))
    assert_same_run(whole, broken)


def test_missing_extras_are_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "_EXTRAS", ("soundfile", "surely_not_installed"))
    with pytest.raises(ImportError, match="distill needs surely_not_installed"):
        train(recipe(corpus, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
