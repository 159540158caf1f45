"""Writes a model in other projects' formats, where they can hold it: what `foreign` reads.

    Hugging Face        a folder of WavLM or HuBERT: encoders, and students of blocks of their own. Prediction
                        heads have no place there (ntu-spml/distilhubert has none either) and are left out
    S3PRL's distiller   a .ckpt of DistillerModel: plain blocks with parallel heads, or predicting by its own
                        hidden layers

A generative student applies one block several times, which neither can.
"""
from __future__ import annotations

import json
import os
import shutil
from typing import Any, Callable

import numpy as np

from ..atomic import replacing
from ..config import Config
from . import huggingface, safetensors

_HEADS = "output_layer."


def _require(what: str, config: Config, **expected: Any) -> None:
    for name, value in expected.items():
        found = getattr(config, name)
        if found not in (value if isinstance(value, tuple) else (value,)):
            choices = " or ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
            raise ValueError(f"{name}: expected {choices}, which {what} can hold, got {found!r}")


def huggingface_config(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, preprocessor_config.json) of the model without its heads. Raises ValueError where
    transformers has no such model."""
    what = "a Hugging Face folder"
    _require(what, config, architecture=("encoder", "multi_head", "self_hidden"),
             gru_rel_pos=config.relative_position_embedding)
    kind = "wavlm" if config.relative_position_embedding else "hubert"
    if kind == "wavlm":
        _require("a Hugging Face folder of WavLM", config, feature_layer_norm=True)
    dims, kernels, strides = map(list, zip(*config.conv_feature_layers))
    if dims[-1] == config.encoder_embed_dim:
        _require(f"{what} (it always projects)", config, feature_projection=True)
    if config.normalize:
        _require(f"{what} (its feature extractor has one for all)", config, normalize_eps=huggingface.NORMALIZE_EPS)
    norm = {"default": "group", "layer_norm": "layer"}[config.extractor_mode]
    fields = {
        "architectures": ["WavLMModel" if kind == "wavlm" else "HubertModel"], "model_type": kind,
        "torch_dtype": "float32", "vocab_size": 32,
        "hidden_size": config.encoder_embed_dim, "num_hidden_layers": config.encoder_layers,
        "num_attention_heads": config.encoder_attention_heads, "intermediate_size": config.encoder_ffn_embed_dim,
        "hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5,
        "hidden_dropout": config.dropout, "attention_dropout": config.attention_dropout,
        "activation_dropout": config.activation_dropout, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
        "layerdrop": 0.0, "initializer_range": 0.02,
        "feat_extract_norm": norm, "conv_dim": dims, "conv_kernel": kernels, "conv_stride": strides,
        "conv_bias": config.conv_bias, "num_feat_extract_layers": len(dims),
        "num_conv_pos_embeddings": config.conv_pos, "num_conv_pos_embedding_groups": config.conv_pos_groups,
        "do_stable_layer_norm": config.layer_norm_first,
        # 0: no mask embedding, which these models have lost.
        "apply_spec_augment": False, "mask_time_prob": 0.0, "mask_feature_prob": 0.0,
    }
    if kind == "wavlm":
        fields |= {"num_buckets": config.num_buckets, "max_bucket_distance": config.max_distance}
    else:
        fields |= {"feat_proj_layer_norm": config.feature_layer_norm}
    # transformers' rule: models whose extractor normalizes over time are to be fed zeros, not a mask.
    return fields, {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1,
                    "sampling_rate": 16000, "padding_side": "right", "padding_value": 0.0,
                    "do_normalize": config.normalize, "return_attention_mask": norm == "layer"}


def save_huggingface(model, folder: str) -> list[str]:
    """Writes a folder that transformers loads (float32), and returns the names of the tensors left out.

    The folder appears when all of it is written; in one that exists, files of these names are replaced.
    Raises ValueError where transformers has no such model, OSError.
    """
    config, preprocessor = huggingface_config(model.config)
    tensors = {huggingface.candidates(name)[-1]: np.asarray(value) for name, value in model.params.items()
               if not name.startswith(_HEADS)}
    folder = os.path.normpath(folder)
    temporary = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(temporary)
    try:
        safetensors.write(os.path.join(temporary, "model.safetensors"), tensors, {"format": "pt"})
        for name, fields in (("config.json", config), ("preprocessor_config.json", preprocessor)):
            with replacing(os.path.join(temporary, name)) as stream:
                stream.write((json.dumps(fields, indent=2) + "\n").encode())
        if os.path.isdir(folder):
            for name in os.listdir(temporary):
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))
        else:
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return [name for name in model.params if name.startswith(_HEADS)]


def s3prl_distiller_config(config: Config) -> dict[str, Any]:
    """What S3PRL's DistillerConfig takes. Raises ValueError where DistillerModel can't be this model."""
    what = "S3PRL's distiller"
    _require(what, config, architecture=("multi_head", "self_hidden"), relative_position_embedding=False,
             feature_layer_norm=False, conv_bias=False, normalize=False)
    if config.conv_feature_layers[-1][0] == config.encoder_embed_dim:
        _require(f"{what} (it projects other widths alone)", config, feature_projection=False)
    heads = config.architecture == "multi_head"
    targets = len(config.target_layers)
    if not heads and targets != config.encoder_layers + 1:
        raise ValueError(f"target_layers: expected encoder_layers + 1 = {config.encoder_layers + 1} layers, which "
                         f"{what} predicts by its hidden layers, got {config.target_layers}")
    return {
        "extractor_mode": config.extractor_mode,
        "extractor_conv_feature_layers": repr(list(config.conv_feature_layers)), "extractor_dropout": 0.0,
        "feature_grad_mult": config.feature_grad_mult, "conv_pos": config.conv_pos,
        "conv_pos_groups": config.conv_pos_groups, "encoder_layers": config.encoder_layers,
        "encoder_embed_dim": config.encoder_embed_dim, "encoder_ffn_embed_dim": config.encoder_ffn_embed_dim,
        "encoder_attention_heads": config.encoder_attention_heads, "activation_fn": "gelu",
        "layer_norm_first": False, "attention_type": "original", "dropout": config.dropout,
        "attention_dropout": config.attention_dropout, "activation_dropout": config.activation_dropout,
        "encoder_layerdrop": 0.0, "final_dim": config.encoder_embed_dim, "out_layer_inter_dim": -1,
        "out_layer_type": "expand-last" if heads else "self-hidden",
        "task_emb_type": "expand-last" if heads else "self-hidden", "n_tasks": targets,
        "pred_layer_id": list(config.target_layers), "loss_type": "l1", "feat_pen_loss": 0.0, "cosine_loss": 1.0,
        "init_teacher_conv_layers": False, "init_teacher_encoder_layers": False,
    }


def save_s3prl_distiller(model, path: str) -> list[str]:
    """Writes what S3PRL's `-u distiller_local -k PATH` loads; no tensor is left out, so []. Needs torch.

    Raises ValueError where S3PRL's DistillerModel can't be this model, ImportError without torch, OSError.
    """
    fields = s3prl_distiller_config(model.config)
    try:
        import torch
    except ImportError as error:
        raise ImportError("writing a .ckpt needs torch: pip install 'gendistiller_ext[torch]'") from error
    state = {name: torch.from_numpy(np.array(value)) for name, value in model.params.items()}
    if model.config.architecture == "multi_head" and len(model.config.target_layers) == 1:
        # S3PRL's SplitLinear of one head is an nn.Linear, (out, in).
        state["output_layer.2.layer.weight"] = state.pop("output_layer.2.weight")[0].T.contiguous()
        state["output_layer.2.layer.bias"] = state.pop("output_layer.2.bias").reshape(-1)
    with replacing(path) as stream:
        torch.save({"Distiller": state, "Config": {"distiller": fields}}, stream)
    return []


#: Formats as `foreign` and `info` call them -> writer of (model, path), which returns what it left out.
WRITERS: dict[str, Callable[[Any, str], list[str]]] = {
    "huggingface": save_huggingface, "s3prl-distiller": save_s3prl_distiller}
