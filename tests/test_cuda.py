"""The CUDA backend without a GPU: its kernels and its unchanged host code on an emulated device (tests/cuda), what the
emulator and the sanitizers must find, and the library that nvcc built. On a machine with a device the same cases run
there too."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

import gendistiller_ext as gd

ROOT = Path(__file__).resolve().parent.parent
CUDA, HERE, PACKAGE = ROOT / "cuda", ROOT / "tests" / "cuda", Path(gd.__file__).resolve().parent
CC, CXX = shlex.split(os.environ.get("CC", "cc")), shlex.split(os.environ.get("CXX", "c++"))
PLUGIN, CUBLAS = "gendistiller_cuda.so", "libcublas.so.13"

WARN = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
EMULATED = ["-g", "-O1", "-fPIC", *WARN, f"-I{HERE / 'include'}", f"-I{HERE}", f"-I{CUDA}", "-DGD_CUDA_EMULATOR",
            "-DGD_CUDA_LOWEST_CAPABILITY=75"]
LANGUAGE = {".c": [*CC, "-std=gnu11"], ".cpp": [*CXX, "-std=c++17"], ".cu": [*CXX, "-std=c++17", "-x", "c++"]}

#: How a build is instrumented, and what the emulator itself is told.
VARIANTS = {"plain": ([], []), "address": (["-fsanitize=address"], ["-DEMULATOR_ASAN"]),
            "thread": (["-fsanitize=thread"], ["-DEMULATOR_TSAN"])}

#: The operations that the backend has, and the names under which the bench has cases of them.
OPERATIONS = {"linear", "gemm", "bias_backward", "layer_norm", "layer_norm_backward", "gelu", "gelu_backward", "axpby",
              "gelu_range", "gelu_reduced_range", "gelu_derivative_range"}


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("GD_EMULATOR", "LD_LIBRARY_PATH")}
    environment |= {"ASAN_OPTIONS": "detect_leaks=0", **env}
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300, env=environment,
                          cwd=cwd)


def succeed(*command: str | Path) -> None:
    done = run(*command)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stderr[-4000:]}"


def output(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def compile_file(source: Path, target: Path, *flags: str) -> Path:
    compiler = LANGUAGE[source.suffix]
    succeed(*compiler, *EMULATED, *flags, "-c", source, "-o", target)
    return target


def backend_sources(folder: Path = CUDA) -> list[Path]:
    return sorted(folder.glob("*.c")) + sorted(folder.glob("*.cu"))


class Builds:
    """Test programs by variant: a folder laid out like site-packages, with gendistiller_ext/{ops,bugs} and the plug-in,
    and the stand-in for cuBLAS where NVIDIA's wheel has the real one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, {}
        (folder / "objects").mkdir()
        bench = [*sorted((ROOT / "tests" / "ops").glob("*.c")), HERE / "no_cpu.c", ROOT / "csrc" / "context.c",
                 ROOT / "csrc" / "plugin.c"]
        with ThreadPoolExecutor(2) as pool:
            self.bench = list(pool.map(lambda s: compile_file(s, folder / "objects" / f"{s.name}.o"), bench))
        self.cublas = folder / CUBLAS
        succeed(*LANGUAGE[".c"], *EMULATED, "-O3", "-shared", f"-Wl,-soname,{CUBLAS}", HERE / "cublas.c", "-o", self.cublas)

    def get(self, variant: str) -> Path:
        if variant not in self.made:
            self.made[variant] = self.make(variant)
        if isinstance(self.made[variant], str):
            pytest.skip(self.made[variant])
        return self.made[variant]

    def make(self, variant: str) -> Path | str:
        flags, own = VARIANTS[variant]
        package, objects = self.folder / variant / "gendistiller_ext", self.folder / variant / "objects"
        wheel = self.folder / variant / "nvidia" / "cu13" / "lib"
        for made in (package, objects, wheel):
            made.mkdir(parents=True)
        reason = self.try_sanitizer(flags, self.folder / variant)
        if reason:
            return f"no {variant} sanitizer: {reason}"
        shutil.copy(self.cublas, wheel)
        sources = [(source, flags) for source in backend_sources()]
        sources += [(HERE / "bugs.cu", flags), (HERE / "emulator.cpp", own), (HERE / "runtime.cpp", own)]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda pair: compile_file(pair[0], objects / f"{pair[0].name}.o", *pair[1]), sources))
        emulator = [objects / "emulator.cpp.o", objects / "runtime.cpp.o"]
        self.link_plugin(variant, [objects / f"{source.name}.o" for source in backend_sources()], package / PLUGIN)
        succeed(*CXX, *flags, objects / "bugs.cu.o", *emulator, "-o", package / "bugs")
        succeed(*CC, *flags, *self.bench, "-o", package / "ops", "-lm", "-ldl", "-pthread")
        return package

    def link_plugin(self, variant: str, objects: list[Path], target: Path) -> None:
        own = self.folder / variant / "objects"
        succeed(*CXX, *VARIANTS[variant][0], "-shared", "-Wl,-Bsymbolic", *objects, own / "emulator.cpp.o", own / "runtime.cpp.o",
                "-o", target)

    @staticmethod
    def try_sanitizer(flags: list[str], folder: Path) -> str:
        """Why this compiler's programs cannot be instrumented so; empty where they can."""
        if not flags:
            return ""
        source = folder / "empty.cpp"
        source.write_text("#include <sanitizer/tsan_interface.h>\nint main() { return 0; }\n")
        for command in ([*CXX, *flags, source, "-o", folder / "empty"], [folder / "empty"]):
            done = run(*command)
            if done.returncode != 0:
                return output(done).strip().splitlines()[0]
        return ""


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("cuda"))


