"""What speed.py compares: each engine as its users run it, float32 unless its name says otherwise.

A peer is made in a process of its own (worker.py), for one model and number of threads:

    peer = PEERS[name](folder, model, threads)      # ImportError or Unavailable where it can't run here
    peer.prepare(wavs)                              # for this shape
    states = peer.run()                             # list of float32 (B, T, D): what is timed; the first may compile

`builds`: it makes code or a file for each shape, and may take longer than a pass for it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


class Unavailable(Exception):
    """The peer is installed but lacks what was asked for."""


def checkpoint(folder: Path, model: str) -> Path:
    return folder / f"{model}.safetensors"


def onnx_file(folder: Path, model: str, batch: int, samples: int) -> Path:
    return folder / f"{model}-{batch}x{samples}.onnx"


def load_torch(folder: Path, model: str):
    import gendistiller_ext as gd
    from torch_models import speech_model

    ours = gd.Model.load(checkpoint(folder, model))
    return speech_model(ours.config, ours.params)


def export_onnx(folder: Path, model: str, batch: int, samples: int) -> Path:
    """Exports Speech at a fixed shape, so that every peer may fold what depends on the length alone. With
    SDPBackend.MATH: the exporter of PyTorch 2.13 fails on the CPU's fused attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    path = onnx_file(folder, model, batch, samples)
    with sdpa_kernel(SDPBackend.MATH):
        torch.onnx.export(load_torch(folder, model), (torch.zeros(batch, samples),), str(path), dynamo=True,
                          input_names=["wavs"], external_data=False, verbose=False)
    return path


class Ours:
    """gendistiller_ext. release() gives up what prepare() made for a shape."""

    precision = "float32"
    builds = False
    package = "gendistiller_ext"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import gendistiller_ext as gd

        self.threads = threads
        self.model = gd.Model.load(checkpoint(folder, model))

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = wavs

    def release(self) -> None:
        self.wavs = None

    def run(self) -> list:
        try:
            return self.model.forward(self.wavs, precision=self.precision, num_threads=self.threads)[0]
        except NotImplementedError as error:
            raise Unavailable(str(error)) from error


class OursBfloat16(Ours):
    precision = "bfloat16"


class OursInt8(Ours):
    precision = "int8"


class Torch:
    precision = "float32"
    builds = False
    package = "torch"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        self.model = load_torch(folder, model)

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = self.torch.from_numpy(wavs)

    def release(self) -> None:
        self.wavs = None

    def run(self) -> list:
        with self.torch.inference_mode():
            return [state.numpy() for state in self.model(self.wavs)]


def compile_again(peer: Torch) -> None:
    """For this shape alone, which makes the faster code."""
    peer.torch.compiler.reset()
    peer.eager = getattr(peer, "eager", peer.model)
    peer.model = peer.torch.compile(peer.eager, dynamic=False)


class TorchCompiled(Torch):
    builds = True

    def prepare(self, wavs: np.ndarray) -> None:
        super().prepare(wavs)
        compile_again(self)


class TorchBfloat16(Torch):
    precision = "bfloat16"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        super().__init__(folder, model, threads)
        self.model = self.model.to(self.torch.bfloat16)

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = self.torch.from_numpy(wavs).to(self.torch.bfloat16)

    def run(self) -> list:
        with self.torch.inference_mode():
            return [state.float().numpy() for state in self.model(self.wavs)]


class TorchInt8(Torch):
    """Dynamic quantization of the linear layers: PyTorch's for a model as it is, without rewriting it."""

    precision = "int8"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        super().__init__(folder, model, threads)
        self.model = self.torch.ao.quantization.quantize_dynamic(self.model, {self.torch.nn.Linear},
                                                                 dtype=self.torch.qint8)


class TorchCompiledBfloat16(TorchBfloat16):
    builds = True

    def prepare(self, wavs: np.ndarray) -> None:
        super().prepare(wavs)
        compile_again(self)


