"""gendistiller bench: median time of a forward pass."""
from __future__ import annotations

import argparse
import json
import time

_EPILOG = """\
example:
  gendistiller bench student.safetensors --seconds 2,7,15 --threads 1,2 --batch 1,8"""


def _numbers(kind):
    def parse(text: str) -> list:
        values = [kind(part) for part in text.split(",")]
        if not values or min(values) <= 0:
            raise argparse.ArgumentTypeError(f"expected positive numbers, separated by commas, got {text!r}")
        return values
    parse.__name__ = "list"
    return parse


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "bench", help="time a model", epilog=_EPILOG,
        description="Times model.forward() on noise: median of the repeats after a warm-up, and how many "
                    "seconds of\naudio that makes a second.")
    parser.add_argument("model", metavar="MODEL", help="checkpoint of any readable format")
    parser.add_argument("--seconds", type=_numbers(float), default=[2.0, 7.0, 15.0], metavar="S,S,...",
                        help="lengths of audio (default: 2,7,15)")
    parser.add_argument("--threads", type=_numbers(int), default=None, metavar="N,N,...",
                        help="thread counts (default: all cores)")
    parser.add_argument("--batch", type=_numbers(int), default=[1], metavar="N,N,...",
                        help="batch sizes (default: 1)")
    parser.add_argument("--num-layers", type=int, default=None, metavar="N",
                        help="layers to generate, or a teacher's blocks to run (default: all)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "int8"), default=None,
                        help="default: the checkpoint's")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="timed runs (default: 7)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    import numpy as np

    import gendistiller_ext as gd

    from ..report import table
    if args.repeat < 1:
        raise ValueError(f"repeat: expected at least 1, got {args.repeat}")
    model = gd.Model.load(args.model, device=args.device)
    noise = np.random.default_rng(0)
    figures = []
    for threads in args.threads or [None]:
        for batch in args.batch:
            for seconds in args.seconds:
                wavs = noise.standard_normal((batch, round(seconds * 16000))).astype(np.float32)
                times = []
                for _ in range(args.repeat + 1):
                    begin = time.perf_counter()
                    model.forward(wavs, num_layers=args.num_layers, precision=args.precision,
                                  num_threads=threads)
                    times.append(time.perf_counter() - begin)
                median = float(np.median(times[1:]))
                figures.append({"seconds": seconds, "batch": batch, "threads": threads, "median": median,
                                "min": min(times[1:]), "audio_per_second": batch * seconds / median})
    if args.json:
        print(json.dumps({"model": args.model, "device": args.device, "cpu_features": list(gd.cpu_features()),
                          "repeat": args.repeat, "figures": figures}))
        return 0
    print(f"{args.model}: {model.num_params:,} parameters, {args.device} ({' '.join(gd.cpu_features())}), median "
          f"of {args.repeat}")
    print(table([(f"{row['seconds']:g} s", row["batch"], row["threads"] or "all",
                  f"{row['median'] * 1e3:.1f}", f"{row['min'] * 1e3:.1f}", f"{row['audio_per_second']:.1f}")
                 for row in figures],
                ("audio", "batch", "threads", "median ms", "best ms", "audio s/s")))
    return 0