def bench(package: Path, *options: str, device: str = "cuda:1", **settings: object) -> subprocess.CompletedProcess[str]:
    """The operations' cases on the second of two emulated devices: the first is every thread's current one."""
    emulator = {"devices": 2, "schedule": "rotate", **settings}
    return run(package / "ops", "--backend", device, *options,
               GD_EMULATOR=",".join(f"{key}={value}" for key, value in emulator.items()))


# ---- The operations ---------------------------------------------------------------------------------------------

def test_operations(builds: Builds, tmp_path: Path) -> None:
    """Every case of the operations that the backend has, in three schedules of threads and blocks, with the same bits."""
    done = bench(builds.get("plain"), report=tmp_path / "report")
    assert done.returncode == 0, output(done)
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed, [1-9]\d* unsupported", done.stdout.splitlines()[-1])
    cases = {line.split()[0] for line in run(builds.get("plain") / "ops", "--backend", "cuda", "--list").stdout.splitlines()}
    unsupported = set(re.findall(r"^unsupported: (\w+)$", done.stdout, re.MULTILINE))
    assert cases - unsupported == OPERATIONS | {"philox"}  # Philox's own cases need no backend
    assert unsupported - {"linear_reduced", "gemm_reduced", "attention_reduced", "dropout_masks", "exp_range"} == unsupported_operations()

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


def unsupported_operations() -> set[str]:
    source = (CUDA / "unsupported.c").read_text(encoding="utf-8")
    operations = set(re.findall(r"^UNSUPPORTED\((\w+),", source, re.MULTILINE)) | {"sum_squares"}
    return operations - {"pack_pos_conv", "split_taps", "merge_taps"}  # the cases of others run these


def kernels_in_source() -> set[str]:
    """Kernels of the .cu files: functions, and what gd_for_elements() is given."""
    source = "".join(path.read_text(encoding="utf-8") for path in CUDA.glob("*.cu"))
    return set(re.findall(r"__global__ void (\w+)", source)) | set(re.findall(r"gd_for_elements\([^;]*?(\w+)\{", source))


def test_every_operation_is_there_or_named() -> None:
    header = (ROOT / "csrc" / "backend.h").read_text(encoding="utf-8")
    members = set(re.findall(r"\(\*(\w+)\)\(", re.search(r"struct gd_backend \{.*?\n\};", header, re.DOTALL)[0]))
    table = (CUDA / "backend_cuda.c").read_text(encoding="utf-8")
    assert set(re.findall(r"^    \.(\w+) = \w+,$", table, re.MULTILINE)) - {"name", "shares_memory", "tile_frames"} == members