class OnnxRuntime:
    precision = "float32"
    builds = False
    package = "onnxruntime"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import onnxruntime

        self.onnxruntime = onnxruntime
        self.folder, self.model = folder, model
        self.options = onnxruntime.SessionOptions()
        self.options.intra_op_num_threads = threads
        self.options.inter_op_num_threads = 1

    def model_file(self, wavs: np.ndarray) -> Path:
        return onnx_file(self.folder, self.model, *wavs.shape)

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = wavs
        self.session = None
        self.session = self.onnxruntime.InferenceSession(str(self.model_file(wavs)), self.options,
                                                         providers=["CPUExecutionProvider"])

    def release(self) -> None:
        self.wavs = self.session = None

    def run(self) -> list:
        return self.session.run(None, {"wavs": self.wavs})


def int8_file(source: Path, wavs: np.ndarray) -> Path:
    """ONNX Runtime's static quantization, as its documentation advises for CNNs, and what OpenVINO reads too: weights
    per channel, activations by their range, which is calibrated on this very audio."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"wavs": wavs}])

        def get_next(self):
            return next(self.batches, None)

    target, prepared = source.with_suffix(".int8.onnx"), source.with_suffix(f".{os.getpid()}.onnx")
    if not target.exists():
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(prepared), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        op_types_to_quantize=["MatMul", "Gemm", "Conv"], activation_type=QuantType.QUInt8,
                        weight_type=QuantType.QInt8)
        prepared.replace(target)
    return target


class OnnxRuntimeInt8(OnnxRuntime):
    precision = "int8"
    builds = True

    def model_file(self, wavs: np.ndarray) -> Path:
        return int8_file(super().model_file(wavs), wavs)


class OpenVino:
    precision = "float32"
    builds = False
    package = "openvino"
    hint = "f32"  # else it chooses bfloat16 by itself where the machine has it

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import openvino

        self.core = openvino.Core()
        self.folder, self.model = folder, model
        if self.hint == "bf16" and "BF16" not in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Unavailable("no bfloat16 on this machine")
        self.settings = {"INFERENCE_PRECISION_HINT": self.hint, "INFERENCE_NUM_THREADS": threads,
                         "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}

    def model_file(self, wavs: np.ndarray) -> Path:
        return onnx_file(self.folder, self.model, *wavs.shape)

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = wavs
        self.request = None
        compiled = self.core.compile_model(str(self.model_file(wavs)), "CPU", self.settings)
        self.request = compiled.create_infer_request()

    def release(self) -> None:
        self.wavs = self.request = None

    def run(self) -> list:
        return list(self.request.infer([self.wavs], share_inputs=True, share_outputs=True).to_tuple())


class OpenVinoBfloat16(OpenVino):
    precision = "bfloat16"
    hint = "bf16"


class OpenVinoInt8(OpenVino):
    """What is not int8 in bfloat16 where the machine has it: the fastest of its ways."""

    precision = "int8"
    builds = True

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        super().__init__(folder, model, threads)
        if "BF16" in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            self.settings["INFERENCE_PRECISION_HINT"] = "bf16"

    def model_file(self, wavs: np.ndarray) -> Path:
        return int8_file(super().model_file(wavs), wavs)


PEERS = {
    "gendistiller": Ours,
    "PyTorch": Torch,
    "PyTorch compiled": TorchCompiled,
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVino,
    "gendistiller bfloat16": OursBfloat16,
    "PyTorch bfloat16": TorchBfloat16,
    "PyTorch compiled bfloat16": TorchCompiledBfloat16,
    "OpenVINO bfloat16": OpenVinoBfloat16,
    "gendistiller int8": OursInt8,
    "PyTorch int8": TorchInt8,
    "ONNX Runtime int8": OnnxRuntimeInt8,
    "OpenVINO int8": OpenVinoInt8,
}
