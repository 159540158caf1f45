"""Small training runs that the tests of several files share. Imports what the extra `train` brings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import soundfile

import gendistiller_ext as gd
from gendistiller_ext.training.recipe import Recipe
from gendistiller_ext.training.report import TIMING_COLUMNS, read_log
from gendistiller_ext.training.trainer import Trainer

CONV = ((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2
TEACHER = dict(architecture="encoder", conv_feature_layers=CONV, encoder_layers=4, encoder_embed_dim=16,
               encoder_ffn_embed_dim=24, encoder_attention_heads=2, conv_pos=8, conv_pos_groups=2, num_buckets=8,
               max_distance=16, skip_connection=False, output_layer=False, target_layers=())
MODEL = dict(target_layers=(1, 3))  # dropout as in the preset, 0.1

#: Of processes that tests start.
PATH = os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, sys.path)])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}


def flags(corpus, out, **changes):
    """The words of `python -m gendistiller_ext distill` for such a run."""
    settings = {"steps": 12, "batch-size": 3, "crop-seconds": 0.3, "lr": 0.01, "warmup": 0.25, "valid-fraction": 0.4,
                "eval-every": 4, "save-every": 5, "log-every": 3, "set": "target_layers=1,3", "teacher": corpus[0],
                "audio": corpus[1], "out": out, "process-timeout": 30, **changes}
    return ["-m", "gendistiller_ext", "distill",
            *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def make_corpus(folder):
    """(teacher's path, audio folder): 9 files of noise of 0.2 to 0.5 s."""
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for i in range(9):
        wav = rng.uniform(-0.5, 0.5, int(16000 * (0.2 + 0.04 * i))).astype(np.float32)
        soundfile.write(str(folder / "audio" / f"{i}.wav"), wav, 16000, subtype="FLOAT")
    gd.Model(gd.Config(**TEACHER), seed=1).save(str(folder / "teacher.safetensors"))
    return str(folder / "teacher.safetensors"), str(folder / "audio")


def recipe(corpus, out, **changes):
    """Twelve steps, in a second."""
    settings = dict(teacher=corpus[0], audio=[corpus[1]], out=str(out), model=dict(MODEL), steps=12, batch_size=3,
                    crop_seconds=0.3, lr=0.01, warmup=0.25, valid_fraction=0.2, eval_every=4, save_every=5, log_every=3)
    settings.update(changes)
    return Recipe(**settings).validate()


def train(recipe, said=None):
    return Trainer(recipe, (said if said is not None else []).append, quiet=True).train()


def params(out):
    return dict(gd.Model.load(os.path.join(out, "student.safetensors")).params)


def assert_same_run(one, other):
    """Two runs' folders hold the same student and the same log but for its times."""
    first, second = params(one), params(other)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name
    rows, others = ([{key: value for key, value in row.items() if key not in TIMING_COLUMNS}
                     for row in read_log(os.path.join(out, "log.csv"))] for out in (one, other))
    assert rows == others
