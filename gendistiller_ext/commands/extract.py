"""gendistiller extract: hidden states of audio files, one file each."""
from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from typing import Callable, Iterator, Optional, Sequence, Union

import numpy as np

from ..atomic import replacing
from ..audio.chunked import Chunking, extract_long
from ..audio.files import RATE, AudioError, AudioFile
from ..audio.find import find_audio
from ..checkpoints import safetensors
from ..modelinfo import model_hash
from ..training.data import Batch, ReadAhead, length_batches, read_files

_CONTEXT = 5.0  # seconds
_BATCH_SAMPLES = 30 * RATE  # batch_size of these fit in a batch; longer files share it with fewer
# What the file system has against a name, not against writing.
_NAME_FAULTS = {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL}

_DESCRIPTION = """\
Writes OUT/<relative path with suffix>.safetensors for every audio file: tensor hidden_states, float32
(states, frames, width), and the model's hash, hop and rate as metadata. States of a student: 0 the feature
embedding, then the generated layers; of a teacher: 0 the first block's input, then each block's output.

Files already written by the same model with the same layers and precision are left alone, so an
interrupted run goes on where it stopped. What is in a file doesn't depend on the batch size.

A file that can't be used is named on stderr and skipped, whatever is wrong with it. The exit code is then 1; under
torchrun, which ends all processes with the first that fails, it is 0 all the same.

More processes, each with files of its own: torchrun --nproc-per-node N -m gendistiller_ext extract ..., or
any launcher that sets RANK and WORLD_SIZE.

With --chunk-seconds longer files are read twice: first for the statistics by which the convolutions' norm
scales the whole file, so that state 0 of a student is the same as without, then chunk by chunk. The
transformer sees a chunk and its context alone: the other states differ, the less the longer the context."""

_EPILOG = """\
example:
  gendistiller extract --model runs/a/student.safetensors --audio LibriSpeech/dev-clean --out features \\
      --layers 0,1,2"""


def _layers(text: str) -> list[int]:
    layers = [int(part) for part in text.split(",")]
    if min(layers) < 0 or len(set(layers)) != len(layers):
        raise argparse.ArgumentTypeError(f"expected different numbers from 0, joined by commas, got {text!r}")
    return layers


_layers.__name__ = "layers"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("extract", help="write hidden states of audio files",
                                   description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--model", metavar="FILE", required=True, help="checkpoint of any readable format")
    parser.add_argument("--audio", metavar="DIR", required=True, nargs="+", action="extend",
                        help="folder, audio file, WebDataset shard (a-{000..099}.tar), S3PRL bucket CSV or TSV "
                             "manifest; may be repeated")
    parser.add_argument("--root", metavar="DIR",
                        help="folder that the paths in CSV and TSV lists are relative to")
    parser.add_argument("--out", metavar="DIR", required=True, help="output folder")
    parser.add_argument("--layers", type=_layers, metavar="N,N,...",
                        help="hidden states to write (default: all)")
    parser.add_argument("--format", choices=("safetensors", "npz"), default="safetensors")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "int8"),
                        help="default: the checkpoint's")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N",
                        help="files computed together (default: 8)")
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: all cores")
    parser.add_argument("--device", default="cpu",
                        help="cpu, cuda or cuda:N; under torchrun, cuda is one for each process (default: cpu)")
    parser.add_argument("--chunk-seconds", type=float, metavar="S",
                        help="compute longer files in chunks, in memory that doesn't grow with their length")
    parser.add_argument("--context-seconds", type=float, metavar="S",
                        help=f"audio that a chunk sees on either side (default: {_CONTEXT:g})")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")


def output_paths(files: Sequence[AudioFile], out: str, suffix: str) -> dict[str, str]:
    """Name -> path below `out`. Raises ValueError where two files would share one."""
    paths: dict[str, str] = {}
    sources: dict[str, str] = {}
    for file in files:
        if file.name in paths:
            raise ValueError(f"audio: {sources[file.name]} and {file.path} would both be written to "
                             f"{paths[file.name]}: extract them into different folders")
        paths[file.name] = os.path.join(out, *file.name.split("/")) + suffix
        sources[file.name] = file.path
    return paths


def _read_tags(path: str) -> dict[str, str]:
    """Metadata of a finished file; {} where there is none or it is damaged."""
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as content:
                return {key: str(content[key]) for key in content.files if key != "hidden_states"}
        return safetensors.read(path)[1]
    except Exception:  # NumPy and zipfile have many for a damaged .npz
        return {}


def _write(path: str, states: np.ndarray, tags: dict[str, str]) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if path.endswith(".npz"):
        with replacing(path) as stream:
            np.savez(stream, hidden_states=states, **{key: np.array(value) for key, value in tags.items()})
    else:
        safetensors.write(path, {"hidden_states": states}, tags)


