"""Builds the CUDA backend, gendistiller_cuda.so, with nvcc: a library of its own that the extension opens when
a CUDA device is asked for. setup.py calls build(); by hand: python cuda/build.py FOLDER.

It links CUDA's runtime statically and neither the driver nor cuBLAS, so it loads on a machine that has none of
them and says so. nvcc is $CUDA_HOME/bin/nvcc or $CUDA_PATH/bin/nvcc, the first in PATH, or
/usr/local/cuda/bin/nvcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "gendistiller_cuda.so"
JOBS = 2

#: Compute capabilities, times 10, to compile for: Turing, Ampere, Hopper, Blackwell. Code for one also runs on
#: later ones of the same major number, and the first's is kept as PTX, which drivers compile for whatever is new.
#: nvcc takes half a second for each, so there is no shorter list for builds that are not released.
CAPABILITIES = (75, 80, 90, 100, 120)

HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Without these nvcc's stubs need libstdc++.
HOST_CXX_FLAGS = ["-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics"]
KERNEL_FLAGS = ["-std=c++17", "-O3", "-Xfatbin=-compress-all", "-Xptxas=--warn-on-spills,--warning-as-error"]
LINK_FLAGS = ["-shared", "-cudart", "static", "-Xlinker", "--as-needed,-z,defs,--exclude-libs,ALL"]


def find_nvcc() -> str:
    """The compiler's path; RuntimeError where there is none."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.path.join(folder, "bin", "nvcc") for folder in folders] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return found
    raise RuntimeError("no nvcc in CUDA_HOME, in PATH or in /usr/local/cuda")


def sources() -> list[Path]:
    return sorted(HERE.glob("*.c")) + sorted(HERE.glob("*.cu"))


def capabilities(nvcc: str) -> list[int]:
    """Those of CAPABILITIES that this nvcc knows."""
    known = run([nvcc, "--list-gpu-code"]).split()
    chosen = [capability for capability in CAPABILITIES if f"sm_{capability}" in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} compiles for none of {', '.join(f'sm_{c}' for c in CAPABILITIES)}")
    return chosen


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout[-4000:]}")
    return done.stdout


def compile_command(nvcc: str, chosen: list[int], source: Path, target: Path) -> list[str]:
    flags = [f"-DGD_CUDA_LOWEST_CAPABILITY={chosen[0]}"]
    if source.suffix == ".cu":
        flags += KERNEL_FLAGS + [f"-Xcompiler={','.join(HOST_FLAGS + HOST_CXX_FLAGS)}"]
        flags += [f"-gencode=arch=compute_{c},code=sm_{c}" for c in chosen]
        flags += [f"-gencode=arch=compute_{chosen[0]},code=compute_{chosen[0]}"]
    else:
        flags += ["-O2", f"-Xcompiler={','.join(HOST_FLAGS + ['-std=gnu11'])}"]
    return [nvcc, *flags, "-c", str(source), "-o", str(target)]


def build(package: Path, temporary: Path, required: bool = False) -> Path:
    """Puts the library into the folder `package` and returns its path; objects lie in `temporary`, and what is
    newer than its sources is not built again. RuntimeError says what is missing or failed; `required` tells that
    whoever builds asked for CUDA."""
    nvcc = find_nvcc()
    chosen = capabilities(nvcc)
    if required and len(chosen) < len(CAPABILITIES):
        print(f"cuda: {nvcc} compiles for {', '.join(f'sm_{c}' for c in chosen)} only", file=sys.stderr)
    temporary.mkdir(parents=True, exist_ok=True)
    package.mkdir(parents=True, exist_ok=True)
    core = HERE.parent / "csrc"
    headers = [*HERE.glob("*.h"), *HERE.glob("*.cuh"), *core.glob("*.h"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)

    def compile_file(source: Path) -> Path:
        target = temporary / (source.name + ".o")
        command = compile_command(nvcc, chosen, source, target)
        stamp = target.with_suffix(".command")
        newest = max(newest_header, source.stat().st_mtime)
        same = stamp.exists() and stamp.read_text() == "\n".join(command)
        if not (same and target.exists() and target.stat().st_mtime >= newest):
            run(command)
            stamp.write_text("\n".join(command))
        return target

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_file, sources()))
    target = package / NAME
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        linked = temporary / NAME
        run([nvcc, *LINK_FLAGS, *map(str, objects), "-o", str(linked), "-ldl"])
        # Another process may have the old one open: replaced, not written over.
        shutil.copy2(linked, package / f".{NAME}.{os.getpid()}")
        os.replace(package / f".{NAME}.{os.getpid()}", target)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python cuda/build.py FOLDER")
    try:
        print(build(Path(sys.argv[1]), HERE.parent / "build" / "cuda", required=True))
    except RuntimeError as error:
        sys.exit(f"cuda: {error}")
