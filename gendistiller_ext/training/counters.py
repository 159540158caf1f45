"""What a run counts: one record, whole in every state, so that a resumed run counts on."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Mapping, Optional

from .report import Window


@dataclass
class Counters:
    """Up to the end of a step; the defaults are those before the first."""
    window: Window  # since the last row of the log
    step: int = 0
    bad_in_a_row: int = 0  # steps skipped, up to this one
    skipped_steps: int = 0
    audio_seconds: float = 0.0
    seconds: float = 0.0  # of training, up to when this process began or its state was written
    failed_names: set[str] = field(default_factory=set)  # files that could not be read
    first_valid: Optional[dict[str, float]] = None  # validation.py's rows
    last_valid: Optional[dict[str, float]] = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object, a key for each field."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**values, "window": self.window.values, "failed_names": sorted(self.failed_names)}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], path: str, layers: int) -> "Counters":
        """What to_json() gave; layers: of the student's targets. Raises ValueError that names the file `path` where
        a counter is missing or unknown."""
        _check_keys(saved, [item.name for item in dataclasses.fields(cls)], f"{path}: counters")
        _check_keys(saved["window"], Window(layers).values, f"{path}: counters: window")
        return cls(**{**saved, "window": Window(layers, saved["window"]), "failed_names": set(saved["failed_names"])})


def _check_keys(saved: Any, expected: Any, what: str) -> None:
    if not isinstance(saved, Mapping):
        raise ValueError(f"{what}: expected an object, got {type(saved).__name__}")
    for key in sorted(set(expected) ^ set(saved)):
        got = f"expected {key!r}, got none" if key in expected else f"unknown {key!r}"
        raise ValueError(f"{what}: {got}")
