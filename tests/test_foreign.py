"""Other projects' checkpoints: files in their exact layouts, written from their own classes."""

from __future__ import annotations

import argparse
import dataclasses
import random

import numpy as np
import pytest

from foreign_models import CONV, ENCODER, SIZES, hubert, large_fields, s3prl, scatter, wav2vec2, wavlm
from gendistiller_ext.checkpoints import foreign
from gendistiller_ext.config import Config

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


def check(read: foreign.Foreign, state, config: Config, ignored, kind: str):
    assert read.format == kind
    assert read.config == config
    assert sorted(read.ignored) == sorted(ignored)
    assert {name: array.shape for name, array in read.tensors.items()} == config.parameter_shapes()
    for name, array in read.tensors.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        assert np.array_equal(array, state[name].float().numpy()), name


# ---- unilm -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_unilm(large, dtype, tmp_path):
    model, cfg = wavlm(large)
    state = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    torch.save({"cfg": cfg, "model": state}, tmp_path / "WavLM.pt")
    config = Config(**{**ENCODER, "relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": 12,
                       "max_distance": 20, "feature_grad_mult": 1.0, **large_fields(large)})
    check(foreign.read(tmp_path / "WavLM.pt"), state, config, ["mask_emb"], "unilm")


def test_unilm_missing_settings_take_unilms_defaults(tmp_path):
    model, _ = wavlm(num_buckets=320, max_distance=1280)
    cfg = {**SIZES, "conv_feature_layers": CONV, "relative_position_embedding": True, "gru_rel_pos": True}
    torch.save({"cfg": cfg, "model": model.state_dict()}, tmp_path / "x.pt")
    config = foreign.read(tmp_path / "x.pt").config
    reference = s3prl("wavlm.WavLM").WavLMConfig(cfg)
    same = ("extractor_mode encoder_layers layer_norm_first conv_bias conv_pos num_buckets max_distance "
            "dropout attention_dropout activation_dropout feature_grad_mult normalize").split()
    assert {name: getattr(config, name) for name in same} == {name: getattr(reference, name) for name in same}


def test_numbers_of_numpy_in_a_config(tmp_path):
    model, cfg = wavlm()
    plain = foreign.read(saved(tmp_path, {"cfg": cfg, "model": model.state_dict()}))
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    numbers = {key: kinds.get(type(value), lambda same: same)(value) for key, value in cfg.items()}
    assert sum(isinstance(value, np.generic) for value in numbers.values()) > 20
    read = foreign.read(saved(tmp_path, {"cfg": numbers, "model": model.state_dict()}))
    assert read.config == plain.config and read.config.to_dict() == plain.config.to_dict()


def saved(folder, content):
    torch.save(content, folder / "x.pt")
    return folder / "x.pt"


def test_unilm_extractor_as_wide_as_the_encoder_has_no_projection(tmp_path):
    model, cfg = wavlm(conv_feature_layers="[(12,10,5)]")
    assert model.post_extract_proj is None
    torch.save({"cfg": cfg, "model": model.state_dict()}, tmp_path / "x.pt")
    assert "post_extract_proj.weight" not in foreign.read(tmp_path / "x.pt").tensors


def test_the_teacher(teacher_path):
    read = foreign.read(teacher_path)
    reference = torch.load(teacher_path, weights_only=True)
    config = Config(architecture="encoder", skip_connection=False, output_layer=False, target_layers=(),
                    conv_feature_layers=reference["cfg"]["conv_feature_layers"], encoder_layers=12,
                    encoder_embed_dim=192, encoder_ffn_embed_dim=768, encoder_attention_heads=3,
                    activation_dropout=0.0, feature_grad_mult=1.0)
    check(read, reference["model"], config, ["mask_emb"], "unilm")
    assert sum(array.size for array in read.tensors.values()) + 192 == 5_930_116


# ---- fairseq and S3PRL's conversion of it ----------------------------------------------------------------

