#!/usr/bin/env python3
"""Figures, kept as JSON as they come, as Markdown tables and a picture.

    python benchmarks/report.py build/bench/speed.json       # or training.json, together.json
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any, Iterable

OURS = "gendistiller"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _unique(values: Iterable[Any]) -> list:
    return list(dict.fromkeys(values))


def _cases(rows: list[dict]) -> dict[tuple, dict[str, dict]]:
    """{(seconds, batch, threads): {peer: row}} in the order of measurement."""
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["seconds"], row["batch"], row["threads"]), {})[row["peer"]] = row
    return cases


def best_peer(case: dict[str, dict], precision: str | None) -> str | None:
    """The fastest other engine, with None of any precision."""
    others = [name for name, row in case.items()
              if not name.startswith(OURS) and precision in (None, row["precision"])]
    return min(others, key=lambda name: case[name]["median"], default=None)


def _milliseconds(case: dict[str, dict], peer: str, best: str | None = None) -> str:
    if peer not in case:
        return "-"
    text = f"{case[peer]['median'] * 1e3:.1f}"
    return f"**{text}**" if peer == best else text


def _engine(row: dict) -> str:
    return row["peer"].removesuffix(" " + row["precision"])


def _case_name(key: tuple) -> str:
    seconds, batch, threads = key
    return f"{seconds:g} s{f' x {batch}' if batch > 1 else ''}, {threads} thread{'s' if threads > 1 else ''}"


def _summary_table(rows: list[dict]) -> str:
    """Ours in each precision beside the fastest other of that precision; int8 beside the fastest of any."""
    precisions = [row["precision"] for row in {row["peer"]: row for row in rows}.values()
                  if row["peer"].startswith(OURS)]
    header, lines = ["audio"], []
    for precision in precisions:
        header += [f"{precision}, ms", f"best other{', any precision' if precision == 'int8' else ''}", "ratio"]
    for key, case in _cases(rows).items():
        line = [_case_name(key)]
        for precision in precisions:
            ours = next((row for name, row in case.items()
                         if name.startswith(OURS) and row["precision"] == precision), None)
            peer = best_peer(case, None if precision == "int8" else precision)
            line += [f"{ours['median'] * 1e3:.1f}" if ours else "-"]
            line += [f"{case[peer]['median'] * 1e3:.1f} {peer if precision == 'int8' else _engine(case[peer])}",
                     f"{case[peer]['median'] / ours['median']:.2f} x"] if ours and peer else ["-", "-"]
        lines.append(line)
    return _table(header, lines)


def _speed_table(rows: list[dict]) -> str:
    peers, lines = _unique(row["peer"] for row in rows), []
    for key, case in _cases(rows).items():
        fastest = min(case, key=lambda name: case[name]["median"])
        lines.append([_case_name(key), *(_milliseconds(case, peer, fastest) for peer in peers)])
    return _table(["audio", *peers], lines)


def _rate(row: dict | None, result: dict) -> str:
    if row is None:
        return "-"
    peak = result["peak"].get(row["precision"], {}).get(str(row["threads"]))
    gemm = max((found["per_second"] for found in result["gemm"] if found["precision"] == row["precision"]
                and found["threads"] == row["threads"]), default=None)
    shares = (f"{row['per_second'] / bound:.0%}" if bound else "-" for bound in (peak, gemm))
    return ", ".join([f"{row['per_second'] / 1e9:.0f}", *shares])


def _rate_table(rows: list[dict], result: dict) -> str:
    peers, lines = _unique(row["peer"] for row in rows), []
    for key, case in _cases(rows).items():
        work = next(iter(case.values()))["flops"]
        lines.append([_case_name(key), f"{work / 1e9:.1f}", *(_rate(case.get(peer), result) for peer in peers)])
    return _table(["audio", "GFLOP", *peers], lines)


def _memory_table(rows: list[dict]) -> str:
    rows = [row for row in rows if "peak_memory" in row]
    peers, lines = _unique(row["peer"] for row in rows), []
    for key, case in _cases(rows).items():
        cells = []
        for peer in peers:
            row = case.get(peer)
            cells.append(f"{row['peak_memory'] / 2**20:.0f} "
                         f"(+{(row['peak_memory'] - row['empty_memory']) / 2**20:.0f})" if row else "-")
        lines.append([_case_name(key), *cells])
    return _table(["audio", *peers], lines)


def _accuracy_table(rows: list[dict]) -> str:
    lines = []
    for peer in _unique(row["peer"] for row in rows):
        mine = [row for row in rows if row["peer"] == peer]
        lines.append([peer, f"{max(row['difference'] for row in mine):.1e}",
                      f"{min(row['cosine'] for row in mine):.6f}"])
    return _table(["", "largest difference", "smallest cosine"], lines)


def _teacher_table(rows: list[dict], teacher: str, student: str) -> str:
    """How many times as fast the student is as its teacher in PyTorch, float32."""
    lines = []
    ours = {name: _cases([row for row in rows if row["model"] == name]) for name in (teacher, student)}
    peers = _unique(row["peer"] for row in rows
                    if row["model"] == student and row["peer"].startswith(OURS))
    for key, case in ours[teacher].items():
        if "PyTorch" in case and key in ours[student]:
            slow, fast = case["PyTorch"]["median"], ours[student][key]
            ratios = (f"{slow / fast[peer]['median']:.2f}x" if peer in fast else "-" for peer in peers)
            lines.append([_case_name(key), f"{slow * 1e3:.1f}", *ratios])
    return _table(["audio", f"{teacher} in PyTorch, ms", *peers], lines) if lines else ""


def _left_out(result: dict) -> list[str]:
    if not result["skipped"]:
        return []
    return ["Left out:\n", "".join(f"* {name}: {reason}\n" for name, reason in result["skipped"].items())]


def _fewer(result: dict) -> str:
    """Which figures are of fewer runs than were asked for."""
    fewer = [f"{row['peer']}, {row['model']}, {_case_name((row['seconds'], row['batch'], row['threads']))}: "
             f"{len(row['times'])}" for row in result["figures"] if len(row["times"]) < result["rounds"]]
    return f"Of fewer runs (a budget of {result['budget']:g} s each): {'; '.join(fewer)}.\n" if fewer else ""


def speed(result: dict) -> str:
    info, parts = result["machine"], []
    if not result["finished"]:
        parts.append("**Unfinished: the run was interrupted.**\n")
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    parts.append(f"{info['processor']}, {info['cores']} cores ({' '.join(info['isa'])}), "
                 f"{info['memory_gib']} GiB; {info['system']}; {versions}. Medians of {result['rounds']}, "
                 "taken in turns, each engine in its own process; load of the machine before: "
                 f"{info['load']:.2f}.\n")
    parts += filter(None, [_fewer(result)])
    parts += [f"This processor has no instructions for products in {precision}. Left out (--emulated times them): "
              f"{', '.join(names)}.\n"
              for precision, names in result["lacking"].items()]
    foreign = max((row["foreign"] or 0.0 for row in result["figures"]), default=0.0)
    if foreign > result["foreign_limit"]:
        doubtful = _unique(f"{row['model']} {row['seconds']:g} s x {row['batch']}, {row['threads']} threads"
                           for row in result["figures"] if (row["foreign"] or 0.0) > result["foreign_limit"])
        parts.append(f"**Doubtful, for other programs took up to {foreign:.0%} of the machine meanwhile: "
                     f"{'; '.join(doubtful)}.**\n")
    bounds = [[f"registers, {precision}", str(threads), "", f"{rate / 1e9:.0f}"]
              for precision, rates in result["peak"].items() for threads, rate in rates.items()]
    bounds += [[f"matrix product, {row['precision']}, {row['library']}", str(row["threads"]),
                " x ".join(map(str, row["shape"])), f"{row['per_second'] / 1e9:.0f}"] for row in result["gemm"]]
    if bounds:
        header = ["", "threads", "m x k x n", "GFLOP/s at best (int8: GOP/s)"]
        parts += ["What bounds it:\n", _table(header, bounds)]
    models = _unique(row["model"] for row in result["figures"])
    for model in models:
        rows = [row for row in result["figures"] if row["model"] == model]
        parts += [f"### {model}\n", "Milliseconds, and how many times as fast gendistiller is:\n",
                  _summary_table(rows), "All of them, milliseconds:\n", _speed_table(rows),
                  "GFLOP/s, their share of the registers' peak at that precision, and of the libraries' best matrix\n"
                  "product. Every method is charged the direct one's products, so that one with fewer may exceed "
                  "these:\n", _rate_table(rows, result),
                  "Hidden states against gendistiller in float32:\n", _accuracy_table(rows)]
        if any("peak_memory" in row for row in rows):
            parts += ["Peak memory of the process in a forward pass, MiB (above Python and NumPy):\n",
                      _memory_table(rows)]
    if "wavlm_base" in models and "gendistiller" in models:
        parts += ["### Student against teacher\n",
                  _teacher_table(result["figures"], "wavlm_base", "gendistiller")]
    parts += _left_out(result)
    if result["wrong"]:
        parts += ["Not timed, for their hidden states differ:\n",
                  "".join(f"* {line}\n" for line in result["wrong"])]
    return "\n".join(parts)


def training(result: dict) -> str:
    rows, options = result["rows"], result["options"]
    torch = {row["precision"]: row["median"] for row in rows if row["peer"].startswith("PyTorch") and "median" in row}
    lines = []
    for row in rows:
        memory = f"{row['peak_memory'] / 2**20:.0f}" if "peak_memory" in row else ""
        speed = ["", "", "", ""]
        if "median" in row:
            speed = [f"{row['median']:.3f}", f"{options['batch'] * options['seconds'] / row['median']:.1f}"]
            speed += [f"{torch[precision] / row['median']:.2f} x" if precision in torch else ""
                      for precision in ("float32", "bfloat16")]
        lines.append([row["peer"], *speed, memory])
    parts = [f"{result['machine']['processor']}, {options['threads']} threads; batch {options['batch']} x "
             f"{options['seconds']:g} s\n",
             _table(["engine", "s / step", "audio s / s", "against PyTorch float32", "against PyTorch bfloat16",
                     "peak memory, MiB"], lines)]
    return "\n".join([*parts, *_left_out(result)])


def together(result: dict) -> str:
    lines, rates = [], []
    found = {(row["case"], row["precision"], row["seconds"], row["threads"]): row["median"]
             for row in result["times"]}
    for (case, *key), alone in found.items():
        if case == "alone":
            precision, seconds, threads = key
            single = found.get((case, precision, seconds, 1), float("nan"))
            others = (found.get((other, *key)) for other in ("PyTorch at rest", "right after PyTorch"))
            lines.append([f"{seconds:g} s", precision, str(threads), f"{alone * 1e3:.1f}", f"{single / alone:.2f} x",
                          *(f"{other / alone - 1:+.1%}" if other else "-" for other in others)])
    for row in result["processes"]:
        single = next((other["rate"] for other in result["processes"] if other["processes"] == 1
                       and all(other[key] == row[key] for key in ("precision", "seconds"))), float("nan"))
        rates.append([f"{row['seconds']:g} s", row["precision"], str(row["processes"]), str(row["threads"]),
                      f"{row['rate']:.2f}", f"{row['rate'] / single:.2f} x"])
    parts = [_table(["audio", "precision", "threads", "alone, ms", "against 1 thread", "PyTorch at rest",
                     "right after PyTorch"], lines),
             _table(["audio", "precision", "processes", "threads of each", "utterances a second",
                     "against one process"], rates), *_left_out(result)]
    if result.get("foreign", 0) > result["foreign_limit"]:
        parts.append(f"Doubtful: other programs took {result['foreign']:.0%} of the machine.\n")
    return "\n".join(parts)


def plot(result: dict, path: Path) -> bool:
    """Bars of milliseconds a second of audio: a row of panels for each precision, a column for each model and number
    of threads; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figures = result["figures"]
    columns = _unique((row["model"], row["threads"]) for row in figures)
    precisions, engines = _unique(row["precision"] for row in figures), _unique(map(_engine, figures))
    if not columns:
        return False
    figure = Figure(figsize=(1 + 5.2 * len(columns), 0.8 + 2.8 * len(precisions)), layout="constrained")
    FigureCanvasAgg(figure)
    panels, handles = figure.subplots(len(precisions), len(columns), squeeze=False), {}
    for panel, (precision, (model, threads)) in zip(panels.flat, itertools.product(precisions, columns)):
        rows = [row for row in figures
                if (row["model"], row["threads"], row["precision"]) == (model, threads, precision)]
        cases = _cases(rows)
        panel.set_visible(bool(cases))
        width = 0.8 / len(engines)
        for place, engine in enumerate(engines):
            bars = [(x + (place - (len(engines) - 1) / 2) * width, row["median"] * 1e3 / (key[0] * key[1]))
                    for x, (key, case) in enumerate(cases.items()) for row in case.values() if _engine(row) == engine]
            if bars:
                drawn = panel.bar(*zip(*bars), width, color=f"C{place}")
                panel.bar_label(drawn, fmt="%.0f", fontsize=7)
                handles.setdefault(engine, drawn)
        labels = [f"{seconds:g} s" + (f" x {batch}" if batch > 1 else "") for seconds, batch, _ in cases]
        panel.set_xticks(range(len(cases)), labels, fontsize=8)
        panel.set_title(f"{model}, {precision}, {threads} thread{'s' if threads > 1 else ''}", fontsize=9)
        panel.set_ylabel("ms per second of audio", fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
    figure.suptitle(f"{result['machine']['processor']}, {result['machine']['cores']} cores", fontsize=9)
    figure.savefig(path, dpi=120)
    return True


REPORTS = {"speed": speed, "training": training, "together": together}


def save(result: dict, path: Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def write(path: Path) -> tuple[str, list[Path]]:
    """The report of a file of figures, also beside it, and what was written: itself, the tables, the picture."""
    result, written = json.loads(path.read_text(encoding="utf-8")), [path, path.with_suffix(".md")]
    text = REPORTS[result["program"]](result)
    written[1].write_text(text, encoding="utf-8")
    if result["program"] == "speed" and plot(result, path.with_suffix(".png")):
        written.append(path.with_suffix(".png"))
    return text, written


if __name__ == "__main__":
    for word in sys.argv[1:]:
        print(write(Path(word))[0])
