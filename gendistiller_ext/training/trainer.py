"""Distillation: teacher -> targets -> student's step -> AdamW, with a log, states and exact resume.

A run that is interrupted and resumed ends in the same weights, bit for bit, as one that was not: batches,
crops and dropout follow from the step's number (data.py), everything else is in the state (state.py).

Of several processes (distributed.py) each computes its share of every batch with the masks that it has in
the whole batch; gradients and loss are summed (batch_gradient.py), then all take the same step. The first one
writes.
"""
from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import signal
import time
from typing import Any, Callable, Optional, cast

import numpy as np

from .._core import AdamW, cpu_features, usable_cores
from ..audio.files import RATE, AudioError
from ..config import Config
from ..model import Model
from ..student import student_config
from .batch_gradient import batch_gradient
from .counters import Counters
from .data import Batch, TrainingData, dataset_hash, find_training_audio
from .distributed import Processes, SharedPlan, local_device, note_launch, was_launched_by
from .interrupt import Interrupt
from .recipe import Recipe, dump_yaml
from .report import Log, Mute, Progress, Window, draw_curves
from .state import check_same, load_newest, save_state
from .target_cache import TargetCache, WholeData
from .teachers import load_teacher
from .validation import Validation

_EXTRAS = ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of step 1..steps, S3PRL's warmup_linear: x = step / steps; peak x / warmup up to warmup, then
    peak (1 - x) / (1 - warmup)."""
    x = step / steps
    return peak * (x / warmup if x < warmup else (1 - x) / (1 - warmup))


class Trainer:
    """One run of a validated Recipe. `train()` runs it; the attributes are there from construction on.

    say: receives lines for a person (skipped files, resume, ...).
    rows: receives every row of the log as it comes.
    processes: of the run, each of which has a Trainer. Only the first one uses recipe.out, and `say`.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = print, quiet: bool = False,
                 processes: Optional[Processes] = None, rows: Optional[Callable[[dict], None]] = None):
        _require_extras()
        self.processes = processes or Processes()
        self.recipe, self.quiet, self.rows = recipe, quiet, rows
        self.say = say if self.processes.first else lambda line: None
        self.out = cast(str, recipe.out)
        self.threads = recipe.threads or usable_cores()
        self.resume = recipe.resume or was_launched_by(self.out, self.processes)
        if self.processes.first:
            self._check_out()
        self.device = local_device(recipe.device)

        self.teacher = load_teacher(cast(str, recipe.teacher), self.device,
                                    recipe.teacher_precision or recipe.precision)
        self.config = self._student_config()
        self._check_parts()
        self.layers = self.config.target_layers
        self.min_samples = self.config.min_samples

        self.train_files, self.valid_files = find_training_audio(recipe, self.min_samples, self.say)
        self.cache = self._open_cache()
        self.data = self._plan_batches()
        self.validation = Validation(self.valid_files, recipe.batch_size, round(recipe.valid_seconds * RATE),
                                     self.min_samples, self._targets, self.processes)

        self.student, self.copied, self.random = self._make_student()
        self.optimizer = self._make_optimizer()
        self.grads = np.zeros(self.student.num_params, np.float32)

        self.counters = Counters(Window(len(self.layers)))
        self._saved: Optional[int] = None
        self._identity = self._identify()
        self._check_others()
        self._restore()

    # ---- Parts -------------------------------------------------------------------------------------------

    def _student_config(self) -> Config:
        overrides = dict(self.recipe.model)
        if self.recipe.freeze_extractor:
            overrides["feature_grad_mult"] = 0.0
        return student_config(self.recipe.preset, self.teacher.config, overrides)

    def _open_cache(self) -> Optional[TargetCache]:
        if not self.recipe.teacher_cache:
            return None
        return TargetCache(self.teacher, self.layers, self.recipe.teacher_cache, lambda line: self.say(line))

    def _plan_batches(self) -> TrainingData:
        """Of each batch this process's share; crops at frames, with the files that they are of, for a cache."""
        recipe = self.recipe
        crops = (self.train_files, recipe.batch_size, round(recipe.crop_seconds * RATE), recipe.seed, self.min_samples)
        data = WholeData(*crops, self.config.hop) if self.cache else TrainingData(*crops)
        data.plan = SharedPlan(data.plan, self.processes)
        return data

    def _make_student(self) -> tuple[Model, list[str], list[str]]:
        """(student, names of the tensors that are the teacher's, names of those that are random)."""
        student = Model(self.config, seed=self.recipe.seed, device=self.device)
        if not self.recipe.init_from_teacher:
            return student, [], sorted(student.params)
        return (student, *self.teacher.initialise(student))

    def _make_optimizer(self) -> AdamW:
        recipe = self.recipe
        return AdamW(self.student, lr=recipe.lr, betas=tuple(recipe.betas), eps=recipe.eps,
                     weight_decay=recipe.weight_decay, clip=recipe.clip, variant=recipe.optimizer)

    def _identify(self) -> dict[str, Any]:
        """What a run may only be resumed with: all that its weights depend on."""
        settings = {**self.recipe.result_settings(), **({"teacher_cache": True} if self.cache else {})}
        return {"recipe": settings, "student": self.config.to_dict(), "teacher": self.teacher.hash,
                "audio": dataset_hash(self.train_files), "valid_audio": dataset_hash(self.valid_files)}

    # ---- Before the first step ---------------------------------------------------------------------------

    def _check_out(self) -> None:
        if os.path.isdir(self.out):
            if os.listdir(self.out) and not self.resume:
                raise ValueError(f"out: expected an empty or new folder, got {self.out}, which has files "
                                 f"(--resume goes on with a run)")
        elif os.path.exists(self.out):
            raise ValueError(f"out: expected a folder, got the file {self.out}")

    def _check_parts(self) -> None:
        """Raises ValueError where a batch's parts would not give the gradient of the whole."""
        recipe, size = self.recipe, self.processes.size
        if recipe.batch_size < size:
            raise ValueError(f"batch_size: expected at least 1 for each of the {size} processes, got "
                             f"{recipe.batch_size}")
        if size > 1 and not recipe.mask_padding:
            raise ValueError(f"mask_padding: expected true with {size} processes, of which each sees a part of "
                             "the batch: how much padding there is depends on the whole")
        if (recipe.accumulate > 1 or size > 1) and self.config.padding != "exact":
            raise ValueError("padding: expected exact where a batch is computed in parts (accumulate "
                             f"{recipe.accumulate}, {size} processes): otherwise what a part gives depends on "
                             f"the whole batch, got {self.config.padding}")

    def _check_others(self) -> None:
        """Raises ValueError where the processes are not set to do the same."""
        mine = {**self._identity, "instruction sets": list(cpu_features())}
        for rank, other in enumerate(self.processes.gather(mine)):
            for key in mine:
                if other[key] != mine[key]:
                    hint = " (GENDISTILLER_DISABLE_CPU masks some)" if key == "instruction sets" else ""
                    raise ValueError(f"{key}: expected the same in every process, processes {rank} and "
                                     f"{self.processes.rank} differ{hint}")

    def _restore(self) -> None:
        found = None
        if self.processes.first and self.resume:
            found = load_newest(os.path.join(self.out, "state"), self.say)
        found = self.processes.spread(found)
        if found is None:
            return
        path, arrays, document = found
        check_same(document["identity"], self._identity)
        self.counters = Counters.from_json(document["counters"], path, len(self.layers))
        self.student.flat_params()[:] = arrays["params"]
        self.student.touch()
        moments = {name[10:]: array for name, array in arrays.items() if name.startswith("optimizer.")}
        self.optimizer.load_state({**moments, **document["optimizer"]})
        self.say(f"resuming after step {self.counters.step} from {path}")

    # ---- Training ----------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Runs to the last step, or until SIGINT or SIGTERM. Returns a summary: see `_summary`."""
        recipe = self.recipe
        log: Any = Mute()
        progress: Any = Mute()
        if self.processes.first:
            os.makedirs(os.path.join(self.out, "state"), exist_ok=True)
            note_launch(self.out, self.processes)
            dump_yaml(os.path.join(self.out, "config.yaml"), recipe, self.config.to_dict())
            log = Log(self.out, self.layers, self.counters.step)
            progress = Progress(recipe.steps, self.counters.step, self.say, self.quiet, recipe.eval_every)
        say, self.say = self.say, progress.say
        self._begin = self._window_begin = time.monotonic()
        self._window_audio = 0.0
        try:
            with Interrupt() as interrupt, self.data.batches(self.counters.step, recipe.steps, threads=recipe.readers,
                                                             ahead=recipe.readers + 2) as batches:
                if self.counters.step == 0:
                    self._write_row(log, progress, self._evaluate(progress))
                stop = self._stop(interrupt)
                for batch in batches if not stop else ():
                    loss = self._train_step(batch)
                    progress.step(loss, self._audio_per_second())
                    evaluate = self.counters.step % recipe.eval_every == 0 or self.counters.step == recipe.steps
                    if evaluate or self.counters.step % recipe.log_every == 0:
                        self._write_row(log, progress, self._evaluate(progress) if evaluate else {})
                    if self.counters.step % recipe.save_every == 0 or self.counters.step == recipe.steps:
                        self._save(log)
                    stop = self._stop(interrupt)
                    if stop:
                        break
                if stop and self._saved != self.counters.step:
                    self._save(log)
        finally:
            self.say = say
            progress.close()
            log.close()
        if self.processes.first:
            draw_curves(os.path.join(self.out, "log.csv"), os.path.join(self.out, "curves.png"), self.layers)
        return self._summary(stop if self.counters.step < recipe.steps else None)

    def _stop(self, interrupt: Interrupt) -> Optional[int]:
        """The signal that came to any of the processes: they stop after the same step."""
        return next((number for number in self.processes.gather(interrupt.signal) if number), None)

    def _train_step(self, batch: Batch) -> Optional[float]:
        """One optimiser step; None where loss or gradient was not finite, or no file could be read."""
        self.counters.step += 1
        shares = self.processes.gather((len(batch.wavs), sum(map(len, batch.wavs)),
                                        [(error.name, error.reason) for error in batch.failed]))
        counts, samples, failed = zip(*shares)
        for name, reason in sum(failed, []):
            self._failed(name, reason)
        rate = learning_rate(self.counters.step, self.recipe.steps, self.recipe.lr, self.recipe.warmup)
        if not any(counts):
            self._bad_step("no file of the batch could be read")
            return None
        loss, terms = self._loss_and_gradient(batch.wavs, sum(counts[:self.processes.rank]),
                                              getattr(batch, "wholes", None))
        if not math.isfinite(loss) or not np.isfinite(self.grads).all():
            self._bad_step("a gradient that is not finite" if math.isfinite(loss) else f"loss {loss}")
            return None
        norm = self.optimizer.step(self.grads, lr=rate, num_threads=self.threads)
        self.counters.bad_in_a_row = 0
        self.counters.audio_seconds += sum(samples) / RATE
        self._window_audio += sum(samples) / RATE
        self.counters.window.add(loss, float(norm), terms)
        return loss

    def _failed(self, name: str, reason: str) -> None:
        if name not in self.counters.failed_names:
            self.counters.failed_names.add(name)
            self.say(f"skipped {AudioError(name, reason)}")

    def _bad_step(self, why: str) -> None:
        self.counters.skipped_steps += 1
        self.counters.bad_in_a_row += 1
        self.say(f"step {self.counters.step} skipped: {why}")
        if self.counters.bad_in_a_row >= self.recipe.max_bad_steps:
            raise ArithmeticError(f"{self.counters.bad_in_a_row} steps in a row had to be skipped, the last one for "
                                  f"{why}; the newest good state is in {os.path.join(self.out, 'state')}")

    def _loss_and_gradient(self, wavs: list[np.ndarray], place: int = 0, wholes: Optional[list] = None
                           ) -> tuple[float, dict[str, Any]]:
        """Fills self.grads for the whole batch, of which `wavs` are this process's share, from number `place`
        on. wholes: the files that the cache's targets are of."""
        def teach(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
            if self.cache is None or wholes is None:
                return self._targets(wavs[first:last])
            return self.cache.targets(wholes[first:last], wavs[first:last], self.threads)
        return batch_gradient(self.student, wavs, teach, self.grads, recipe=self.recipe, processes=self.processes,
                              step=self.counters.step, place=place, threads=self.threads)

    def _targets(self, wavs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return self.teacher.targets(wavs, self.layers, self.threads)

    def _evaluate(self, progress: Any) -> dict[str, float]:
        begin = time.monotonic()
        row, failed = self.validation.evaluate(self.student, self.recipe.lam, self.recipe.loss_type,
                                               self.threads)
        for name, reason in failed:
            self._failed(name, reason)
        seconds = time.monotonic() - begin
        self._begin += seconds  # the clock counts training alone
        self._window_begin += seconds
        progress.evaluation(seconds)
        if row:
            self.counters.first_valid = self.counters.first_valid or row
            self.counters.last_valid = row
        return row

    # ---- Log, state, summary -----------------------------------------------------------------------------

    def _audio_per_second(self) -> float:
        return self._window_audio / max(time.monotonic() - self._window_begin, 1e-9)

    def _write_row(self, log: Log, progress: Progress, valid: dict[str, float]) -> None:
        recipe, counted = self.recipe, self.counters
        row = {"step": counted.step, "epoch": self.data.plan.epoch(counted.step),
               "lr": learning_rate(counted.step, recipe.steps, recipe.lr, recipe.warmup),
               **counted.window.row(self.layers), **valid, "skipped_steps": counted.skipped_steps,
               "skipped_files": len(counted.failed_names), "audio_seconds": counted.audio_seconds,
               "seconds": self._seconds(), "audio_per_second": self._audio_per_second()}
        log.write(row)
        progress.row(row)
        if self.rows and self.processes.first:
            self.rows(row)
        self.counters.window = Window(len(self.layers))
        self._window_begin, self._window_audio = time.monotonic(), 0.0

    def _seconds(self) -> float:
        return self.counters.seconds + time.monotonic() - self._begin

    def _save(self, log: Log) -> None:
        moments, numbers = {}, {}
        for name, value in self.optimizer.state().items():
            if isinstance(value, np.ndarray) and value.ndim:
                moments[f"optimizer.{name}"] = value
            else:
                numbers[name] = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
        counters = dataclasses.replace(self.counters, seconds=self._seconds())
        weights = hashlib.sha256(self.student.flat_params()).hexdigest()
        if len(set(self.processes.gather(weights))) > 1:
            raise RuntimeError(f"step {self.counters.step}: the processes' weights differ: a machine among them "
                               "computes wrongly")
        self._saved = self.counters.step
        if not self.processes.first:
            return
        log.flush()
        save_state(os.path.join(self.out, "state"), self.counters.step,
                   {"params": self.student.flat_params(), **moments},
                   {"identity": self._identity, "optimizer": numbers, "counters": counters.to_json()})
        self.student.save(os.path.join(self.out, "student.safetensors"), dtype="float32")

    def _summary(self, stopped_by: Optional[int]) -> dict[str, Any]:
        """{"out", "student", "steps", "stopped_by": "SIGINT" | "SIGTERM" | None, "seconds", "audio_seconds",
        "skipped_steps", "skipped_files", "parameters", "teacher_parameters", "valid_first", "valid_last"}."""
        counted = self.counters
        return {"out": self.out, "student": os.path.join(self.out, "student.safetensors"), "steps": counted.step,
                "stopped_by": signal.Signals(stopped_by).name if stopped_by else None,
                "seconds": self._seconds(), "audio_seconds": counted.audio_seconds,
                "skipped_steps": counted.skipped_steps, "skipped_files": len(counted.failed_names),
                "parameters": int(self.student.num_params), "teacher_parameters": int(self.teacher.num_params),
                "valid_first": counted.first_valid, "valid_last": counted.last_valid}


def _require_extras() -> None:
    import importlib
    for name in _EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f"distill needs {name}: pip install 'gendistiller_ext[train]' ({error})"
            raise ImportError(message) from error