def hubert_file(layout, large):
    model, cfg, task, symbols = hubert(large)
    state = model.state_dict()
    named = {"_name": "hubert", **cfg}
    content = {
        "s3prl": {"task_cfg": task, "model_cfg": named, "model_weight": state,
                  "dictionaries_symbols": symbols},
        "fairseq": {"args": None, "cfg": {"_name": None, "model": named,
                                          "task": {"_name": "hubert_pretraining", **task},
                                          "common": {"seed": 1}}, "model": state, "extra_state": {"epoch": 1},
                    "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        "args": {"args": argparse.Namespace(arch="hubert", **{**cfg, **task}), "model": state},
    }
    if layout == "omegaconf":
        omegaconf = pytest.importorskip("omegaconf")
        return {**content["fairseq"], "cfg": omegaconf.OmegaConf.create(content["fairseq"]["cfg"])}, state
    return content[layout], state


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("layout", ["s3prl", "fairseq", "omegaconf", "args"])
def test_hubert(layout, large, tmp_path):
    content, state = hubert_file(layout, large)
    torch.save(content, tmp_path / "hubert.pt")
    config = Config(**{**ENCODER, "feature_grad_mult": 1.0, **large_fields(large)})
    ignored = ["mask_emb", "label_embs_concat", "final_proj.weight", "final_proj.bias"]
    check(foreign.read(tmp_path / "hubert.pt"), state, config, ignored,
          "s3prl" if layout == "s3prl" else "fairseq")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("layout", ["s3prl", "fairseq"])
def test_wav2vec2(layout, large, tmp_path):
    model, cfg, task = wav2vec2(large)
    named, state = {"_name": "wav2vec2", **cfg}, model.state_dict()
    torch.save({"task_cfg": task, "model_cfg": named, "model_weight": state} if layout == "s3prl" else
               {"cfg": {"model": named, "task": task}, "model": state}, tmp_path / "wav2vec2.pt")
    config = Config(**{**ENCODER, "feature_grad_mult": 1.0, **large_fields(large)})
    ignored = [name for name in state if name.split(".")[0] in ("mask_emb", "quantizer", "project_q",
                                                                "final_proj")]
    assert len(ignored) == 8
    check(foreign.read(tmp_path / "wav2vec2.pt"), state, config, ignored, layout)


def test_fairseq_missing_settings_take_fairseqs_defaults():
    module = s3prl("wav2vec2.wav2vec2_model")
    reference = dataclasses.asdict(module.Wav2Vec2Config())
    fields, _ = foreign._fairseq({}, {}, {}, "wav2vec2")
    config = Config(**fields)
    for name in foreign._DEFAULTS:
        expected = Config(**{**ENCODER, "conv_feature_layers": reference[name]}).conv_feature_layers \
            if name == "conv_feature_layers" else reference[name]
        assert getattr(config, name) == expected, name


# ---- S3PRL's distiller -----------------------------------------------------------------------------------

def distiller(**changes):
    module = s3prl("distiller.model")
    cfg = {**SIZES, "extractor_conv_feature_layers": CONV, "extractor_mode": "default", "final_dim": 12,
           "n_tasks": 3,
           "pred_layer_id": [4, 8, 12], "task_emb_type": "expand-last", "out_layer_type": "expand-last",
           "feature_grad_mult": 0.1, "cosine_loss": 1.0, "attention_type": "original", **changes}
    model = scatter(module.DistillerModel(module.DistillerConfig(cfg)))
    return model, {"Distiller": model.state_dict(), "Config": {"distiller": cfg,
                                                               "teacher": {"model": "hubert_base"}},
                   "Optimizer": {"state": {}}, "Step": 200000,
                   "Args": argparse.Namespace(upstream="distiller")}


def student(**fields):
    return Config(**{**ENCODER, "feature_layer_norm": False, "activation_dropout": 0.1, **fields})


def test_distiller(tmp_path):
    model, content = distiller()
    torch.save(content, tmp_path / "states.ckpt")
    config = student(architecture="multi_head", output_layer=True, target_layers=(4, 8, 12))
    check(foreign.read(tmp_path / "states.ckpt"), model.state_dict(), config, [], "s3prl-distiller")


def test_distiller_of_one_head_is_transposed(tmp_path):
    model, content = distiller(n_tasks=1, pred_layer_id=[9])
    torch.save(content, tmp_path / "states.ckpt")
    read = foreign.read(tmp_path / "states.ckpt")
    assert read.config == student(architecture="multi_head", output_layer=True, target_layers=(9,))
    x = torch.randn(2, 5, 12)
    hidden = torch.nn.functional.gelu(model.output_layer[0](x)).detach().numpy()
    ours = np.einsum("bti,nio->btno", hidden,
                     read.tensors["output_layer.2.weight"]) + read.tensors["output_layer.2.bias"]
    theirs = model.output_layer(x).detach().numpy()
    np.testing.assert_allclose(ours[:, :, 0], theirs, atol=1e-6)


def test_distiller_self_hidden(tmp_path):
    model, content = distiller(task_emb_type="self-hidden", out_layer_type="self-hidden", final_dim=768)
    torch.save(content, tmp_path / "states.ckpt")
    config = student(architecture="self_hidden", output_layer=False, target_layers=(4, 8, 12))
    check(foreign.read(tmp_path / "states.ckpt"), model.state_dict(), config, [], "s3prl-distiller")


def test_distiller_missing_settings_take_s3prls_defaults():
    reference = s3prl("distiller.model").DistillerConfig({})
    fields, _ = foreign._distiller({"Distiller": {}, "Config": {"distiller": {"_": 0}}})
    assert fields["target_layers"] == reference.pred_layer_id == list(range(1, 13))
    for name in foreign._DISTILLER_DEFAULTS:
        if name not in ("conv_feature_layers", "conv_bias"):
            assert fields[name] == getattr(reference, name), name


@pytest.mark.parametrize("change, message", [
    ({"task_emb_type": "add"}, "task_emb_type: expected 'expand-last' or 'self-hidden', got str 'add'"),
    ({"n_tasks": 10 ** 12}, "n_tasks: expected 1 to 64, got int 1000000000000"),
    ({"n_tasks": "3"}, "n_tasks: expected 1 to 64, got str '3'"),
    ({"pred_layer_id": [4, 8]}, "pred_layer_id: expected n_tasks = 3 layers, got list of 2"),
    ({"pred_layer_id": 4}, "pred_layer_id: expected n_tasks = 3 layers, got int 4"),
    ({"pred_layer_id": [8, 4, 12]}, r"target_layers: expected rising layers, got 4 after 8"),
    ({"final_dim": 10},
     "final_dim, out_layer_inter_dim: expected encoder_embed_dim int 12, got int 10, int -1"),
    ({"out_layer_inter_dim": 5}, "final_dim, out_layer_inter_dim: expected encoder_embed_dim int 12"),
    ({"attention_type": "sparse"}, "attention_type: expected 'original', got str 'sparse'"),
    ({"layer_norm_first": True}, "layer_norm_first: expected false for architecture \"multi_head\""),
    ({"encoder_layers": 0}, "encoder_layers: expected 1 to 1024, got 0"),
])
def test_distillers_that_are_not_supported(change, message, tmp_path):
    _, content = distiller()
    content["Config"]["distiller"].update(change)
    torch.save(content, tmp_path / "states.ckpt")
    with pytest.raises(ValueError, match=rf"states\.ckpt: {message}"):
        foreign.read(tmp_path / "states.ckpt")


# ---- What is wrong is named ------------------------------------------------------------------------------

def edited(edit, tmp_path):
    model, cfg = wavlm()
    content = {"cfg": cfg, "model": dict(model.state_dict())}
    edit(content)
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


Q = "encoder.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("edit, message", [
    (lambda c: c["model"].pop(Q), r"missing encoder\.layers\.1\.self_attn\.q_proj\.weight \(12, 12\)$"),
    (lambda c: c["model"].update({"encoder.extra": torch.ones(1)}), r"unexpected encoder\.extra$"),
    (lambda c: c["model"].update({"layer_norm.scale": torch.ones(1)}), r"unexpected layer_norm\.scale$"),
    (lambda c: c["model"].update({Q: torch.ones(12, 11)}),
     r"q_proj\.weight: expected shape \(12, 12\), got \(12, 11\)"),
    (lambda c: c["model"].update({Q: torch.ones(144)}),
     r"q_proj\.weight: expected shape \(12, 12\), got \(144,\)"),
    (lambda c: c["model"].update({Q: torch.ones(12, 12).long()}),
     r"expected a floating-point tensor, got int64"),
    (lambda c: c["model"].update({Q: 3.0}), r"q_proj\.weight: expected a floating-point tensor, got float"),
    (lambda c: c["model"].update({Q: torch.full((12, 12), float("nan"))}),
     "expected finite numbers, got NaN or Inf"),
    (lambda c: c["model"].update({Q: torch.full((12, 12), 1e300, dtype=torch.float64)}),
     "expected finite numbers, got NaN or Inf"),
    (lambda c: c["model"].update({Q: torch.ones(1).expand(12, 12)}),
     "no larger than its storage of 1 elements"),
    (lambda c: c["model"].update({5: torch.ones(1)}), "expected a dict of named tensors, got dict"),
    (lambda c: c.update(model=[1]), "expected a dict of named tensors, got list"),
    (lambda c: c.update(cfg=[1]), "expected a WavLM .*, got a dict of 'cfg', 'model'"),
    (lambda c: c.pop("cfg"), "expected a WavLM .*, got a dict of 'model'"),
    (lambda c: c["cfg"].update(activation_fn="relu"), "activation_fn: expected 'gelu', got str 'relu'"),
    (lambda c: c["cfg"].update(conv_feature_layers="__import__('os').abort()"),
     "conv_feature_layers: expected"),
    (lambda c: c["cfg"].update(encoder_layers="2"), "encoder_layers: expected int, got str '2'"),
    (lambda c: c["cfg"].update(dropout=np.complex64(0.1)),
     "dropout: expected a plain value, got an object of numpy.core.multiarray.scalar"),
    (lambda c: c["cfg"].update(dropout=argparse.Namespace), "dropout: .* got an object of argparse.Namespace"),
    (lambda c: c["cfg"].update(gru_rel_pos=False), r"unexpected encoder\.layers\.0\.self_attn\.grep_a, "),
    (lambda c: c["cfg"].update(encoder_attention_heads=2),
     r"grep_linear\.weight: expected shape \(8, 6\), got \(8, 4\)"),
])
def test_what_is_wrong_is_named(edit, message, tmp_path):
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        foreign.read(edited(edit, tmp_path))


