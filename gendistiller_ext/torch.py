"""The model as a PyTorch module, its gradients through the C kernels.

    from gendistiller_ext.torch import GenDistiller

    student = GenDistiller("student.safetensors")
    hidden, frames = student([wav, other_wav])          # tensors of samples, lengths may differ
    hidden[-1].mean().backward()                        # student.encoder.layers[...].grad

The parameters are `nn.Parameter`s over the model's own flat buffer, so an optimiser, `load_state_dict` or DDP
writes straight into what the kernels read. Forward and backward are one custom operator each,
`torch.ops.gendistiller.forward` and `.backward`; the second recomputes the first, so nothing but the audio is
kept in between, and torch.compile, autocast and DDP see two opaque functions of their arguments.
"""

from __future__ import annotations

import itertools
import os
import weakref
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import gendistiller_ext as gd

from .config import Precision

__all__ = ["GenDistiller"]

# Columns of the checksum: prime, so that exchanged rows or blocks of a weight move into other columns.
CHECKSUM_COLUMNS = 509


def _checksum(flat: np.ndarray) -> np.ndarray:
    """uint64 column sums of a float32 buffer's bits: tells of writes that no version counter saw."""
    words = flat[:flat.size & ~1].view(np.uint64)
    whole = words.size - words.size % CHECKSUM_COLUMNS
    sums = words[:whole].reshape(-1, CHECKSUM_COLUMNS).sum(axis=0, dtype=np.uint64)
    sums[:words.size - whole] += words[whole:]
    if flat.size & 1:
        sums[-1] += np.uint64(flat[-1:].view(np.uint32)[0])
    return sums


class _Engine:
    """A gd.Model and the tensors over its flat buffer. `model_for(tensors)` is the model whose parameters
    have the values of the given tensors: this one, packed anew if they were written to; or, for tensors that
    live elsewhere (another device, torch.func.functional_call), a second one that they are copied into."""

    live: "weakref.WeakValueDictionary[int, _Engine]" = weakref.WeakValueDictionary()
    handles = itertools.count(1)

    def __init__(self, model: gd.Model) -> None:
        self.model = model
        self.flat = model.flat_params()
        self.names, self.shapes, self.offsets, self.views = [], [], [], []
        for name, shape, offset in model.tensors:
            size = int(np.prod(shape, dtype=np.int64))
            self.names.append(name)
            self.shapes.append(tuple(shape))
            self.offsets.append(offset)
            # One tensor a parameter, not slices of one tensor: each then has its own version counter and
            # storage.
            self.views.append(torch.from_numpy(self.flat[offset:offset + size].reshape(shape)))
        self.pointers = [view.data_ptr() for view in self.views]
        self.versions: list[Optional[int]] = [None] * len(self.views)
        self.checksum: Optional[np.ndarray] = None
        self.elsewhere: Optional[gd.Model] = None
        self.last: Optional[gd.Model] = None
        self.revision = 0
        self.num_threads: Optional[int] = None
        self.handle = next(self.handles)
        self.live[self.handle] = self

    def holds(self, index: int, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self.pointers[index] and tensor.dtype == torch.float32 and (
            tensor.device.type == "cpu" and tensor.shape == self.shapes[index] and tensor.is_contiguous())

    def model_for(self, tensors: Sequence[Tensor]) -> gd.Model:
        if len(tensors) != len(self.names):
            raise ValueError(f"params: expected {len(self.names)} tensors, got {len(tensors)}")
        here = all(self.holds(i, tensor) for i, tensor in enumerate(tensors))
        model = self.shared(tensors) if here else self.copied(tensors)
        if model is not self.last:
            self.last = model
            self.revision += 1
        return model

    def shared(self, tensors: Sequence[Tensor]) -> gd.Model:
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        checksum = _checksum(self.flat)
        if versions != self.versions or self.checksum is None or not np.array_equal(checksum, self.checksum):
            self.model.touch()
            self.revision += 1
            self.versions, self.checksum = versions, checksum
        return self.model

    def copied(self, tensors: Sequence[Tensor]) -> gd.Model:
        for name, shape, tensor in zip(self.names, self.shapes, tensors):
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32, got {str(tensor.dtype).removeprefix('torch.')}; "
                                "the module computes in float32 (also under autocast): call .float()")
            if tensor.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if self.elsewhere is None:
            self.elsewhere = gd.Model(self.model.config)
        self.elsewhere.precision = self.model.precision
        flat, changed = self.elsewhere.flat_params(), False
        for offset, tensor in zip(self.offsets, tensors):
            value = tensor.detach().cpu().contiguous().numpy().reshape(-1)
            own = flat[offset:offset + value.size]
            if not np.array_equal(own.view(np.uint32), value.view(np.uint32)):
                own[:] = value
                changed = True
        if changed:
            self.elsewhere.touch()
            self.revision += 1
        return self.elsewhere

    def num_states(self, num_layers: int) -> int:
        return 1 + num_layers if num_layers else self.model.config.num_states