def _batches(files: Sequence[AudioFile], batch_size: int, together: bool) -> list[list[AudioFile]]:
    """Files of like length, at most batch_size; fewer where they are long, one where a batch would matter."""
    batches: list[list[AudioFile]] = []
    for (file,) in length_batches(files, 1):
        longest = max(batches[-1][0].samples, 1) if batches else 1
        room = min(batch_size, max(1, batch_size * _BATCH_SAMPLES // longest)) if together else 1
        if batches and len(batches[-1]) < room:
            batches[-1].append(file)
        else:
            batches.append([file])
    return batches


@contextlib.contextmanager
def _faults_of(name: str) -> Iterator[None]:
    """Makes an AudioError of what one file can do to memory and to the output folder; a full disk is not its fault."""
    try:
        yield
    except MemoryError as error:
        raise AudioError(name, str(error) or "out of memory") from None
    except OSError as error:
        if error.errno not in _NAME_FAULTS:
            raise
        raise AudioError(name, f"{error.filename}: {error.strerror}") from None


def _forward(model, batch: Batch, **options) -> Iterator[tuple[str, Union[list[np.ndarray], AudioError]]]:
    """(name, states or why there are none) of each file of a batch. Where memory doesn't hold a batch, each of its
    files is computed alone."""
    try:
        with _faults_of(batch.names[0]):
            hidden, frames = model.forward(batch.wavs, **options)
    except AudioError as error:
        if len(batch.wavs) == 1:
            yield error.name, error
        else:
            for wav, name in zip(batch.wavs, batch.names):
                yield from _forward(model, Batch(batch.number, [wav], [name], []), **options)
        return
    for row, name in enumerate(batch.names):
        yield name, [state[row, :frames[row]] for state in hidden]


def extract(model, files: Sequence[AudioFile], out: str, *, layers: Optional[Sequence[int]] = None,
            suffix: str = ".safetensors", precision: Optional[str] = None, batch_size: int = 8,
            threads: Optional[int] = None, share: tuple[int, int] = (0, 1), chunking: Optional[Chunking] = None,
            say: Callable[[str], None] = print,
            done: Callable[[int, float], None] = lambda files, seconds: None) -> dict[str, int]:
    """Writes the hidden states of all files: {"written", "kept", "skipped"}, numbers of files.

    share: (r, n): only every n-th file, from number r on.
    chunking: how files longer than a chunk are cut.
    done is called with the number and the seconds of the files that each batch finished.
    """
    config = model.config
    total = config.num_states
    chosen = list(range(total)) if layers is None else list(layers)
    if max(chosen) >= total:
        raise ValueError(f"layers: expected 0 to {total - 1}, which this model has, got {max(chosen)}")
    whole = layers is None or config.architecture not in ("generative", "encoder")
    num_layers = None if whole else max(1, *chosen)
    least, hop = config.min_samples, config.hop
    tags = {"model": model_hash(model), "hop": str(hop), "rate": str(RATE),
            "layers": ",".join(map(str, chosen)), "precision": precision or model.precision}
    paths = output_paths(files, out, suffix)
    counts = {"written": 0, "kept": 0, "skipped": 0}
    left, long = [], []
    for file in files[share[0]::share[1]]:
        cut = chunking is not None and chunking.applies(file)
        if _read_tags(paths[file.name]) == {**tags, **(chunking.tags if cut else {})}:
            counts["kept"] += 1
            done(1, file.samples / RATE)
        else:
            (long if cut else left).append(file)

    def skip(error: AudioError) -> None:
        counts["skipped"] += 1
        say(f"skipped {error}")

    def load(batch: list[AudioFile]) -> Batch:
        return read_files(batch, min_samples=least)

    batches = _batches(left, batch_size, config.padding == "exact")
    with ReadAhead(load, iter(batches)) as loaded:
        for batch in loaded:
            for error in batch.failed:
                skip(error)
            if batch.wavs:
                for name, states in _forward(model, batch, num_layers=num_layers, precision=precision,
                                             num_threads=threads):
                    try:
                        if isinstance(states, AudioError):
                            raise states
                        with _faults_of(name):
                            _write(paths[name], np.stack([states[layer] for layer in chosen]), tags)
                        counts["written"] += 1
                    except AudioError as error:
                        skip(error)
            done(len(batch.wavs) + len(batch.failed), batch.seconds)
    for file in long:
        try:
            with _faults_of(file.name):
                extract_long(model, file, paths[file.name], chunking, layers=chosen, tags={**tags, **chunking.tags},
                             num_layers=num_layers, precision=precision, threads=threads)
            counts["written"] += 1
        except AudioError as error:
            skip(error)
        done(1, file.samples / RATE)
    return counts


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"batch-size: expected at least 1, got {args.batch_size}")
    if args.chunk_seconds is None and args.context_seconds is not None:
        raise ValueError("context-seconds: expected chunk-seconds with it")
    chunking = None if args.chunk_seconds is None else Chunking(
        args.chunk_seconds, _CONTEXT if args.context_seconds is None else args.context_seconds)
    import gendistiller_ext as gd

    from ..training.distributed import local_device, rank_and_size

    rank, size = rank_and_size()
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("extract needs tqdm: pip install 'gendistiller_ext[train]'") from error
    model = gd.Model.load(args.model, device=local_device(args.device))
    files, skipped = find_audio(args.audio, root=args.root, min_samples=model.config.min_samples)
    if rank > 0:
        skipped = []  # the first process tells
    for error in skipped:
        print(f"skipped {error}", file=sys.stderr)
    own = len(files[rank::size])
    with tqdm(total=own, unit="file", file=sys.stderr, dynamic_ncols=True,
              disable=True if args.quiet else None) as bar:
        heard = 0.0

        def done(number: int, seconds: float) -> None:
            nonlocal heard
            heard += seconds
            bar.set_postfix_str(f"audio {heard / 60:.1f} min", refresh=False)
            bar.update(number)

        counts = extract(model, files, args.out, layers=args.layers, suffix=f".{args.format}",
                         precision=args.precision, batch_size=args.batch_size, chunking=chunking,
                         threads=args.threads, share=(rank, size),
                         say=lambda line: bar.write(line, file=sys.stderr), done=done)
    counts["skipped"] += len(skipped)
    if args.json:
        print(json.dumps({"out": args.out, **counts}))
    else:
        print(f"{args.out}: {counts['written']} files written, {counts['kept']} already there, "
              f"{counts['skipped']} skipped")
    if own and counts["written"] + counts["kept"] == 0:
        raise ValueError(f"audio: none of {own} files could be read")
    return 1 if counts["skipped"] and size == 1 else 0
