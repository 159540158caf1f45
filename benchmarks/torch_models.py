"""The student and its teachers as a PyTorch user writes them for inference: nn.Module, Conv1d, GroupNorm,
scaled_dot_product_attention. The positional convolution's weight norm is folded in, as for deployment."""

from __future__ import annotations

import math
from typing import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """WavLM's bucket of every pair, int64 (length, length): rows are queries."""
    half, exact = num_buckets // 2, num_buckets // 4
    positions = torch.arange(length)
    offset = positions[None, :] - positions[:, None]
    distance = offset.abs()
    scale = (half - exact) / math.log(max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    return torch.where(distance < exact, distance, far.clamp(max=half - 1)) + half * (offset > 0)


class Attention(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        dim, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.gated = config.gru_rel_pos
        if self.gated:
            self.grep_linear = nn.Linear(dim // self.heads, 8)
            self.grep_a = nn.Parameter(torch.ones(1, self.heads, 1, 1))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (self.split(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if bias is not None and self.gated:
            gates = torch.sigmoid(self.grep_linear(self.split(x)).unflatten(-1, (2, 4)).sum(-1))
            a, b = gates.chunk(2, -1)
            bias = (a * (b * self.grep_a - 1) + 2) * bias
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config) -> None:
        super().__init__()
        dim, ffn = config.encoder_embed_dim, config.encoder_ffn_embed_dim
        self.self_attn = Attention(config)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn), nn.Linear(ffn, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = self.self_attn_layer_norm(x + self.self_attn(x, bias))
        return self.final_layer_norm(x + self.fc2(F.gelu(self.fc1(x))))


class Speech(nn.Module):
    """Audio (B, N) to the list of hidden states, each (B, T, D), that gendistiller_ext returns.

    Takes the post-norm architectures with a GroupNorm extractor: generative, multi_head, encoder.
    """

    def __init__(self, config) -> None:
        super().__init__()
        if (config.extractor_mode != "default" or config.layer_norm_first or config.cross_attention
                or config.position != "once" or config.normalize or config.architecture == "self_hidden"):
            raise ValueError("config: expected a post-norm model with a GroupNorm extractor")
        self.config = config
        dim, channels, layers = config.encoder_embed_dim, 1, []
        for i, (width, kernel, stride) in enumerate(config.conv_feature_layers):
            layers.append(nn.Conv1d(channels, width, kernel, stride, bias=False))
            if i == 0:
                layers.append(nn.GroupNorm(width, width))
            layers.append(nn.GELU())
            channels = width
        self.extractor = nn.Sequential(*layers)
        self.layer_norm = nn.LayerNorm(channels) if config.feature_layer_norm else nn.Identity()
        self.post_extract_proj = nn.Linear(channels, dim) if channels != dim else nn.Identity()
        self.pos_conv = nn.Conv1d(dim, dim, config.conv_pos, padding=config.conv_pos // 2,
                                  groups=config.conv_pos_groups)
        self.encoder_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.encoder_layers))
        if config.relative_position_embedding:
            self.bias_table = nn.Embedding(config.num_buckets, config.encoder_attention_heads)
        targets = len(config.target_layers)
        if config.architecture == "multi_head":
            self.expand = nn.Linear(dim, targets * dim)
            self.predict = nn.ModuleList(nn.Linear(dim, dim) for _ in range(targets))
        elif config.output_layer:
            self.output_layer = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, wavs: Tensor) -> list[Tensor]:
        config = self.config
        f = self.post_extract_proj(self.layer_norm(self.extractor(wavs[:, None]).transpose(1, 2)))
        position = F.gelu(self.pos_conv(f.transpose(1, 2))[:, :, : f.shape[1]]).transpose(1, 2)
        h = self.encoder_norm(f + position)
        bias = None
        if config.relative_position_embedding:
            buckets = relative_buckets(f.shape[1], config.num_buckets, config.max_distance)
            bias = self.bias_table(buckets).permute(2, 0, 1)[None]
        if config.architecture == "generative":
            states = [f]
            for _ in config.target_layers:
                z = self.blocks[0](h, bias)
                z = z + h if config.skip_connection else z
                h = self.output_layer(z) if config.output_layer else z
                states.append(h)
            return states
        states = [h if config.architecture == "encoder" else f]
        for block in self.blocks:
            h = block(h, bias)
            states.append(h)
        if config.architecture == "multi_head":
            parts = F.gelu(self.expand(h)).chunk(len(self.predict), 2)
            states += [head(part) for head, part in zip(self.predict, parts)]
        return states


def torch_name(name: str, config) -> str:
    """A checkpoint tensor's name in Speech.state_dict()."""
    prefix = "feature_extractor.conv_layers."
    if name.startswith(prefix):
        layer, part, kind = name[len(prefix):].split(".")
        place = 0 if layer == "0" else 1 + 2 * int(layer)
        return f"extractor.{place + (part == '2')}.{kind}"
    for ours, theirs in (("encoder.layers.0.self_attn.relative_attention_bias", "bias_table"),
                         ("encoder.pos_conv.0", "pos_conv"), ("encoder.layer_norm", "encoder_norm"),
                         ("encoder.layers", "blocks")):
        if name.startswith(ours):
            return theirs + name[len(ours):]
    if config.architecture == "multi_head" and name.startswith("output_layer.0"):
        return name.replace("output_layer.0", "expand")
    return name


def speech_model(config, params: Mapping[str, np.ndarray]) -> Speech:
    """Speech with a checkpoint's tensors, in evaluation. Raises where a tensor is missing or left over."""
    params = {name: torch.from_numpy(np.array(value)) for name, value in params.items()}
    gain, direction = (params.pop(f"encoder.pos_conv.0.weight_{part}") for part in "gv")
    norm = direction.square().sum((0, 1), keepdim=True).sqrt()
    params["encoder.pos_conv.0.weight"] = gain * direction / norm
    state = {}
    if config.architecture == "multi_head":
        weights, biases = params.pop("output_layer.2.weight"), params.pop("output_layer.2.bias")
        for i, weight in enumerate(weights):
            state[f"predict.{i}.weight"], state[f"predict.{i}.bias"] = weight.T, biases[0, 0, i]
    state.update({torch_name(name, config): value for name, value in params.items()})
    model = Speech(config)
    model.load_state_dict(state)
    return model.eval()
