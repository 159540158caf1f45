"""The CUDA backend without a GPU: its operations, by kernels and host code that are the device's own, on an emulated
one."""

from __future__ import annotations

import re
from pathlib import Path

from emulated import CUDA, HOST_OPERATIONS, ROOT, Builds, bench, output


def test_operations(builds: Builds, tmp_path: Path) -> None:
    """Every case of the operations that the backend has, in three schedules of threads and blocks, with the same
    bits."""
    done = bench(builds.get("plain"), report=tmp_path / "report")
    assert done.returncode == 0, output(done)
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed, [1-9]\d* unsupported", done.stdout.splitlines()[-1])
    unsupported = set(re.findall(r"^unsupported: (\w+, \w+)$", done.stdout, re.MULTILINE))
    assert unsupported == {f"{name}, float32" for name in HOST_OPERATIONS} | {"linear_reduced, int8"}

    *kernels, left = (tmp_path / "report").read_text().splitlines()
    assert left == "left: memory 0 streams 0"
    ran = {}
    for line in kernels:
        name, counts = line.rsplit(":", 1)
        ran[name] = dict(zip(*[iter(counts.split())] * 2))
        assert set(ran[name]) == {"forward", "reverse", "random"} and "0" not in ran[name].values(), line
    assert len(ran) == len(kernels_in_source())
    for kernel in kernels_in_source():
        assert any(re.search(rf"\b{kernel}\b", name) for name in ran), f"{kernel} never ran"


def kernels_in_source() -> set[str]:
    """Kernels of the .cu files: functions, and what gd_for_elements() is given."""
    source = "".join(path.read_text(encoding="utf-8") for path in CUDA.glob("*.cu"))
    elements = re.findall(r"gd_for_elements\([^;]*?(\w+)\{", source)
    return {*re.findall(r"__global__ void (\w+)", source), *elements}


def test_every_operation_is_there() -> None:
    header = (ROOT / "csrc" / "backend.h").read_text(encoding="utf-8")
    members = set(re.findall(r"\(\*(\w+)\)\(", re.search(r"struct gd_backend \{.*?\n\};", header, re.DOTALL)[0]))
    table = (CUDA / "backend_cuda.c").read_text(encoding="utf-8")
    filled = set(re.findall(r"^    \.(\w+) = \w+,$", table, re.MULTILINE))
    assert filled - {"name", "shares_memory", "tile_frames", "block_rows"} == members - HOST_OPERATIONS


def test_address_sanitizer(builds: Builds) -> None:
    """Operands are whole allocations, so that any access beside one is an error."""
    done = bench(builds.get("address"), "--exact", "layer_norm", "activate activation=1 ",
                 "activate_backward activation=1 ", "no_activation", "axpby", "round_rows", "bias_backward rows", "gemm m=1 ", "gemm m=12 ", "gemm m=13 ", "linear rows=1 ",
                 "linear rows=4 ", "linear rows=12 ", "linear rows=25 ", "linear rows=17 ", "dropout width=",
                 "linear_reduced rows=9 ", "linear_reduced rows=23 ", "gemm_reduced m=12 ", "gemm_reduced m=13 ",
                 "attention_reduced heads=2 head_dim=3 ",
                 "scatter_rows width=", "gather_rows width=", "loss_rows rows=5 ", "position_bias heads=2 longest=40 ",
                 "position_bias_backward heads=2 longest=40 ", "gate rows=5 ", "gate_backward rows=5 ",
                 "gate_backward rows=70 ", "attention heads=2 head_dim=3 rows=5 ", "attention heads=2 head_dim=16 ",
                 "attention heads=2 head_dim=200 ", "attention_backward heads=2 head_dim=3 rows=5 ",
                 "attention_backward heads=2 head_dim=16 ", "attention_backward heads=2 head_dim=129 ",
                 "moments frames=33 ", "norm_fold dim=17 ", "norm_fold_backward dim=17 ", "normalize samples=17 ",
                 "normalize samples=31999 ", "conv_backward rows=7 ", "conv_backward rows=33 ", "weight_norm out=4 ",
                 "weight_norm_backward out=4 ", "pos_conv batch=2 longest=20 ", "pos_conv batch=3 longest=33 ",
                 "pos_conv batch=4 longest=40 ", "pos_conv_backward_weight batch=3 longest=33 ")
    assert done.returncode == 0, output(done)[-4000:]
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed(, \d+ unsupported)?", done.stdout.splitlines()[-1])


def test_thread_sanitizer(builds: Builds) -> None:
    done = bench(builds.get("thread"), "--exact", "layer_norm rows=5 ", "layer_norm rows=33 ",
                 "layer_norm_backward rows=5 ", "layer_norm_backward rows=65 ", "layer_norm_backward rows=130 ",
                 "activate activation=1 rows=3 ", "activate_backward activation=1 rows=2 ", "axpby rows=50 ",
                 "bias_backward rows=257 ", "bias_backward rows=99 ", "linear rows=12 ", "linear_reduced rows=12 ",
                 "position_bias heads=2 longest=40 ", "position_bias_backward heads=2 longest=40 ", "gate rows=5 ",
                 "gate_backward rows=70 ", "attention_reduced heads=3 head_dim=15 ",
                 "attention heads=3 head_dim=15 ", "attention heads=2 head_dim=200 ",
                 "attention_backward heads=3 head_dim=15 ", "attention_backward heads=2 head_dim=129 ",
                 "moments frames=50 kernel=3 ", "norm_fold dim=5 ", "norm_fold_backward dim=5 ",
                 "normalize samples=31999 offset_1000=500 deviation_1000=100 given=0", "conv_backward rows=7 ",
                 "weight_norm out=2 in=1 ", "weight_norm_backward out=2 in=2 ", "pos_conv batch=3 longest=17 ",
                 "pos_conv_backward_weight batch=3 longest=17 ")
    assert done.returncode == 0 and "WARNING: ThreadSanitizer" not in done.stderr, output(done)[-4000:]
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed(, \d+ unsupported)?", done.stdout.splitlines()[-1])
