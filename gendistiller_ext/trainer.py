"""Distillation: teacher -> targets -> student's step -> AdamW, with a log, states and exact resume.

A run that is interrupted and resumed ends in the same weights, bit for bit, as one that was not: batches,
crops and dropout follow from the step's number (data.py), everything else is in the state (state.py).
"""
from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from typing import Any, Callable, Optional

import numpy as np

from .audio import RATE, AudioError, AudioFile, find_audio, without
from .data import Batch, TrainingData, dataset_hash, split_validation
from .modelinfo import model_hash
from .recipe import Recipe, dump_yaml
from .report import Log, Progress, Window, draw_curves
from .state import load_newest, save_state
from .student import frame_geometry, init_from_teacher, student_config
from .validation import TERMS, Validation

_EXTRAS = ("soundfile", "soxr", "yaml", "tqdm", "tensorboardX", "matplotlib")


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Rate of step 1..steps, S3PRL's warmup_linear: x = step / steps; peak x / warmup up to warmup, then
    peak (1 - x) / (1 - warmup)."""
    x = step / steps
    return peak * (x / warmup if x < warmup else (1 - x) / (1 - warmup))


class Interrupt:
    """While entered, SIGINT and SIGTERM only set `signal`; a second one acts as usual. Elsewhere than in the
    main thread signals are left alone."""

    def __init__(self):
        self.signal: Optional[int] = None
        self._former: dict = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()

    def __exit__(self, *exception) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}


class Trainer:
    """One run of a validated Recipe. `train()` runs it; the attributes are there from construction on.

    say: receives lines for a person (skipped files, resume, ...).
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None] = print, quiet: bool = False):
        import gendistiller_ext as gd
        _require_extras()
        self.recipe, self.say, self.quiet = recipe, say, quiet
        self.out = recipe.out
        self.threads = recipe.threads or None
        self._check_out()
        self.teacher = gd.Model.load(recipe.teacher, device=recipe.device)
        overrides = dict(recipe.model)
        if recipe.freeze_extractor:
            overrides["feature_grad_mult"] = 0.0
        self.config = student_config(recipe.preset, self.teacher.config, overrides)
        self.layers = self.config.target_layers
        self.min_samples = frame_geometry(self.config)[0]
        self.train_files, self.valid_files = self._find_audio()
        self.data = TrainingData(self.train_files, recipe.batch_size, round(recipe.crop_seconds * RATE),
                                 recipe.seed, self.min_samples)
        self.validation = Validation(self.valid_files, recipe.batch_size, round(recipe.valid_seconds * RATE),
                                     self.min_samples, self._targets, self._failed)
        self.student = gd.Model(self.config, seed=recipe.seed, device=recipe.device)
        self.copied, self.random = (init_from_teacher(self.student, self.teacher) if recipe.init_from_teacher
                                    else ([], sorted(self.student.params)))
        self.optimizer = gd.AdamW(
            self.student, lr=recipe.lr, betas=tuple(recipe.betas), eps=recipe.eps,
            weight_decay=recipe.weight_decay, clip=recipe.clip, variant=recipe.optimizer)
        self.grads = np.zeros(self.student.num_params, np.float32)
        self.step = 0
        self.bad_in_a_row = 0
        self.skipped_steps = 0
        self.audio_seconds = 0.0
        self.failed_names: set[str] = set()
        self.window = Window(len(self.layers))
        self.first_valid: Optional[dict[str, float]] = None
        self.last_valid: Optional[dict[str, float]] = None
        self._seconds_before = 0.0
        self._saved: Optional[int] = None
        self._identity = {"recipe": recipe.result_settings(), "student": self.config.to_dict(),
                          "teacher": model_hash(self.teacher), "audio": dataset_hash(self.train_files),
                          "valid_audio": dataset_hash(self.valid_files)}
        self._restore()

    # ---- Before the first step ---------------------------------------------------------------------------

    def _check_out(self) -> None:
        if os.path.isdir(self.out):
            if os.listdir(self.out) and not self.recipe.resume:
                raise ValueError(f"out: expected an empty or new folder, got {self.out}, which has files "
                                 f"(--resume goes on with a run)")
        elif os.path.exists(self.out):
            raise ValueError(f"out: expected a folder, got the file {self.out}")

    def _find_audio(self) -> tuple[list[AudioFile], list[AudioFile]]:
        recipe = self.recipe
        files = self._usable(recipe.audio)
        if not recipe.valid_audio:
            return split_validation(files, recipe.valid_fraction)
        held = self._usable(recipe.valid_audio)
        files = without(files, held)
        if not files:
            raise ValueError("audio: expected files that are not in valid_audio, got none")
        return files, held

    def _usable(self, sources) -> list[AudioFile]:
        files, skipped = find_audio(sources, root=self.recipe.root, min_samples=self.min_samples)
        for error in skipped:
            self.say(f"skipped {error}")
        if skipped:
            self.say(f"skipped {len(skipped)} files, {len(files)} are left")
        return files

    def _restore(self) -> None:
        found = load_newest(os.path.join(self.out, "state"), self.say) if self.recipe.resume else None
        if found is None:
            return
        path, arrays, document = found
        _check_same(document["identity"], self._identity)
        self.student.flat_params()[:] = arrays["params"]
        self.student.touch()
        moments = {name[10:]: array for name, array in arrays.items() if name.startswith("optimizer.")}
        self.optimizer.load_state({**moments, **document["optimizer"]})
        counters = document["counters"]
        self.step, self.bad_in_a_row = counters["step"], counters["bad_in_a_row"]
        self.skipped_steps, self.audio_seconds = counters["skipped_steps"], counters["audio_seconds"]
        self.failed_names = set(counters["failed_names"])
        self.window = Window(len(self.layers), counters["window"])
        self.first_valid, self.last_valid = counters["first_valid"], counters["last_valid"]
        self._seconds_before = counters["seconds"]
        self.say(f"resuming after step {self.step} from {path}")

    # ---- Training ----------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        """Runs to the last step, or until SIGINT or SIGTERM. Returns a summary: see `_summary`."""
        recipe = self.recipe
        os.makedirs(self.out, exist_ok=True)
        dump_yaml(os.path.join(self.out, "config.yaml"), recipe, self.config.to_dict())
        log = Log(self.out, self.layers, self.step)
        progress = Progress(recipe.steps, self.step, self.say, self.quiet)
        say, self.say = self.say, progress.say
        self._begin = self._window_begin = time.monotonic()
        self._window_audio = 0.0
        try:
            with Interrupt() as interrupt, self.data.batches(self.step, recipe.steps, threads=recipe.readers,
                                                             ahead=recipe.readers + 2) as batches:
                if self.step == 0:
                    self._write_row(log, progress, self._evaluate())
                for batch in batches if not interrupt.signal else ():
                    loss = self._train_step(batch)
                    progress.step(loss, self._audio_per_second())
                    evaluate = self.step % recipe.eval_every == 0 or self.step == recipe.steps
                    if evaluate or self.step % recipe.log_every == 0:
                        self._write_row(log, progress, self._evaluate() if evaluate else {})
                    if self.step % recipe.save_every == 0 or self.step == recipe.steps:
                        self._save(log)
                    if interrupt.signal:
                        break
                if interrupt.signal and self._saved != self.step:
                    self._save(log)
        finally:
            self.say = say
            progress.close()
            log.close()
        draw_curves(os.path.join(self.out, "log.csv"), os.path.join(self.out, "curves.png"), self.layers)
        return self._summary(interrupt.signal if self.step < recipe.steps else None)

    def _train_step(self, batch: Batch) -> Optional[float]:
        """One optimiser step; None where loss or gradient was not finite, or no file could be read."""
        self.step += 1
        for error in batch.failed:
            self._failed(error)
        rate = learning_rate(self.step, self.recipe.steps, self.recipe.lr, self.recipe.warmup)
        if not batch.wavs:
            return self._bad_step("no file of the batch could be read")
        loss, terms = self._loss_and_gradient(batch.wavs)
        if not math.isfinite(loss) or not np.isfinite(self.grads).all():
            return self._bad_step("a gradient that is not finite" if math.isfinite(loss) else f"loss {loss}")
        norm = self.optimizer.step(self.grads, lr=rate, num_threads=self.threads)
        self.bad_in_a_row = 0
        self.audio_seconds += batch.seconds
        self._window_audio += batch.seconds
        self.window.add(loss, float(norm), terms)
        return loss

    def _failed(self, error: AudioError) -> None:
        if error.name not in self.failed_names:
            self.failed_names.add(error.name)
            self.say(f"skipped {error}")

    def _bad_step(self, why: str) -> None:
        self.skipped_steps += 1
        self.bad_in_a_row += 1
        self.say(f"step {self.step} skipped: {why}")
        if self.bad_in_a_row >= self.recipe.max_bad_steps:
            raise ArithmeticError(f"{self.bad_in_a_row} steps in a row had to be skipped, the last one for "
                                  f"{why}; the newest good state is in {os.path.join(self.out, 'state')}")

    def _loss_and_gradient(self, wavs: list[np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
        """Fills self.grads for the whole batch, computed in `accumulate` parts: each part's sum, divided once
        by the frames of all."""
        recipe = self.recipe
        parts = min(recipe.accumulate, len(wavs))
        by_sum = parts > 1 or recipe.reduction == "sum"
        bounds = [len(wavs) * i // parts for i in range(parts + 1)]
        dropout = any((self.config.dropout, self.config.attention_dropout, self.config.activation_dropout))
        options = dict(lam=recipe.lam, mask_padding=recipe.mask_padding, history=recipe.history,
                       detach_history=recipe.detach_history, precision=recipe.precision,
                       num_threads=self.threads)
        self.grads[:] = 0
        loss, frames_of_all = 0.0, 0
        terms = {term: np.zeros(len(self.layers)) for term in TERMS}
        for first, last in zip(bounds, bounds[1:]):
            targets, frames = self._targets(wavs[first:last])
            count = int(np.sum(frames)) if recipe.mask_padding else targets.shape[1] * targets.shape[2]
            result = self.student.distill_step(
                wavs[first:last], targets, reduction="sum" if by_sum else "mean",
                dropout_seed=(recipe.seed, self.step, first) if dropout else None, into=self.grads, **options)
            scale = 1 if by_sum else count
            loss += float(result.loss) * scale
            for term in ("l1", "cos"):
                terms[term] += np.asarray(getattr(result, term), np.float64) * scale
            terms["similarity"] += np.asarray(result.similarity, np.float64) * count  # a mean, always
            frames_of_all += count
        terms = {term: total / frames_of_all for term, total in terms.items()}
        if recipe.reduction == "sum":
            return loss, terms
        if by_sum:
            self.grads *= np.float32(1 / frames_of_all)
        return loss / frames_of_all, terms

    def _targets(self, wavs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """((L, B, T, D) float32, (B,)) of the teacher, which runs no block that no target needs."""
        hidden, frames = self.teacher.forward(wavs, num_layers=max(1, *self.layers), num_threads=self.threads)
        return np.stack([hidden[layer] for layer in self.layers]), frames

    def _evaluate(self) -> dict[str, float]:
        begin = time.monotonic()
        row = self.validation.evaluate(self.student, self.recipe.lam, self.threads)
        self._begin += time.monotonic() - begin  # the clock counts training alone
        self._window_begin += time.monotonic() - begin
        if row:
            self.first_valid = self.first_valid or row
            self.last_valid = row
        return row

    # ---- Log, state, summary -----------------------------------------------------------------------------

    def _audio_per_second(self) -> float:
        return self._window_audio / max(time.monotonic() - self._window_begin, 1e-9)

    def _write_row(self, log: Log, progress: Progress, valid: dict[str, float]) -> None:
        recipe = self.recipe
        row = {"step": self.step, "epoch": self.data.plan.epoch(self.step),
               "lr": learning_rate(self.step, recipe.steps, recipe.lr, recipe.warmup),
               **self.window.row(self.layers), **valid, "skipped_steps": self.skipped_steps,
               "skipped_files": len(self.failed_names), "audio_seconds": self.audio_seconds,
               "seconds": self._seconds(), "audio_per_second": self._audio_per_second()}
        log.write(row)
        progress.row(row)
        self.window = Window(len(self.layers))
        self._window_begin, self._window_audio = time.monotonic(), 0.0

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begin

    def _save(self, log: Log) -> None:
        moments, numbers = {}, {}
        for name, value in self.optimizer.state().items():
            if isinstance(value, np.ndarray) and value.ndim:
                moments[f"optimizer.{name}"] = value
            else:
                numbers[name] = value.item() if isinstance(value, (np.ndarray, np.generic)) else value
        counters = {"step": self.step, "bad_in_a_row": self.bad_in_a_row, "skipped_steps": self.skipped_steps,
                    "audio_seconds": self.audio_seconds, "failed_names": sorted(self.failed_names),
                    "window": self.window.values, "seconds": self._seconds(), "first_valid": self.first_valid,
                    "last_valid": self.last_valid}
        log.flush()
        save_state(os.path.join(self.out, "state"), self.step,
                   {"params": self.student.flat_params(), **moments},
                   {"identity": self._identity, "optimizer": numbers, "counters": counters})
        self.student.save(os.path.join(self.out, "student.safetensors"), dtype="float32")
        self._saved = self.step

    def _summary(self, stopped_by: Optional[int]) -> dict[str, Any]:
        """{"out", "student", "steps", "stopped_by": "SIGINT" | "SIGTERM" | None, "seconds", "audio_seconds",
        "skipped_steps", "skipped_files", "parameters", "teacher_parameters", "valid_first", "valid_last"}."""
        return {"out": self.out, "student": os.path.join(self.out, "student.safetensors"), "steps": self.step,
                "stopped_by": signal.Signals(stopped_by).name if stopped_by else None,
                "seconds": self._seconds(), "audio_seconds": self.audio_seconds, "skipped_steps": self.skipped_steps,
                "skipped_files": len(self.failed_names), "parameters": int(self.student.num_params),
                "teacher_parameters": int(self.teacher.num_params), "valid_first": self.first_valid,
                "valid_last": self.last_valid}


def _require_extras() -> None:
    import importlib
    for name in _EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            message = f"distill needs {name}: pip install 'gendistiller_ext[train]' ({error})"
            raise ImportError(message) from error


def _check_same(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError that names the first setting in which a resumed run differs."""
    now = json.loads(json.dumps(now))
    for group in ("recipe", "student"):
        for key in sorted(set(saved[group]) | set(now[group])):
            before, after = saved[group].get(key), now[group].get(key)
            if before != after:
                raise ValueError(f"resume: {key}: expected {before}, as in the run so far, got {after}")
    for key, what in (("teacher", "the same weights"), ("audio", "the same files"),
                      ("valid_audio", "the same files")):
        if saved[key] != now[key]:
            raise ValueError(f"resume: {key}: expected {what} as in the run so far, got others")
