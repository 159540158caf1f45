"""Builds gendistiller_ext._core from csrc/, and the CUDA plug-in from cuda/ where nvcc is found.

Switches, by environment variable:

    GENDISTILLER_DEBUG=1                            no optimisation, assertions
    GENDISTILLER_SANITIZE=address|undefined|thread  an instrumented build (or several, by commas)
    GENDISTILLER_CUDA=auto|0|1                      1: fail without nvcc; auto (default): build if possible
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
JOBS = 2
PTH = "s3prl_upstream/gendistiller_s3prl.pth"


def switch(name: str, choices: tuple[str, ...], default: str) -> str:
    value = os.environ.get(f"GENDISTILLER_{name}") or default
    if value not in choices:
        sys.exit(f"GENDISTILLER_{name}: expected {', '.join(choices)}, got {value!r}")
    return value


DEBUG = switch("DEBUG", ("0", "1"), "0") == "1"
CUDA = switch("CUDA", ("auto", "0", "1"), "auto")
SANITIZE = [name for name in os.environ.get("GENDISTILLER_SANITIZE", "").split(",") if name]
if not set(SANITIZE) <= {"address", "undefined", "thread"}:
    sys.exit(f"GENDISTILLER_SANITIZE: expected address, undefined or thread, got {','.join(SANITIZE)!r}")

COMPILE_FLAGS = ["-std=gnu11", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
LINK_FLAGS = ["-pthread", "-lm", "-ldl"]
if DEBUG:
    COMPILE_FLAGS += ["-O0", "-g", "-UNDEBUG"]
elif SANITIZE:
    COMPILE_FLAGS += ["-O1", "-g", "-UNDEBUG"]
else:
    COMPILE_FLAGS += ["-O3", "-g0"]
if SANITIZE:
    SANITIZERS = f"-fsanitize={','.join(SANITIZE)}"
    COMPILE_FLAGS += [SANITIZERS, "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    LINK_FLAGS += [SANITIZERS]


def version() -> str:
    header = (ROOT / "csrc" / "gendistiller.h").read_text(encoding="utf-8")
    return re.search(r'#define GD_VERSION "([^"]+)"', header)[1]


def sources(folder: str, *suffixes: str) -> list[str]:
    paths = (ROOT / folder).rglob("*")
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.suffix in suffixes)


class BuildExt(build_ext):
    """Compiles what changed, JOBS files at once."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # Objects of different switches don't mix.
        variant = "-".join((["debug"] if DEBUG else []) + SANITIZE)
        if variant:
            self.build_temp += f"-{variant}"

    def run(self) -> None:
        import numpy
        for extension in self.extensions:
            extension.include_dirs.append(numpy.get_include())
        # pip builds in this folder too: two builds at once would link each other's half-written objects.
        os.makedirs(self.build_temp, exist_ok=True)
        with open(os.path.join(self.build_temp, "lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            super().run()
            self.build_cuda()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        newest_header = max(os.path.getmtime(path) for path in ext.depends)
        with ThreadPoolExecutor(JOBS) as pool:
            tasks = [pool.submit(self.compile_file, ext, source, newest_header) for source in ext.sources]
            objects = [task.result() for task in tasks]
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(objects, str(target), extra_postargs=ext.extra_link_args,
                                         build_temp=self.build_temp, target_lang="c")

    def compile_file(self, ext: Extension, source: str, newest_header: float) -> str:
        [target] = self.compiler.object_filenames([source], output_dir=self.build_temp)
        # The flags stand in this file; the interpreter is in build_temp's name.
        newest = max(newest_header, os.path.getmtime(source), os.path.getmtime(__file__))
        if not self.force and os.path.exists(target) and os.path.getmtime(target) >= newest:
            return target
        self.compiler.compile([source], output_dir=self.build_temp, include_dirs=ext.include_dirs,
                              extra_postargs=ext.extra_compile_args)
        return target

    def build_cuda(self) -> None:
        """cuda/build.py's build(package, temporary, required) puts the plug-in library into the folder
        `package`, or raises RuntimeError that says what is missing."""
        if CUDA == "0":
            return
        script = ROOT / "cuda" / "build.py"
        package = ROOT if self.inplace else Path(self.build_lib)
        try:
            if not script.is_file():
                raise RuntimeError("these sources have no cuda/build.py")
            spec = importlib.util.spec_from_file_location("gendistiller_cuda_build", script)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.build(package / "gendistiller_ext", Path(self.build_temp) / "cuda", CUDA == "1")
        except Exception as error:
            if CUDA == "1":
                raise SystemExit(f"GENDISTILLER_CUDA=1: {error}") from error
            self.warn(f"without CUDA: {error}")


class BuildPy(build_py):
    """Adds the .pth file that tells S3PRL of the upstream. An editable install has no place for it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode and (ROOT / PTH).is_file():
            self.copy_file(str(ROOT / PTH), self.pth_target(), preserve_mode=False)

    def pth_target(self) -> str:
        return os.path.join(self.build_lib, os.path.basename(PTH))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        return outputs if self.editable_mode else outputs + [self.pth_target()]


core = Extension(
    "gendistiller_ext._core",
    sources("csrc", ".c"),
    depends=sources("csrc", ".h", ".def"),
    extra_compile_args=COMPILE_FLAGS,
    extra_link_args=LINK_FLAGS,
)

setup(version=version(), ext_modules=[core], cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
