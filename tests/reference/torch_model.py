"""The student and its teachers in PyTorch, from the equations alone: one utterance at a time, or S3PRL's
padded batch.

f      = post_extract_proj(layer_norm(cnn(x))) h[0]   = encoder_layer_norm(f + gelu(pos_conv(f))) h[l]   =
O(F(h[l-1]) + h[l-1])
"""

from __future__ import annotations

import math
from typing import Any, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import factors
from .layout import as_config, num_frames


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """WavLM's bucket of every pair: int64 (length, length), [i, j] for query i and key j. The logarithm is
    taken in float32, as WavLM takes it: where it falls on a whole number, float64 would choose another
    bucket."""
    half, exact = num_buckets // 2, num_buckets // 4
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    distance = offset.abs()
    log_ratio = torch.log(distance.clamp(min=1).to(torch.float32) / exact) / math.log(max_distance / exact)
    far = (exact + (log_ratio * (half - exact)).to(torch.int64)).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class Reference:
    """`params` holds leaf tensors under checkpoint names; with `grad` they collect gradients. `dropout_seed`:
    (seed, step, first utterance) of a training step, with `padding: exact`."""

    def __init__(
        self,
        config: Any,
        state: dict[str, np.ndarray],
        dtype: torch.dtype = torch.float32,
        grad: bool = False,
        dropout_seed: tuple[int, int, int] | None = None,
    ) -> None:
        self.config = as_config(config)
        self.dropout_seed = dropout_seed
        self.utterance = 0
        self.dtype = dtype
        #: What cnn() gave since forward() began, (B, T, C) a call.
        self.extracted: list[Tensor] = []
        self.params = {
            name: torch.tensor(np.asarray(value), dtype=dtype, requires_grad=grad)
            for name, value in state.items()
        }
        if self.config.layer_norm_first and self.config.architecture != "encoder":
            raise ValueError("layer_norm_first: only the encoder architecture has pre-norm blocks")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.params[f"{name}.weight"].T + self.params[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.params[f"{name}.weight"], self.params[f"{name}.bias"], 1e-5)

    def drop(self, x: Tensor, rate: float, site: str, step: int) -> Tensor:
        """(1, T, W), or (1, H, T, T) of which every head is a line; one utterance's."""
        if self.dropout_seed is None or rate == 0:
            return x
        heads, frames, width = x.shape[-3:]
        line = (self.dropout_seed[2] + self.utterance) * heads + np.arange(heads)
        mask = factors(self.dropout_seed[:2], line, site, step, rate, frames, width)
        return x * torch.from_numpy(mask).to(x.dtype)

    def cnn(self, wavs: Tensor) -> Tensor:
        """(B, N) -> (B, T, C)."""
        c, x = self.config, wavs[:, None, :]
        for i, (_, _, stride) in enumerate(c.conv_feature_layers):
            layer = f"feature_extractor.conv_layers.{i}"
            x = F.conv1d(x, self.params[f"{layer}.0.weight"], self.params.get(f"{layer}.0.bias"), stride)
            if c.extractor_mode == "layer_norm":
                x = self.norm(f"{layer}.2.1", x.transpose(1, 2)).transpose(1, 2)
            elif i == 0:
                mean = x.mean(2, keepdim=True)
                var = ((x - mean) ** 2).mean(2, keepdim=True)
                gain, shift = self.params[f"{layer}.2.weight"], self.params[f"{layer}.2.bias"]
                x = (x - mean) / torch.sqrt(var + 1e-5) * gain[:, None] + shift[:, None]
            x = F.gelu(x)
        x = x.transpose(1, 2)
        if c.feature_grad_mult == 0:
            x = x.detach()
        if x.requires_grad and c.feature_grad_mult != 1:
            x.register_hook(lambda grad: grad * c.feature_grad_mult)
        self.extracted.append(x)
        return x

    def pos_conv(self, x: Tensor) -> Tensor:
        """gelu of the grouped convolution over time whose weight is normalised for each tap; (B, T, D)."""
        c, name = self.config, "encoder.pos_conv.0"
        v = self.params[f"{name}.weight_v"]
        weight = self.params[f"{name}.weight_g"] * v / torch.sqrt((v * v).sum((0, 1), keepdim=True))
        y = F.conv1d(
            x.transpose(1, 2),
            weight,
            self.params[f"{name}.bias"],
            padding=c.conv_pos // 2,
            groups=c.conv_pos_groups,
        )
        return F.gelu(y[:, :, : x.shape[1]].transpose(1, 2))

    def position_bias(self, length: int) -> Tensor | None:
        """(H, T, T), layer 0's table read at every pair's bucket."""
        c = self.config
        if not c.relative_position_embedding:
            return None
        table = self.params["encoder.layers.0.self_attn.relative_attention_bias.weight"]
        return table[relative_buckets(length, c.num_buckets, c.max_distance)].permute(2, 0, 1)

    def split(self, x: Tensor) -> Tensor:
        heads = self.config.encoder_attention_heads
        return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def attend(
        self, name: str, x: Tensor, memory: Tensor, bias: Tensor | None, valid: Tensor | None, step: int
    ) -> Tensor:
        """Queries from x, keys and values from memory, both (B, T, D). `bias` is gated by x where the layer
        has a gate; `valid` (B, T) tells which keys may be looked at."""
        q, k, v = (
            self.split(self.linear(f"{name}.{p}_proj", s))
            for p, s in (("q", x), ("k", memory), ("v", memory))
        )
        logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(2, 3)
        if bias is not None:
            if f"{name}.grep_a" in self.params:
                gates = self.linear(f"{name}.grep_linear", self.split(x))
                a, b = torch.sigmoid(gates.unflatten(-1, (2, 4)).sum(-1)).unbind(-1)
                bias = (a * (b * self.params[f"{name}.grep_a"][..., 0] - 1) + 2)[..., None] * bias
            logits = logits + bias
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None, :], -math.inf)
        c, site = self.config, "cross" if name.endswith("cross_attn") else "attention"
        probs = self.drop(torch.softmax(logits, -1), c.attention_dropout, f"{site}_probs", step)
        mixed = (probs @ v).transpose(1, 2).flatten(2)
        return self.drop(self.linear(f"{name}.out_proj", mixed), c.dropout, site, step)

    def feed_forward(self, name: str, x: Tensor, step: int) -> Tensor:
        inner = self.drop(F.gelu(self.linear(f"{name}.fc1", x)), self.config.activation_dropout, "activation", step)
        return self.drop(self.linear(f"{name}.fc2", inner), self.config.dropout, "ffn", step)

    def block(self, i: int, x: Tensor, f: Tensor, bias: Tensor | None, valid: Tensor | None, step: int) -> Tensor:
        c, name = self.config, f"encoder.layers.{i}"
        if c.layer_norm_first:
            y = self.norm(f"{name}.self_attn_layer_norm", x)
            x = x + self.attend(f"{name}.self_attn", y, y, bias, valid, step)
            y = self.norm(f"{name}.final_layer_norm", x)
            return x + self.feed_forward(name, y, step)
        x = self.norm(f"{name}.self_attn_layer_norm", x + self.attend(f"{name}.self_attn", x, x, bias, valid, step))
        if c.cross_attention:
            x = self.norm(
                f"{name}.cross_attn_layer_norm", x + self.attend(f"{name}.cross_attn", x, f, None, valid, step)
            )
        return self.norm(f"{name}.final_layer_norm", x + self.feed_forward(name, x, step))

    def place(self, x: Tensor, valid: Tensor | None, step: int) -> Tensor:
        """Position added to the valid frames, zeros in the others; normalised where the blocks are post-norm."""
        if valid is not None:
            x = x * valid[..., None]
        x = x + self.pos_conv(x)
        x = x if self.config.layer_norm_first else self.norm("encoder.layer_norm", x)
        return self.drop(x, self.config.dropout, "encoder", step)

    def states(
        self,
        wavs: Tensor,
        valid: Tensor | None = None,
        num_layers: int | None = None,
        history: Tensor | None = None,
        detach_history: bool = False,
    ) -> list[Tensor]:
        """The hidden states of (B, N) audio, each (B, T, D). `history` (L, B, T, D): what the steps read in
        place of what they generated, step l (from 2) history[l - 2]."""
        c = self.config
        f = self.cnn(wavs)
        if c.feature_layer_norm:
            f = self.norm("layer_norm", f)
        if "post_extract_proj.weight" in self.params:
            f = self.linear("post_extract_proj", f)
        if valid is not None:
            f = f * valid[..., None]
        bias = self.position_bias(f.shape[1])
        h = self.place(f, valid, int(c.position == "every_step"))
        if c.architecture == "generative":
            out = [f]
            for step in range(num_layers or len(c.target_layers)):
                z = h
                if step and history is not None:
                    z = history[step - 1]
                elif step and detach_history:
                    z = h.detach()
                if step and c.position == "every_step":
                    z = self.place(z, valid, step + 1)
                h = z
                for i in range(c.encoder_layers):
                    h = self.block(i, h, f, bias, valid, step + 1)
                h = h + z if c.skip_connection else h
                if c.output_layer:
                    h = self.linear("output_layer.2", F.gelu(self.linear("output_layer.0", h)))
                out.append(h)
            return out
        out = [h] if c.architecture == "encoder" else [f]
        for i in range(c.encoder_layers if num_layers is None else num_layers):
            h = self.block(i, h, f, bias, valid, i + 1)
            out.append(h)
        if c.layer_norm_first and len(out) == c.encoder_layers + 1:
            out[-1] = self.norm("encoder.layer_norm", out[-1])
        if c.architecture == "multi_head":
            z = F.gelu(self.linear("output_layer.0", h)).unflatten(-1, (len(c.target_layers), -1))
            y = torch.einsum("btnm,nmk->btnk", z, self.params["output_layer.2.weight"])
            out += (y + self.params["output_layer.2.bias"]).unbind(2)
        return out

    def s3prl_mask(self, lengths: Sequence[int], num_samples: int, frames: int) -> Tensor:
        """Which frames S3PRL calls valid in a padded batch: the exact count for a distiller; for WavLM, the
        frames not wholly made of padding when the batch's samples are dealt out evenly."""
        count = torch.tensor(lengths)
        if self.config.architecture != "encoder":
            return (
                torch.arange(frames)[None]
                < torch.tensor([num_frames(self.config, n) for n in lengths])[:, None]
            )
        padded = torch.arange(num_samples)[None] >= count[:, None]
        padded = padded[:, : num_samples - num_samples % frames] if num_samples % frames else padded
        return ~padded.reshape(len(lengths), frames, -1).all(-1)

    def forward(
        self,
        wavs: Sequence[np.ndarray],
        num_layers: int | None = None,
        history: Tensor | None = None,
        detach_history: bool = False,
    ) -> tuple[list[Tensor], np.ndarray]:
        """Hidden states of a list of utterances, each (B, T, D), and the frames of each (B,).

        `padding: exact`: every utterance is run alone, and the frames past its end are zeros. `padding:
        s3prl`: one padded batch with S3PRL's masks; what stands in the padded frames is then whatever the
        blocks make of it.
        """
        c = self.config
        self.extracted.clear()
        audio = [torch.tensor(np.asarray(w), dtype=self.dtype) for w in wavs]
        if c.normalize:
            audio = [F.layer_norm(w, w.shape, eps=c.normalize_eps) for w in audio]
        lengths = [len(w) for w in audio]
        frames = np.array([num_frames(c, n) for n in lengths])
        total = num_frames(c, max(lengths))
        if c.padding == "exact":
            rows = []
            for b, wav in enumerate(audio):
                self.utterance = b
                past = None if history is None else history[:, b : b + 1, : frames[b]].to(self.dtype)
                rows.append(self.states(wav[None], None, num_layers, past, detach_history))
            return [
                torch.cat([F.pad(row[s], (0, 0, 0, total - row[s].shape[1])) for row in rows])
                for s in range(len(rows[0]))
            ], frames
        padded = torch.stack([F.pad(w, (0, max(lengths) - len(w))) for w in audio])
        valid = self.s3prl_mask(lengths, max(lengths), total)
        hidden = self.states(padded, valid, num_layers, history, detach_history)
        return hidden, valid.sum(1).numpy()
