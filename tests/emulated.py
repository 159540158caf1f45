"""The CUDA backend on an emulated device: how the tests build it (tests/cuda) and run what they built."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

#: Operations on the parameters, which are the host's: a device's table has none of them.
HOST_OPERATIONS = {"sum_squares", "adamw"}


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
        bench = [*sorted((ROOT / "tests" / "ops").glob("*.c")), HERE / "no_cpu.c",
                 *(ROOT / "csrc" / name for name in ("context.c", "cores.c", "device.c", "plugin.c"))]
        with ThreadPoolExecutor(2) as pool:
            self.bench = list(pool.map(lambda s: compile_file(s, folder / "objects" / f"{s.name}.o"), bench))
        self.cublas = folder / CUBLAS
        succeed(*LANGUAGE[".c"], *EMULATED, "-O3", "-shared", f"-Wl,-soname,{CUBLAS}", HERE / "cublas.c", "-o",
                self.cublas)

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
        succeed(*CXX, *VARIANTS[variant][0], "-shared", "-Wl,-Bsymbolic", *objects, own / "emulator.cpp.o",
                own / "runtime.cpp.o", "-o", target)

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


def bench(package: Path, *options: str, device: str = "cuda:1", **settings: object) -> subprocess.CompletedProcess[str]:
    """The operations' cases on the second of two emulated devices: the first is every thread's current one."""
    emulator = {"devices": 2, "schedule": "rotate", **settings}
    return run(package / "ops", "--backend", device, *options,
               GD_EMULATOR=",".join(f"{key}={value}" for key, value in emulator.items()))


def lay_out_package(folder: Path, plugin: Path | None, cublas: Path | None) -> None:
    """The package in `folder`, with this plug-in."""
    package = folder / "gendistiller_ext"
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
