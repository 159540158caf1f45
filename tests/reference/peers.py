"""Other people's models with the reference's weights: S3PRL's WavLM and distiller, Hugging Face's encoders,
torch's own attention. A test that asks for one is skipped where its package is absent."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch
import torch.nn.functional as F

from .layout import as_config


def wavlm_of(config, state):
    """S3PRL's WavLM with this config and state, in evaluation."""
    wavlm = pytest.importorskip("s3prl.upstream.wavlm.WavLM")
    c = as_config(config)
    fields = {name: getattr(c, name) for name in vars(wavlm.WavLMConfig()) if hasattr(c, name)}
    model = wavlm.WavLM(
        wavlm.WavLMConfig({**fields, "conv_feature_layers": repr(list(c.conv_feature_layers))})
    )
    missing, extra = model.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    assert missing == ["mask_emb"] and not extra
    return model.eval()


def wavlm_states(model, wav, mask=None):
    """What S3PRL's hooks collect: every block's input, then the encoder's output."""
    states = []
    hooks = [
        layer.register_forward_hook(lambda m, i, o: states.append(i[0].transpose(0, 1)))
        for layer in model.encoder.layers
    ]
    with torch.no_grad():
        states.append(model.extract_features(wav, padding_mask=mask)[0])
    for hook in hooks:
        hook.remove()
    return states


def huggingface_name(name):
    """Our checkpoint name in a Hugging Face encoder."""
    if name.startswith("feature_extractor"):
        name = re.sub(r"\.0\.(weight|bias)$", r".conv.\1", name)
        return re.sub(r"\.2(\.1)?\.(weight|bias)$", r".layer_norm.\2", name)
    for ours, theirs in (
        ("post_extract_proj", "feature_projection.projection"),
        ("grep_linear", "gru_rel_pos_linear"),
        ("grep_a", "gru_rel_pos_const"),
        ("relative_attention_bias", "rel_attn_embed"),
        ("pos_conv.0.bias", "pos_conv_embed.conv.bias"),
        ("pos_conv.0.weight_g", "pos_conv_embed.conv.parametrizations.weight.original0"),
        ("pos_conv.0.weight_v", "pos_conv_embed.conv.parametrizations.weight.original1"),
        ("self_attn_layer_norm", "attention_norm"),
        ("self_attn.", "attention."),
        ("attention_norm", "layer_norm"),
        ("fc1", "feed_forward.intermediate_dense"),
        ("fc2", "feed_forward.output_dense"),
    ):
        name = name.replace(ours, theirs)
    return f"feature_projection.{name}" if name.startswith("layer_norm.") else name


# transformers' kind of model, and the name of a small teacher that it can be.
HUGGINGFACE = [
    ("WavLM", "wavlm"),
    ("WavLM", "wavlm_large"),
    ("Hubert", "hubert"),
    ("Hubert", "hubert_large"),
    ("Wav2Vec2", "hubert"),
    ("Wav2Vec2", "hubert_large"),
]


def huggingface_of(kind, config, state):
    transformers = pytest.importorskip("transformers")
    c = as_config(config)
    dims, kernels, strides = zip(*c.conv_feature_layers)
    options = dict(
        hidden_size=c.encoder_embed_dim,
        num_hidden_layers=c.encoder_layers,
        intermediate_size=c.encoder_ffn_embed_dim,
        num_attention_heads=c.encoder_attention_heads,
        conv_dim=dims,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=c.conv_bias,
        feat_extract_norm="layer" if c.extractor_mode == "layer_norm" else "group",
        do_stable_layer_norm=c.layer_norm_first,
        num_conv_pos_embeddings=c.conv_pos,
        layerdrop=0.0,
        num_conv_pos_embedding_groups=c.conv_pos_groups,
        apply_spec_augment=False,
    )
    if kind == "WavLM":
        options |= dict(num_buckets=c.num_buckets, max_bucket_distance=c.max_distance)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    values = {huggingface_name(name): torch.tensor(value) for name, value in state.items()}
    missing, extra = model.load_state_dict(values, strict=False)
    assert set(missing) <= {"masked_spec_embed"} and not extra, (missing, extra)
    return model.eval()


def distiller_of(config, state, task):
    """S3PRL's distiller: parallel heads (expand-last) or its own hidden layers (self-hidden), plain
    blocks."""
    distiller = pytest.importorskip("s3prl.upstream.distiller.model")
    c = as_config(config)
    fields = {name: getattr(c, name) for name in vars(c)} | dict(
        extractor_conv_feature_layers=repr(list(c.conv_feature_layers)),
        final_dim=c.encoder_embed_dim,
        n_tasks=len(c.target_layers),
        pred_layer_id=list(c.target_layers),
        task_emb_type=task,
        out_layer_type="expand-last" if task == "expand-last" else "none",
    )
    with contextlib.redirect_stdout(io.StringIO()):
        model = distiller.DistillerModel(distiller.DistillerConfig(fields))
    model.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    return model.eval()


def s3prl_loss(pred, target, cosine_loss=1.0, loss_type="l1", feat=None, feat_pen_loss=0.0):
    """DistillerForPretrain.compute_loss (s3prl/pretrain/distiller/pretrain_expert.py); feat is the convolutions'
    output."""
    rec_loss = {"l1": torch.nn.L1Loss, "l2": torch.nn.MSELoss}[loss_type](reduction="none")(pred, target).mean()
    penalty = 0 if feat is None else feat.square().mean()
    similarity = F.cosine_similarity(pred, target, dim=-1)
    return rec_loss + cosine_loss * -F.logsigmoid(similarity).mean() + feat_pen_loss * penalty


def cross_attention_of(state, dim, heads):
    """torch's own attention with the block's cross_attn weights."""
    module = torch.nn.MultiheadAttention(dim, heads, batch_first=True)
    values = {
        name.rsplit(".cross_attn.", 1)[1]: torch.tensor(v)
        for name, v in state.items()
        if ".cross_attn." in name
    }
    module.load_state_dict(
        {
            "in_proj_weight": torch.cat([values[f"{p}_proj.weight"] for p in "qkv"]),
            "in_proj_bias": torch.cat([values[f"{p}_proj.bias"] for p in "qkv"]),
            "out_proj.weight": values["out_proj.weight"],
            "out_proj.bias": values["out_proj.bias"],
        }
    )
    return module.eval()
