"""The upstream: S3PRL's list of wavs in, its dict of hidden states out. Between them padding and one call."""

from __future__ import annotations

from typing import Any, Optional, Sequence

import torch
import torch.nn.functional as F
from s3prl.upstream.interfaces import UpstreamBase
from torch import Tensor

from gendistiller_ext.torch import GenDistiller

from .cache import StateCache

OPTIONS = ("num_layers", "num_threads", "precision", "cache_megabytes")


def _options(model_config: Optional[str], given: dict[str, Any]) -> dict[str, Any]:
    """The file's options, overridden by keyword arguments."""
    options: dict[str, Any] = {}
    if model_config is not None:
        import yaml

        with open(model_config, encoding="utf-8") as file:
            options = yaml.safe_load(file) or {}
        expected = f"model_config: expected a mapping of {', '.join(OPTIONS)}"
        if not isinstance(options, dict):
            raise ValueError(f"{expected}, got {type(options).__name__}")
        if set(options) - set(OPTIONS):
            raise ValueError(f"{expected}, got {', '.join(sorted(set(options) - set(OPTIONS)))}")
    return {**options, **{name: given[name] for name in OPTIONS if given.get(name) is not None}}


class UpstreamExpert(UpstreamBase):
    """
    ckpt: a checkpoint's path; model_config: a YAML file with any of the options below (S3PRL's `-g`).
    num_layers: how many layers a generative student generates, or how many blocks a teacher runs; None: all.
    num_threads: of the kernels; None for one a core.
    precision: 'float32', 'bfloat16' or 'int8', while the upstream is frozen; None: the checkpoint's.
    cache_megabytes: of states to keep of clips heard before, while the upstream is frozen; 0 (default): none.
    """

    def __init__(self, ckpt: str, model_config: Optional[str] = None, **kwargs: Any) -> None:
        super().__init__(hooks=kwargs.get("hooks"), hook_postprocess=kwargs.get("hook_postprocess"))
        options = _options(model_config, kwargs)
        self.num_layers = options.get("num_layers")
        self.model = GenDistiller(ckpt, num_threads=options.get("num_threads"), precision=options.get("precision"))
        config = self.model.config
        self.minimum, self.hop = config.min_samples, config.hop
        megabytes = options.get("cache_megabytes") or 0
        self.cache = StateCache(megabytes) if megabytes and config.padding == "exact" else None
        self.paper = config.encoder_layers if config.architecture == "multi_head" else -1

    def get_downsample_rates(self, key: str) -> int:
        return self.hop

    def states(self, wavs: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        def run(some: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
            return self.model(some, num_layers=self.num_layers)

        if self.cache is None or torch.is_grad_enabled():
            return run(wavs)
        return self.cache(wavs, self.model.revision, run)

    def forward(self, wavs: Sequence[Tensor]) -> dict[str, Any]:
        """wavs: 1-D tensors of 16 kHz audio; one shorter than a frame (400 samples, as a rule) gets zeros appended.

        With frames every `hop` samples, S3PRL gives a row of n samples round(n / hop) of them
        (interfaces.Featurizer) or ceil(n / hop) (nn.S3PRLUpstream), one or two more than it has. Up to there each row repeats its last valid frame,
        which is what S3PRL does to the longest row: a row is then the same in every batch. Frames past that
        are zeros; pad_mask marks the valid ones.
        """
        lengths = [len(wav) for wav in wavs]
        hidden, frames = self.states([F.pad(wav, (0, max(0, self.minimum - len(wav)))) for wav in wavs])
        valid = frames.tolist()
        wanted = [max(count, -(-length // self.hop)) for count, length in zip(valid, lengths)]
        rows = [b for b, count in enumerate(valid) for _ in range(count, wanted[b])]
        places = [t for b, count in enumerate(valid) for t in range(count, wanted[b])]
        last = [valid[b] - 1 for b in rows]
        states = []
        for state in hidden:
            state = F.pad(state, (0, 0, 0, max(wanted) - state.shape[1]))
            state[rows, places] = state[rows, last]
            states.append(state)
        mask = torch.arange(max(wanted))[None] < frames[:, None]
        return {"hidden_states": states, "last_hidden_state": states[-1], "paper": states[self.paper],
                "pad_mask": mask.to(states[0])}
