"""What S3PRL 0.4 uses and current torch and torchaudio no longer have. Each is put back only where it is
missing, and only once s3prl itself has been imported; a complete older torchaudio is left as it is.

    torchaudio.set_audio_backend   gone in 2.9; called at import and by run_downstream
    torchaudio.info, load, save    info gone in 2.9; load and save need TorchCodec since
    torchaudio.sox_effects         gone in 2.9; imported for KS, SV, QbE and MOS
    argparse.Namespace, schedules  in S3PRL's checkpoints (`-e`), refused by torch.load since 2.6
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Optional


def tolerate_foreign_library(utils: ModuleType) -> None:
    """torchaudio._extension.utils: a compiled library that cannot be loaded (built for CUDA, while torch is
    for the CPU) counts as not there, as torchaudio itself does where the file is missing."""
    load = utils._load_lib

    def load_or_none(lib: str) -> bool:
        try:
            return load(lib)
        except OSError:
            return False

    utils._load_lib = load_or_none


def complete_torchaudio(torchaudio: ModuleType) -> None:
    """Add to `torchaudio` what it lacks of the functions above."""
    from . import audio, sox

    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = lambda backend: None
    if not _can_read(torchaudio):
        torchaudio.load, torchaudio.save, torchaudio.info = audio.load, audio.save, audio.info
    elif not hasattr(torchaudio, "info"):
        torchaudio.info = audio.info
    if not _has_effects(torchaudio):
        effects = getattr(torchaudio, "sox_effects", None) or ModuleType("torchaudio.sox_effects")
        effects.apply_effects_file = sox.apply_effects_file
        effects.apply_effects_tensor = sox.apply_effects_tensor
        sys.modules["torchaudio.sox_effects"] = torchaudio.sox_effects = effects


def _can_read(torchaudio: ModuleType) -> bool:
    """Whether torchaudio.load has a decoder: up to 2.8 a backend, from 2.9 TorchCodec with its FFmpeg."""
    if not hasattr(torchaudio, "load"):
        return False
    if hasattr(torchaudio, "list_audio_backends"):
        return bool(torchaudio.list_audio_backends())
    try:
        importlib.import_module("torchcodec.decoders")
        return True
    except Exception:
        return False


def _has_effects(torchaudio: ModuleType) -> bool:
    try:
        effects = importlib.import_module("torchaudio.sox_effects")
        return "rate" in effects.effect_names()
    except Exception:  # no such module, or its library does not load
        return False


def allow_checkpoints(module: Optional[str] = None) -> None:
    """Let torch.load read the one class that S3PRL's own checkpoints hold besides tensors and containers; and the
    classes of one of its modules: run_pretrain.py's have a schedule of `optimizers`."""
    import torch

    allowed = [argparse.Namespace]
    if module is not None:
        allowed += [value for value in vars(importlib.import_module(module)).values()
                    if isinstance(value, type) and value.__module__ == module]
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals(allowed)
