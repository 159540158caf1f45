"""Dropout's masks in NumPy: Philox 4x32-10 of (seed, step) and (element, frame, line, place).

A line is an utterance, or a head of one; a place is a site at a generation step."""

from __future__ import annotations

import numpy as np

#: In the order of their numbers; each has places for 32 generation steps.
SITES = ("encoder", "attention_probs", "attention", "activation", "ffn", "cross_probs", "cross")
STEPS = 32


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> np.ndarray:
    """(4, ...) words of counters of four words each."""
    low, c = np.uint64(0xFFFFFFFF), [np.asarray(word, np.uint64) for word in counter]
    for turn in range(10):
        k = [np.uint64((key[i] + turn * weyl) & 0xFFFFFFFF) for i, weyl in enumerate((0x9E3779B9, 0xBB67AE85))]
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & low, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & low]
    return np.stack(np.broadcast_arrays(*c))


def factors(seed: tuple[int, int], line: np.ndarray, site: str, generation: int, rate: float,
            frames: int, width: int) -> np.ndarray:
    """(lines, frames, width): 1 / (1 - rate) where an element is kept, else 0. seed: the run's and the step's."""
    low = 0xFFFFFFFF
    key = (seed[0] & low) ^ (seed[1] >> 32), (seed[1] & low) ^ (seed[0] >> 32)
    element, frame = np.arange(width), np.arange(frames)
    place = np.uint64(SITES.index(site) * STEPS + generation)
    words = philox([(element // 4)[None, None], frame[None, :, None], line[:, None, None], place], key)
    word = np.take_along_axis(words, np.broadcast_to(element % 4, words.shape[1:])[None], 0)[0]
    return np.where(word >= np.ceil(rate * 2.0**32), np.float32(1 / (1 - rate)), np.float32(0))
