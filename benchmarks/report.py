"""speed.json as Markdown tables and as a picture."""

from __future__ import annotations

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


def best_peer(case: dict[str, dict], precision: str) -> str | None:
    others = [name for name, row in case.items()
              if not name.startswith(OURS) and row["precision"] == precision]
    return min(others, key=lambda name: case[name]["median"], default=None)


def _milliseconds(case: dict[str, dict], peer: str, best: str | None = None) -> str:
    if peer not in case:
        return "-"
    text = f"{case[peer]['median'] * 1e3:.1f}"
    return f"**{text}**" if peer == best else text


def _speed_table(rows: list[dict]) -> str:
    peers, cases = _unique(row["peer"] for row in rows), _cases(rows)
    precisions = [p for p in _unique(row["precision"] for row in rows)
                  if any(row["peer"].startswith(OURS) and row["precision"] == p for row in rows)]
    lines = []
    for (seconds, batch, threads), case in cases.items():
        fastest = min(case, key=lambda name: case[name]["median"])
        line = [f"{seconds:g} s", str(batch), str(threads)]
        line += [_milliseconds(case, peer, fastest) for peer in peers]
        for precision in precisions:
            other = best_peer(case, precision)
            ours = next((row for name, row in case.items()
                         if name.startswith(OURS) and row["precision"] == precision), None)
            line.append(f"{case[other]['median'] / ours['median']:.2f}x {other}" if other and ours else "-")
        lines.append(line)
    header = ["audio", "batch", "threads", *peers, *(f"ours to the best, {p}" for p in precisions)]
    return _table(header, lines)


def _share(row: dict | None) -> str:
    if row is None:
        return "-"
    share = f", {row['share_of_peak']:.0%}" if row["share_of_peak"] else ""
    return f"{row['per_second'] / 1e9:.0f}{share}"


def _rate_table(rows: list[dict]) -> str:
    peers, lines = _unique(row["peer"] for row in rows), []
    for (seconds, batch, threads), case in _cases(rows).items():
        work = next(iter(case.values()))["flops"]
        lines.append([f"{seconds:g} s", str(batch), str(threads), f"{work / 1e9:.1f}",
                      *(_share(case.get(peer)) for peer in peers)])
    return _table(["audio", "batch", "threads", "GFLOP", *peers], lines)


def _memory_table(rows: list[dict]) -> str:
    rows = [row for row in rows if "peak_memory" in row]
    peers, lines = _unique(row["peer"] for row in rows), []
    for (seconds, batch, _), case in _cases(rows).items():
        cells = []
        for peer in peers:
            row = case.get(peer)
            cells.append(f"{row['peak_memory'] / 2**20:.0f} "
                         f"(+{(row['peak_memory'] - row['empty_memory']) / 2**20:.0f})" if row else "-")
        lines.append([f"{seconds:g} s", str(batch), *cells])
    return _table(["audio", "batch", *peers], lines)


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
            lines.append([f"{key[0]:g} s", str(key[1]), str(key[2]), f"{slow * 1e3:.1f}", *ratios])
    return _table(["audio", "batch", "threads", f"{teacher} in PyTorch, ms", *peers], lines) if lines else ""


def markdown(result: dict) -> str:
    info, parts = result["machine"], []
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    parts.append(f"{info['processor']}, {info['cores']} cores ({' '.join(info['isa'])}), "
                 f"{info['memory_gib']} GiB; {info['system']}; {versions}. Medians of {result['rounds']}, "
                 "taken in turns, each engine in its own process; load of the machine before: "
                 f"{info['load']:.2f}.\n")
    foreign = max((row["foreign"] or 0.0 for row in result["figures"]), default=0.0)
    if foreign > result["foreign_limit"]:
        doubtful = _unique(f"{row['model']} {row['seconds']:g} s x {row['batch']}, {row['threads']} threads"
                           for row in result["figures"] if (row["foreign"] or 0.0) > result["foreign_limit"])
        parts.append(f"**Doubtful, for other programs took up to {foreign:.0%} of the machine meanwhile: "
                     f"{'; '.join(doubtful)}.**\n")
    bounds = [[f"registers, {precision}", str(threads), "", f"{rate / 1e9:.0f}"]
              for precision, rates in result["peak"].items() for threads, rate in rates.items()]
    bounds += [[f"sgemm, {row['library']}", str(row["threads"]), " x ".join(map(str, row["shape"])),
                f"{row['per_second'] / 1e9:.0f}"] for row in result["gemm"]]
    if bounds:
        header = ["", "threads", "m x k x n", "GFLOP/s at best (int8: GOP/s)"]
        parts += ["What bounds it:\n", _table(header, bounds)]
    models = _unique(row["model"] for row in result["figures"])
    for model in models:
        rows = [row for row in result["figures"] if row["model"] == model]
        parts += [f"### {model}\n", "Milliseconds; the last columns: how many times as fast as the fastest "
                  "other engine of that\nprecision gendistiller is.\n", _speed_table(rows),
                  "GFLOP/s, and their share of the registers' peak at that precision:\n", _rate_table(rows),
                  "Hidden states against gendistiller in float32:\n", _accuracy_table(rows)]
        if any("peak_memory" in row for row in rows):
            parts += ["Peak memory of the process in a forward pass, MiB (above Python and NumPy):\n",
                      _memory_table(rows)]
    if "wavlm_base" in models and "gendistiller" in models:
        parts += ["### Student against teacher\n",
                  _teacher_table(result["figures"], "wavlm_base", "gendistiller")]
    if result["skipped"]:
        parts += ["Left out:\n",
                  "".join(f"* {name}: {reason}\n" for name, reason in result["skipped"].items())]
    if result["wrong"]:
        parts += ["Not timed, for their hidden states differ:\n",
                  "".join(f"* {line}\n" for line in result["wrong"])]
    return "\n".join(parts)


def plot(result: dict, path: Path) -> bool:
    """Bars of milliseconds a second of audio, a panel for each model and number of threads; False without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = _unique((row["model"], row["threads"]) for row in result["figures"])
    if not panels:
        return False
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    all_peers, handles = _unique(row["peer"] for row in result["figures"]), {}
    for place, (model, threads) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        rows = [row for row in result["figures"] if (row["model"], row["threads"]) == (model, threads)]
        peers, cases = _unique(row["peer"] for row in rows), _cases(rows)
        width = 0.8 / len(peers)
        for i, peer in enumerate(peers):
            shift = (i - (len(peers) - 1) / 2) * width
            at = [x + shift for x, case in enumerate(cases.values()) if peer in case]
            heights = [case[peer]["median"] * 1e3 / (key[0] * key[1])
                       for key, case in cases.items() if peer in case]
            bars = axes.bar(at, heights, width, label=peer, color=f"C{all_peers.index(peer) % 10}")
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
            handles.setdefault(peer, bars)
        axes.set_xticks(range(len(cases)), [f"{s:g} s" + (f" x {b}" if b > 1 else "") for s, b, _ in cases])
        axes.set_title(f"{model}, {threads} thread{'s' if threads > 1 else ''}")
        axes.set_ylabel("ms per second of audio")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"{result['machine']['processor']}, {result['machine']['cores']} cores", fontsize=9)
    figure.savefig(path, dpi=150)
    return True
