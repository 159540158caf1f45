"""What a run tells: log.csv, TensorBoard, the progress bar, curves.png."""
from __future__ import annotations

import csv
import io
import os
import sys
import time
from collections import deque
from typing import Any, Callable, Mapping, Optional, Sequence

from ..atomic import replacing
from .validation import TERMS

# Columns that differ between two runs of the same training.
TIMING_COLUMNS = ("seconds", "audio_per_second")
# Of a training step, besides the terms of each layer.
SCALARS = ("loss", "feature_penalty", "grad_norm")


def columns(target_layers: Sequence[int]) -> list[str]:
    """Column names of log.csv. A row's values are means over the steps since the row before it; valid_* are
    there where an evaluation took place, valid_loss without the feature penalty. l1, cos (-log sigmoid) and
    similarity (cosine) are by layer."""
    layers = [f"{term}_{layer}" for layer in target_layers for term in TERMS]
    return ["step", "epoch", "lr", *SCALARS, *layers,
            "valid_loss", *(f"valid_{name}" for name in layers),
            "skipped_steps", "skipped_files", "audio_seconds", *TIMING_COLUMNS]


class Window:
    """Means over the steps since the last row of the log. `values` goes into the state, so that rows don't
    depend on interruptions."""

    def __init__(self, layers: int, values: Optional[dict] = None):
        self.values = values or {"steps": 0, **dict.fromkeys(SCALARS, 0.0),
                                 **{term: [0.0] * layers for term in TERMS}}

    def add(self, loss: float, norm: float, terms: Mapping[str, Any]) -> None:
        sums = self.values
        sums["steps"] += 1
        for name, value in zip(SCALARS, (loss, terms["feature_penalty"], norm)):
            sums[name] += value
        for term in TERMS:
            sums[term] = [old + float(new) for old, new in zip(sums[term], terms[term])]

    def row(self, target_layers: Sequence[int]) -> dict[str, float]:
        """{} where no step was added."""
        sums = self.values
        if sums["steps"] == 0:
            return {}
        row = {name: sums[name] / sums["steps"] for name in SCALARS}
        for term in TERMS:
            row.update({f"{term}_{layer}": total / sums["steps"]
                        for layer, total in zip(target_layers, sums[term])})
        return row