@pytest.mark.parametrize("content, message", [
    ([1, 2], "expected a WavLM .*, got list"),
    ({"cfg": {"model": {"_name": "wav2vec_ctc"}, "task": {}}, "model": {}},
     "expected a pre-trained hubert or wav2vec2 model, got str 'wav2vec_ctc'"),
    ({"task_cfg": {}, "model_cfg": {"_name": "data2vec_audio"}, "model_weight": {}},
     "got str 'data2vec_audio'"),
    ({"task_cfg": {}, "model_cfg": {"pos_conv_depth": 5}, "model_weight": {}},
     "pos_conv_depth: expected 1, got int 5"),
    ({"task_cfg": {}, "model_cfg": {"layer_type": "conformer"}, "model_weight": {}},
     "layer_type: expected 'transformer'"),
    ({"task_cfg": 3, "model_cfg": {}, "model_weight": {}}, "task_cfg: expected a dict of settings, got int"),
    ({"args": argparse.Namespace(arch="transformer"), "model": {}}, "got str 'transformer'"),
    ({"args": 4, "model": {}}, "args: expected a dict of settings, got int"),
    ({"Distiller": {}, "Config": {}}, "Config.distiller: expected a dict of settings, got NoneType"),
])
def test_files_of_another_kind(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt: .*{message}"):
        foreign.read(tmp_path / "x.pt")


def test_new_weight_norm_names_in_a_torch_file(tmp_path):
    model, cfg = wavlm()
    state = dict(model.state_dict())
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"encoder.pos_conv.0.parametrizations.weight.{new}"] = state.pop(f"encoder.pos_conv.0.{old}")
    torch.save({"cfg": cfg, "model": state}, tmp_path / "x.pt")
    read = foreign.read(tmp_path / "x.pt")
    assert np.array_equal(read.tensors["encoder.pos_conv.0.weight_g"],
                          model.encoder.pos_conv[0].weight_g.detach())


