"""The CUDA backend as a library: how it fails, seen from Python, where it finds cuBLAS, what it declares against
NVIDIA's headers, and what nvcc made of it. On a machine with a device the operations' cases run there too."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable

import pytest

import gendistiller_ext as gd
from emulated import (CC, CUBLAS, CUDA, HERE, HOST_OPERATIONS, PACKAGE, PLUGIN, Builds, backend_sources, bench,
                      compile_file, lay_out_package, output, run, succeed)

# ---- Failures, from Python --------------------------------------------------------------------------------------

SCRIPT = """
import sys, warnings
import numpy as np
import gendistiller_ext as gd
try:
    print(gd.devices())
    model = gd.Model(gd.Config(conv_feature_layers=((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2,
                               encoder_embed_dim=12, encoder_ffn_embed_dim=20, encoder_attention_heads=3, conv_pos=8,
                               conv_pos_groups=2),
                     device=sys.argv[1])
    params = {name: value.copy() for name, value in model.params.items()}
    try:
        hidden, frames = model.forward(np.zeros((2, 4000), np.float32) + 0.1)
        print(len(hidden), hidden[0].shape, frames)
    finally:
        assert all(np.array_equal(params[name], value) for name, value in model.params.items())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def python(folder: Path, plugin: Path | None, device: str, cublas: Path | None = None, **settings: object) -> list[str]:
    """What SCRIPT prints where the package has this plug-in."""
    if not (folder / "gendistiller_ext").exists():
        lay_out_package(folder, plugin, cublas)
    done = run(sys.executable, "-c", SCRIPT, device, cwd=folder, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1",
               GD_EMULATOR=",".join(f"{key}={value}" for key, value in settings.items()))
    assert done.returncode == 0, output(done)
    return done.stdout.splitlines()


def test_python_on_an_emulated_device(builds: Builds, tmp_path: Path) -> None:
    def say(device: str = "cuda", **settings: object) -> list[str]:
        return python(tmp_path, builds.get("plain") / PLUGIN, device, builds.cublas, **settings)

    devices = "['cpu', 'cuda:0', 'cuda:1']"
    assert say(devices=2) == [devices, "3 (2, 12, 12) [12 12]"]
    assert say("cuda:2", devices=2) == [devices, "DeviceError: device: expected cuda:0 to cuda:1, got cuda:2"]
    failures = {
        "driver=0": "this machine has no NVIDIA driver (libcuda.so.1)",
        "driver=12080": "the NVIDIA driver is too old: it knows CUDA 12.8, this library needs 13.0",
        "devices=0": "the NVIDIA driver sees no device",
        "capability=70": "cuda:0 has compute capability 7.0, this library needs 7.5 or later",
    }
    for setting, message in failures.items():
        key, value = setting.split("=")
        assert say(**{key: value}) == ["['cpu']", f"DeviceError: device: {message}"]


def test_allocations_that_fail(builds: Builds, tmp_path: Path) -> None:
    """Parameters, workspace, packed weights: each is refused in turn."""
    said = [python(tmp_path, builds.get("plain") / PLUGIN, "cuda", builds.cublas, fail_malloc=n)[-1]
            for n in range(1, 5)]
    for message, wanted in zip(said, ("parameters on the device", "workspace of", "packed weights")):
        assert re.fullmatch(f"MemoryError: out of memory for .*{wanted}.*", message)
    assert said[3] == "3 (2, 12, 12) [12 12]"


def test_launches_and_products_that_fail(builds: Builds) -> None:
    package = builds.get("plain")
    failed = bench(package, "layer_norm rows=1 ", fail_launch=1)
    assert "the device failed: device: layer_norm: invalid argument" in failed.stdout
    said = bench(package, "gemm m=5 ", fail_gemm=1).stdout
    assert "the device failed: device: cublasGemmEx: the function failed to launch on the GPU" in said


def test_where_cublas_is_found(builds: Builds, tmp_path: Path) -> None:
    for name in ("ops", PLUGIN):
        shutil.copy(builds.get("plain") / name, tmp_path)
    program = [tmp_path / "ops", "--backend", "cuda", "gemm m=5 "]
    done = run(*program)
    if "cuBLAS cannot be found; the nvidia-cublas package has it: libcublas.so.13" not in done.stdout:
        assert done.returncode == 0, output(done)  # the system has one
    done = run(*program, LD_LIBRARY_PATH=str(builds.cublas.parent))
    assert done.returncode == 0, output(done)
    empty = tmp_path / CUBLAS
    (tmp_path / "empty.c").write_text("")
    succeed(*CC, "-shared", "-fPIC", tmp_path / "empty.c", f"-Wl,-soname,{CUBLAS}", "-o", empty)
    done = run(*program, LD_LIBRARY_PATH=str(tmp_path))
    assert "cuBLAS has no cublasCreate_v2; expected version 12 or later" in done.stdout


# ---- A plug-in of another build ---------------------------------------------------------------------------------

class OtherBuild:
    """The emulated plug-in, of other sources of ours, and what Python says of it."""

    def __init__(self, builds: Builds, folder: Path) -> None:
        self.builds, self.folder, self.count = builds, folder, 0
        for part in ("csrc", "cuda"):
            shutil.copytree(CUDA.parent / part, folder / "sources" / part)

    def say(self, header: str, edit: Callable[[str], str], *flags: str) -> str:
        """With this header edited, and then as it was."""
        path = self.folder / "sources" / "csrc" / header
        text, self.count = path.read_text(encoding="utf-8"), self.count + 1
        folder = self.folder / str(self.count)
        folder.mkdir()
        path.write_text(edit(text), encoding="utf-8")
        try:
            compile_file(self.folder / "sources" / "cuda" / "backend_cuda.c", folder / "backend_cuda.o", *flags)
        finally:
            path.write_text(text, encoding="utf-8")
        objects = self.builds.get("plain").parent / "objects"
        others = [objects / f"{source.name}.o" for source in backend_sources() if source.name != "backend_cuda.c"]
        self.builds.link_plugin("plain", [folder / "backend_cuda.o", *others], folder / PLUGIN)
        return python(folder, folder / PLUGIN, "cuda", self.builds.cublas, devices=1)[-1]


@pytest.fixture(scope="module")
def other(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> OtherBuild:
    builds.get("plain")
    return OtherBuild(builds, tmp_path_factory.mktemp("other"))


REFUSAL = re.compile(r"DeviceError: device: \S+ is of another build: expected (\d\S+ \(backend\.h [0-9a-f]{16}\)), "
                     r"got (\S+ \(backend\.h [0-9a-f]{16}\)); install the package anew")


def replace(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)
    return edit


GATE = "    void (*gate)(gd_context *, const struct gd_gate *);\n"
GATE_BACKWARD = "    void (*gate_backward)(gd_context *, const struct gd_gate_backward *);\n"


def test_plugin_of_the_same_headers(other: OtherBuild) -> None:
    """In another folder, seen by another path."""
    assert other.say("backend.h", lambda text: text) == "3 (2, 12, 12) [12 12]"


@pytest.mark.parametrize("header, old, new", [
    ("backend.h", "const float *gamma, *stats;", "const float *stats, *gamma;"),  # a struct of the same size
    ("backend.h", GATE + GATE_BACKWARD, GATE_BACKWARD + GATE),  # the table's order
    ("backend.h", "size_t scratch_stride; /* bytes */", "size_t scratch_stride; /* floats */"),
    ("gendistiller.h", "{ GD_FLOAT32, GD_BFLOAT16, GD_INT8 }", "{ GD_FLOAT32, GD_INT8, GD_BFLOAT16 }"),
    ("gendistiller.h", '#define GD_VERSION "', '#define GD_VERSION "9'),
])
def test_plugin_of_other_headers(other: OtherBuild, header: str, old: str, new: str) -> None:
    refusal = REFUSAL.fullmatch(other.say(header, replace(old, new)))
    assert refusal and refusal[1] != refusal[2]
    assert refusal[1].startswith(f"{gd.__version__} ")
    assert refusal[2].startswith("9" if "VERSION" in old else f"{gd.__version__} ")


def test_plugin_of_other_flags(other: OtherBuild) -> None:
    """The same text with other sizes."""
    assert REFUSAL.fullmatch(other.say("backend.h", lambda text: text, "-fshort-enums"))


def test_every_header_of_the_backend_counts(other: OtherBuild) -> None:
    made = output(run(*CC, "-MM", CUDA.parent / "csrc" / "backend.h")).split()
    headers = sorted({Path(word).name for word in made if word.endswith(".h")})
    assert {"backend.h", "gendistiller.h"} <= set(headers)
    for header in headers:
        assert REFUSAL.fullmatch(other.say(header, lambda text: text + "/* another */\n")), header


def test_plugin_without_its_build(builds: Builds, tmp_path: Path) -> None:
    builds.get("plain")
    (tmp_path / "empty.c").write_text("")
    succeed(*CC, "-shared", "-fPIC", tmp_path / "empty.c", "-o", tmp_path / PLUGIN)
    said = python(tmp_path, tmp_path / PLUGIN, "cuda")[-1]
    assert re.fullmatch(rf"DeviceError: device: \S+{PLUGIN} has no gd_cuda_build", said)


# ---- Against NVIDIA's headers -----------------------------------------------------------------------------------

def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gendistiller_cuda_build", CUDA / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return build_script().find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def toolkit(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of CUDA's headers."""
    source = tmp_path_factory.mktemp("toolkit") / "empty.cu"
    source.write_text("")
    for folder in re.findall(r'"-I([^"]+)"', output(run(nvcc, "--dryrun", "-c", source))):
        if (Path(folder) / "cuda_runtime_api.h").is_file():
            return Path(folder)
    pytest.skip(f"{nvcc} has no cuda_runtime_api.h")


def test_stand_in_runtime_is_declared_as_the_real_one(toolkit: Path, tmp_path: Path) -> None:
    header = "".join((HERE / "include" / f"{name}.h").read_text(encoding="utf-8")
                     for name in ("cuda_runtime_api", "library_types"))
    constants = re.findall(r"\b(cuda\w+|CUDA_R_\w+) = (\d+)", header)
    prototypes = re.findall(r"^(?:cudaError_t|const char \*) ?\*?cuda\w+\([^;]*\);", header, re.MULTILINE)
    assert len(constants) >= 10 and len(prototypes) >= 15
    include = "#include <cuda_runtime_api.h>\n#include <library_types.h>\n"
    (tmp_path / "check.c").write_text(include + "\n".join(prototypes) + "\n" + "\n".join(
        f'_Static_assert({name} == {value}, "{name}");' for name, value in constants) + "\n")
    succeed(*CC, "-std=gnu11", "-Werror", f"-I{toolkit}", "-fsyntax-only", tmp_path / "check.c")


def test_cublas_api_is_the_real_ones(toolkit: Path, tmp_path: Path) -> None:
    wheels = [Path(entry) / "nvidia" / "cu13" / "include" for entry in sys.path]
    named = [Path(folder) for folder in [os.environ.get("CUBLAS_INCLUDE")] if folder]
    for folder in (*named, toolkit, *wheels):
        if (folder / "cublas_v2.h").is_file():
            break
    else:
        pytest.skip("no cublas_v2.h: neither in CUBLAS_INCLUDE, nor in the toolkit, nor from nvidia-cublas")
    (tmp_path / "check.c").write_text(f"""#define GD_CUBLAS_HEADER <cublas_v2.h>
#include "{CUDA / 'cublas_api.h'}"
#define SAME_VALUE(name, value) _Static_assert((int)name == value, #name);
#define SAME_TYPE(member, symbol, result, arguments) .member = symbol,
GD_CUBLAS_CONSTANTS(SAME_VALUE)
_Static_assert(sizeof(cublasStatus_t) == sizeof(int) && sizeof(cublasOperation_t) == sizeof(int), "enums");
_Static_assert(sizeof(cublasMath_t) == sizeof(int) && sizeof(cublasComputeType_t) == sizeof(int), "enums");
_Static_assert(sizeof(cublasGemmAlgo_t) == sizeof(int), "enums");
const struct gd_cublas real = {{GD_CUBLAS_FUNCTIONS(SAME_TYPE)}};
""")
    succeed(*CC, "-std=gnu11", "-Werror", f"-I{folder}", f"-I{toolkit}", "-fsyntax-only", tmp_path / "check.c")


# ---- The library that nvcc built --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def plugin(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed one; where the package was installed without: one built here."""
    if (PACKAGE / PLUGIN).is_file():
        return PACKAGE / PLUGIN
    folder = tmp_path_factory.mktemp("plugin")
    return build_script().build(folder, folder / "objects")


def test_what_the_plugin_exports_and_needs(plugin: Path) -> None:
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("no nm or readelf")
    exported = [line.split()[-1] for line in run("nm", "-D", "--defined-only", plugin).stdout.splitlines()]
    assert sorted(exported) == ["gd_cuda_build", "gd_cuda_open"]
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", plugin).stdout)
    assert not [name for name in needed if re.search("cuda|cublas|stdc", name)]


def device_count() -> int:
    """Of the driver's own counting: what the plug-in says is under test."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return 0
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def test_plugin_says_why_there_is_no_device(plugin: Path, tmp_path: Path) -> None:
    if device_count():
        pytest.skip("this machine has a CUDA device")
    devices, error = python(tmp_path, plugin, "cuda")
    assert devices == "['cpu']"
    assert re.match("DeviceError: device: (this machine has no NVIDIA driver|the NVIDIA driver|CUDA: )", error)


def test_no_plugin(tmp_path: Path) -> None:
    devices, error = python(tmp_path, None, "cuda")
    assert devices == "['cpu']"
    assert re.fullmatch(rf"DeviceError: device: built without CUDA: there is no .*{PLUGIN}", error)
    (tmp_path / "gendistiller_ext" / PLUGIN).write_text("no library")
    assert python(tmp_path, None, "cuda")[-1].startswith("DeviceError: device: the CUDA backend cannot be loaded: ")


def test_operations_on_a_real_device(builds: Builds, plugin: Path, tmp_path: Path) -> None:
    if not device_count():
        pytest.skip("this machine has no CUDA device")
    shutil.copy(builds.get("plain") / "ops", tmp_path)
    shutil.copy(plugin, tmp_path / PLUGIN)
    wheels = [Path(entry) / "nvidia" / "cu13" / "lib" for entry in sys.path]
    done = run(tmp_path / "ops", "--backend", "cuda", LD_LIBRARY_PATH=os.pathsep.join(
        [str(wheel) for wheel in wheels if wheel.is_dir()] + [os.environ.get("LD_LIBRARY_PATH", "")]))
    assert done.returncode == 0, output(done)
    assert set(re.findall(r"^unsupported: (\w+), float32$", done.stdout, re.MULTILINE)) == HOST_OPERATIONS
