"""The settings of a distillation run: one dataclass from which flags, YAML keys and checks are made.

Defaults are S3PRL's recipe (s3prl/pretrain/distiller/config_runner.yaml and config_model.yaml). A field of
the student's `Config` (encoder_ffn_embed_dim, dropout, ...) is a YAML key of its own, `--set KEY=VALUE` on
the command line.
"""
from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Mapping, Optional

from ..atomic import replacing
from ..config import Config

S3PRL = "s3prl:"  # a teacher that begins so is an upstream of S3PRL


def _option(default: Any, help: str, *, kind: Any, low: float = -math.inf, high: float = math.inf,
            choices: tuple = (), metavar: Optional[str] = None, resumable: bool = False, below: bool = False):
    """A setting. resumable: a run may be resumed with another value. below: `high` itself is excluded."""
    metadata = dict(help=help, kind=kind, low=low, high=high, choices=choices, metavar=metavar,
                    resumable=resumable, below=below)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Recipe:
    """Settings of `gendistiller distill`. `validate()` checks them; paths are not opened by it."""
    teacher: Optional[str] = _option(None, "teacher checkpoint, any readable format; or s3prl:NAME, "
                                           "s3prl:NAME:CKPT, any upstream of S3PRL with a frame every 320 "
                                           "samples", kind=str, metavar="FILE", resumable=True)
    teacher_cache: Optional[str] = _option(
        None, "keep the teacher's states there (bfloat16) and compute them once. The teacher then hears whole "
              "files, not crops, so that near a crop's ends the targets differ from those without a cache",
        kind=str, metavar="DIR", resumable=True)
    audio: list = _option([], "folder, audio file, WebDataset shard (a-{000..099}.tar), S3PRL bucket CSV or TSV "
                              "manifest; may be repeated",
                          kind=list, metavar="DIR", resumable=True)
    root: Optional[str] = _option(None, "folder that the paths in CSV and TSV lists are relative to",
                                  kind=str, metavar="DIR", resumable=True)
    out: Optional[str] = _option(None, "output folder", kind=str, metavar="DIR", resumable=True)
    preset: str = _option("gendistiller", "the student's architecture; its widths are the teacher's",
                          kind=str)
    model: dict = _option({}, "fields of the student's config, over preset and teacher", kind=dict)
    init_from_teacher: bool = _option(True, "copy what the teacher has: CNN, norms, projection, pos_conv and "
                                            "its first blocks", kind=bool)
    freeze_extractor: bool = _option(False, "leave the CNN as it is (feature_grad_mult 0)", kind=bool)

    steps: int = _option(200000, "optimiser steps", kind=int, low=1)
    batch_size: int = _option(24, "utterances a step", kind=int, low=1)
    accumulate: int = _option(1, "compute the batch in this many parts, to save memory", kind=int, low=1)
    crop_seconds: float = _option(15.625, "longer utterances are cropped at a random place", kind=float,
                                  low=0.025)
    lr: float = _option(2e-4, "peak learning rate", kind=float, low=0)
    warmup: float = _option(0.07, "part of the steps over which the rate rises from 0; then it falls to 0",
                            kind=float, low=0, high=1, below=True)
    optimizer: Literal["adamw", "adamw_s3prl"] = _option(
        "adamw", "adamw is torch's update; adamw_s3prl S3PRL's", kind=str, choices=("adamw", "adamw_s3prl"))
    betas: list = _option([0.9, 0.98], "decay rates of AdamW's moments", kind=list, metavar="B")
    eps: float = _option(1e-6, "AdamW's epsilon", kind=float, low=0)
    weight_decay: float = _option(1e-6, "decay of matrices and convolutions (adamw only)", kind=float, low=0)
    clip: float = _option(5.0, "largest global norm of the gradient; 0: no clipping", kind=float, low=0)
    lam: float = _option(1.0, "weight of the cosine term", kind=float, low=0)
    loss_type: Literal["l1", "l2"] = _option(
        "l1", "l1, or l2: squared differences in place of absolute ones, also in what the log calls l1", kind=str,
        choices=("l1", "l2"))
    feat_pen_loss: float = _option(0.0, "weight of the feature penalty, the mean square of the CNN's output; "
                                        "held-out loss leaves it out", kind=float, low=0)
    reduction: Literal["mean", "sum"] = _option(
        "mean", "mean over all frames, or sum over utterances and frames (eq. 2)", kind=str, choices=("mean", "sum"))
    mask_padding: bool = _option(True, "leave padded frames out of the loss (S3PRL counts them)", kind=bool)
    history: Literal["free", "teacher"] = _option(
        "free", "what a generation step reads: the student's own layers or the teacher's", kind=str,
        choices=("free", "teacher"))
    detach_history: bool = _option(False, "no gradient from one generation step to the one before", kind=bool)
    precision: Literal["float32", "bfloat16"] = _option(
        "float32", "of the matrix products of student and teacher", kind=str, choices=("float32", "bfloat16"))
    teacher_precision: Optional[Literal["float32", "bfloat16", "int8"]] = _option(
        None, "of the teacher's matrix products (default: as --precision says)", kind=str,
        choices=("float32", "bfloat16", "int8"))
    seed: int = _option(0, "of initialisation, data order, crops and dropout", kind=int, low=0,
                        high=2 ** 63 - 1)

    valid_audio: list = _option([], "held-out audio, as --audio", kind=list, metavar="DIR", resumable=True)
    valid_fraction: float = _option(0.02, "without --valid-audio: part of --audio to hold out, chosen by a "
                                          "hash of the path; 0: none", kind=float, low=0, high=1, below=True)
    valid_seconds: float = _option(15.625, "validation files are cut at this length", kind=float, low=0.025)

    eval_every: int = _option(1000, "steps between evaluations", kind=int, low=1, resumable=True)
    save_every: int = _option(1000, "steps between states saved", kind=int, low=1, resumable=True)
    log_every: int = _option(10, "steps averaged in a line of the log", kind=int, low=1, resumable=True)
    max_bad_steps: int = _option(10, "stop after this many steps in a row whose loss or gradient is not "
                                     "finite", kind=int, low=1, resumable=True)
    readers: int = _option(2, "threads that read audio", kind=int, low=1, high=256, resumable=True)
    threads: int = _option(0, "threads that compute; 0: all cores. Results don't depend on it", kind=int,
                           low=0, high=1024, resumable=True)
    device: str = _option("cpu", "cpu, cuda or cuda:N; under torchrun, cuda is one for each process", kind=str,
                          resumable=True)
    process_timeout: float = _option(300.0, "under torchrun: seconds without an answer after which another "
                                            "process counts as lost", kind=float, low=1, resumable=True)
    resume: bool = _option(False, "go on from the newest state in --out; without one, from step 0", kind=bool,
                           resumable=True)

    def validate(self) -> "Recipe":
        """Itself, with every value of its type and in its range. Raises ValueError that names the key."""
        for item in dataclasses.fields(self):
            value = _checked(item.name, getattr(self, item.name), item.metadata, item.default)
            setattr(self, item.name, value)
        for key in ("teacher", "audio", "out"):
            if not getattr(self, key):
                raise ValueError(f"{key}: expected a value, got none (--{key} or a config file's key)")
        if self.teacher_precision and str(self.teacher).startswith(S3PRL):
            raise ValueError(f"teacher_precision: expected none with {self.teacher}, which PyTorch computes, got "
                             f"{self.teacher_precision}")
        if len(self.betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas: expected two numbers, 0 <= beta < 1, got {self.betas}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate: expected at most batch_size ({self.batch_size}), "
                             f"got {self.accumulate}")
        if self.accumulate > 1 and not self.mask_padding:
            raise ValueError("accumulate: expected 1 where padding counts (mask_padding false), which depends "
                             f"on the whole batch, got {self.accumulate}")
        return self

    def result_settings(self) -> dict:
        """The settings that the trained weights and the log depend on, teacher and data aside."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)
                if not item.metadata["resumable"] and item.name != "model"}


def _checked(key: str, value: Any, rule: Mapping, default: Any) -> Any:
    kind = rule["kind"]
    if value is None and default is None:
        return None
    if kind is list and isinstance(value, str):
        value = [value]
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-4 as a string
        try:
            value = float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is list and isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list",
                 dict: "a mapping"}
        raise ValueError(f"{key}: expected {names[kind]}, got {value!r}")
    if kind in (int, float):
        low, high = rule["low"], rule["high"]
        if not low <= value <= high or not math.isfinite(value) or (rule["below"] and value == high):
            upper = "" if high == math.inf else f" and {'<' if rule['below'] else '<='} {high}"
            raise ValueError(f"{key}: expected a number >= {low}{upper}, got {value}")
    if rule["choices"] and value not in rule["choices"]:
        raise ValueError(f"{key}: expected {' or '.join(rule['choices'])}, got {value!r}")
    return value


def config_fields() -> dict[str, Any]:
    """Names of `Config`'s fields with the `gendistiller` preset's values."""
    preset = Config.preset("gendistiller")
    return {item.name: getattr(preset, item.name) for item in dataclasses.fields(preset)}


def model_value(key: str, value: Any) -> Any:
    """A value for the config field `key`, from text or YAML, as the field's type. Raises ValueError."""
    fields = config_fields()
    if key not in fields:
        raise ValueError(f"{key}: unknown key{_suggestion(key, fields)}")
    if isinstance(value, str):
        try:
            # 4,8 is a list; conv_feature_layers has a string form of its own, which Config reads.
            value = json.loads(f"[{value}]" if key == "target_layers" and value[:1] != "[" else value)
        except ValueError:
            if key == "target_layers":
                raise ValueError(f"{key}: expected integers, got {value!r}") from None
    if isinstance(fields[key], float):
        rule = dict(kind=float, low=-math.inf, high=math.inf, choices=(), below=False)
        return _checked(key, value, rule, 0.0)
    if isinstance(fields[key], tuple) and isinstance(value, (list, int)):
        value = [value] if isinstance(value, int) else value
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return value


