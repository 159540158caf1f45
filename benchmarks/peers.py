"""What speed.py compares: each engine as its users run it, float32 unless its name says otherwise.

A peer is made in a process of its own (worker.py), for one model and number of threads:

    peer = PEERS[name](folder, model, threads)      # ImportError or Unavailable where it can't run here
    peer.prepare(wavs)                              # for this shape: builds, compiles
    states = peer.run()                             # list of float32 (B, T, D): what is timed
"""

from __future__ import annotations

import ctypes
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
    precision = "float32"
    package = "gendistiller_ext"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import gendistiller_ext as gd

        self.threads = threads
        self.model = gd.Model.load(checkpoint(folder, model))

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = wavs

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
    package = "torch"

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import torch

        self.torch = torch
        torch.set_num_threads(threads)
        self.model = load_torch(folder, model)

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = self.torch.from_numpy(wavs)

    def run(self) -> list:
        with self.torch.inference_mode():
            return [state.numpy() for state in self.model(self.wavs)]


class TorchCompiled(Torch):
    def prepare(self, wavs: np.ndarray) -> None:
        super().prepare(wavs)
        self.torch.compiler.reset()
        self.eager = getattr(self, "eager", self.model)
        self.model = self.torch.compile(self.eager, dynamic=False)


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


class OnnxRuntime:
    precision = "float32"
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

    def run(self) -> list:
        return self.session.run(None, {"wavs": self.wavs})


class OnnxRuntimeInt8(OnnxRuntime):
    """Dynamic quantization, as ONNX Runtime's documentation advises for transformers: weights per channel,
    activations by their range at run time. Convolutions too: without them nothing is gained here."""

    precision = "int8"

    def model_file(self, wavs: np.ndarray) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source = super().model_file(wavs)
        target = source.with_suffix(".int8.onnx")
        if not target.exists():
            # QUInt8 convolution weights are what ONNX Runtime has a ConvInteger kernel for.
            quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QUInt8,
                             op_types_to_quantize=["MatMul", "Conv"])
        return target


class OpenVino:
    precision = "float32"
    package = "openvino"
    hint = "f32"  # else it chooses bfloat16 by itself where the machine has it

    def __init__(self, folder: Path, model: str, threads: int) -> None:
        import openvino

        self.core = openvino.Core()
        self.folder, self.model = folder, model
        self.settings = {"INFERENCE_PRECISION_HINT": self.hint, "INFERENCE_NUM_THREADS": threads,
                         "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
        if self.hint == "bf16" and "BF16" not in self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Unavailable("no bfloat16 on this machine")

    def prepare(self, wavs: np.ndarray) -> None:
        self.wavs = wavs
        self.request = None
        compiled = self.core.compile_model(str(onnx_file(self.folder, self.model, *wavs.shape)), "CPU",
                                           self.settings)
        self.request = compiled.create_infer_request()

    def run(self) -> list:
        return list(self.request.infer([self.wavs], share_inputs=True, share_outputs=True).to_tuple())


class OpenVinoBfloat16(OpenVino):
    precision = "bfloat16"
    hint = "bf16"


PEERS = {
    "gendistiller": Ours,
    "PyTorch": Torch,
    "PyTorch compiled": TorchCompiled,
    "ONNX Runtime": OnnxRuntime,
    "OpenVINO": OpenVino,
    "gendistiller bfloat16": OursBfloat16,
    "PyTorch bfloat16": TorchBfloat16,
    "OpenVINO bfloat16": OpenVinoBfloat16,
    "gendistiller int8": OursInt8,
    "ONNX Runtime int8": OnnxRuntimeInt8,
}


def library_gemm(library: str, threads: int, m: int, k: int, n: int):
    """A function that multiplies (m, k) by (k, n) in float32 with PyTorch's or NumPy's BLAS, and its name."""
    a, b = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
    if library == "numpy":
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)
        info = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
        name = "its BLAS"
        if info:
            name = f"{info[0]['internal_api']} {info[0]['version']} ({info[0].get('architecture')})"
        out = np.empty((m, n), np.float32)
        return (lambda: np.matmul(a, b, out=out)), f"NumPy: {name}"
    import torch

    torch.set_num_threads(threads)
    x, y = torch.from_numpy(a), torch.from_numpy(b)
    out = torch.empty(m, n)
    name = "MKL" if torch.backends.mkl.is_available() else "its BLAS"
    return (lambda: torch.mm(x, y, out=out)), f"PyTorch: {name}"


def peak_memory() -> dict[str, int]:
    """Bytes of this process: now, and at most so far."""
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            fields = dict(line.split(":", 1) for line in stream)
        return {"now": int(fields["VmRSS"].split()[0]) * 1024, "peak": int(fields["VmHWM"].split()[0]) * 1024}
    except (OSError, KeyError):
        import resource

        unit = 1 if os.uname().sysname == "Darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"now": peak, "peak": peak}


def forget_peak() -> None:
    """Lets the peak start again from now, where the system can (Linux)."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
            stream.write("5")
    except OSError:
        pass


def register_peak(library: str, precision: str, threads: int) -> float:
    """Operations a second of `threads` threads at once, best of 10 runs of about 50 ms: the system takes a
    while to give each thread a core. 0 without the instructions."""
    import time
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    run = ctypes.CDLL(library).peak_run
    run.restype, run.argtypes = ctypes.c_double, [ctypes.c_char_p, ctypes.c_int64]
    barrier, rounds = Barrier(threads), 1000
    begin = time.perf_counter()
    if not run(precision.encode(), rounds):
        return 0.0
    while time.perf_counter() - begin < 0.05:
        begin, rounds = time.perf_counter(), 2 * rounds
        run(precision.encode(), rounds)

    def one(_) -> tuple[float, float, float]:
        barrier.wait()
        begin = time.perf_counter()
        done = run(precision.encode(), rounds)
        return done, begin, time.perf_counter()

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(10):
            done, begins, ends = zip(*pool.map(one, range(threads)))
            best = max(best, sum(done) / (max(ends) - min(begins)))
    return best
