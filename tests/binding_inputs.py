"""Inputs of the small preset, right and odd, that the tests of the module share."""

from __future__ import annotations

import numpy as np

import gendistiller_ext as gd
from conftest import SEED, SMALL

D = SMALL["encoder_embed_dim"]
CONFIG = gd.Config(**SMALL)


def audio(*samples: int, seed: int = SEED) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(n).astype(np.float32) for n in samples]


WAVS = np.stack(audio(1200, 1200))
FRAMES = 3
TARGETS = np.random.default_rng(SEED).standard_normal((2, 2, FRAMES, D)).astype(np.float32)


class Raises:
    def __array__(self, *args, **kwargs):
        raise KeyError("not today")


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def spoilt(array: np.ndarray, place, value) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def unaligned(count: int) -> np.ndarray:
    return np.zeros(4 * count + 1, np.uint8)[1:].view(np.float32)


P = gd.Model(CONFIG).num_params