def _suggestion(key: str, known) -> str:
    close = difflib.get_close_matches(key, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def load_yaml(path: str) -> dict[str, Any]:
    """Recipe settings from a YAML file, config fields gathered under "model". Unknown keys are errors."""
    try:
        import yaml
    except ImportError as error:
        raise ImportError("config files need PyYAML: pip install 'gendistiller_ext[train]'") from error
    with open(path, encoding="utf-8") as stream:
        try:
            content = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, got a {type(content).__name__}")
    known = {item.name for item in dataclasses.fields(Recipe)} - {"model"}
    settings: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in known:
            settings[name] = value
        elif name in config_fields():
            model[name] = model_value(name, value)
        else:
            raise ValueError(f"{path}: unknown key {key}{_suggestion(name, known | set(config_fields()))}")
    if model:
        settings["model"] = model
    return settings


def dump_yaml(path: str, recipe: Recipe, student: Mapping[str, Any]) -> None:
    """Writes a file that `--config` takes: the recipe and every field of the student's config."""
    import yaml
    settings = {item.name: getattr(recipe, item.name) for item in dataclasses.fields(recipe)
                if item.name not in ("model", "resume") and getattr(recipe, item.name) is not None}
    plain = json.loads(json.dumps({**settings, **student}))  # tuples to lists
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    with replacing(path) as stream:
        stream.write(text.encode())
