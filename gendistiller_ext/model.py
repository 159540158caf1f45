"""The model: _core.Model with Config objects, checkpoints of any format, and what a training step returns."""

from __future__ import annotations

import json
import os
from typing import Any, Literal, Optional, Sequence, Union, overload

import numpy as np

from . import _core
from .config import Config, Precision
from .stream import Stream

Wavs = Union[np.ndarray, Sequence[np.ndarray]]
Path = Union[str, "os.PathLike[str]"]


class StepResult:
    """What Model.distill_step returns.

    loss            float: the mean over layers of l1 + lam cos, reduced over frames, and feat_pen_loss times
                    feature_penalty
    l1, cos         float64 (L,): its terms for each target layer
    similarity      float64 (L,): cosine similarity with the target, mean over frames
    feature_penalty float: mean square of the convolutions' output over channels, reduced over frames
    flat_grads      float32 (num_params,): d loss / d params, or `into` with it added
    grads           dict of tensor name -> view of flat_grads
    """

    __slots__ = ("_tensors", "cos", "feature_penalty", "flat_grads", "l1", "loss", "similarity")

    def __init__(
        self,
        tensors: Sequence[Any],
        loss: float,
        l1: np.ndarray,
        cos: np.ndarray,
        similarity: np.ndarray,
        feature_penalty: float,
        flat_grads: np.ndarray,
    ) -> None:
        self._tensors = tensors
        self.loss = loss
        self.l1 = l1
        self.cos = cos
        self.similarity = similarity
        self.feature_penalty = feature_penalty
        self.flat_grads = flat_grads

    @property
    def grads(self) -> dict[str, np.ndarray]:
        """Tensor name -> view of flat_grads in the tensor's shape."""
        return {tensor.name: self.flat_grads[tensor.offset:tensor.offset + tensor.size].reshape(tensor.shape)
                for tensor in self._tensors}

    def __repr__(self) -> str:
        return f"StepResult(loss={self.loss:.6g}, l1={self.l1}, cos={self.cos}, similarity={self.similarity})"


