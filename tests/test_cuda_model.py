"""Whole models on an emulated CUDA device (tests/cuda): the stages' own code, the plug-in's unchanged host code and its
kernels, held against the CPU."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from emulated import HERE, PLUGIN, Builds, lay_out_package, output, run

sys.path.insert(0, str(HERE))
import on_device


@pytest.fixture(scope="module")
def results(builds: Builds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    folder = tmp_path_factory.mktemp("device")
    lay_out_package(folder, builds.get("plain") / PLUGIN, builds.cublas)
    done = run(sys.executable, HERE / "on_device.py", "cuda:1", folder / "out.npz", cwd=folder, PYTHONPATH=str(folder),
               PYTHONDONTWRITEBYTECODE="1", GD_EMULATOR=f"devices=2,schedule=rotate,report={folder / 'report'}")
    assert done.returncode == 0, output(done)
    assert (folder / "report").read_text().splitlines()[-1] == "left: memory 0 streams 0"
    return dict(np.load(folder / "out.npz"))


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return on_device.run("cpu")


#: Of the largest value there.
BOUNDS = {"frames": 0, "state after": 2e-5, "gradient": 2e-5, "sum of gradients": 2e-5}


@pytest.mark.parametrize("name", [*on_device.students(), *on_device.SMALL_TEACHERS])
def test_as_on_the_cpu(results: dict[str, np.ndarray], expected: dict[str, np.ndarray], name: str) -> None:
    keys = [key for key in expected if key.startswith(f"{name}|")]
    assert keys and keys == [key for key in results if key.startswith(f"{name}|")]
    for key in keys:
        ours, theirs = results[key], expected[key]
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        bound = BOUNDS.get(key.split("|")[1], 5e-6) * max(1, np.abs(theirs).max())
        assert np.abs(ours - theirs).max() <= bound, f"{key}: {np.abs(ours - theirs).max():.2e} > {bound:.2e}"


def test_precision(builds: Builds, tmp_path: Path) -> None:
    lay_out_package(tmp_path, builds.get("plain") / PLUGIN, builds.cublas)
    code = ("import numpy as np, gendistiller_ext as gd\n"
            "from conftest import SMALL\n"
            "model = gd.Model(gd.Config(**SMALL), device='cuda')\n"
            "model.forward(np.zeros((1, 400), np.float32), precision='bfloat16')\n")
    done = run(sys.executable, "-c", code, cwd=tmp_path, GD_EMULATOR="devices=1",
               PYTHONPATH=f"{tmp_path}:{HERE.parent}")
    assert re.search("NotImplementedError: precision: this device computes in float32, it has no bfloat16 kernels",
                     done.stderr)

