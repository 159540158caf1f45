"""Teachers of any kind, and the cache of what they say."""
import os
from types import SimpleNamespace

import numpy as np
import pytest

for module in ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib"):
    pytest.importorskip(module)

import gendistiller_ext as gd  # noqa: E402
from gendistiller_ext.training.state import write_checked  # noqa: E402
from gendistiller_ext.training.target_cache import TargetCache, from_bfloat16, to_bfloat16  # noqa: E402
from gendistiller_ext.training.teachers import EngineTeacher, UpstreamTeacher, load_teacher  # noqa: E402
from gendistiller_ext.training.trainer import Trainer  # noqa: E402
from runs import CONV, TEACHER, assert_same_run, params, recipe, train  # noqa: E402


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    monkeypatch.setattr("gendistiller_ext.training.trainer.draw_curves", lambda *paths: None)


def wavs_of(*lengths):
    return [np.random.default_rng(i).uniform(-0.5, 0.5, n).astype(np.float32) for i, n in enumerate(lengths)]


# ---- Upstreams of S3PRL ------------------------------------------------------------------------------------

@pytest.fixture
def hub():
    pytest.importorskip("s3prl")
    pytest.importorskip("torch")
    import s3prl_upstream
    s3prl_upstream.register()
    import s3prl.hub
    return s3prl.hub


