"""Paths of the models that are part of the package; README.md beside this file is their card."""
from pathlib import Path

_FOLDER = Path(__file__).parent


def wavlm_tiny() -> Path:
    """The teacher: WavLM's architecture, 5,929,924 parameters, 12 blocks of width 192; bfloat16."""
    return _FOLDER / "wavlm_tiny.safetensors"


def student_tiny() -> Path:
    """A GenDistiller student of that teacher: 1,104,779 parameters, layers 4 and 8; bfloat16."""
    return _FOLDER / "student_tiny.safetensors"
