"""torchaudio.load, save and info by soundfile, with torchaudio's arguments and results."""

from __future__ import annotations

import os
from collections import namedtuple
from typing import Any, BinaryIO, Optional, Union

import numpy as np
import soundfile
import torch
from torch import Tensor

AudioMetaData = namedtuple("AudioMetaData", "sample_rate num_frames num_channels bits_per_sample encoding")

# libsndfile's subtypes: bits a sample and torchaudio's name of the encoding.
SUBTYPES = {
    "PCM_S8": (8, "PCM_S"), "PCM_U8": (8, "PCM_U"), "PCM_16": (16, "PCM_S"), "PCM_24": (24, "PCM_S"),
    "PCM_32": (32, "PCM_S"), "FLOAT": (32, "PCM_F"), "DOUBLE": (64, "PCM_F"), "ULAW": (8, "ULAW"),
    "ALAW": (8, "ALAW"), "VORBIS": (0, "VORBIS"), "OPUS": (0, "OPUS"), "MPEG_LAYER_III": (0, "MP3"),
}
# What soundfile can read unscaled, for normalize=False.
INTEGERS = {"PCM_16": "int16", "PCM_24": "int32", "PCM_32": "int32"}
# torchaudio's default subtype of a WAV file, after the tensor's dtype.
WAV_SUBTYPES = {torch.float32: "FLOAT", torch.float64: "DOUBLE", torch.int32: "PCM_32", torch.int16: "PCM_16"}

Source = Union[str, "os.PathLike[str]", BinaryIO]


def _open(uri: Any) -> Any:
    return os.fspath(uri) if isinstance(uri, os.PathLike) else uri


def load(uri: Source, frame_offset: int = 0, num_frames: int = -1, normalize: bool = True,
         channels_first: bool = True, format: Optional[str] = None, buffer_size: int = 4096,
         backend: Optional[str] = None) -> tuple[Tensor, int]:
    """Samples (channels, frames), or (frames, channels) with channels_first=False, and the sampling rate.
    float32 in [-1, 1); normalize=False keeps 16- and 32-bit integers. num_frames -1: to the end."""
    with soundfile.SoundFile(_open(uri)) as file:
        dtype = "float32" if normalize else INTEGERS.get(file.subtype, "float32")
        file.seek(min(frame_offset, file.frames))
        samples = file.read(num_frames, dtype=dtype, always_2d=True)
        rate = file.samplerate
    return torch.from_numpy(np.ascontiguousarray(samples.T) if channels_first else samples), rate


def save(uri: Source, src: Tensor, sample_rate: int, channels_first: bool = True,
         format: Optional[str] = None, encoding: Optional[str] = None, bits_per_sample: Optional[int] = None,
         buffer_size: int = 4096, backend: Optional[str] = None, compression: Any = None) -> None:
    """Write (channels, frames) samples. A WAV file takes the tensor's dtype unless encoding ("PCM_S",
    "PCM_U", "PCM_F", "ULAW", "ALAW") or bits_per_sample say otherwise."""
    samples = src.detach().cpu()
    if samples.dim() != 2:
        raise ValueError(f"src: expected (channels, frames), got {tuple(samples.shape)}")
    kind = (format or os.path.splitext(str(uri))[1].lstrip(".")).upper()
    subtype = WAV_SUBTYPES.get(samples.dtype) if kind == "WAV" else None
    if encoding or bits_per_sample:
        matching = [name for name, (bits, code) in SUBTYPES.items()
                    if code == (encoding or "PCM_S") and bits_per_sample in (None, bits)]
        if not matching:
            raise ValueError(f"encoding: no {encoding or 'PCM_S'} of {bits_per_sample} bits a sample")
        subtype = "PCM_16" if "PCM_16" in matching else matching[0]
    soundfile.write(_open(uri), (samples.T if channels_first else samples).numpy(), sample_rate,
                    subtype=subtype, format=kind or None)


def info(uri: Source, format: Optional[str] = None, buffer_size: int = 4096,
         backend: Optional[str] = None) -> AudioMetaData:
    """sample_rate, num_frames, num_channels, bits_per_sample (0 where the codec has none) and encoding of a
    file."""
    found = soundfile.info(_open(uri))
    bits, encoding = SUBTYPES.get(found.subtype, (0, "UNKNOWN"))
    if found.format == "FLAC":
        encoding = "FLAC"
    return AudioMetaData(found.samplerate, found.frames, found.channels, bits, encoding)
