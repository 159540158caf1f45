"""Models written for other projects: S3PRL's own distiller upstream and transformers load them and give the
same hidden states."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gendistiller_ext as gd
from conftest import SEED, SMALL, SMALL_TEACHERS, SMALL_VARIANTS
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import export, foreign
from reference.layout import random_state, random_wavs

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

TOLERANCE = 1e-5
PLAIN = {"relative_position_embedding": False, "gru_rel_pos": False, "feature_layer_norm": False}
DISTILLERS = {
    "three heads": SMALL_VARIANTS["multi_head"],
    "one head": {**SMALL_VARIANTS["multi_head"], "target_layers": (9,)},
    "layer_norm extractor": {**SMALL_VARIANTS["multi_head"], "extractor_mode": "layer_norm"},
    "self_hidden": {**SMALL_VARIANTS["self_hidden"], **PLAIN},
    "as wide as its extractor": {**SMALL_VARIANTS["multi_head"], "encoder_embed_dim": 8, "encoder_attention_heads": 2},
}
# An extractor as wide as the blocks.
WIDE = {"conv_feature_layers": ((16, 10, 5),) + ((16, 3, 2),) * 4 + ((16, 2, 2),) * 2, "encoder_embed_dim": 16,
        "encoder_attention_heads": 2}
FOLDERS = {**{name: {**fields, "normalize_eps": 1e-7} for name, fields in SMALL_TEACHERS.items()},
           "projected": {**SMALL_TEACHERS["hubert"], **WIDE, "feature_projection": True}, "multi_head": SMALL_VARIANTS["multi_head"],
           "self_hidden": SMALL_VARIANTS["self_hidden"],
           "self_hidden_plain": {**SMALL_VARIANTS["self_hidden"], **PLAIN}}


def model_of(fields):
    config = gd.Config(**fields)
    model = gd.Model(config)
    model.load_params(random_state(config, SEED))
    return model


def assert_same(ours, theirs):
    for s, (a, b) in enumerate(zip(ours, theirs)):
        assert a.shape == tuple(b.shape)
        error = np.abs(a - b.numpy()).max()
        assert error <= TOLERANCE * max(1.0, np.abs(a).max()), f"state {s}: {error:.2e}"


# ---- S3PRL's distiller -------------------------------------------------------------------------------------

def upstream_of(path):
    """S3PRL's own upstream of the file, through its hub."""
    pytest.importorskip("s3prl", reason="S3PRL is not installed")
    from s3prl.upstream.distiller import hubconf
    return hubconf.distiller_local(str(path)).eval()


@pytest.mark.parametrize("name", DISTILLERS)
def test_s3prls_own_upstream_gives_the_same_states(name, tmp_path):
    model = model_of(DISTILLERS[name])
    assert export.save_s3prl_distiller(model, str(tmp_path / "states.ckpt")) == []
    upstream = upstream_of(tmp_path / "states.ckpt")
    for wav in random_wavs([400, 719, 16000], SEED):
        with torch.no_grad():
            theirs = upstream([torch.tensor(wav)])["hidden_states"]
        ours, _ = model.forward([wav])
        # Predictions by hidden layers come a second time in S3PRL.
        assert len(theirs) == len(ours) * (2 if model.config.architecture == "self_hidden" else 1)
        assert_same(ours, theirs)
    back = foreign.read(tmp_path / "states.ckpt")
    assert back.format == "s3prl-distiller" and back.config == dataclasses.replace(
        model.config, num_buckets=back.config.num_buckets, max_distance=back.config.max_distance)
    assert all(np.array_equal(back.tensors[key], value) for key, value in model.params.items())


