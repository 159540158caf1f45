"""What the student learns from: a checkpoint that the engine runs, or any upstream of S3PRL.

A teacher has

    config                          its sizes, a Config: what `student_config` takes over
    num_params, hash                the same weights have the same hash
    initialise(student)             (names copied, names left): weights that both have
    targets(wavs, layers, threads)  (states (L, B, T, D) float32, zeros past an utterance; frames (B,))
"""
from __future__ import annotations

import hashlib
import math
from typing import Optional, Sequence

import numpy as np

from ..config import Config, Precision
from ..model import num_frames
from ..modelinfo import model_hash
from ..student import init_from_teacher
from .recipe import S3PRL


def load_teacher(source: str, device: str = "cpu", precision: Precision = "float32"):
    """source: a checkpoint, whose products are computed in `precision`, or s3prl:NAME, s3prl:NAME:CKPT for the
    upstream NAME of S3PRL. Raises OSError, ValueError, ImportError."""
    if source.startswith(S3PRL):
        name, _, ckpt = source[len(S3PRL):].partition(":")
        return UpstreamTeacher(name, ckpt or None, device)
    return EngineTeacher(source, device, precision)


class EngineTeacher:
    """A checkpoint that this engine reads; it runs no block that no target needs."""

    def __init__(self, path: str, device: str = "cpu", precision: Precision = "float32"):
        import gendistiller_ext as gd
        self.model = gd.Model.load(path, device=device)
        self.model.precision = precision
        self.config, self.num_params = self.model.config, int(self.model.num_params)
        self.hash = model_hash(self.model)  # and where they are computed otherwise, other targets
        if precision != "float32":
            self.hash += f" {precision}"

    def initialise(self, student) -> tuple[list[str], list[str]]:
        return init_from_teacher(student, self.model)

    def targets(self, wavs: Sequence[np.ndarray], layers: Sequence[int],
                threads: Optional[int] = None) -> tuple[np.ndarray, np.ndarray]:
        """(float32 (L, B, T, D) of `layers`, int64 (B,) frames) of 1-D float32 audio at 16 kHz."""
        hidden, frames = self.model.forward(wavs, num_layers=max(1, *layers), num_threads=threads, states=list(layers))
        return np.stack(hidden), frames


class UpstreamTeacher:
    """An upstream of S3PRL, in evaluation mode. Each utterance is computed alone, so that its states do not
    depend on the batch. Its frames have to be 320 samples apart; it may have some more than the student, which
    are left out, or one less: the last one is repeated then, as in S3PRL."""

    def __init__(self, name: str, ckpt: Optional[str] = None, device: str = "cpu"):
        try:
            import torch

            import s3prl_upstream
            s3prl_upstream.register()
            import s3prl.hub
        except ImportError as error:
            raise ImportError(f"teacher: {S3PRL}{name} needs S3PRL: pip install 'gendistiller_ext[s3prl]' "
                              f"({error})") from error
        make = getattr(s3prl.hub, name, None)
        if not name or not callable(make):
            raise ValueError(f"teacher: expected an upstream of s3prl.hub, got {name!r}")
        self.name, self._torch = S3PRL + name, torch
        self._device = device
        self._upstream = (make(ckpt=ckpt) if ckpt else make()).to(device).eval()
        values = self._upstream.state_dict()
        self.num_params = sum(value.numel() for value in self._upstream.parameters())
        digest = hashlib.sha256(name.encode())
        for key in sorted(values):
            if isinstance(values[key], torch.Tensor):
                digest.update(key.encode() + b"\0")
                digest.update(values[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        self.hash = digest.hexdigest()
        self.config = self._sizes()

    def initialise(self, student) -> tuple[list[str], list[str]]:
        """Its tensors have names of their own: nothing is copied."""
        return [], sorted(student.params)

    def targets(self, wavs: Sequence[np.ndarray], layers: Sequence[int],
                threads: Optional[int] = None) -> tuple[np.ndarray, np.ndarray]:
        """As EngineTeacher's. Raises ValueError where a layer has another shape than the student's frames ask for."""
        frames = num_frames(self.config, np.array([len(wav) for wav in wavs]))
        targets = np.zeros((len(layers), len(wavs), frames.max(), self.config.encoder_embed_dim), np.float32)
        if threads:
            self._torch.set_num_threads(threads)
        for row, (wav, count) in enumerate(zip(wavs, frames)):
            hidden = self._hidden(wav)
            for index, layer in enumerate(layers):
                state = hidden[layer][:count]
                if state.shape != (count, targets.shape[3]) and state.shape != (count - 1, targets.shape[3]):
                    raise ValueError(f"teacher: {self.name}: layer {layer}: expected ({count}, {targets.shape[3]}) "
                                     f"for {len(wav)} samples, got {hidden[layer].shape}")
                targets[index, row, :len(state)] = state
                targets[index, row, len(state):count] = state[-1]
        return targets, frames

    def _hidden(self, wav: np.ndarray) -> list[np.ndarray]:
        """The states (T, D) of an utterance."""
        with self._torch.inference_mode():
            states = self._upstream([self._torch.from_numpy(wav).to(self._device)])["hidden_states"]
        return [state[0].float().cpu().numpy() for state in states]

    def _sizes(self):
        """A Config with the widths of the states; what can't be told from outside is WavLM Base's."""
        rate = self._upstream.get_downsample_rates("hidden_states")
        hidden = self._hidden(np.random.default_rng(0).uniform(-0.1, 0.1, 16000).astype(np.float32))
        hop, frames = Config().hop, num_frames(Config(), 16000)
        if rate != hop or not frames - 1 <= len(hidden[-1]) <= frames + 2:
            raise ValueError(f"teacher: expected frames every {hop} samples, as the student has them, got one every "
                             f"{rate} and {len(hidden[-1])} for 16000 samples from {self.name}")
        width = hidden[-1].shape[1]
        return Config(
            architecture="encoder", encoder_layers=max(1, len(hidden) - 1), encoder_embed_dim=width,
            encoder_ffn_embed_dim=4 * width, encoder_attention_heads=width // 64 if width % 64 == 0 else 1,
            conv_pos_groups=math.gcd(width, 16), target_layers=(), skip_connection=False, output_layer=False)