class Log:
    """Rows to OUT/log.csv (flushed as they come) and scalars to OUT/tb/.

    Rows after `resume_step` are removed first: they belong to steps that will be run again. 0 starts anew.
    """

    def __init__(self, out: str, target_layers: Sequence[int], resume_step: int = 0):
        self._path = os.path.join(out, "log.csv")
        self._columns = columns(target_layers)
        kept = [row for row in read_log(self._path) if 0 < resume_step >= row["step"]] if resume_step else []
        with replacing(self._path) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8", newline="", write_through=True)
            writer = csv.DictWriter(text, self._columns)
            writer.writeheader()
            writer.writerows({name: _cell(row.get(name)) for name in self._columns} for row in kept)
            text.detach()
        self._stream = open(self._path, "a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._stream, self._columns)
        from tensorboardX import SummaryWriter
        self._board = SummaryWriter(os.path.join(out, "tb"),
                                    purge_step=resume_step + 1 if resume_step else None)

    def write(self, row: Mapping[str, Any]) -> None:
        self._writer.writerow({name: _cell(row.get(name)) for name in self._columns})
        self._stream.flush()
        for name, value in row.items():
            if value is None or name == "step":
                continue
            tag = f"valid/{name[6:]}" if name.startswith("valid_") else f"train/{name}"
            self._board.add_scalar(tag, float(value), int(row["step"]))

    def flush(self) -> None:
        self._stream.flush()
        self._board.flush()

    def close(self) -> None:
        self._stream.close()
        self._board.close()


def _cell(value: Any) -> str:
    return "" if value is None else (repr(value) if isinstance(value, float) else str(value))


def read_log(path: str) -> list[dict[str, Any]]:
    """Rows of a log.csv, numbers as int (step) or float, empty cells as None; [] where there is no file.
    A last line cut short by a crash is left out."""
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            try:
                values = {name: float(cell) if cell else None for name, cell in row.items()}
                rows.append({**values, "step": int(row["step"])})
            except (TypeError, ValueError):
                continue
    return rows


class TimeLeft:
    """How long a run will take yet: the mean of its latest steps for those that are left, and of its evaluations,
    which take much longer, for those that are left."""

    def __init__(self, total: int, step: int, eval_every: int, clock: Callable[[], float] = time.monotonic):
        self._total, self._step, self._eval_every, self._clock = total, step, eval_every, clock
        self._steps: deque = deque(maxlen=200)
        self._evaluations: deque = deque(maxlen=5)
        self._evaluating = 0.0  # since the latest step
        self._last = clock()

    def step(self) -> None:
        now = self._clock()
        self._steps.append(now - self._last - self._evaluating)
        self._last, self._evaluating, self._step = now, 0.0, self._step + 1

    def evaluation(self, seconds: float) -> None:
        self._evaluations.append(seconds)
        self._evaluating += seconds

    def seconds(self) -> Optional[float]:
        """None before the first step."""
        if not self._steps:
            return None
        # Every eval_every-th step and the last one; that of the latest step may be under way.
        evaluations = -(-self._total // self._eval_every) - self._step // self._eval_every
        left = (self._total - self._step) * sum(self._steps) / len(self._steps)
        if self._evaluations:
            left += evaluations * sum(self._evaluations) / len(self._evaluations)
        return left


class Progress:
    """A tqdm bar where stderr is a terminal; elsewhere a line through `say` for every row of the log."""

    def __init__(self, total: int, initial: int, say: Callable[[str], None], quiet: bool = False,
                 eval_every: int = 1000):
        from tqdm import tqdm
        self._quiet, self._say = quiet, say
        self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, file=sys.stderr,
                         disable=True if quiet else None,
                         bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]")
        self._total = total
        self._left = TimeLeft(total, initial, eval_every)

    def step(self, loss: Optional[float], audio_per_second: float) -> None:
        self._left.step()
        self._bar.update(1)
        left = self._left.seconds() or 0.0  # there is one after a step
        shown = "not finite" if loss is None else f"{loss:.4f}"
        self._bar.set_postfix_str(f"left {_duration(left)}, loss {shown}, "
                                  f"audio {audio_per_second:.1f} s/s", refresh=False)

    def evaluation(self, seconds: float) -> None:
        self._left.evaluation(seconds)

    def row(self, row: Mapping[str, Any]) -> None:
        if self._quiet or not self._bar.disable:
            return
        parts = [f"step {row['step']}/{self._total}"]
        if row.get("loss") is not None:
            parts.append(f"loss {row['loss']:.4f}")
        if row.get("valid_loss") is not None:
            parts.append(f"valid {row['valid_loss']:.4f}")
        if row.get("audio_per_second"):
            parts.append(f"audio {row['audio_per_second']:.1f} s/s")
        left = self._left.seconds()
        if left is not None:
            parts.append(f"left {_duration(left)}")
        self._say("  ".join(parts))

    def say(self, message: str) -> None:
        """A line for a person; above the bar where there is one."""
        if self._bar.disable:
            self._say(message)
        else:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    return f"{int(seconds) // 3600:d}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


class Mute:
    """A Log and a Progress of a process that writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


def draw_curves(log_path: str, image_path: str, target_layers: Sequence[int]) -> None:
    """A PNG of a log: loss, cosine with each target layer, L1 of each, learning rate and gradient norm."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    rows = read_log(log_path)

    def curve(axis, name: str, label: str, **style) -> None:
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        if points:
            axis.plot(*zip(*points), label=label, **style)

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (loss, cosine), (distance, rate) = figure.subplots(2, 2)
    curve(loss, "loss", "training", color="C0", linewidth=0.8)
    curve(loss, "valid_loss", "validation", color="C1", marker=".")
    for index, layer in enumerate(target_layers):
        for axis, term in ((cosine, "similarity"), (distance, "l1")):
            curve(axis, f"{term}_{layer}", f"layer {layer}", color=f"C{index}", linewidth=0.8)
            curve(axis, f"valid_{term}_{layer}", f"layer {layer}, validation", color=f"C{index}", marker=".",
                  linestyle="--")
    curve(rate, "lr", "learning rate", color="C2")
    norms = rate.twinx()
    curve(norms, "grad_norm", "gradient norm", color="C3", linewidth=0.8)
    norms.set_ylabel("gradient norm")
    for axis, title in ((loss, "loss"), (cosine, "cosine with the teacher"), (distance, "L1 per dimension"),
                        (rate, "learning rate (green), gradient norm (red)")):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with replacing(image_path) as stream:
        stream.write(buffer.getvalue())


def table(rows: Sequence[Sequence[Any]], header: Optional[Sequence[str]] = None) -> str:
    """Columns lined up for a terminal: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else []) + list(rows)]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells)