def test_s3prls_own_upstream_in_a_batch(tmp_path):
    """With S3PRL's padding, which counts the zeros of the longest row into the GroupNorm."""
    model = model_of({**SMALL_VARIANTS["multi_head"], "padding": "s3prl"})
    export.save_s3prl_distiller(model, str(tmp_path / "states.ckpt"))
    wavs = random_wavs([7000, 3100, 5000], SEED)
    with torch.no_grad():
        theirs = upstream_of(tmp_path / "states.ckpt")([torch.tensor(wav) for wav in wavs])["hidden_states"]
    ours, frames = model.forward(wavs)
    for b, count in enumerate(frames):
        assert_same([state[b, :count] for state in ours], [state[b, :count] for state in theirs])


def test_distilhubert_at_its_size(tmp_path):
    model = gd.Model(gd.Config.preset("distilhubert"), seed=3)
    export.save_s3prl_distiller(model, str(tmp_path / "states.ckpt"))
    upstream = upstream_of(tmp_path / "states.ckpt")
    assert sum(p.numel() for p in upstream.model.parameters()) == model.num_params == 27_034_752
    [wav] = random_wavs([16000], SEED)
    with torch.no_grad():
        theirs = upstream([torch.tensor(wav)])["hidden_states"]
    ours, _ = model.forward([wav])
    assert len(ours) == len(theirs) == 6
    assert_same(ours, theirs)


@pytest.mark.parametrize("fields, message", [
    (SMALL, "architecture: expected 'multi_head' or 'self_hidden', which S3PRL's distiller can hold, got 'generative'"),
    (SMALL_TEACHERS["hubert"], "architecture: expected .* got 'encoder'"),
    (SMALL_VARIANTS["self_hidden"], "relative_position_embedding: expected False"),
    ({**SMALL_VARIANTS["multi_head"], "feature_layer_norm": True}, "feature_layer_norm: expected False"),
    ({**SMALL_VARIANTS["multi_head"], "normalize": True}, "normalize: expected False"),
    ({**SMALL_VARIANTS["multi_head"], **WIDE, "feature_projection": True}, "feature_projection: expected False"),
    ({**SMALL_VARIANTS["self_hidden_three"], **PLAIN},
     r"target_layers: expected encoder_layers \+ 1 = 4 layers, .* got \(4, 8, 12\)"),
])
def test_what_s3prls_distiller_cannot_be_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.save_s3prl_distiller(model_of(fields), str(tmp_path / "x.ckpt"))
    assert os.listdir(tmp_path) == []


# ---- Hugging Face ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FOLDERS)
def test_transformers_gives_the_same_states(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = model_of(FOLDERS[name])
    left_out = export.save_huggingface(model, str(tmp_path / "folder"))
    assert left_out == [key for key in model.params if key.startswith("output_layer.")]
    peer, loading = transformers.AutoModel.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "folder")
    assert extractor.do_normalize == model.config.normalize
    assert peer.config.model_type == ("wavlm" if model.config.gru_rel_pos else "hubert")
    blocks = model.config.encoder_layers
    for wav in random_wavs([400, 719, 16000], SEED):
        given = extractor(wav, sampling_rate=16000, return_tensors="pt").input_values
        with torch.no_grad():
            theirs = peer.eval()(given, output_hidden_states=True).hidden_states
        ours, _ = model.forward([wav])
        assert len(theirs) == blocks + 1
        if model.config.architecture == "encoder":
            assert_same(ours, theirs)
        else:  # state 0 is the feature embedding here, the first block's input there
            assert_same(ours[1:blocks + 1], theirs[1:])
    back = foreign.read(tmp_path / "folder")
    assert back.format == "huggingface" and back.ignored == []
    assert all(np.array_equal(value, model.params[key]) for key, value in back.tensors.items())
    assert set(back.tensors) | set(left_out) == set(model.params)
    # What is read back computes the same bits.
    again = gd.Model.load(tmp_path / "folder")
    for ours, theirs in zip(model.forward([wav])[0][1:blocks + 1], again.forward([wav])[0][1:]):
        assert np.array_equal(ours, theirs)
    if model.config.architecture == "encoder":
        same = ("feature_grad_mult", "normalize_eps", "num_buckets", "max_distance")  # but where they have no effect
        assert dataclasses.replace(back.config, **{name: getattr(model.config, name) for name in same}) == model.config
        assert not model.config.normalize or back.config.normalize_eps == 1e-7