def test_address_sanitizer(builds: Builds) -> None:
    """Operands are whole allocations, so that any access beside one is an error."""
    done = bench(builds.get("address"), "--exact", "layer_norm", "gelu rows", "gelu_backward rows", "axpby", "bias_backward rows",
                 "gemm m=1 ", "gemm m=12 ", "gemm m=13 ", "linear rows=1 ", "linear rows=4 ", "linear rows=12 ", "linear rows=25 ",
                 "linear rows=17 ")
    assert done.returncode == 0, output(done)[-4000:]
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed", done.stdout.splitlines()[-1])


def test_thread_sanitizer(builds: Builds) -> None:
    done = bench(builds.get("thread"), "--exact", "layer_norm rows=5 ", "layer_norm rows=33 ", "layer_norm_backward rows=5 ",
                 "layer_norm_backward rows=65 ", "layer_norm_backward rows=130 ", "gelu rows=3 ", "gelu_backward rows=2 ", "axpby rows=50 ",
                 "bias_backward rows=257 ", "bias_backward rows=99 ", "linear rows=12 ")
    assert done.returncode == 0 and "WARNING: ThreadSanitizer" not in done.stderr, output(done)[-4000:]
    assert re.fullmatch(r"[1-9]\d+ passed, 0 failed", done.stdout.splitlines()[-1])


# ---- Does it find anything? -------------------------------------------------------------------------------------

#: Kernels of tests/cuda/bugs.cu -> what the plain emulator says; None: nothing, the kernel is right or only a
#: sanitizer can tell.
SAID = {
    "divergent_barrier": "16 of 32 threads have ended and don't reach __syncthreads()",
    "two_barriers": r"threads wait at __syncthreads\(\) in line \d+ and in line \d+",
    "barrier_after_exit": "1 of 32 threads have ended",
    "shuffle_without_all": "the mask names lane 16, which has ended or does not exist",
    "shuffle_not_in_mask": "a shuffle reads lane 17, which its mask 0000ffff does not name",
    "shuffle_from_outside": "a shuffle reads lane 16, which its mask 0000ffff does not name",
    "shuffle_beyond_block": "the mask names lane 30",
    "shared_unwritten": "no error; 1 NaN",
    "shared_too_large": "52000 bytes of shared memory, of which 49152 are allowed",
    "dynamic_not_asked_for": "invalid argument",
    "no_blocks": "invalid configuration argument",
    "too_many_threads": "invalid configuration argument",
    "touch_device_memory": "",
    "beyond_global": "",
}
RIGHT = ("shuffle_right", "dynamic_right", "dynamic_asked_for", "ordered_shared", "atomic_blocks", "ordered_warp")
BEYOND = ("beyond_global", "before_global", "beyond_shared", "beyond_dynamic", "touch_device_memory")
RACES = ("race_shared", "race_shared_again", "race_global", "race_blocks", "race_warp")


def test_planted_bugs(builds: Builds) -> None:
    program = builds.get("plain") / "bugs"
    for bug, said in SAID.items():
        done = run(program, bug)
        assert done.returncode != 0 and re.search(said.replace("()", r"\(\)"), output(done)), f"{bug}: {output(done)}"
    for bug in RIGHT:
        done = run(program, bug)
        assert (done.returncode, done.stdout) == (0, "no error; 0 NaN\n"), f"{bug}: {output(done)}"


@pytest.mark.parametrize("variant, bugs, said", [
    ("address", BEYOND, "ERROR: AddressSanitizer: (heap-buffer-overflow|use-after-poison)"),
    ("thread", RACES, "WARNING: ThreadSanitizer: data race"),
])
def test_planted_bugs_under_sanitizers(builds: Builds, variant: str, bugs: tuple[str, ...], said: str) -> None:
    program = builds.get(variant) / "bugs"
    for bug in bugs:
        done = run(program, bug)
        assert done.returncode != 0 and re.search(said, done.stderr), f"{bug}: {output(done)}"
    for bug in RIGHT:
        done = run(program, bug)
        assert (done.returncode, done.stdout) == (0, "no error; 0 NaN\n"), f"{bug}: {output(done)}"


