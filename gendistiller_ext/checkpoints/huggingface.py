"""Reads a Hugging Face folder of WavLM, HuBERT, wav2vec 2.0, UniSpeech or UniSpeech-SAT with NumPy alone.

    config.json                     the architecture
    preprocessor_config.json        do_normalize
    model.safetensors, or model.safetensors.index.json and its shards, or pytorch_model.bin (likewise)

Names and meaning of the fields: transformers' configuration_{wavlm,hubert,wav2vec2,unispeech,unispeech_sat}.py and
modeling_*.py.
"""
from __future__ import annotations

import json
import os
import re
import warnings
from typing import Any

from ..config import describe
from . import git_lfs, safetensors, torch_zip
from .matching import Layout

WEIGHTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")
NORMALIZE_EPS = 1e-7  # Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm's; fairseq's and unilm's is 1e-5
_MAX_JSON = 100_000_000


def _read_json(path: str) -> dict[str, Any]:
    with open(path, "rb") as stream:
        text = stream.read(_MAX_JSON)
    problem = git_lfs.pointer(text)
    if problem:
        raise ValueError(f"{path}: {problem}")
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=safetensors.unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the JSON that was expected: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _read_weights(path: str) -> dict[str, Any]:
    if path.endswith(".index.json"):
        return _read_shards(path)
    if path.endswith(".safetensors"):
        return safetensors.read(path)[0]
    state = torch_zip.load(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(state).__name__}")
    return state


def _read_shards(index: str) -> dict[str, Any]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict):
        raise ValueError(f"{index}: expected an object weight_map")
    folder = os.path.dirname(index)
    files: dict[str, dict[str, Any]] = {}
    state = {}
    for name, shard in shards.items():
        # A name that leads out of the folder, or back to an index, is not followed.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w\-.]+\.(safetensors|bin)", shard):
            raise ValueError(f"{index}: {name[:200]}: expected a file name, got {describe(shard)}")
        if shard not in files:
            files[shard] = _read_weights(os.path.join(folder, shard))
        if name not in files[shard]:
            raise ValueError(f"{index}: {name[:200]}: missing in {shard}")
        state[name] = files[shard][name]
    return state


# Our Config's field -> transformers', with the default of all its classes.
_FIELDS = {
    "conv_bias": ("conv_bias", False), "encoder_layers": ("num_hidden_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768), "encoder_ffn_embed_dim": ("intermediate_size", 3072),
    "encoder_attention_heads": ("num_attention_heads", 12), "layer_norm_first": ("do_stable_layer_norm", False),
    "conv_pos": ("num_conv_pos_embeddings", 128), "conv_pos_groups": ("num_conv_pos_embedding_groups", 16),
    "dropout": ("hidden_dropout", 0.1), "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.1),
}
#: model_type -> what its class alone reads, as in _FIELDS; the others' files may have it, without effect.
FAMILIES: dict[str, dict[str, tuple[str, Any]]] = {
    "wavlm": {"num_buckets": ("num_buckets", 320), "max_distance": ("max_bucket_distance", 800)},
    "hubert": {"feature_layer_norm": ("feat_proj_layer_norm", True)},
    "wav2vec2": {}, "unispeech": {}, "unispeech-sat": {},
}
# Settings that change the hidden states: any other value is not this model. Those that are in no table here change
# none: heads, losses, masks and dropout of training, generation, what a call returns, padding in a batch
# (tests/test_huggingface_settings.py).
_ONLY = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "conv_pos_batch_norm": False,
         "add_adapter": False, "adapter_attn_dim": None, "pruned_heads": {}}
_ONLY_HEARD = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "feature_size": 1}


def _refuse_others(settings: dict[str, Any], only: dict[str, Any], path: str) -> None:
    for name, value in only.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: {name}: expected {value!r}, got {describe(settings[name])}")


