"""Weights of a clone without Git LFS: each file that can be a pointer is called one, with what to do."""

from __future__ import annotations

import json

import pytest

import gendistiller_ext as gd
from gendistiller_ext import cli
from gendistiller_ext.checkpoints import safetensors, torch_zip

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 377607901\n"
INDEX = {"weight_map": {"encoder.layer_norm.weight": "model-00001-of-00001.safetensors"}}


def write(layout, folder):
    """What is loaded, and the pointer in it."""
    if layout in ("student.safetensors", "WavLM.pt", "states.ckpt"):
        (folder / layout).write_bytes(POINTER)
        return folder / layout, folder / layout
    (folder / "config.json").write_text(json.dumps({"model_type": "hubert"}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    name = layout
    if layout == "shards":
        (folder / "model.safetensors.index.json").write_text(json.dumps(INDEX))
        name = "model-00001-of-00001.safetensors"
    (folder / name).write_bytes(POINTER)
    return folder, folder / name


@pytest.mark.parametrize("layout", ["student.safetensors", "WavLM.pt", "states.ckpt", "model.safetensors",
                                    "pytorch_model.bin", "shards", "model.safetensors.index.json", "config.json"])
def test_pointers_are_named(layout, tmp_path, capsys):
    source, file = write(layout, tmp_path)
    message = "expected the file itself, got a Git LFS pointer.*: run `git lfs pull`"
    with pytest.raises(ValueError, match=message) as caught:
        gd.Model.load(source)
    assert str(caught.value).startswith(f"{file}: ") and str(caught.value).count(str(file)) == 1
    assert cli.main(["info", str(source)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "git lfs pull" in line and str(file) in line


def test_the_size_of_what_is_missing(tmp_path):
    for call in (torch_zip.load, safetensors.read):
        (tmp_path / "x").write_bytes(POINTER)
        with pytest.raises(ValueError, match="to its 377,607,901 bytes: run"):
            call(str(tmp_path / "x"))
        (tmp_path / "x").write_bytes(POINTER[:60])
        with pytest.raises(ValueError, match="got a Git LFS pointer: run"):
            call(str(tmp_path / "x"))


@pytest.mark.parametrize("content", [b"version ", b"version https://git-lfs.example.com/spec/v1\n", POINTER[1:]])
def test_other_text_is_no_pointer(content, tmp_path):
    for name in ("x.safetensors", "x.pt"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as caught:
            gd.Model.load(tmp_path / name)
        assert "LFS" not in str(caught.value)
