"""gendistiller bench: median time of a forward pass; the paper's Table 2."""
from __future__ import annotations

import argparse
import json
import os
import sys
import time

_DESCRIPTION = """\
Times MODEL.forward() on noise: median of the repeats after a warm-up, and how many seconds of audio that makes
a second.

With --table2 DIR it is the paper's Table 2 instead: WavLM Base, DistilWavLM and GenDistiller (with random
weights, which take as long as others), or the models named, extract the features of all audio of DIR, one file
at a time, three times: parameters, seconds, and how many times faster than the first. Decoding is not timed."""

_EPILOG = """\
example:
  gendistiller bench student.safetensors --seconds 2,7,15 --threads 1,2 --batch 1,8
  gendistiller bench --table2 LibriSpeech/dev-clean --threads 4"""


def _numbers(kind):
    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",")]
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"expected positive numbers, separated by commas, got {text!r}")
        return values
    parse.__name__ = "list"
    return parse


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="time a model", epilog=_EPILOG, description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", nargs="*",
                        help="checkpoint of any readable format, or a preset's name; one, several with --table2")
    parser.add_argument("--seconds", type=_numbers(float), default=None, metavar="S,S,...",
                        help="lengths of audio (default: 2,7,15)")
    parser.add_argument("--threads", type=_numbers(int), default=None, metavar="N,N,...",
                        help="thread counts (default: all cores)")
    parser.add_argument("--batch", type=_numbers(int), default=None, metavar="N,N,...",
                        help="batch sizes (default: 1)")
    parser.add_argument("--num-layers", type=int, default=None, metavar="N",
                        help="layers to generate, or a teacher's blocks to run (default: all)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "int8"), default=None,
                        help="default: the checkpoint's")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--repeat", type=int, default=None, metavar="N",
                        help="timed runs (default: 7; with --table2: 3)")
    parser.add_argument("--table2", metavar="DIR", action="append",
                        help="the paper's Table 2 on this audio: a folder, file or list as `distill --audio` takes "
                             "it; may be repeated")
    parser.add_argument("--root", metavar="DIR", help="with --table2: what the paths in lists are relative to")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="with --table2: this many files, spread evenly over the set (default: all)")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    if args.repeat is not None and args.repeat < 1:
        raise ValueError(f"repeat: expected at least 1, got {args.repeat}")
    return _run_noise(args) if args.table2 is None else _run_table2(args)


def _load(source: str, device: str):
    import gendistiller_ext as gd
    if not os.path.exists(source) and source in gd.Config.presets():
        return gd.Model(gd.Config.preset(source), seed=0, device=device)
    return gd.Model.load(source, device=device)


def _run_noise(args: argparse.Namespace) -> int:
    import numpy as np

    import gendistiller_ext as gd

    from ..training.report import table
    for name in ("root", "limit"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: expected --table2 with it")
    if len(args.model) != 1:
        raise ValueError(f"model: expected one checkpoint, or --table2 DIR, got {len(args.model)}")
    source, repeat = args.model[0], args.repeat or 7
    model = _load(source, args.device)
    noise = np.random.default_rng(0)
    figures = []
    for threads in args.threads or [None]:
        for batch in args.batch or [1]:
            for seconds in args.seconds or [2.0, 7.0, 15.0]:
                wavs = noise.standard_normal((batch, round(seconds * 16000))).astype(np.float32)
                times = []
                for _ in range(repeat + 1):
                    begin = time.perf_counter()
                    model.forward(wavs, num_layers=args.num_layers, precision=args.precision,
                                  num_threads=threads)
                    times.append(time.perf_counter() - begin)
                median = float(np.median(times[1:]))
                figures.append({"seconds": seconds, "batch": batch, "threads": threads, "median": median,
                                "min": min(times[1:]), "audio_per_second": batch * seconds / median})
    if args.json:
        print(json.dumps({"model": source, "device": args.device, "cpu_features": list(gd.cpu_features()),
                          "repeat": repeat, "figures": figures}))
        return 0
    print(f"{source}: {model.num_params:,} parameters, {args.device} ({' '.join(gd.cpu_features())}), median "
          f"of {repeat}")
    print(table([(f"{row['seconds']:g} s", row["batch"], row["threads"] or "all",
                  f"{row['median'] * 1e3:.1f}", f"{row['min'] * 1e3:.1f}", f"{row['audio_per_second']:.1f}")
                 for row in figures],
                ("audio", "batch", "threads", "median ms", "best ms", "audio s/s")))
    return 0


def _run_table2(args: argparse.Namespace) -> int:
    import gendistiller_ext as gd

    from ..audio.find import find_audio
    from ..superb.inference_time import TABLE2, measure, spread
    from ..training.report import table
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("bench --table2 needs tqdm: pip install 'gendistiller_ext[train]'") from error
    for name in ("seconds", "batch", "num_layers"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name.replace('_', '-')}: expected none with --table2")
    if args.threads and len(args.threads) > 1:
        raise ValueError(f"threads: expected one number with --table2, got {args.threads}")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"limit: expected at least 1, got {args.limit}")
    threads, runs, names = args.threads[0] if args.threads else None, args.repeat or 3, args.model or list(TABLE2)
    models = [_load(name, args.device) for name in names]
    least = max(model.config.min_samples for model in models)
    files, skipped = find_audio(args.table2, root=args.root, min_samples=least)
    files = spread(files, args.limit)
    with tqdm(total=runs * len(files), unit="file", file=sys.stderr, dynamic_ncols=True,
              disable=True if args.quiet else None) as bar:
        for error in skipped:
            bar.write(f"skipped {error}", file=sys.stderr)

        def failed(error) -> None:
            skipped.append(error)
            bar.write(f"skipped {error}", file=sys.stderr)

        found = measure(models, files, runs, threads, args.precision, failed, lambda: bar.update())
    means = found["seconds"].mean(axis=1)
    rows = [{"model": name, "parameters": int(model.num_params), "seconds": list(map(float, seconds)),
             "mean": float(mean), "ratio": float(means[0] / mean)}
            for name, model, seconds, mean in zip(names, models, found["seconds"], means)]
    if args.json:
        print(json.dumps({"audio": args.table2, "files": found["files"], "skipped": len(skipped),
                          "audio_seconds": found["audio_seconds"], "threads": threads, "repeat": runs,
                          "device": args.device, "cpu_features": list(gd.cpu_features()), "rows": rows}))
        return 0
    print(f"{found['files']} files, {found['audio_seconds']:.1f} s of audio, {len(skipped)} skipped; one at a time; "
          f"runs: {runs}, threads: {threads or 'all'}, {args.device} ({' '.join(gd.cpu_features())})")
    print(table([(row["model"], f"{row['parameters']:,}", f"{row['parameters'] / rows[0]['parameters']:.1%}",
                  f"{row['mean']:.2f}", f"{min(row['seconds']):.2f}", f"{max(row['seconds']):.2f}",
                  f"{row['ratio']:.2f}x") for row in rows],
                ("model", "parameters", "", "mean s", "least", "most", "speed")))
    return 0
