"""Whole models on an emulated CUDA device (tests/cuda): the stages' own code, the plug-in's unchanged host code and its
kernels, held against the CPU."""

from __future__ import annotations

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


@pytest.fixture(scope="module")
def reduced() -> dict[str, np.ndarray]:
    return {**on_device.run_wide("cpu", "bfloat16"), **on_device.run_wide("cpu", "float32")}


#: Where the CPU rounds the same factors in training: no convolution goes by minimal filtering
#: (csrc/cpu/filter_template.h) or FFT (csrc/cpu/pos_conv_fft.c), whose factors are rounded after a transformation.
SAME_FACTORS = ("two_taps", "cross_attention")


@pytest.mark.parametrize("name", on_device.WIDE)
def test_bfloat16(results: dict[str, np.ndarray], reduced: dict[str, np.ndarray], name: str) -> None:
    """States are as far from float32's as the CPU's in bfloat16 are, and from these as two independent roundings are:
    in inference GELU differs too, and with it what is rounded. Gradients point where the CPU's do."""
    def apart(a: np.ndarray, b: np.ndarray) -> float:
        """One minus the cosine."""
        a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        return 1 - (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())

    exact = {key.split("|")[2]: value for key, value in reduced.items() if key.startswith(f"float32|{name}|")}
    whole = np.sqrt(sum((exact[what].astype(np.float64) ** 2).sum() for what in exact if what.startswith("gradient")))
    same = name in SAME_FACTORS
    for what, value in exact.items():
        ours, theirs = (made[f"bfloat16|{name}|{what}"] for made in (results, reduced))
        if what.startswith("state"):
            rounding = apart(theirs, value)
            assert apart(ours, theirs) < 3 * rounding < 3 * (1 - 0.9995), what
            if rounding > 1e-8:  # or the products are too short to be in bfloat16
                assert rounding / 4 < apart(ours, value) < 3 * rounding, what
        elif what == "loss":
            assert abs(ours - theirs) < (1e-6 if same else 1e-3) * theirs, what
        elif np.linalg.norm(value) > 1e-4 * whole:
            assert apart(ours, theirs) < (1e-6 if same else 0.01), what


def test_training_in_bfloat16(builds: Builds, tmp_path: Path) -> None:
    """The command, on the device and on the CPU."""
    pytest.importorskip("soundfile")
    import runs
    from gendistiller_ext.training.report import read_log

    lay_out_package(tmp_path / "device", builds.get("plain") / PLUGIN, builds.cublas)
    corpus, losses = runs.make_corpus(tmp_path), {}
    for device in ("cuda", "cpu"):
        done = run(sys.executable, *runs.flags(corpus, tmp_path / device, steps=6, device=device, precision="bfloat16"),
                   cwd=tmp_path / "device", PYTHONPATH=f"{tmp_path / 'device'}:{runs.PATH}")
        assert done.returncode == 0, output(done)
        losses[device] = [float(row["loss"]) for row in read_log(str(tmp_path / device / "log.csv")) if row["loss"]]
    assert len(losses["cpu"]) > 1 and np.allclose(losses["cuda"], losses["cpu"], rtol=1e-3, atol=0)


def test_precisions_that_a_device_lacks(builds: Builds, tmp_path: Path) -> None:
    lay_out_package(tmp_path, builds.get("plain") / PLUGIN, builds.cublas)
    code = ("import sys, numpy as np, gendistiller_ext as gd\n"
            "from conftest import SMALL\n"
            "model = gd.Model(gd.Config(**SMALL), device='cuda')\n"
            "model.forward(np.zeros((1, 400), np.float32), precision=sys.argv[1])\n")
    for precision, capability, has in (("int8", 80, "float32 or bfloat16"), ("int8", 75, "float32"),
                                       ("bfloat16", 75, "float32")):
        done = run(sys.executable, "-c", code, precision, cwd=tmp_path, GD_EMULATOR=f"capability={capability}",
                   PYTHONPATH=f"{tmp_path}:{HERE.parent}")
        said = f"NotImplementedError: precision: this device computes in {has}, it has no {precision} kernels"
        assert said in done.stderr, output(done)