@pytest.mark.parametrize("fields, message", [
    (SMALL, "architecture: expected 'encoder' or 'multi_head' or 'self_hidden', which a Hugging Face folder can hold"),
    ({**SMALL_TEACHERS["wavlm"], "gru_rel_pos": False}, "gru_rel_pos: expected True"),
    ({**SMALL_TEACHERS["wavlm"], "feature_layer_norm": False}, "feature_layer_norm: expected True, .* WavLM"),
    ({**SMALL_TEACHERS["hubert"], **WIDE}, "feature_projection: expected True, .* got False"),
    (SMALL_TEACHERS["wavlm_large"],
     r"normalize_eps: expected 1e-07, which a Hugging Face folder .* can hold, got 1e-05"),
])
def test_what_hugging_face_cannot_be_is_refused(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.save_huggingface(model_of(fields), str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(export.safetensors, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export.save_huggingface(model_of(SMALL_TEACHERS["hubert"]), str(tmp_path / "x"))
    assert os.listdir(tmp_path) == []


# ---- The command -------------------------------------------------------------------------------------------

def convert(capsys, *words):
    code = cli.main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_name_of_the_target_is_the_format(capsys, tmp_path):
    source = tmp_path / "student.safetensors"
    model = model_of(SMALL_VARIANTS["multi_head"])
    model.save(source)
    heads = ["output_layer.0.weight", "output_layer.0.bias", "output_layer.2.weight", "output_layer.2.bias"]
    for target, kind, left_out in (("a.ckpt", "s3prl-distiller", []), ("folder", "huggingface", heads),
                                   ("v1.0/", "huggingface", heads), ("b.safetensors", "gendistiller", [])):
        code, out, _ = convert(capsys, source, f"{tmp_path}/{target}", "--json")
        facts = json.loads(out)
        assert code == 0 and facts["format"] == kind and facts["left_out"] == left_out
        assert facts["parameters"] == model.num_params and facts["bytes"] > 0
    code, out, _ = convert(capsys, source, tmp_path / "folder", "--force")
    assert code == 0 and f"left out: {', '.join(heads)}" in out
    assert sorted(os.listdir(tmp_path / "folder")) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    # There and back again.
    assert convert(capsys, tmp_path / "a.ckpt", tmp_path / "c.safetensors")[0] == 0
    again = gd.Model.load(tmp_path / "c.safetensors")
    assert again.flat_params().tobytes() == model.flat_params().tobytes()
    assert convert(capsys, source, tmp_path / "x.bin", "--to", "s3prl-distiller")[0] == 0
    assert foreign.read(tmp_path / "x.bin").format == "s3prl-distiller"


@pytest.mark.parametrize("words, message", [
    (("x.pt",), "target: expected FILE.safetensors, FILE.ckpt or a folder"),
    (("student.safetensors",), "target: expected a new file"),
    (("x.ckpt", "--dtype", "bfloat16"), "dtype: expected float32 for s3prl-distiller, got bfloat16"),
    (("student.safetensors", "--to", "huggingface", "--force"), "target: expected a folder"),
    (("x.ckpt",), "architecture: expected 'multi_head' or 'self_hidden'"),
])
def test_wrong_targets_are_one_line(words, message, capsys, tmp_path):
    source = tmp_path / "student.safetensors"
    model_of(SMALL).save(source)
    code, out, err = convert(capsys, source, tmp_path / words[0], *words[1:])
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch: pip install 'gendistiller_ext\[torch\]'"):
        export.save_s3prl_distiller(model_of(SMALL_VARIANTS["multi_head"]), str(tmp_path / "x.ckpt"))
    assert os.listdir(tmp_path) == []