def custom(hub, monkeypatch, width=24, rate=320, extra=0, states=5):
    """An upstream `custom` of s3prl.hub: linear maps of frames of 320 samples."""
    import torch

    class Custom(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.maps = torch.nn.ModuleList([torch.nn.Linear(400, width) for _ in range(states)])
            self.dropout = torch.nn.Dropout(0.5)  # a teacher is in evaluation mode

        def get_downsample_rates(self, key):
            return rate

        def forward(self, wavs):
            frames = torch.nn.utils.rnn.pad_sequence([wav.unfold(0, 400, 320) for wav in wavs], batch_first=True)
            kept = frames[:, :extra] if extra < 0 else torch.cat([frames, *[frames[:, -1:]] * extra], 1)
            return {"hidden_states": [self.dropout(part(kept)) for part in self.maps]}
    monkeypatch.setattr(hub, "custom", lambda **options: Custom(), raising=False)


def test_an_upstream_is_the_engines_teacher(hub, teacher_path):
    """S3PRL's own WavLM of the same checkpoint."""
    upstream, engine = load_teacher(f"s3prl:wavlm_local:{teacher_path}"), load_teacher(str(teacher_path))
    assert isinstance(upstream, UpstreamTeacher) and isinstance(engine, EngineTeacher)
    assert upstream.config.encoder_embed_dim == engine.config.encoder_embed_dim
    assert upstream.config.encoder_layers == engine.config.encoder_layers
    for layers in ((4, 8), (0, 12)):
        theirs, frames = upstream.targets(wavs_of(16000, 5000), layers)
        ours, expected = engine.targets(wavs_of(16000, 5000), layers)
        assert np.array_equal(frames, expected) and theirs.shape == ours.shape
        assert np.abs(theirs - ours).max() < 2e-4 * np.abs(ours).max()


@pytest.mark.parametrize("extra", [0, 1])
def test_a_custom_upstream_teaches(hub, monkeypatch, corpus, tmp_path, extra):
    custom(hub, monkeypatch, extra=extra)
    model = dict(target_layers=(1, 3), conv_feature_layers=CONV, encoder_ffn_embed_dim=24, conv_pos=8)
    settings = dict(teacher="s3prl:custom", model=model, steps=30)
    run = Trainer(recipe(corpus, tmp_path / "run", **settings), print, quiet=True)
    assert run.config.encoder_embed_dim == 24 and run.copied == [] and len(run.random) == len(run.student.params)
    wavs = wavs_of(5000, 900)
    targets, frames = run.teacher.targets(wavs, (1, 3))
    assert targets.shape == (2, 2, 15, 24) and list(frames) == [15, 2] and not targets[:, 1, 2:].any()
    alone, _ = run.teacher.targets(wavs[1:], (1, 3))
    assert np.array_equal(targets[:, 1, :2], alone[:, 0])
    summary = run.train()
    assert summary["valid_last"]["valid_loss"] < summary["valid_first"]["valid_loss"]
    assert summary["teacher_parameters"] == 5 * 401 * 24


def test_an_upstream_with_a_frame_less_repeats_the_last(hub, monkeypatch):
    custom(hub, monkeypatch, extra=-1)
    targets, frames = load_teacher("s3prl:custom").targets(wavs_of(5000), (2,))
    assert list(frames) == [15] and np.array_equal(targets[0, 0, 14], targets[0, 0, 13])
    assert not np.array_equal(targets[0, 0, 13], targets[0, 0, 12])


def test_upstreams_that_do_not_fit(hub, monkeypatch, corpus, tmp_path):
    custom(hub, monkeypatch, rate=160)
    with pytest.raises(ValueError, match="teacher: expected frames every 320 samples, as the student has them, got one every 160"):
        load_teacher("s3prl:custom")
    custom(hub, monkeypatch, extra=9)
    with pytest.raises(ValueError, match="teacher: expected frames every 320 samples, .* 58 for 16000"):
        load_teacher("s3prl:custom")
    for name in ("no_such_upstream", ""):
        with pytest.raises(ValueError, match=f"teacher: expected an upstream of s3prl.hub, got '{name}'"):
            load_teacher(f"s3prl:{name}")
    custom(hub, monkeypatch)
    with pytest.raises(ValueError, match="target_layers: expected layers from 0 to 4, which the teacher has, got 9"):
        Trainer(recipe(corpus, tmp_path, teacher="s3prl:custom", model=dict(target_layers=(9,))), print)


# ---- The cache ---------------------------------------------------------------------------------------------

def test_bfloat16_is_torchs():
    torch = pytest.importorskip("torch")
    special = [0, -0.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8, 1e-40, 3e38]
    values = np.concatenate([np.random.default_rng(0).standard_normal(9999), special]).astype(np.float32)
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(to_bfloat16(values), theirs.view(torch.uint16).numpy())
    assert np.array_equal(from_bfloat16(to_bfloat16(values)), theirs.float().numpy())


def counting(teacher):
    calls = []

    def targets(wavs, layers, threads=None):
        calls.append([len(wav) for wav in wavs])
        return teacher.targets(wavs, layers, threads)
    return SimpleNamespace(config=teacher.config, hash=teacher.hash, targets=targets), calls


def test_targets_are_the_whole_files(corpus, tmp_path):
    teacher, calls = counting(EngineTeacher(corpus[0]))
    cache = TargetCache(teacher, (1, 3), str(tmp_path))
    one, other = wavs_of(8000, 6000)
    whole, _ = EngineTeacher(corpus[0]).targets([one], (1, 3))
    for _ in range(2):
        targets, frames = cache.targets([(one, 5), (other, 0)], [one[1600:1600 + 4000], other[:2000]])
        assert list(frames) == [12, 6] and targets.shape == (2, 2, 12, 16)
        expected = from_bfloat16(to_bfloat16(whole[:, 0, 5:17]))
        assert np.array_equal(targets[:, 0], expected) and not targets[:, 1, 6:].any()
    assert calls == [[8000], [6000]]
    louder = one.copy()
    louder[7000] += 0.1
    cache.whole(louder)  # other samples
    TargetCache(teacher, (1, 2), str(tmp_path)).whole(one)  # other layers
    gd.Model(gd.Config(**TEACHER), seed=9).save(str(tmp_path / "other.safetensors"))
    TargetCache(EngineTeacher(str(tmp_path / "other.safetensors")), (1, 3), str(tmp_path)).whole(one)
    assert calls[2:] == [[8000], [8000]]
    assert sum(name.endswith(".targets") for _, _, names in os.walk(tmp_path) for name in names) == 5


def test_a_damaged_entry_is_computed_again(corpus, tmp_path):
    teacher, calls = counting(EngineTeacher(corpus[0]))
    said = []
    cache = TargetCache(teacher, (1, 3), str(tmp_path), said.append)
    [wav] = wavs_of(8000)
    expected, path = cache.whole(wav), cache.path(wav)
    good = open(path, "rb").read()
    for number, bad in enumerate([b"", good[:100], good[:-1], good[:300] + bytes([good[300] ^ 1]) + good[301:]], 1):
        with open(path, "wb") as stream:
            stream.write(bad)
        assert np.array_equal(cache.whole(wav), expected)
        assert len(calls) == 1 + number and len(said) == number and "computed again" in said[-1]
        assert open(path, "rb").read() == good
    for other in (np.zeros((2, 3, 4), np.uint16), np.zeros(expected.shape, np.int16)):  # whole, but another's
        write_checked(path, {"targets": other}, {})
        assert np.array_equal(cache.whole(wav), expected)
        assert open(path, "rb").read() == good


def test_a_run_with_a_cache(corpus, tmp_path, monkeypatch):
    """The first run fills it, the second one only reads it; an interrupted one ends in the same weights."""
    settings = dict(teacher_cache=str(tmp_path / "cache"), valid_fraction=0.2)
    asked = []
    original = EngineTeacher.targets

    def spy(self, wavs, *rest):
        asked.append(len(wavs))
        return original(self, wavs, *rest)
    monkeypatch.setattr(EngineTeacher, "targets", spy)
    train(recipe(corpus, tmp_path / "one", **settings))
    files = len(Trainer(recipe(corpus, tmp_path / "x", **settings), print).train_files)
    assert asked.count(1) == files
    train(recipe(corpus, tmp_path / "two", steps=12, readers=5, **settings))
    assert asked.count(1) == files
    assert_same_run(tmp_path / "one", tmp_path / "two")
    os.unlink(tmp_path / "two" / "state" / "step-00000012.state")
    train(recipe(corpus, tmp_path / "two", resume=True, **settings))
    assert_same_run(tmp_path / "one", tmp_path / "two")
    train(recipe(corpus, tmp_path / "without", valid_fraction=0.2))
    name = "encoder.layers.0.fc1.weight"
    assert not np.array_equal(params(tmp_path / "one")[name], params(tmp_path / "without")[name])
    with pytest.raises(ValueError, match="resume: teacher_cache: expected True, as in the run so far, got None"):
        train(recipe(corpus, tmp_path / "two", resume=True, valid_fraction=0.2))


def test_whole_files_are_cropped_at_every_frame(corpus, tmp_path):
    data = Trainer(recipe(corpus, tmp_path / "out", teacher_cache=str(tmp_path / "cache")), print).data
    for utterance, file in enumerate(data.files):
        firsts = {data.load((0, [(epoch, utterance)])).wholes[0][1] for epoch in range(100)}
        assert firsts == set(range(max(0, file.samples - 4800) // 320 + 1))


def test_a_teacher_with_another_hop_is_cropped_at_its_frames(corpus, tmp_path):
    """wav2vec's frames are 160 samples apart: what a crop's frames learn is what the teacher says at their time."""
    path = str(tmp_path / "teacher.safetensors")
    gd.Model(gd.Config(**{**TEACHER, "conv_feature_layers": CONV[:-1]}), seed=1).save(path)
    run = Trainer(recipe((path, corpus[1]), tmp_path / "out", teacher_cache=str(tmp_path / "cache"),
                         init_from_teacher=False), print)
    assert run.config.hop == run.teacher.config.hop == 160
    for number in range(4):
        batch = run.data.load((number, run.data.plan[number]))
        targets, frames = run.cache.targets(batch.wholes, batch.wavs)
        for row, ((whole, first), wav) in enumerate(zip(batch.wholes, batch.wavs)):
            assert np.array_equal(whole[160 * first:160 * first + 4800], wav)
            states = run.teacher.model.forward([whole], states=[1, 3])[0]
            expected = np.stack([state[0, first:first + frames[row]] for state in states])
            assert np.array_equal(targets[:, row, :frames[row]], from_bfloat16(to_bfloat16(expected)))


def test_parts_with_a_cache_sum_to_the_whole(corpus, tmp_path):
    grads = []
    for parts in (1, 2):
        run = Trainer(recipe(corpus, tmp_path / "out", teacher_cache=str(tmp_path / "cache"), accumulate=parts), print)
        batch = run.data.load((0, run.data.plan[0]))
        assert all(len(wav) <= 4800 for wav in batch.wavs)
        for (whole, first), wav in zip(batch.wholes, batch.wavs):
            assert np.array_equal(whole[320 * first:320 * first + 4800], wav)
        run._loss_and_gradient(batch.wavs, 0, batch.wholes)
        grads.append(run.grads.copy())
    assert np.linalg.norm(grads[0] - grads[1]) <= 1e-6 * np.linalg.norm(grads[0])
