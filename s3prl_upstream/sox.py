"""torchaudio.sox_effects: what S3PRL asks of it is done here, anything else by the `sox` program.

    channels 1     mean of the channels
    rate HZ        soxr, the resampler of sox as a library, at sox's default quality
    gain DB        x 10^(DB / 20), clipped to [-1, 1]
    norm [DB]      the same, from a peak of 1
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import Optional, Sequence

import numpy as np
import soundfile
import torch
from torch import Tensor

from . import audio


def _resample(x: Tensor, rate: int, new: int) -> Tensor:
    import soxr

    return torch.from_numpy(np.ascontiguousarray(soxr.resample(x.T.numpy(), rate, new, quality="HQ").T))


def _builtin(x: Tensor, rate: int, name: str, arguments: list[str]) -> Optional[tuple[Tensor, int]]:
    """One effect on (channels, frames); None if it is not among those above."""
    try:
        numbers = [float(argument) for argument in arguments]
    except ValueError:
        return None
    if name == "channels" and numbers == [1]:
        return x.mean(0, keepdim=True), rate
    if name == "rate" and len(numbers) == 1:
        new = int(numbers[0])
        return (x if new == rate else _resample(x, rate, new)), new
    if name == "gain" and len(numbers) == 1:
        return (x * 10 ** (numbers[0] / 20)).clamp(-1, 1), rate
    if name == "norm" and len(numbers) <= 1:
        peak = x.abs().max() if x.numel() else x.new_zeros(())
        return (x * (10 ** (sum(numbers) / 20) / peak) if peak > 0 else x).clamp(-1, 1), rate
    return None


def _program(x: Tensor, rate: int, effects: Sequence[Sequence[str]]) -> tuple[Tensor, int]:
    program = shutil.which("sox")
    if program is None:
        names = ", ".join(effect[0] for effect in effects)
        raise RuntimeError(f"effects: {names}: needs the sox program, which is not installed "
                           "(apt-get install sox)")
    with tempfile.TemporaryDirectory() as folder:
        source, result = os.path.join(folder, "in.wav"), os.path.join(folder, "out.wav")
        soundfile.write(source, x.T.numpy(), rate, subtype="FLOAT")
        subprocess.run([program, "-V1", "-D", source, "-b", "32", "-e", "floating-point", result,
                        *(word for effect in effects for word in effect)], check=True)
        return audio.load(result)


def apply_effects_tensor(tensor: Tensor, sample_rate: int, effects: Sequence[Sequence[str]],
                         channels_first: bool = True) -> tuple[Tensor, int]:
    """The samples float32 (channels, frames) and their rate after the effects, each a list of a name and
    arguments."""
    x, rate = (tensor if channels_first else tensor.T).detach().cpu(), sample_rate
    rest = [[str(word) for word in effect] for effect in effects]
    while rest:
        done = _builtin(x, rate, rest[0][0], rest[0][1:])
        if done is None:
            x, rate = _program(x, rate, rest)
            break
        (x, rate), rest = done, rest[1:]
    return (x if channels_first else x.T), rate


def apply_effects_file(path: audio.Source, effects: Sequence[Sequence[str]], normalize: bool = True,
                       channels_first: bool = True, format: Optional[str] = None) -> tuple[Tensor, int]:
    """As apply_effects_tensor, on a file's samples."""
    x, rate = audio.load(path)
    x, rate = apply_effects_tensor(x, rate, effects)
    if not normalize:
        x = (x * 32768).round().clamp(-32768, 32767).to(torch.int16)
    return (x if channels_first else x.T), rate
