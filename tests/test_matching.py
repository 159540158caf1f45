"""An encoder inside something else: prefixes of any name before it, heads of any name beside it, in every format."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from foreign_models import CONV, ENCODER, SIZES, hubert, s3prl, scatter, wav2vec2, wavlm
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import export, foreign
from gendistiller_ext.config import Config

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

PREFIXES = ("", "module.", "_orig_mod.", "model.", "encoder.", "wavlm.", "upstream.model.module._orig_mod.",
            "encoder.encoder.", "feature_extractor.", "w2v_encoder.w2v_model.", "a b.")
FORMATS = ("unilm", "fairseq", "fairseq args", "s3prl", "distiller", "distiller of one head", "safetensors", "bin",
           "shards")
# What other projects put beside an encoder; none of them is known by name.
HEADS = {"tdnn.0.kernel.weight": (3, 4), "objective.weight": (2, 2), "final_proj.bias": (5,), "quantizer.vars": (1, 4),
         "decoder.layers.0.fc1.weight": (3, 3), "feature_extractor_2.weight": (2,), "mask_emb": (12,)}


def distiller_of(tasks):
    module = s3prl("distiller.model")
    cfg = {**SIZES, "extractor_conv_feature_layers": CONV, "extractor_mode": "default", "final_dim": 12,
           "n_tasks": tasks, "pred_layer_id": [4, 8, 12][:tasks], "task_emb_type": "expand-last",
           "out_layer_type": "expand-last"}
    return scatter(module.DistillerModel(module.DistillerConfig(cfg))).state_dict(), cfg


def folder_of(tmp_path):
    """(a Hugging Face folder's state, its configs)"""
    import gendistiller_ext as gd
    from safetensors.torch import load_file
    model = gd.Model(Config(**{**ENCODER, "relative_position_embedding": True, "gru_rel_pos": True}), seed=1)
    export.save_huggingface(model, str(tmp_path / "source"))
    return load_file(tmp_path / "source" / "model.safetensors"), tmp_path / "source"


def write(kind, tmp_path, change):
    """A checkpoint of the format, of the same weights each time, its tensors' dict changed by `change`."""
    path = tmp_path / "x.pt"
    torch.manual_seed(0)
    if kind == "unilm":
        model, cfg = wavlm()
        torch.save({"cfg": cfg, "model": change(dict(model.state_dict()))}, path)
    elif kind == "fairseq":
        model, cfg, task = wav2vec2()
        torch.save({"cfg": {"model": {"_name": "wav2vec2", **cfg}, "task": task},
                    "model": change(dict(model.state_dict()))}, path)
    elif kind == "fairseq args":
        model, cfg, task, _ = hubert()
        torch.save({"args": argparse.Namespace(arch="hubert", **{**cfg, **task}),
                    "model": change(dict(model.state_dict()))}, path)
    elif kind == "s3prl":
        model, cfg, task, _ = hubert(True)
        torch.save({"task_cfg": task, "model_cfg": {"_name": "hubert", **cfg},
                    "model_weight": change(dict(model.state_dict()))}, path)
    elif kind.startswith("distiller"):
        state, cfg = distiller_of(1 if "one" in kind else 3)
        torch.save({"Distiller": change(dict(state)), "Config": {"distiller": cfg}}, path)
    else:
        save_file = pytest.importorskip("safetensors.torch").save_file
        state, path = folder_of(tmp_path)
        state = {name: value.clone() for name, value in change(state).items()}
        (path / "model.safetensors").unlink()
        if kind == "bin":
            torch.save(state, path / "pytorch_model.bin")
        elif kind == "safetensors":
            save_file(state, path / "model.safetensors")
        else:
            names = sorted(state)
            parts = {f"model-{i}-of-3.safetensors": names[i::3] for i in range(3)}
            for part, its in parts.items():
                save_file({name: state[name] for name in its}, path / part)
            (path / "model.safetensors.index.json").write_text(json.dumps(
                {"weight_map": {name: part for part, its in parts.items() for name in its}}))
    return path


def same(read, plain):
    assert read.config == plain.config and list(read.tensors) == list(plain.tensors)
    assert all(np.array_equal(read.tensors[name], value) for name, value in plain.tensors.items())


@pytest.mark.parametrize("kind", FORMATS)
def test_any_prefix_and_any_heads(kind, tmp_path):
    plain = foreign.read(write(kind, tmp_path, lambda state: state))
    for prefix in PREFIXES:
        heads = {name: torch.ones(shape) for name, shape in HEADS.items()
                 if not (prefix == "" and name.startswith("feature_extractor."))}
        read = foreign.read(write(kind, tmp_path, lambda state: {
            **{prefix + name: value for name, value in state.items()}, **heads,
            **{f"other.{prefix}{name}": value for name, value in heads.items()}}))
        same(read, plain)
        assert read.prefix == prefix
        # Heads of the file's own, such as mask_emb, may stand where ours would.
        expected = {prefix + name for name in plain.ignored} | set(heads) | {f"other.{prefix}{name}" for name in heads}
        assert set(read.ignored) == expected


@pytest.mark.parametrize("kind", ["unilm", "distiller", "safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["", "module.wavlm."])
def test_inside_the_encoder_nothing_is_passed_over(kind, prefix, tmp_path):
    norm, bias = "encoder.layer_norm.weight", "encoder.layer_norm.bias"

    def changed(edit):
        def change(state):
            state = {prefix + name: value for name, value in state.items()}
            edit(state)
            return state
        return write(kind, tmp_path, change)

    for edit, message in (
            (lambda state: state.pop(prefix + bias), rf"missing {prefix}{bias} \(12,\)$"),
            (lambda state: state.update({f"{prefix}encoder.extra": torch.ones(1)}),
             f"unexpected {prefix}encoder.extra$"),
            (lambda state: state.update({f"{prefix}feature_extractor.extra": torch.ones(1)}),
             f"unexpected {prefix}feature_extractor.extra$"),
            (lambda state: state.update({prefix + norm: torch.ones(11)}),
             rf"{prefix}{norm}: expected shape \(12,\), got \(11,\)$"),
            (lambda state: state.update({prefix + norm: torch.ones(12).int()}),
             f"{prefix}{norm}: expected a floating-point tensor, got int32$")):
        with pytest.raises(ValueError, match=message):
            foreign.read(changed(edit))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("first, second", [("teacher.", "student."), ("", "ema."), ("model.", "model.ema.")])
def test_two_encoders_are_named(kind, first, second, tmp_path, capsys):
    def twice(state):
        return {**{first + name: value for name, value in state.items()},
                **{second + name: value + 1 for name, value in state.items()}}
    path = write(kind, tmp_path, twice)
    names = sorted((repr(first), repr(second)))
    with pytest.raises(ValueError) as caught:
        foreign.read(path)
    assert str(caught.value) == f"{path}: expected one encoder, got two: under {names[0]} and under {names[1]}"
    assert cli.main(["info", str(path)]) == 2 and names[1] in capsys.readouterr().err


def test_two_halves_of_an_encoder_are_none(tmp_path):
    """Copies that both lack a tensor: neither is the encoder."""
    def twice(state):
        del state["encoder.layer_norm.bias"]
        return {f"{prefix}.{name}": value for name, value in state.items() for prefix in "ab"}
    with pytest.raises(ValueError, match=r"got \d+ of its \d+ tensors twice: under 'a\.' and under 'b\.'$"):
        foreign.read(write("unilm", tmp_path, twice))


def test_a_whole_encoder_beside_a_part_of_another(tmp_path):
    """A copy of the blocks alone, and a student of other widths, are heads."""
    plain = foreign.read(write("unilm", tmp_path, lambda state: state))
    read = foreign.read(write("unilm", tmp_path, lambda state: {
        **{f"teacher.{name}": value for name, value in state.items()},
        **{f"blocks.{name}": value for name, value in state.items() if name.startswith("encoder.layers.")},
        **{f"student.{name}": value[..., :1].clone() for name, value in state.items()}}))
    same(read, plain)
    assert read.prefix == "teacher." and sum(name.startswith("student.") for name in read.ignored) > 30


def test_info_tells_prefix_and_heads(tmp_path, capsys):
    path = write("unilm", tmp_path, lambda state: {
        **{f"module.{name}": value for name, value in state.items()}, "tdnn.0.bias": torch.ones(3)})
    assert cli.main(["info", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prefix"] == "module." and facts["ignored"] == ["module.mask_emb", "tdnn.0.bias"]
    assert cli.main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "the encoder's names begin with module.\n" in out and "ignored tensors: module.mask_emb, tdnn.0.bias" in out


HEADED = [("WavLM", head) for head in ("ForCTC", "ForSequenceClassification", "ForAudioFrameClassification",
                                       "ForXVector")]
HEADED += [("Hubert", head) for head in ("ForCTC", "ForSequenceClassification")]
HEADED += [("UniSpeech", head) for head in ("ForCTC", "ForPreTraining", "ForSequenceClassification")]
HEADED += [("UniSpeechSat", head) for head in ("ForCTC", "ForPreTraining", "ForSequenceClassification",
                                               "ForAudioFrameClassification", "ForXVector")]
HEADED += [("Wav2Vec2", head) for head in ("ForCTC", "ForPreTraining", "ForSequenceClassification",
                                           "ForAudioFrameClassification", "ForXVector", "ForMaskedLM")]


@pytest.mark.parametrize("name, head", HEADED)
def test_every_head_of_transformers(name, head, tmp_path):
    transformers = pytest.importorskip("transformers")
    from test_huggingface import HF, preprocessor
    if not hasattr(transformers, name + head):
        pytest.skip(f"this transformers has no {name}{head}")
    config = getattr(transformers, f"{name}Config")(
        **HF, tdnn_dim=[6] * 5, xvector_output_dim=4, use_weighted_layer_sum=True, classifier_proj_size=3)
    model = scatter(getattr(transformers, name + head)(config))
    model.save_pretrained(tmp_path)
    preprocessor(tmp_path, do_normalize=False)
    read = foreign.read(tmp_path)
    kind = model.base_model_prefix
    bare = getattr(model, kind)
    assert read.prefix == f"{kind}."
    ours = {f"{kind}.{key}" for key in bare.state_dict()} - {f"{kind}.masked_spec_embed"}
    assert set(read.ignored) == set(model.state_dict()) - ours and len(read.ignored) > 1