def _fields(config: dict[str, Any], path: str) -> dict[str, Any]:
    """Our Config's fields from transformers' config.json."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{path}: model_type: expected {', '.join(FAMILIES)}, got {describe(kind)}")
    _refuse_others(config, _ONLY, path)
    norms = {"group": "default", "layer": "layer_norm"}
    norm = config.get("feat_extract_norm", "group")
    if not isinstance(norm, str) or norm not in norms:
        raise ValueError(f"{path}: feat_extract_norm: expected 'group' or 'layer', got {describe(norm)}")
    parts = [config.get("conv_dim", [512] * 7), config.get("conv_kernel", [10, 3, 3, 3, 3, 2, 2]),
             config.get("conv_stride", [5, 2, 2, 2, 2, 2, 2])]
    if not all(isinstance(part, list) and len(part) == len(parts[0]) for part in parts):
        raise ValueError(f"{path}: conv_dim, conv_kernel, conv_stride: expected lists of one length")
    fields = {
        "architecture": "encoder", "skip_connection": False, "output_layer": False, "target_layers": (),
        "extractor_mode": norms[norm], "conv_feature_layers": list(zip(*parts)),
        "relative_position_embedding": kind == "wavlm", "gru_rel_pos": kind == "wavlm",
    }
    for ours, (theirs, default) in {**_FIELDS, **FAMILIES[kind]}.items():
        fields[ours] = config.get(theirs, default)
    # transformers always has the projection; the field is about widths that don't ask for one.
    fields["feature_projection"] = bool(parts[0]) and parts[0][-1] == fields["encoder_embed_dim"]
    return fields


def in_their_words(message: str) -> str:
    """Config's message about a field, by transformers' name for it too."""
    field = message.partition(":")[0]
    theirs = {ours: name for own in (_FIELDS, *FAMILIES.values()) for ours, (name, _) in own.items()}.get(field)
    return message if theirs in (None, field) else f"{theirs} ({field}){message[len(field):]}"


def _normalize(folder: str) -> dict[str, Any]:
    """Config's fields that preprocessor_config.json decides."""
    path = os.path.join(folder, "preprocessor_config.json")
    if not os.path.exists(path):
        warnings.warn(f"{path}: no such file to say do_normalize; taken as False", stacklevel=5)
        return {"normalize": False}
    settings = _read_json(path)
    _refuse_others(settings, _ONLY_HEARD, path)
    value = settings.get("do_normalize", True)  # Wav2Vec2FeatureExtractor's default
    if not isinstance(value, bool):
        raise ValueError(f"{path}: do_normalize: expected true or false, got {describe(value)}")
    return {"normalize": True, "normalize_eps": NORMALIZE_EPS} if value else {"normalize": False}


_PARTS = {
    "self_attn.q_proj": "attention.q_proj", "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj", "self_attn.out_proj": "attention.out_proj",
    "self_attn.grep_linear": "attention.gru_rel_pos_linear",
    "self_attn.relative_attention_bias": "attention.rel_attn_embed",
    "self_attn_layer_norm": "layer_norm", "fc1": "feed_forward.intermediate_dense",
    "fc2": "feed_forward.output_dense", "final_layer_norm": "final_layer_norm",
}


def candidates(name: str) -> list[str]:
    """What transformers calls the tensor that is `name` here: one name, or two where its version matters
    (torch.nn.utils.weight_norm before, parametrizations.weight_norm now)."""
    stem, _, leaf = name.rpartition(".")
    if stem == "encoder.pos_conv.0":
        stem = "encoder.pos_conv_embed.conv"
        new = {"weight_g": "original0", "weight_v": "original1"}
        return [f"{stem}.{leaf}"] + ([f"{stem}.parametrizations.weight.{new[leaf]}"] if leaf in new else [])
    if stem in ("layer_norm", "post_extract_proj"):
        part = "layer_norm" if stem == "layer_norm" else "projection"
        return [f"feature_projection.{part}.{leaf}"]
    conv = re.fullmatch(r"(feature_extractor\.conv_layers\.\d+)\.(0|2|2\.1)", stem)
    if conv:
        return [f"{conv[1]}.{'conv' if conv[2] == '0' else 'layer_norm'}.{leaf}"]
    block = re.fullmatch(r"(encoder\.layers\.\d+)\.(.+)", stem)
    if block and leaf == "grep_a":
        return [f"{block[1]}.attention.gru_rel_pos_const"]
    if block:
        return [f"{block[1]}.{_PARTS[block[2]]}.{leaf}"]
    return [name]


#: The bare models'; with a head they stand under the type's name.
LAYOUT = Layout(candidates, ("feature_extractor", "feature_projection", "encoder"))


def read(folder: str, weights: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(Config's fields, tensors by transformers' names).

    weights: a file in the folder; None: the first of WEIGHTS that is there. Raises OSError, ValueError; warns
    where preprocessor_config.json doesn't say whether to normalize.
    """
    path = os.path.join(folder, "config.json")
    fields = _fields(_read_json(path), path)
    if weights is None:
        found = [name for name in WEIGHTS if os.path.exists(os.path.join(folder, name))]
        if not found:
            raise ValueError(f"{folder}: expected one of {', '.join(WEIGHTS)}, got none")
        weights = found[0]
    state = _read_weights(os.path.join(folder, weights))
    return {**fields, **_normalize(folder)}, state
