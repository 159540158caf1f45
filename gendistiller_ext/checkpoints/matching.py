"""Finds one encoder's tensors among all that a checkpoint holds.

They may share a prefix, which what they were saved from gave them: "wavlm." of a model with a head, "module." of
DistributedDataParallel, any other, several in a row. Whatever stands outside the encoder is a head: it is left out
and listed. Inside, nothing may be missing, misshapen or left over.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..config import Config

_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a format names what is `name` here.

    names: our name -> the format's, the one to report first, where its version matters several; parts: the modules
    that an encoder consists of, by the first words of the format's names.
    """

    names: Callable[[str], list[str]]
    parts: tuple[str, ...]


@dataclasses.dataclass
class Foreign:
    """What was read. tensors: name -> float32 array (C order, perhaps read-only), all of
    `config.parameter_shapes()`; format: a name of `foreign`'s list; prefix: what the encoder's names begin with;
    ignored: tensors outside of it.
    """

    config: Config
    tensors: dict[str, np.ndarray]
    format: str
    prefix: str
    ignored: list[str]


@dataclasses.dataclass
class Contents:
    """What a checkpoint holds by its headers: no tensor is read.

    prefix, ignored: as in Foreign. found: our name -> the file's, for tensors of the right kind and shape; what is
    wrong with the others: missing ("name (shape)"), misshapen (messages), unexpected (names). Names are the
    file's. state: the file's name -> tensor, to be read by its numpy().
    """

    path: str
    config: Config
    format: str
    state: dict[str, Any]
    prefix: str
    found: dict[str, str]
    missing: list[str]
    misshapen: list[str]
    unexpected: list[str]
    ignored: list[str]

    @property
    def problem(self) -> str | None:
        """Why the checkpoint can't be used; None where it can."""
        if self.misshapen:
            return f"{self.path}: {self.misshapen[0]}"
        if self.missing:
            return f"{self.path}: missing {_listing(self.missing)}"
        return f"{self.path}: unexpected {_listing(self.unexpected)}" if self.unexpected else None

    def read(self) -> Foreign:
        """Reads the tensors. Raises ValueError that names one that is missing, left over, of another shape or
        not finite."""
        if self.problem:
            raise ValueError(self.problem)
        tensors = {name: _float32(self.path, theirs, self.state[theirs]) for name, theirs in self.found.items()}
        return Foreign(self.config, tensors, self.format, self.prefix, self.ignored)


def match(path: str, config: Config, kind: str, state: Any, layout: Layout) -> Contents:
    """Which of the file's tensors are the model's. Raises ValueError where `state` is no dict of names and where it
    holds two encoders."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"expected a dict of named tensors, got {type(state).__name__}")
    shapes = config.parameter_shapes()
    choices = {name: layout.names(name) for name in shapes}
    prefix = _find_prefix(shapes, choices, state)
    found, missing, misshapen, used = {}, [], [], set()
    for name, shape in shapes.items():
        theirs = next((prefix + choice for choice in choices[name] if prefix + choice in state), None)
        if theirs is None:
            missing.append(f"{prefix}{choices[name][0]} {shape}")
            continue
        used.add(theirs)
        problem = _problem(state[theirs], shape)
        if problem:
            misshapen.append(f"{theirs}: {problem}")
        else:
            found[name] = theirs
    inside = tuple(f"{prefix}{part}." for part in layout.parts)
    rest = [name for name in state if name not in used]
    return Contents(path, config, kind, state, prefix, found, missing, misshapen,
                    unexpected=[name for name in rest if name.startswith(inside)],
                    ignored=[name for name in rest if not name.startswith(inside)])


def _find_prefix(shapes: Mapping[str, tuple[int, ...]], choices: Mapping[str, list[str]],
                 state: Mapping[str, Any]) -> str:
    """What stands before the names of the one encoder that is whole; where none is, of the one that most is there
    of. Raises ValueError where it could be either of two."""
    ours = {choice: name for name, its in choices.items() for choice in its}
    most = max(choice.count(".") for choice in ours) + 1
    present: dict[str, set[str]] = {}
    right: dict[str, set[str]] = {}
    for theirs, tensor in state.items():
        words = theirs.rsplit(".", most)
        for first in range(len(words)):
            tail = ".".join(words[first:])
            name = ours.get(tail)
            if name is not None:
                prefix = theirs[:len(theirs) - len(tail)]
                present.setdefault(prefix, set()).add(name)
                if not _problem(tensor, shapes[name]):
                    right.setdefault(prefix, set()).add(name)
    order = sorted(present, key=lambda prefix: (-len(right.get(prefix, ())), -len(present[prefix]), prefix))
    counts = [len(right.get(prefix, ())) for prefix in order]
    if len(order) > 1 and counts[0] == counts[1] and 2 * counts[0] >= len(shapes):
        whole = "two" if counts[0] == len(shapes) else f"{counts[0]} of its {len(shapes)} tensors twice"
        raise ValueError(f"expected one encoder, got {whole}: under {order[0]!r} and under {order[1]!r}")
    return order[0] if order else ""


def _problem(tensor: Any, shape: tuple[int, ...]) -> str | None:
    dtype = getattr(tensor, "dtype", None)
    if dtype not in _FLOATS:
        return f"expected a floating-point tensor, got {type(tensor).__name__ if dtype is None else dtype}"
    return None if tensor.shape == shape else f"expected shape {shape}, got {tensor.shape}"


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(name[:200] for name in names[:10]) + more


def _float32(path: str, name: str, tensor: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(tensor.numpy(), dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {name}: expected finite numbers, got NaN or Inf")
    return array
