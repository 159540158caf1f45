"""Reads other projects' checkpoints: their configuration and their tensors under this project's names.

    "unilm"             WavLM's own: {"cfg": {...}, "model": {...}}
    "fairseq"           HuBERT, wav2vec 2.0: {"cfg": {"model", "task"}, "model"}; older: {"args", "model"}
    "s3prl"             the same converted by S3PRL: {"task_cfg", "model_cfg", "model_weight"}
    "s3prl-distiller"   S3PRL's distiller (DistilHuBERT): {"Distiller", "Config"}
    "huggingface"       a folder of WavLM, HuBERT, wav2vec 2.0, UniSpeech, UniSpeech-SAT, or a weights file in one

torch is not needed, and nothing in a file is run: see `torch_zip`.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from .._core import GD_MAX_TARGETS
from ..config import BASE_CONV_LAYERS, Config, describe
from . import huggingface, torch_zip
from .inert_pickle import Global, Opaque
from .matching import Contents, Foreign, Layout, match
from .torch_zip import Tensor


_ENCODER = {"architecture": "encoder", "skip_connection": False, "output_layer": False, "target_layers": (),
            "relative_position_embedding": False, "gru_rel_pos": False}
# fairseq's Wav2Vec2Config and HubertConfig, and unilm's WavLMConfig, agree on these defaults.
_DEFAULTS = {
    "extractor_mode": "default", "conv_feature_layers": BASE_CONV_LAYERS, "conv_bias": False,
    "encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12, "layer_norm_first": False, "conv_pos": 128, "conv_pos_groups": 16,
    "dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0, "feature_grad_mult": 1.0,
}
_WAVLM_DEFAULTS = {**_DEFAULTS, "normalize": False, "relative_position_embedding": False,
                   "gru_rel_pos": False, "num_buckets": 320, "max_distance": 1280}
_DISTILLER_DEFAULTS = {**_DEFAULTS, "encoder_layers": 1, "activation_dropout": 0.1}
# Options that change the computation: any other value is not this model.
_ONLY = {"activation_fn": "gelu", "layer_type": "transformer", "pos_conv_depth": 1, "quantize_input": False,
         "crop_seq_to_multiple": 1, "attention_type": "original"}


def _plain(value: Any) -> Any:
    """What an argparse.Namespace, an omegaconf node or an enum's member holds; anything else as it is."""
    if isinstance(value, Opaque):
        state = value.state
        if value.name == "argparse.Namespace" and isinstance(state, dict):
            return state
        if value.name.startswith("omegaconf.") and isinstance(state, dict):
            return state.get("_content", state.get("_val"))
        if len(value.args) == 1 and isinstance(value.args[0], str):
            return value.args[0]
    return value


def _settings(value: Any, name: str) -> dict[str, Any]:
    value = _plain(value)
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a dict of settings, got {type(value).__name__}")
    settings = {key: _plain(item) for key, item in value.items()}
    return {key: item for key, item in settings.items() if item is not None}


