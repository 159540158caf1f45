"""The eight teacher presets, at widths of a few channels: random weights in S3PRL's and in Hugging Face's own
classes, written in each format that the teacher comes in, loaded and run by the engine against both."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gendistiller_ext as gd
from conftest import SEED, SMALL_CONV
from foreign_models import s3prl
from reference.layout import random_state, random_wavs
from reference.peers import huggingface_of, wavlm_of, wavlm_states

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

# A preset's structure at small widths; the positional convolution's kernel is what each class has.
WIDTHS = {"conv_feature_layers": SMALL_CONV, "encoder_layers": 3, "encoder_embed_dim": 12,
          "encoder_ffn_embed_dim": 20, "encoder_attention_heads": 3, "conv_pos_groups": 3}
TEACHERS = [name for name in gd.Config.presets() if gd.Config.preset(name).architecture == "encoder"]
HUGGINGFACE = ("safetensors", "bin", "safetensors shards", "bin shards", "old names", "old names bin", "with a head")
FORMATS = {"wavlm": ("unilm",), "hubert": ("fairseq", "fairseq args", "s3prl"),
           "wav2vec2": ("fairseq", "fairseq args", "s3prl")}
TOLERANCE = 2e-4


def kind_of(preset):
    return preset.split("_")[0]


def small(preset):
    return dataclasses.replace(gd.Config.preset(preset), **WIDTHS)


def s3prl_peer(kind, config, state):
    """(S3PRL's model, its settings, its task's settings)"""
    if kind == "wavlm":
        model = wavlm_of(config.to_dict(), state)
        return model, dict(vars(model.cfg)), {}
    shared = ("extractor_mode", "conv_bias", "encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim",
              "encoder_attention_heads", "layer_norm_first", "conv_pos", "conv_pos_groups", "dropout",
              "attention_dropout", "activation_dropout", "feature_grad_mult")
    fields = {name: getattr(config, name) for name in shared}
    fields |= {"conv_feature_layers": repr(list(config.conv_feature_layers)), "required_seq_len_multiple": 1}
    if kind == "hubert":
        module = s3prl("hubert.hubert_model")
        cfg = module.HubertConfig(label_rate=50, **fields)
        task = module.HubertPretrainingConfig(normalize=config.normalize)
        model = module.HubertModel(cfg, task, [["a", "b", "c"]])
    else:
        module = s3prl("wav2vec2.wav2vec2_model")
        cfg = module.Wav2Vec2Config(quantize_targets=True, final_dim=4, latent_vars=5, **fields)
        task = module.AudioPretrainingConfig(normalize=config.normalize)
        model = module.Wav2Vec2Model(cfg)
    rest = model.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)
    own = ("mask_emb", "final_proj", "label_embs", "quantizer", "project_q")
    assert not rest.unexpected_keys and all(name.startswith(own) for name in rest.missing_keys)
    return model.eval(), dataclasses.asdict(cfg), dataclasses.asdict(task)


def s3prl_states(kind, model, wav):
    """What S3PRL's upstreams hook: each block's input, then the encoder's output."""
    if kind == "wavlm":
        return wavlm_states(model, wav)
    states = []
    hooks = [layer.register_forward_pre_hook(
        lambda _, args, kwargs: states.append((args[0] if args else kwargs["x"]).transpose(0, 1)), with_kwargs=True)
        for layer in model.encoder.layers]
    with torch.no_grad():
        final = model.extract_features(wav, padding_mask=None, mask=False)
    for hook in hooks:
        hook.remove()
    return [*states, final["x"] if isinstance(final, dict) else final[0]]


def write_s3prl(layout, kind, peer, path):
    model, cfg, task = peer
    state = model.state_dict()
    named = {"_name": kind, **cfg}
    torch.save({
        "unilm": {"cfg": cfg, "model": state},
        "fairseq": {"args": None, "cfg": {"model": named, "task": {"_name": "audio_pretraining", **task}},
                    "model": state, "extra_state": {"epoch": 1}},
        "fairseq args": {"args": argparse.Namespace(arch=kind, **{**cfg, **task}), "model": state},
        "s3prl": {"task_cfg": task, "model_cfg": named, "model_weight": state},
    }[layout], path)


def write_huggingface(layout, kind, config, state, folder):
    """The folder that save_pretrained makes; the bare model."""
    name = {"wavlm": "WavLM", "hubert": "Hubert", "wav2vec2": "Wav2Vec2"}[kind]
    model = huggingface_of(name, config.to_dict(), state)
    saved = model
    if layout == "with a head":
        transformers = pytest.importorskip("transformers")
        saved = getattr(transformers, f"{name}ForCTC")(model.config)
        setattr(saved, kind, model)
    saved.save_pretrained(folder, safe_serialization="bin" not in layout,
                          **({"max_shard_size": "10KB"} if "shards" in layout else {}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": config.normalize}))
    if "shards" in layout:
        assert len(list(folder.glob("*-of-*"))) > 2
    if "old names" in layout:
        stem = "encoder.pos_conv_embed.conv."
        old = {f"{stem}parametrizations.weight.original0": f"{stem}weight_g",
               f"{stem}parametrizations.weight.original1": f"{stem}weight_v"}
        weights = {old.get(key, key): value.contiguous() for key, value in model.state_dict().items()}
        assert set(old.values()) <= set(weights)
        if "bin" in layout:
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            pytest.importorskip("safetensors.torch").save_file(weights, folder / "model.safetensors")
    return model


def assert_states(hidden, theirs):
    assert len(hidden) == len(theirs)
    for s, (h, t) in enumerate(zip(hidden, theirs)):
        assert h.shape == tuple(t.shape)
        assert np.abs(h - t.numpy()).max() < TOLERANCE, f"state {s}: {np.abs(h - t.numpy()).max():.2e}"
        assert np.abs(h).mean() > 0.1


CASES = [(preset, layout) for preset in TEACHERS for layout in (*FORMATS[kind_of(preset)], *HUGGINGFACE)]


@pytest.mark.parametrize("preset, layout", CASES)
def test_teacher(preset, layout, tmp_path):
    kind, config = kind_of(preset), small(preset)
    state = random_state(config, SEED)
    peer = s3prl_peer(kind, config, state)
    if layout in HUGGINGFACE:
        bare = write_huggingface(layout, kind, config, state, tmp_path)
        model = gd.Model.load(tmp_path)
    else:
        bare = None
        write_s3prl(layout, kind, peer, tmp_path / "model.pt")
        model = gd.Model.load(tmp_path / "model.pt")
    structure = ("architecture", "extractor_mode", "conv_bias", "layer_norm_first", "normalize",
                 "relative_position_embedding", "gru_rel_pos", "conv_pos", "max_distance", "num_buckets")
    assert {key: getattr(model.config, key) for key in structure} == {key: getattr(config, key) for key in structure}
    for wav in random_wavs([400, 719, 16000], SEED):
        given = torch.tensor(wav)[None]
        if config.normalize:
            given = torch.nn.functional.layer_norm(given, given.shape[1:])
        hidden = model.forward([wav])[0]
        assert_states(hidden, s3prl_states(kind, peer[0], given))
        if bare is not None:
            with torch.no_grad():
                assert_states(hidden, bare(given, output_hidden_states=True).hidden_states)


def test_there_are_eight():
    assert len(TEACHERS) == 8 and {kind_of(preset) for preset in TEACHERS} == set(FORMATS)
