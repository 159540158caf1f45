"""The engine as the tests drive it: a model with given weights, and the same in a process of its own under
another choice of instruction sets. Run as a script, this file is that process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import gendistiller_ext as gd

#: GENDISTILLER_DISABLE_CPU for each choice; what is left is the widest set that it does not name.
ISAS = {"widest": "", "no_avx512": "avx512", "generic": "avx512,avx2,neon"}


def build(config: dict, state: dict[str, np.ndarray]) -> gd.Model:
    model = gd.Model(gd.Config(**config))
    model.load_params(state)
    return model


def run_elsewhere(models: dict[str, dict[str, Any]], folder: Path, disable: str) -> dict[str, list]:
    """Runs models in a new process whose GENDISTILLER_DISABLE_CPU is `disable`.

    models: name -> {"config", "state", "runs": [{"wavs": [...], options of Model.forward}, ...]}. Returns
    name -> [(hidden, frames), ...], one a run; under "features" what gd.cpu_features() said there.
    """
    arrays, described = {}, {}
    for name, model in models.items():
        arrays |= {f"{name}|state|{key}": value for key, value in model["state"].items()}
        arrays |= {
            f"{name}|{r}|{w}": wav for r, run in enumerate(model["runs"]) for w, wav in enumerate(run["wavs"])
        }
        described[name] = {
            "config": model["config"],
            "states": list(model["state"]),
            "runs": [
                {**{k: v for k, v in run.items() if k != "wavs"}, "count": len(run["wavs"])}
                for run in model["runs"]
            ],
        }
    np.savez(folder / "in.npz", models=json.dumps(described), **arrays)
    root = str(Path(gd.__file__).resolve().parent.parent)
    environment = dict(os.environ, GENDISTILLER_DISABLE_CPU=disable)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    out = np.load(folder / "out.npz")
    results: dict[str, Any] = {"features": str(out["features"])}
    for name, model in models.items():
        results[name] = [
            (
                [out[f"{name}|{r}|{s}"] for s in range(int(out[f"{name}|{r}|count"]))],
                out[f"{name}|{r}|frames"],
            )
            for r in range(len(model["runs"]))
        ]
    return results


def _main(folder: Path) -> None:
    given = np.load(folder / "in.npz")
    out: dict[str, Any] = {"features": " ".join(gd.cpu_features())}
    for name, described in json.loads(str(given["models"])).items():
        model = build(
            described["config"], {key: given[f"{name}|state|{key}"] for key in described["states"]}
        )
        for r, options in enumerate(described["runs"]):
            wavs = [given[f"{name}|{r}|{w}"] for w in range(options.pop("count"))]
            hidden, frames = model.forward(wavs, **options)
            out |= {f"{name}|{r}|{s}": h for s, h in enumerate(hidden)}
            out |= {f"{name}|{r}|frames": frames, f"{name}|{r}|count": len(hidden)}
    np.savez(folder / "out.npz", **out)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