def _engine(handle: int) -> _Engine:
    engine = _Engine.live.get(handle)
    if engine is None:
        raise RuntimeError("handle: the GenDistiller module that this operator was called for is gone")
    return engine


def _options(engine: _Engine, seed: Optional[Tensor], num_layers: int) -> dict[str, Any]:
    """Keyword arguments of gd.Model.forward and .backward."""
    if seed is not None and (seed.dtype != torch.int64 or seed.shape != (3,)):
        raise ValueError(f"dropout_seed: expected int64 (3,), got {str(seed.dtype).removeprefix('torch.')} "
                         f"{tuple(seed.shape)}")
    return {"num_layers": num_layers or None, "num_threads": engine.num_threads,
            "dropout_seed": None if seed is None else tuple(seed.tolist())}


# Defined by schema, not by torch.library.custom_op, whose first call imports the whole compiler (about a
# second).
_INPUTS = "Tensor[] params, Tensor wavs, Tensor lengths, Tensor? seed"
torch.library.define("gendistiller::forward",
                     f"({_INPUTS}, int handle, int num_layers, bool differentiated) -> Tensor[]",
                     tags=torch.Tag.pt2_compliant_tag)
torch.library.define("gendistiller::backward",
                     f"({_INPUTS}, Tensor?[] grads, int handle, int num_layers) -> Tensor",
                     tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("gendistiller::forward", "CompositeExplicitAutograd")
def _forward(params: list[Tensor], wavs: Tensor, lengths: Tensor, seed: Optional[Tensor], handle: int,
             num_layers: int, differentiated: bool) -> list[Tensor]:
    """wavs float32 (B, N); lengths int64 (B,); seed int64 (3,): (seed, step, first utterance), None for no
    dropout; num_layers 0 for all; differentiated: in float32, as backward is, whatever the precision. Returns the
    hidden states, float32 (B, T, D) each, and the frames, int64 (B,)."""
    engine = _engine(handle)
    audio = wavs.detach().cpu().contiguous().numpy()
    precision = "float32" if differentiated else engine.model.precision
    hidden, frames = engine.model_for(params).forward(audio, lengths.cpu().numpy(), precision=precision,
                                                      **_options(engine, seed, num_layers))
    states = [torch.from_numpy(state).to(wavs.device) for state in hidden]
    return states + [torch.from_numpy(np.asarray(frames, np.int64)).to(lengths.device)]


@torch.library.register_fake("gendistiller::forward")
def _forward_fake(params, wavs, lengths, seed, handle, num_layers, differentiated):
    engine = _engine(handle)
    config, frames = engine.model.config, wavs.shape[1]
    for _, kernel, stride in config.conv_feature_layers:
        frames = (frames - kernel) // stride + 1
    shape = (wavs.shape[0], frames, config.encoder_embed_dim)
    states = [wavs.new_empty(shape) for _ in range(engine.num_states(num_layers))]
    return states + [lengths.new_empty(lengths.shape)]


@torch.library.impl("gendistiller::backward", "CompositeExplicitAutograd")
def _backward(params: list[Tensor], wavs: Tensor, lengths: Tensor, seed: Optional[Tensor],
              grads: list[Optional[Tensor]], handle: int, num_layers: int) -> Tensor:
    """grads: d loss / d state, (B, T, D) or None each. Returns d loss / d parameters, flat, on the
    parameters' device."""
    engine = _engine(handle)
    given = [None if grad is None else grad.to("cpu", torch.float32).contiguous().numpy() for grad in grads]
    flat = engine.model_for(params).backward(wavs.cpu().contiguous().numpy(), given, lengths.cpu().numpy(),
                                             **_options(engine, seed, num_layers))
    return torch.from_numpy(flat).to(params[0].device)


@torch.library.register_fake("gendistiller::backward")
def _backward_fake(params, wavs, lengths, seed, grads, handle, num_layers):
    return params[0].new_empty(_engine(handle).flat.size)


def _setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
    params, wavs, lengths, seed, ctx.handle, ctx.num_layers, _ = inputs
    ctx.engine = _engine(ctx.handle)  # the graph keeps the model alive, as it would a module's parameters
    ctx.save_for_backward(wavs, lengths, seed, *params)


def _gradient(ctx: Any, grads: Sequence[Optional[Tensor]]) -> tuple:
    wavs, lengths, seed, *params = ctx.saved_tensors
    given = list(grads[:-1])
    pieces: list[Optional[Tensor]] = [None] * len(params)
    if any(grad is not None for grad in given):
        flat = torch.ops.gendistiller.backward(params, wavs, lengths, seed, given, ctx.handle, ctx.num_layers)
        pieces = [flat.narrow(0, offset, param.numel()).view(param.shape)
                  for offset, param in zip(ctx.engine.offsets, params)]
    return pieces, None, None, None, None, None, None


torch.library.register_autograd("gendistiller::forward", _gradient, setup_context=_setup_context)


class GenDistiller(nn.Module):
    """A student (or a teacher, forward only) whose `state_dict()` has the checkpoint's names and float32
    values.

    source: a checkpoint's path (any format that `gd.Model.load` reads), a `gd.Model`, which is then shared,
        or a `gd.Config`, for random weights from `seed`.
    num_threads: of the kernels; None for the model's own choice.
    precision: 'float32', 'bfloat16' or 'int8', of the products where no gradient is asked for; None: the
        checkpoint's. The attribute `precision` changes it, for the model. Gradients are of the float32 model.

    A parameter that is moved stays usable: one put elsewhere in the CPU's memory as float32 is brought back
    into the flat buffer, one on another device is copied for each call (the kernels run on the CPU; the
    states go to the audio's device). Any dtype but float32 is a TypeError. Under torch.autocast the module
    computes in float32.
    """

    def __init__(self, source: "str | os.PathLike[str] | gd.Model | gd.Config", *, seed: int = 0,
                 num_threads: Optional[int] = None, precision: Optional[Precision] = None) -> None:
        super().__init__()
        if isinstance(source, gd.Config):
            model = gd.Model(source, seed=seed)
        elif isinstance(source, gd.Model):
            model = source
        elif isinstance(source, (str, os.PathLike)):
            model = gd.Model.load(source)
        else:
            raise TypeError("source: expected a checkpoint's path, a gendistiller_ext.Model or a "
                            f"gendistiller_ext.Config, got {type(source).__name__}")
        self._engine = _Engine(model)
        self._engine.num_threads = num_threads
        if precision is not None:
            self.precision = precision
        self._handle = self._engine.handle
        for name, view in zip(self._engine.names, self._engine.views):
            owner, leaf = self._owner(name, create=True)
            owner.register_parameter(leaf, nn.Parameter(view))

    def _owner(self, name: str, create: bool = False) -> tuple[nn.Module, str]:
        """The module that the dotted `name` lies in, and its last part."""
        *path, leaf = name.split(".")
        owner: nn.Module = self
        for part in path:
            if create and part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        return owner, leaf

    def _tensors(self) -> Iterator[Tensor]:
        """What stands under each checkpoint name now, in the flat buffer's order."""
        for name in self._engine.names:
            owner, leaf = self._owner(name)
            yield getattr(owner, leaf)

    def _adopt(self) -> None:
        """Bring float32 parameters that left the flat buffer for other memory of the CPU back into it."""
        engine = self._engine
        for i, tensor in enumerate(self._tensors()):
            view = engine.views[i]
            alike = (tensor.shape, tensor.dtype, tensor.device) == (view.shape, view.dtype, view.device)
            if isinstance(tensor, nn.Parameter) and alike and not engine.holds(i, tensor):
                with torch.no_grad():
                    view.copy_(tensor)
                tensor.data = view

    def _apply(self, fn: Any, recurse: bool = True) -> "GenDistiller":
        super()._apply(fn, recurse)
        self._adopt()
        return self

    @property
    def config(self) -> gd.Config:
        return self._engine.model.config

    @property
    def precision(self) -> Precision:
        return self._engine.model.precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        self._engine.model.precision = precision

    @property
    def model(self) -> gd.Model:
        """The gd.Model with the parameters' present values."""
        self._adopt()
        return self._engine.model_for(list(self._tensors()))

    @property
    def revision(self) -> int:
        """A number that is another one whenever the parameters' values may have changed."""
        _ = self.model
        return self._engine.revision

    def save(self, path: "str | os.PathLike[str]", dtype: Precision = "float32") -> None:
        """Write a checkpoint of the parameters' present values; dtype as in `gd.Model.save`."""
        self.model.save(path, dtype)

    def forward(self, wavs: "Tensor | Sequence[Tensor]", lengths: "Tensor | Sequence[int] | None" = None, *,
                num_layers: Optional[int] = None,
                dropout_seed: Optional[Tensor] = None) -> tuple[list[Tensor], Tensor]:
        """Hidden states, float32 (B, T, D) each, on the audio's device, and frames, int64 (B,), on the CPU.

        wavs: a list of 1-D tensors, or a padded (B, N) tensor with `lengths` (B,), samples of each row,
            None: all N.
        num_layers: how many layers to generate (encoder: how many blocks to run); None: the config's.
        dropout_seed: int64 (3,): (seed, step, index of the first utterance). None: none in eval mode, under
            no_grad or with all parameters frozen; else one drawn from torch's generator, as nn.Dropout would.
        No gradient flows to the audio.
        """
        if isinstance(wavs, Tensor):
            if wavs.dim() != 2:
                raise ValueError("wavs: expected (batch, samples) or a list of 1-D tensors, got "
                                 f"{tuple(wavs.shape)}")
            rows, samples = wavs.shape
            sizes = torch.full((rows,), samples) if lengths is None else torch.as_tensor(lengths).long()
        else:
            if lengths is not None:
                raise ValueError("lengths: expected None with a list of wavs, which have their own")
            if not len(wavs) or any(wav.dim() != 1 for wav in wavs):
                raise ValueError("wavs: expected at least one 1-D tensor, got shapes "
                                 f"{[tuple(wav.shape) for wav in wavs]}")
            sizes = torch.tensor([wav.shape[0] for wav in wavs])
            wavs = pad_sequence(list(wavs), batch_first=True)
        if not torch.compiler.is_compiling():
            self._adopt()
        params = list(self._tensors())
        differentiated = torch.is_grad_enabled() and any(param.requires_grad for param in params)
        if dropout_seed is None and self.training and differentiated:
            dropout_seed = torch.cat((torch.randint(2 ** 62, (2,)), torch.zeros(1, dtype=torch.int64)))
        # The engine is reached by number: an operator's arguments are tensors and plain values.
        audio = wavs.detach().to(torch.float32)
        *hidden, frames = torch.ops.gendistiller.forward(params, audio, sizes.cpu(), dropout_seed,
                                                         self._handle, num_layers or 0, differentiated)
        return hidden, frames

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_engine"] = (self.config, self._engine.num_threads, self.precision)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        config, num_threads, precision = state["_engine"]
        super().__setstate__(state)
        self._engine = _Engine(gd.Model(config))
        self._engine.num_threads = num_threads
        self.precision = precision
        self._handle = self._engine.handle
        self._adopt()

    def extra_repr(self) -> str:
        return f"{self.config.architecture}, {self._engine.model.num_params:,} parameters"
