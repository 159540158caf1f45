"""gendistiller_ext._core: the C library as it is called. Shapes, units and errors are in each docstring."""

import os
import sys
from _typeshed import structseq
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, SupportsIndex, final, overload
from typing_extensions import Self, TypeAlias, disjoint_base

import numpy as np
from numpy.typing import NDArray

_Precision: TypeAlias = Literal["float32", "bfloat16", "int8"]
_Floats: TypeAlias = NDArray[np.float32]
_Integers: TypeAlias = NDArray[np.int64]
_Doubles: TypeAlias = NDArray[np.float64]
_Wavs: TypeAlias = _Floats | Sequence[_Floats]
_Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
_DropoutSeed: TypeAlias = tuple[SupportsIndex, SupportsIndex, SupportsIndex]

__version__: Final[str]
GD_MAX_CONV_LAYERS: Final[int]
GD_MAX_TARGETS: Final[int]

class DeviceError(RuntimeError): ...

@final
class Tensor(structseq[Any], tuple[str, tuple[int, ...], int]):
    """(name, shape, offset) as a tuple."""

    if sys.version_info >= (3, 10):
        __match_args__: Final = ("name", "shape", "offset")

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def decay(self) -> bool: ...

@final
class ConfigFacts(structseq[int], tuple[int, int, int, int]):
    """(min_samples, hop, num_states, num_params) as a tuple."""

    if sys.version_info >= (3, 10):
        __match_args__: Final = ("min_samples", "hop", "num_states", "num_params")

    @property
    def min_samples(self) -> int: ...
    @property
    def hop(self) -> int: ...
    @property
    def num_states(self) -> int: ...
    @property
    def num_params(self) -> int: ...

@disjoint_base
class Model:
    def __new__(cls, config: str, seed: SupportsIndex = 0, device: str = "cpu") -> Self: ...
    @classmethod
    def _load(cls, path: _Path, device: str = "cpu") -> Self: ...
    @property
    def params(self) -> dict[str, _Floats]: ...
    @property
    def tensors(self) -> tuple[Tensor, ...]: ...
    @property
    def num_params(self) -> int: ...
    @property
    def config_json(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> _Precision: ...
    @precision.setter
    def precision(self, value: _Precision | None) -> None: ...
    @property
    def statistics(self) -> _Doubles | None: ...
    @statistics.setter
    def statistics(self, value: _Doubles | None) -> None: ...
    def forward(
        self,
        wavs: _Wavs,
        lengths: _Integers | None = None,
        *,
        num_layers: SupportsIndex | None = None,
        precision: _Precision | None = None,
        num_threads: SupportsIndex | None = None,
        dropout_seed: _DropoutSeed | None = None,
        statistics: _Doubles | None = None,
        states: Sequence[SupportsIndex] | None = None,
    ) -> tuple[list[_Floats], _Integers]: ...
    def backward(
        self,
        wavs: _Wavs,
        grad_hidden: list[_Floats | None] | tuple[_Floats | None, ...],
        lengths: _Integers | None = None,
        *,
        num_layers: SupportsIndex | None = None,
        dropout_seed: _DropoutSeed | None = None,
        into: _Floats | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> _Floats: ...
    def _distill_step(
        self,
        wavs: _Wavs,
        targets: _Floats,
        lengths: _Integers | None = None,
        *,
        lam: float = 1.0,
        loss_type: Literal["l1", "l2"] = "l1",
        feat_pen_loss: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        mask_padding: bool = True,
        history: Literal["free", "teacher"] = "free",
        detach_history: bool = False,
        dropout_seed: _DropoutSeed | None = None,
        precision: _Precision | None = None,
        into: _Floats | None = None,
        num_threads: SupportsIndex | None = None,
    ) -> tuple[float, _Doubles, _Doubles, _Doubles, float, _Floats]: ...
    def _add_statistics(self, statistics: _Doubles | None, audio: _Floats, before: SupportsIndex) -> _Doubles: ...
    def load_params(self, params: Mapping[str, NDArray[Any]], /) -> None: ...
    def flat_params(self, /) -> _Floats: ...
    def touch(self, /) -> None: ...
    def save(self, path: _Path, dtype: _Precision = "float32") -> None: ...

@disjoint_base
class AdamW:
    def __new__(
        cls,
        model: Model,
        lr: float = 2e-4,
        betas: tuple[float, float] | list[float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 1e-6,
        clip: float = 5.0,
        variant: Literal["adamw", "adamw_s3prl"] = "adamw",
    ) -> Self: ...
    @property
    def model(self) -> Model: ...
    @property
    def lr(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def eps(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def variant(self) -> Literal["adamw", "adamw_s3prl"]: ...
    def step(self, grads: _Floats, lr: float | None = None, *, num_threads: SupportsIndex | None = None) -> float: ...
    def state(self, /) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any], /) -> None: ...

def config_facts(config: str, /) -> ConfigFacts: ...
def config_tensors(config: str, /) -> dict[str, tuple[int, ...]]: ...
@overload
def num_frames(config: str, num_samples: int, /) -> int: ...
@overload
def num_frames(config: str, num_samples: NDArray[np.integer[Any]], /) -> _Integers: ...
def cpu_features() -> tuple[str, ...]: ...
def usable_cores() -> int: ...
def devices() -> list[str]: ...
def distill_loss(
    pred: _Floats,
    target: _Floats,
    frames: _Integers | None = None,
    *,
    lam: float = 1.0,
    loss_type: Literal["l1", "l2"] = "l1",
    reduction: Literal["mean", "sum"] = "mean",
    mask_padding: bool = True,
    num_threads: SupportsIndex | None = None,
) -> tuple[float, _Doubles, _Doubles, _Floats]: ...
