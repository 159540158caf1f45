"""The paper's Table 2: how long models take to extract features of a set of audio files, one file at a time.

    row = one model: parameters; seconds of forward() over all files, for each run; how many times faster it is
    than the first model

Decoding is not timed. The models take turns file by file, in an order that rotates, so that they share whatever
else the machine does.
"""
from __future__ import annotations

import time
from typing import Any, Callable, Optional, Sequence

import numpy as np

from ..audio.files import RATE, AudioError, AudioFile
from ..training.data import read_files

#: The rows of the paper's table, as presets; random weights take as long as others.
TABLE2 = ("wavlm_base", "distilwavlm", "gendistiller")


def spread(files: Sequence[AudioFile], limit: Optional[int]) -> list[AudioFile]:
    """`limit` files, evenly spread over the list; all where it is None or there are no more."""
    if limit is None or limit >= len(files):
        return list(files)
    return [files[i * len(files) // limit] for i in range(limit)]


def measure(models: Sequence[Any], files: Sequence[AudioFile], runs: int = 3, threads: Optional[int] = None,
            precision: Optional[str] = None, failed: Callable[[AudioError], None] = lambda error: None,
            done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """{"seconds": (models, runs) array, "files", "audio_seconds": of a run}.

    failed: called once with each file that can't be read; done: after each file of each run. Raises ValueError
    where no file can be read.
    """
    least = max(model.config.min_samples for model in models)
    seconds = np.zeros((len(models), runs))
    usable, samples = 0, 0
    warm = False
    for run in range(runs):
        for number, file in enumerate(files):
            batch = read_files([file], min_samples=least)
            if run == 0:
                for error in batch.failed:
                    failed(error)
                usable += len(batch.wavs)
                samples += sum(map(len, batch.wavs))
            if batch.wavs:
                if not warm:  # weights are packed at the first call
                    for model in models:
                        model.forward(batch.wavs, precision=precision, num_threads=threads)
                    warm = True
                for turn in range(len(models)):
                    index = (number + run + turn) % len(models)
                    begin = time.perf_counter()
                    models[index].forward(batch.wavs, precision=precision, num_threads=threads)
                    seconds[index, run] += time.perf_counter() - begin
            done()
        if not usable:
            raise ValueError(f"audio: none of {len(files)} files could be read")
    return {"seconds": seconds, "files": usable, "audio_seconds": samples / RATE}
