"""`gendistiller info` on each format, whole and with tensors missing, misshapen and unknown."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import gendistiller_ext as gd
from conftest import SMALL, SMALL_TEACHERS, SMALL_VARIANTS
from foreign_models import hubert, wav2vec2, wavlm
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import export, safetensors
from gendistiller_ext.modelinfo import model_hash

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

FORMATS = ("gendistiller float32", "gendistiller bfloat16", "unilm", "fairseq", "s3prl", "s3prl-distiller",
           "huggingface")


def write(kind, folder):
    """A checkpoint of a format: its path."""
    path = folder / "model.pt"
    if kind.startswith("gendistiller"):
        path = folder / "model.safetensors"
        gd.Model(gd.Config(**SMALL), seed=1).save(path, dtype=kind.split()[1])
    elif kind == "unilm":
        model, cfg = wavlm()
        torch.save({"cfg": cfg, "model": model.state_dict()}, path)
    elif kind == "fairseq":
        model, cfg, task = wav2vec2()
        torch.save({"cfg": {"model": {"_name": "wav2vec2", **cfg}, "task": task}, "model": model.state_dict()}, path)
    elif kind == "s3prl":
        model, cfg, task, _ = hubert(True)
        torch.save({"task_cfg": task, "model_cfg": {"_name": "hubert", **cfg},
                    "model_weight": model.state_dict()}, path)
    elif kind == "s3prl-distiller":
        export.save_s3prl_distiller(gd.Model(gd.Config(**SMALL_VARIANTS["multi_head"]), seed=1), str(path))
    else:
        config = gd.Config(**SMALL_TEACHERS["wavlm_large"], normalize_eps=1e-7)
        export.save_huggingface(gd.Model(config, seed=1), str(folder / "model"))
        return folder / "model"
    return path


def info(capsys, *words):
    code = cli.main(["info", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format(kind, capsys, tmp_path):
    path = write(kind, tmp_path)
    model = gd.Model.load(path)
    code, out, err = info(capsys, path, "--json")
    facts = json.loads(out)
    assert code == 0 and err == "" and facts["format"] == kind and facts["problem"] is None
    assert gd.Config.from_dict(facts["config"]) == model.config and facts["hash"] == model_hash(model)
    assert facts["parameters"] == model.num_params and facts["bytes"] > 2 * model.num_params
    assert facts["missing"] == facts["misshapen"] == facts["unexpected"] == []
    assert sum(facts["dtypes"].values()) == len(model.params)
    assert set(facts["dtypes"]) == {"bfloat16"} if "bfloat16" in kind else {"float32"}
    ignored = {"unilm": 1, "fairseq": 8, "s3prl": 4}.get(kind, 0)
    assert len(facts["ignored"]) == ignored
    code, out, _ = info(capsys, path)
    lines = out.splitlines()
    assert code == 0 and kind in lines[0] and lines[1].startswith(f"{model.config.architecture}, ")
    assert f"{model.config.encoder_embed_dim} x {model.config.encoder_attention_heads} heads" in lines[1]
    assert f"{model.num_params:,}" in out and ("ignored tensors: " in out) == (ignored > 0)


def test_a_preset(capsys):
    code, out, _ = info(capsys, "table4_conv256", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["format"] == "preset" and facts["parameters"] == 14_243_988 and facts["bytes"] is None


DAMAGE = {"missing": ["encoder.layers.0.fc1.bias"], "misshapen": ["encoder.layers.0.fc1.weight"],
          "unexpected": ["encoder.layers.9.fc1.bias"]}


@pytest.mark.parametrize("key", DAMAGE)
@pytest.mark.parametrize("kind", ["gendistiller float32", "unilm", "huggingface"])
def test_what_is_wrong_is_listed(kind, key, capsys, tmp_path):
    """The facts are still told; the exit code and one line say that the checkpoint can't be used."""
    path = write(kind, tmp_path)
    [name] = DAMAGE[key]
    if kind == "huggingface":
        name = name.replace("fc1", "feed_forward.intermediate_dense")

    def damage(state, wrong):
        if key == "missing":
            del state[name]
        else:
            state[name] = wrong
        return state
    if kind == "unilm":
        content = torch.load(path)
        damage(content["model"], torch.ones(3))
        torch.save(content, path)
    else:
        weights = path / "model.safetensors" if kind == "huggingface" else path
        arrays, metadata = safetensors.parse(weights.read_bytes())
        safetensors.write(weights, damage(dict(arrays), np.ones(3, np.float32)), metadata)
    code, out, err = info(capsys, path, "--json")
    facts = json.loads(out)
    assert code == 2 and err.count("\n") == 1 and name in err and str(path) in err
    assert facts["format"] == kind and facts["hash"] is None and facts["parameters"] > 0
    assert [len(facts[other]) for other in DAMAGE] == [int(other == key) for other in DAMAGE]
    assert facts[key][0].startswith(name) and facts["problem"] in err
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        gd.Model.load(path)
    code, out, err = info(capsys, path)
    assert code == 2 and f"{key} tensors: {name}" in out


@pytest.mark.parametrize("content, message", [
    (b"", "expected a zip"), (b"PK\x03\x04", "damaged zip"), (b"{}", "expected a zip"),
])
def test_what_is_no_checkpoint(content, message, capsys, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    code, out, err = info(capsys, tmp_path / "x.pt")
    assert code == 2 and out == "" and message in err