class Model(_core.Model):
    """A student or a teacher: a Config and its parameters, float32.

    config: Config.
    seed: of the random initialisation, which is a function of the seed and each tensor's name alone.
    device: 'cpu', 'cuda' or 'cuda:N'.

    Raises DeviceError where there is no such device. Two threads may share a model: their calls run one after
    the other. Calls on different models run at once. A model can be pickled and copied.

    Attributes: config, params, tensors, num_params, device, precision, statistics.
    Methods: forward, stream, backward, distill_step, load, save, load_params, flat_params, touch.
    """

    _config: Optional[Config] = None

    def __new__(cls, config: Config, seed: int = 0, device: str = "cpu") -> "Model":
        if not isinstance(config, Config):
            raise TypeError(f"config: expected a Config, got {type(config).__name__}")
        return super().__new__(cls, config.to_json(), seed, device)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> "Model":
        """Read a checkpoint: our .safetensors; unilm's WavLM, fairseq's and S3PRL's HuBERT and wav2vec 2.0,
        S3PRL's distiller (.pt, .ckpt); a Hugging Face folder.

        Raises OSError where the file can't be read, ValueError where it is damaged, of another kind, or has
        missing, extra or misshapen tensors, which are named.
        """
        if _is_ours(path):
            return cls._load(path, device)
        from .checkpoints import foreign
        checkpoint = foreign.read(path)
        model = cls(checkpoint.config, device=device)
        missing = [tensor.name for tensor in model.tensors if tensor.name not in checkpoint.tensors]
        if missing:
            raise ValueError(f"{os.fspath(path)}: expected a tensor {missing[0]!r}, got none")
        model.load_params(checkpoint.tensors)
        return model

    @property
    def config(self) -> Config:
        if self._config is None:
            self._config = Config.from_dict(json.loads(self.config_json))
        return self._config

    def stream(self, chunk_seconds: float, context_seconds: float, stats: Literal["running", "fixed"] = "running",
               **options: Any) -> Stream:
        """A Stream that is fed audio piece by piece: see gendistiller_ext.stream.Stream for the arguments."""
        return Stream(self, chunk_seconds, context_seconds, stats, **options)

    def distill_step(
        self,
        wavs: Wavs,
        targets: np.ndarray,
        lengths: Optional[np.ndarray] = None,
        *,
        lam: float = 1.0,
        loss_type: Literal["l1", "l2"] = "l1",
        feat_pen_loss: float = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        mask_padding: bool = True,
        history: Literal["free", "teacher"] = "free",
        detach_history: bool = False,
        dropout_seed: Optional[tuple[int, int, int]] = None,
        precision: Optional[Precision] = "float32",
        into: Optional[np.ndarray] = None,
        num_threads: Optional[int] = None,
    ) -> StepResult:
        """Forward, loss and backward of a batch.

        wavs, lengths, num_threads: as in forward().
        targets: float32 (L, B, T, D), the teacher's states of the layers in config.target_layers.
        lam: weight of the cosine term.
        loss_type: 'l1', or 'l2' for squared differences; the result's l1 has those then.
        feat_pen_loss: weight of S3PRL's feature penalty, the mean square of the convolutions' output.
        reduction: 'mean' over all frames, or 'sum' over utterances and frames.
        mask_padding: False counts padded frames as S3PRL does.
        history: 'teacher': step l > 1 reads targets[l - 2], the teacher's layer, in place of h[l - 1].
        detach_history: no gradient through h[l - 1] into the step before.
        dropout_seed: None (no dropout) or (seed, step, index of the first utterance in the whole batch).
        into: float32 (num_params,) that the gradient is added to; None: a fresh one.

        Raises ValueError or TypeError that names the argument; nothing is changed then.
        """
        return StepResult(self.tensors, *self._distill_step(
            wavs, targets, lengths, lam=lam, loss_type=loss_type, feat_pen_loss=feat_pen_loss, reduction=reduction,
            mask_padding=mask_padding, history=history, detach_history=detach_history, dropout_seed=dropout_seed,
            precision=precision, into=into, num_threads=num_threads))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.config, self.flat_params().copy(), self.device, self.statistics,
                          self.precision)

    def __repr__(self) -> str:
        name, kind = type(self).__name__, self.config.architecture
        return f"<{name}: {kind}, {self.num_params:,} parameters, {self.device}>"


def _restore(cls: type[Model], config: Config, params: np.ndarray, device: str,
             statistics: Optional[np.ndarray] = None, precision: Precision = "float32") -> Model:
    model = cls.__new__(cls, config, device=device)
    model.flat_params()[:] = params
    model.touch()
    model.statistics = statistics
    model.precision = precision
    return model


def _is_ours(path: Path) -> bool:
    """Whether a file is a .safetensors with our config, or with a header that can't be read, so that the C
    reader tells what is wrong with it."""
    if os.path.isdir(path):
        return False
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        return True
    from .checkpoints import safetensors
    try:
        return "gendistiller" in safetensors.read(os.fspath(path))[1]
    except ValueError:
        with open(path, "rb") as stream:
            return os.fspath(path).endswith(".safetensors") or stream.read(9)[8:] == b"{"


@overload
def num_frames(config: Config, num_samples: int) -> int: ...


@overload
def num_frames(config: Config, num_samples: np.ndarray) -> np.ndarray: ...


def num_frames(config: Config, num_samples: "int | np.ndarray") -> "int | np.ndarray":
    """Frames of utterances of `num_samples` samples: an int, or int64 of the shape of an integer array; 0
    where an utterance is shorter than one frame."""
    if not isinstance(config, Config):
        raise TypeError(f"config: expected a Config, got {type(config).__name__}")
    return _core.num_frames(config.to_json(), num_samples)