def _take(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    for name, only in _ONLY.items():
        if settings.get(name, only) != only:
            raise ValueError(f"{name}: expected {only!r}, got {describe(settings[name])}")
    taken = {name: settings.get(name, default) for name, default in defaults.items()}
    for name, value in taken.items():
        if isinstance(value, (Opaque, Global)):
            raise ValueError(f"{name}: expected a plain value, got an object of {value.name[:200]}")
    return taken


def _unilm(content: dict) -> tuple[dict, Any]:
    fields = _take(_settings(content["cfg"], "cfg"), _WAVLM_DEFAULTS)
    return {**_ENCODER, **fields}, content["model"]


def _fairseq(model: dict, task: dict, state: Any, kind: Any) -> tuple[dict, Any]:
    if kind not in (None, "hubert", "wav2vec2"):
        raise ValueError(f"expected a pre-trained hubert or wav2vec2 model, got {describe(kind)}")
    return {**_ENCODER, **_take(model, _DEFAULTS), "normalize": task.get("normalize", False)}, state


def _fairseq_cfg(content: dict) -> tuple[dict, Any]:
    cfg = _settings(content["cfg"], "cfg")
    model = _settings(cfg["model"], "cfg.model")
    return _fairseq(model, _settings(cfg.get("task", {}), "cfg.task"), content["model"], model.get("_name"))


def _fairseq_args(content: dict) -> tuple[dict, Any]:
    args = _settings(content["args"], "args")
    return _fairseq(args, args, content["model"], args.get("arch"))


def _s3prl(content: dict) -> tuple[dict, Any]:
    model = _settings(content["model_cfg"], "model_cfg")
    task = _settings(content.get("task_cfg", {}), "task_cfg")
    return _fairseq(model, task, content["model_weight"], model.get("_name"))


def _distiller(content: dict) -> tuple[dict, Any]:
    settings = _settings(_settings(content["Config"], "Config").get("distiller"), "Config.distiller")
    if "extractor_conv_feature_layers" in settings:
        settings["conv_feature_layers"] = settings["extractor_conv_feature_layers"]
    fields = {**_take(settings, _DISTILLER_DEFAULTS), "feature_layer_norm": False, "skip_connection": False,
              "relative_position_embedding": False, "gru_rel_pos": False}
    kind = settings.get("task_emb_type", "expand-last")
    tasks = settings.get("n_tasks", 12)
    if not isinstance(tasks, int) or not 1 <= tasks <= GD_MAX_TARGETS:
        raise ValueError(f"n_tasks: expected 1 to {GD_MAX_TARGETS}, got {describe(tasks)}")
    targets = settings.get("pred_layer_id", list(range(1, tasks + 1)))
    if not isinstance(targets, (list, tuple)) or len(targets) != tasks:
        raise ValueError(f"pred_layer_id: expected n_tasks = {tasks} layers, got {describe(targets)}")
    fields["target_layers"] = targets
    state = content["Distiller"]
    if kind == "self-hidden":
        fields |= {"architecture": "self_hidden", "output_layer": False}
    elif kind == "expand-last":
        fields |= {"architecture": "multi_head", "output_layer": True}
        dim = fields["encoder_embed_dim"]
        final, inner = settings.get("final_dim", 768), settings.get("out_layer_inter_dim", -1)
        if final != dim or not (inner == dim or isinstance(inner, int) and inner <= 0):
            raise ValueError(f"final_dim, out_layer_inter_dim: expected encoder_embed_dim {describe(dim)}, "
                             f"got {describe(final)}, {describe(inner)}")
        state = _single_head(state)
    else:
        raise ValueError(f"task_emb_type: expected 'expand-last' or 'self-hidden', got {describe(kind)}")
    return fields, state


def _single_head(state: Any) -> Any:
    """S3PRL's SplitLinear of one head is an nn.Linear `layer`, (out, in): here (1, in, out) as the others."""
    end = "output_layer.2.layer.weight"
    heads = [name[:-len(end)] for name in state if isinstance(name, str) and name.endswith(end)] \
        if isinstance(state, dict) else []
    for prefix in heads:
        weight, bias = f"{prefix}{end}", f"{prefix}output_layer.2.layer.bias"
        w, b = state[weight], state.get(bias)
        if not (isinstance(w, Tensor) and isinstance(b, Tensor) and len(w.shape) == 2 and len(b.shape) == 1):
            continue
        state = {name: tensor for name, tensor in state.items() if name not in (weight, bias)}
        state[f"{prefix}output_layer.2.weight"] = Tensor(w.storage, w.dtype, w.offset, (1, *w.shape[::-1]),
                                                         (0, *w.stride[::-1]))
        state[f"{prefix}output_layer.2.bias"] = Tensor(b.storage, b.dtype, b.offset, (1, 1, 1, *b.shape),
                                                       (0, 0, 0, *b.stride))
    return state


def _recognise(content: Any) -> tuple[str, Callable[[dict], tuple[dict, Any]]]:
    if isinstance(content, dict):
        if "model_weight" in content and "model_cfg" in content:
            return "s3prl", _s3prl
        if "Distiller" in content and "Config" in content:
            return "s3prl-distiller", _distiller
        cfg = _plain(content.get("cfg"))
        if "model" in content and isinstance(cfg, dict):
            nested = isinstance(_plain(cfg.get("model")), dict)
            return ("fairseq", _fairseq_cfg) if nested else ("unilm", _unilm)
        if "model" in content and content.get("args") is not None:
            return "fairseq", _fairseq_args
        got = f"a dict of {', '.join(map(repr, list(content)[:8]))[:300]}"
    else:
        got = type(content).__name__
    raise ValueError("expected a WavLM (unilm), fairseq, S3PRL or S3PRL distiller checkpoint, or a weights "
                     f"file beside its config.json, got {got}")


def _names(name: str) -> list[str]:
    new = {"encoder.pos_conv.0.weight_g": "encoder.pos_conv.0.parametrizations.weight.original0",
           "encoder.pos_conv.0.weight_v": "encoder.pos_conv.0.parametrizations.weight.original1"}
    return [name, new[name]] if name in new else [name]


#: unilm's and fairseq's; of S3PRL's distiller the prediction heads are a part of the model.
LAYOUT = Layout(_names, ("feature_extractor", "layer_norm", "post_extract_proj", "encoder"))
DISTILLER_LAYOUT = Layout(_names, (*LAYOUT.parts, "output_layer"))


def inspect(path: str | os.PathLike) -> Contents:
    """What a checkpoint of another project holds: a file, or a Hugging Face folder.

    Raises OSError where it can't be read, and ValueError that names the path and the setting where it is
    damaged, of another kind, or a model that this project does not compute. Missing, misshapen and unexpected
    tensors are listed, not raised. Warns where a Hugging Face folder doesn't say whether audio is normalized
    (taken as False).
    """
    path = os.fsdecode(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    is_weights = path.endswith((".safetensors", ".index.json", ".bin"))
    if os.path.isdir(path) or is_weights and os.path.exists(os.path.join(folder, "config.json")):
        kind, layout = "huggingface", huggingface.LAYOUT
        fields, state = huggingface.read(folder, None if folder == path else os.path.basename(path))
    elif path.endswith((".safetensors", ".index.json")):
        raise ValueError(f"{path}: expected config.json beside it (a Hugging Face folder), got none")
    else:
        content = torch_zip.load(path)
        try:
            kind, convert = _recognise(content)
            fields, state = convert(content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        layout = DISTILLER_LAYOUT if kind == "s3prl-distiller" else LAYOUT
    try:
        return match(path, Config(**fields), kind, state, layout)
    except (TypeError, ValueError) as error:
        told = huggingface.in_their_words(str(error)) if kind == "huggingface" else error
        raise ValueError(f"{path}: {told}") from None


def read(path: str | os.PathLike) -> Foreign:
    """Reads a checkpoint of another project. Raises what `inspect` and `Contents.read` raise."""
    return inspect(path).read()