JUNK = [None, True, -1, 0, 10 ** 30, 2.5, float("nan"), "", "x", b"b", [], [1], (), (1, (2,)), {}, {"a": 1},
        {3: 4},
        argparse.Namespace(a=1), torch.ones(2), torch.float32, torch.device("cpu")]


@pytest.mark.parametrize("layout", ["unilm", "s3prl", "fairseq", "omegaconf", "args", "distiller"])
def test_files_with_anything_anywhere_raise_value_error_only(layout, tmp_path):
    """One value of a right file, at any depth, becomes something else."""
    if layout == "unilm":
        model, cfg = wavlm()
        content = {"cfg": cfg, "model": dict(model.state_dict())}
    elif layout == "distiller":
        content = distiller()[1]
    else:
        content = hubert_file(layout, False)[0]
    random_ = random.Random(layout)
    refused = 0
    for _ in range(80):
        changed = dict(content)
        inner = changed
        for _ in range(random_.randrange(4)):
            nested = [key for key, value in inner.items() if isinstance(value, dict) and value]
            if not nested:
                break
            key = random_.choice(nested)
            inner[key] = dict(inner[key])
            inner = inner[key]
        inner[random_.choice(list(inner))] = random_.choice(JUNK)
        torch.save(changed, tmp_path / "x.pt")
        try:
            foreign.read(tmp_path / "x.pt")
        except ValueError as error:
            assert str(tmp_path / "x.pt") in str(error) and len(str(error)) < 2000
            refused += 1
    assert refused > 20
