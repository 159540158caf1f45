"""Every row of the paper's tables from distillation to S3PRL: a few steps, features of the student on the disk,
and the same features through the upstream, all at widths of a few channels."""
import io
import os
import tarfile

import numpy as np
import pytest

for module in ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib"):
    pytest.importorskip(module)
import soundfile  # noqa: E402

import gendistiller_ext as gd  # noqa: E402
from conftest import SMALL_TEACHERS  # noqa: E402
from gendistiller_ext.checkpoints import safetensors  # noqa: E402
from gendistiller_ext.training import trainer as trainer_module  # noqa: E402
from gendistiller_ext.audio.files import read_audio  # noqa: E402
from gendistiller_ext.audio.find import find_audio  # noqa: E402
from gendistiller_ext.commands.extract import extract  # noqa: E402
from gendistiller_ext.training.recipe import Recipe  # noqa: E402
from gendistiller_ext.training.trainer import Trainer  # noqa: E402

STUDENTS = [name for name in gd.Config.presets() if gd.Config.preset(name).architecture != "encoder"]
# What a row is about stays, so its own widths are given here again, small.
NARROW = {"table4_conv256": {"conv_feature_layers": ((4, 10, 5),) + ((4, 3, 2),) * 4 + ((4, 2, 2),) * 2},
          "table4_ffn2048": {"encoder_ffn_embed_dim": 16}, "table4_ffn1536": {"encoder_ffn_embed_dim": 14}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A teacher of 12 blocks and 5 files of noise of 0.1 to 0.3 s, in a folder and in two shards."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for i in range(5):
        wav = rng.uniform(-0.5, 0.5, 1600 + 640 * i).astype(np.float32)
        soundfile.write(str(folder / "audio" / f"{i}.wav"), wav, 16000, subtype="FLOAT")
    for shard, members in enumerate((range(3), range(3, 5))):
        with tarfile.open(folder / f"set-{shard:02d}.tar", "w") as archive:
            for i in members:
                archive.add(folder / "audio" / f"{i}.wav", f"{i}.wav")
    teacher = gd.Config(**{**SMALL_TEACHERS["wavlm"], "encoder_layers": 12})
    gd.Model(teacher, seed=1).save(folder / "teacher.safetensors")
    return folder


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(trainer_module, "draw_curves", lambda *paths: None)


def distil(corpus, out, audio, preset="gendistiller", **changes):
    settings = dict(teacher=str(corpus / "teacher.safetensors"), audio=[str(source) for source in audio], out=str(out),
                    preset=preset, model=NARROW.get(preset, {}), steps=3, batch_size=2, crop_seconds=0.15, lr=0.01,
                    warmup=0.3, valid_fraction=0.3, log_every=1)
    return Trainer(Recipe(**{**settings, **changes}).validate(), lambda line: None, quiet=True).train()


@pytest.mark.parametrize("preset", STUDENTS)
def test_row(preset, corpus, tmp_path):
    """Forward, backward, an optimiser that moves every tensor, extract, S3PRL."""
    summary = distil(corpus, tmp_path / "run", [corpus / "audio"], preset, init_from_teacher=False, lr=2e-3)
    assert summary["steps"] == 3 and summary["skipped_steps"] == summary["skipped_files"] == 0
    assert np.isfinite(summary["valid_last"]["valid_loss"])
    assert summary["valid_last"]["valid_loss"] < summary["valid_first"]["valid_loss"]

    model = gd.Model.load(summary["student"])
    row = gd.Config.preset(preset)
    same = ("architecture", "target_layers", "encoder_layers", "skip_connection", "output_layer", "cross_attention",
            "gru_rel_pos", "feature_layer_norm", "position")
    assert {name: getattr(model.config, name) for name in same} == {name: getattr(row, name) for name in same}
    start = gd.Model(model.config, seed=0)
    # A key's bias has no gradient: the softmax ignores it.
    still = [name for name, value in model.params.items()
             if not name.endswith("k_proj.bias") and np.array_equal(value, start.params[name])]
    assert still == []

    files, _ = find_audio([str(corpus / "audio")])
    assert extract(model, files, str(tmp_path / "features"))["written"] == 5
    features = [safetensors.parse((tmp_path / "features" / f"{i}.wav.safetensors").read_bytes())[0]["hidden_states"]
                for i in range(5)]
    assert {len(states) for states in features} == {model.config.num_states}

    torch = pytest.importorskip("torch")
    pytest.importorskip("s3prl", reason="S3PRL is not installed")
    import s3prl_upstream
    s3prl_upstream.register()
    from s3prl import hub
    upstream = hub.gendistiller(ckpt=summary["student"]).eval()
    wavs = [torch.from_numpy(read_audio(file)) for file in files]
    with torch.no_grad():
        states = upstream(wavs)["hidden_states"]
    assert len(states) == model.config.num_states
    for b, feature in enumerate(features):
        assert np.array_equal(torch.stack(states)[:, b, :feature.shape[1]].numpy(), feature)


def test_distilling_from_shards_is_distilling_from_files(corpus, tmp_path):
    """The same bits: order and crops follow from the place in the list, reads from the offset."""
    kept = [distil(corpus, tmp_path / name, audio, valid_fraction=0.0)["student"]
            for name, audio in (("files", [corpus / "audio"]), ("shards", [corpus / "set-{00..01}.tar"]))]
    first, second = (gd.Model.load(path).flat_params().tobytes() for path in kept)
    assert first == second


def test_held_out_shards(corpus, tmp_path):
    trainer = Trainer(Recipe(teacher=str(corpus / "teacher.safetensors"), audio=[str(corpus / "set-{00..01}.tar")],
                             valid_audio=[str(corpus / "set-01.tar")], out=str(tmp_path / "run"), steps=1,
                             model={}).validate(), lambda line: None, quiet=True)
    assert [file.name for file in trainer.train_files] == [f"set-00/{i}.wav" for i in range(3)]
    assert [file.name for file in trainer.valid_files] == ["set-01/3.wav", "set-01/4.wav"]


def test_extracting_from_shards_is_named_by_shard_and_member_and_goes_on(corpus, tmp_path):
    model = gd.Model.load(corpus / "teacher.safetensors")
    files, _ = find_audio([str(corpus / "set-{00..01}.tar")])
    said = []
    assert extract(model, files[:3], str(tmp_path), say=said.append) == {"written": 3, "kept": 0, "skipped": 0}
    stamps = {name: os.stat(tmp_path / "set-00" / name).st_mtime_ns for name in os.listdir(tmp_path / "set-00")}
    assert extract(model, files, str(tmp_path), say=said.append) == {"written": 2, "kept": 3, "skipped": 0}
    assert {name: os.stat(tmp_path / "set-00" / name).st_mtime_ns for name in stamps} == stamps
    assert sorted(os.listdir(tmp_path / "set-01")) == ["3.wav.safetensors", "4.wav.safetensors"]
    alone, _ = find_audio([str(corpus / "audio")])
    extract(model, alone, str(tmp_path / "files"))
    for i in range(5):
        path = tmp_path / f"set-{i // 3:02d}" / f"{i}.wav.safetensors"
        assert path.read_bytes() == (tmp_path / "files" / f"{i}.wav.safetensors").read_bytes()


def test_extracting_skips_members_that_cannot_be_read(corpus, tmp_path):
    """Nothing is wrong with the header of this member, so it is found when it is read."""
    flac = io.BytesIO()
    soundfile.write(flac, np.random.default_rng(0).uniform(-1, 1, 9000), 16000, format="FLAC")
    entry = tarfile.TarInfo("cut.flac")
    entry.size = len(flac.getvalue()) // 2
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        archive.addfile(entry, io.BytesIO(flac.getvalue()[:entry.size]))
        archive.add(corpus / "audio" / "0.wav", "0.wav")
    files, skipped = find_audio([str(tmp_path / "s.tar")])
    said = []
    counts = extract(gd.Model.load(corpus / "teacher.safetensors"), files, str(tmp_path / "out"), say=said.append)
    assert skipped == [] and counts == {"written": 1, "kept": 0, "skipped": 1}
    assert len(said) == 1 and said[0].startswith("skipped s/cut.flac: ")