#: Changes of the backend's own source: file, text, what it becomes, the sources that see it, variant, cases, and what
#: the run then says.
MUTANTS = {
    "sum_without_barrier": ("kernel.cuh", "    __syncthreads();\n    float total", "    float total", ["linear.cu"], "plain",
                            "bias_backward rows", "NaN"),
    "next_sum_without_barrier": ("kernel.cuh", "    __syncthreads(); /* part is the next sum's */\n", "", ["layer_norm.cu"],
                                 "thread", "layer_norm_backward rows=65 ", "data race .* in gd_column_total"),
    "exit_before_barrier": ("linear.cu", "    float sum = 0;\n", "    float sum = 0;\n    if (column >= width)\n        return;\n",
                            ["linear.cu"], "plain", "bias_backward rows", "threads have ended"),
    "half_a_warp": ("kernel.cuh", "distance = GD_WARP / 2", "distance = GD_WARP / 4", ["layer_norm.cu"], "plain", "layer_norm rows",
                    "expected .* within"),
    "lane_outside": ("kernel.cuh", "__shfl_xor_sync(0xffffffffu", "__shfl_xor_sync(0x7fffffffu", ["layer_norm.cu"], "plain",
                     "layer_norm rows", "which its mask 7fffffff does not name|not in its mask"),
    "a_row_too_many": ("layer_norm.cu", "if (row >= n.rows) /*", "if (row > n.rows) /*", ["layer_norm.cu"], "address",
                       "layer_norm rows=5 ", "heap-buffer-overflow .* in layer_norm_rows"),
    "a_column_too_many": ("kernel.cuh", "column < width;", "column <= width;", ["elementwise.cu"], "address", "axpby rows=1 ",
                          "heap-buffer-overflow .* in axpby"),
    "short_leading_dimension": ("gemm.c", ".b_row = 1, .b_col = w->in,", ".b_row = 1, .b_col = w->in - 1,", ["gemm.c"], "plain",
                                "linear rows=23 ", "expected .* within|cublasSgemm"),
    "windows_in_one_piece": ("gemm.c", "smaller(x->length, larger(x->ld, 1))", "x->length", ["gemm.c"], "plain",
                             "gemm m=64 n=10 k=50 ", "within|cublasSgemm"),
    "another_device": ("backend_cuda.c", "cudaSetDevice(cuda->device), \"cudaSetDevice\"", "cudaSetDevice(0), \"cudaSetDevice\"",
                       ["backend_cuda.c"], "plain", "axpby rows=1 ", "invalid"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants(builds: Builds, tmp_path: Path, mutant: str) -> None:
    file, text, becomes, sources, variant, cases, said = MUTANTS[mutant]
    package = builds.get(variant)
    assert bench(package, "--exact", cases).returncode == 0
    shutil.copytree(CUDA, tmp_path / "cuda", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    original = (CUDA / file).read_text(encoding="utf-8")
    assert original.count(text) == 1, f"{file} has changed"
    (tmp_path / "cuda" / file).write_text(original.replace(text, becomes), encoding="utf-8")
    objects = {source.name: builds.folder / variant / "objects" / f"{source.name}.o" for source in backend_sources()}
    for name in sources:
        objects[name] = compile_file(tmp_path / "cuda" / name, tmp_path / f"{name}.o", *VARIANTS[variant][0])
    shutil.copytree(package.parent / "nvidia", tmp_path / "site" / "nvidia")
    mutated = tmp_path / "site" / "gendistiller_ext"
    mutated.mkdir()
    builds.link_plugin(variant, list(objects.values()), mutated / PLUGIN)
    shutil.copy(package / "ops", mutated)
    done = bench(mutated, "--exact", cases)
    assert done.returncode != 0 and re.search(said, output(done)), output(done)[-4000:]


# ---- Failures, from Python --------------------------------------------------------------------------------------

SCRIPT = """
import sys, warnings
import numpy as np
import gendistiller_ext as gd
try:
    print(gd.devices())
    model = gd.Model(gd.Config(conv_feature_layers=((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2, encoder_embed_dim=12,
                               encoder_ffn_embed_dim=20, encoder_attention_heads=3, conv_pos=8, conv_pos_groups=2),
                     device=sys.argv[1])
    params = {name: value.copy() for name, value in model.params.items()}
    try:
        model.forward(np.zeros((2, 4000), np.float32) + 0.1)
    finally:
        assert all(np.array_equal(params[name], value) for name, value in model.params.items())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def python(folder: Path, plugin: Path | None, device: str, cublas: Path | None = None, **settings: object) -> list[str]:
    """What SCRIPT prints where the package has this plug-in."""
    package = folder / "gendistiller_ext"
    if not package.exists():
        package.mkdir(parents=True)
        for entry in PACKAGE.iterdir():
            if entry.name not in (PLUGIN, "__pycache__"):
                (package / entry.name).symlink_to(entry)
        if plugin:
            shutil.copy(plugin, package / PLUGIN)
        if cublas:
            wheel = folder / "nvidia" / "cu13" / "lib"
            wheel.mkdir(parents=True)
            shutil.copy(cublas, wheel)
    done = run(sys.executable, "-c", SCRIPT, device, cwd=folder, PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1",
               GD_EMULATOR=",".join(f"{key}={value}" for key, value in settings.items()))
    assert done.returncode == 0, output(done)
    return done.stdout.splitlines()


def test_python_on_an_emulated_device(builds: Builds, tmp_path: Path) -> None:
    def say(device: str = "cuda", **settings: object) -> list[str]:
        return python(tmp_path, builds.get("plain") / PLUGIN, device, builds.cublas, **settings)

    devices = "['cpu', 'cuda:0', 'cuda:1']"
    assert say(devices=2) == [devices, "NotImplementedError: device: the CUDA backend has no weight_norm yet"]
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
    said = [python(tmp_path, builds.get("plain") / PLUGIN, "cuda", builds.cublas, fail_malloc=n)[-1] for n in range(1, 5)]
    for message, wanted in zip(said, ("parameters on the device", "workspace of", "packed weights")):
        assert re.fullmatch(f"MemoryError: out of memory for .*{wanted}.*", message)
    assert said[3].startswith("NotImplementedError")


def test_launches_and_products_that_fail(builds: Builds) -> None:
    package = builds.get("plain")
    assert "the device failed: device: layer_norm: invalid argument" in bench(package, "layer_norm rows=1 ", fail_launch=1).stdout
    said = bench(package, "gemm m=5 ", fail_gemm=1).stdout
    assert "the device failed: device: cublasSgemm: the function failed to launch on the GPU" in said


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
    assert "cuBLAS has no cublasCreate_v2; expected version 12 or later" in run(*program, LD_LIBRARY_PATH=str(tmp_path)).stdout


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
    header = (HERE / "include" / "cuda_runtime_api.h").read_text(encoding="utf-8")
    constants = re.findall(r"\b(cuda\w+) = (\d+)", header)
    prototypes = re.findall(r"^(?:cudaError_t|const char \*) ?\*?cuda\w+\([^;]*\);", header, re.MULTILINE)
    assert len(constants) >= 10 and len(prototypes) >= 15
    (tmp_path / "check.c").write_text("#include <cuda_runtime_api.h>\n" + "\n".join(prototypes) + "\n" + "\n".join(
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
_Static_assert(sizeof(cublasMath_t) == sizeof(int), "enums");
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
    assert exported == ["gd_cuda_open"]
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", plugin).stdout)
    assert not [name for name in needed if re.search("cuda|cublas|stdc", name)]


def test_plugin_of_another_build(plugin: Path) -> None:
    context = ctypes.create_string_buffer(4096)
    status = ctypes.CDLL(str(plugin)).gd_cuda_open(context, 0, b"0.0.0", ctypes.c_size_t(8))
    assert status == 5 and b"device: gendistiller_cuda.so is not of this build" in context.raw


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
    assert set(re.findall(r"^unsupported: (\w+)$", done.stdout, re.MULTILINE)) & OPERATIONS == set()
