"""SUPERB's keyword spotting (S3PRL's downstream `speech_commands`) on labelled speech of any words.

S3PRL's task has twelve fixed classes: ten words, `_unknown_` for all other words, `_silence_` for background
noise. It reads `train/WORD/SPEAKER_nohash_N.wav`, of which a hash of SPEAKER chooses the validation part,
`train/_background_noise_/*.wav`, and `test/CLASS/*.wav`. `prepare` lays such a folder out, so that no speaker
is in two of the parts; other words than S3PRL's ten go under their names.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence

import numpy as np

from ..audio.files import RATE, AudioError, read_audio
from ..audio.find import SUFFIXES
from ..audio.lists import lines, table

#: S3PRL's words (downstream/speech_commands/dataset.py).
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
UNKNOWN, SILENCE, NOISE = "_unknown_", "_silence_", "_background_noise_"
PARTS = ("train", "valid", "test")
# Folders above the words, and lists beside them, that tell of an official division.
PART_FOLDERS = {"train": "train", "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
                "test": "test", "testing": "test"}
PART_LISTS = {"validation_list.txt": "valid", "testing_list.txt": "test"}
# Speakers without an official part: a quarter for the test, a seventh of the others for validation.
TEST_SHARE, ONE_VALID_IN = 0.25, 7
NOISE_CLIPS, NOISE_DB = 60, (-30, -40, -50)


@dataclass(frozen=True)
class Clip:
    path: Path
    label: str
    speaker: str
    part: Optional[str] = None  # the corpus's own division


@dataclass(frozen=True)
class Corpus:
    """folder: what S3PRL reads, train/ and test/; classes: S3PRL's class -> the words in it; clips: part ->
    how many; skipped: files that can't be used, which S3PRL would end at."""

    folder: Path
    classes: dict[str, list[str]]
    clips: dict[str, int]
    skipped: list[AudioError]


def find_clips(data: "str | os.PathLike[str]") -> tuple[list[Clip], list[Path]]:
    """The labelled clips under `data`, and its recordings of background noise.

    With a `manifest.tsv` (columns path, tasks, speaker, label): its rows whose tasks include KS. Else every
    audio file is `.../WORD/SPEAKER_REST`, as in Google's Speech Commands. Folders named train, val or test
    above WORD, or Google's `validation_list.txt` and `testing_list.txt`, give the official division.
    ValueError where no clip is found.
    """
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"data: no such folder: {root}")
    manifest, clips, noises = root / "manifest.tsv", [], []
    if manifest.is_file():
        for _, row in table(str(manifest), "\t", ["path", "tasks", "speaker", "label"]):
            if "KS" in row["tasks"].split(","):
                clips.append(Clip(root / row["path"], row["label"], row["speaker"], _folder_part(row["path"])))
    else:
        listed = {line.strip(): part for name, part in PART_LISTS.items() if (root / name).is_file()
                  for line in lines(str(root / name))}
        for path in sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES):
            name = path.relative_to(root).as_posix()
            label = path.parent.name
            if label == NOISE:
                noises.append(path)
            elif path.parent != root:
                part = listed.get(name, "train") if listed else _folder_part(name)
                clips.append(Clip(path, label, path.stem.split("_")[0] or path.stem, part))
    if not clips:
        raise ValueError(f"data: expected clips WORD/SPEAKER_REST or a manifest.tsv with task KS in {root}, "
                         "found none")
    return clips, noises


def _folder_part(name: str) -> Optional[str]:
    return next((PART_FOLDERS[part] for part in name.split("/")[:-2] if part in PART_FOLDERS), None)


def divide(clips: Iterable[Clip]) -> dict[str, str]:
    """speaker -> part. The official part where there is one (an official validation part is the test where
    there is no official test); the rest, and a validation part where none is left, by the order of the
    speakers' hashes."""
    official: dict[str, Optional[str]] = {}
    for clip in clips:
        if clip.label != SILENCE and official.setdefault(clip.speaker, clip.part) != clip.part:
            raise ValueError(f"data: speaker {clip.speaker} is in two parts, {official[clip.speaker]} and "
                             f"{clip.part}")
    order = sorted(official, key=lambda speaker: hashlib.sha1(speaker.encode("utf-8", "surrogateescape")).hexdigest())
    if "test" not in official.values():
        official = {speaker: "test" if part == "valid" else part for speaker, part in official.items()}
    parts = {speaker: part for speaker, part in official.items() if part is not None}
    free = [speaker for speaker in order if official[speaker] is None]
    tests = round(TEST_SHARE * len(free))
    parts.update({speaker: "test" if i < tests else "train" for i, speaker in enumerate(free)})
    if "valid" not in parts.values():
        for group in (free, [speaker for speaker in order if official[speaker] is not None]):
            train = [speaker for speaker in group if parts[speaker] == "train"]
            parts.update(dict.fromkeys(train[:-(-len(train) // ONE_VALID_IN)], "valid"))
    if set(parts.values()) != set(PARTS):
        raise ValueError(f"data: expected speakers enough for train, validation and test, got {len(parts)}")
    return parts


def assign(labels: Sequence[str], keywords: Optional[Sequence[str]] = None) -> dict[str, str]:
    """word -> S3PRL's class. The keywords (default: S3PRL's ten, filled up by the most frequent others) keep
    their name where it is one of the ten and take the free names in order; all other words are _unknown_."""
    counts = Counter(label for label in labels if label not in (UNKNOWN, SILENCE))
    frequent = sorted(counts, key=lambda word: (word not in WORDS, -counts[word], word))
    chosen = frequent[:len(WORDS)] if keywords is None else list(keywords)
    missing = [word for word in chosen if word not in counts]
    if missing or len(set(chosen)) != len(chosen) or not 2 <= len(chosen) <= len(WORDS):
        raise ValueError(f"keywords: expected 2 to {len(WORDS)} different words of "
                         f"{', '.join(sorted(counts))}, got {', '.join(chosen)}")
    free = [name for name in WORDS if name not in chosen]
    names = {word: word if word in WORDS else free.pop(0) for word in chosen}
    return {**{word: UNKNOWN for word in counts}, **names, UNKNOWN: UNKNOWN, SILENCE: SILENCE}


def speaker_name(speaker: str, part: str) -> str:
    """`speaker`, with a suffix where S3PRL's hash of the name alone would put it into another part than this
    one of train and valid. The rule is Google's: sha1 modulo 2^27, in per cent; below 10 validation, below 20
    left out."""
    def share(name: str) -> float:
        return int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest(), 16) % 2 ** 27 * (100.0 / (2 ** 27 - 1))

    name = stem = re.sub(r"\W|_", "-", speaker)
    suffix = 0
    while (share(name) >= 10) if part == "valid" else (share(name) < 20):
        suffix += 1
        name = f"{stem}.{suffix}"
    return name


def _place(source: Path, target: Path) -> None:
    """A link where S3PRL can read the file as it is, else a WAV of the same samples."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".wav":
        target.symlink_to(source.resolve())
    else:
        _write(target, read_audio(str(source)))


def _write(target: Path, samples: np.ndarray) -> None:
    import soundfile

    target.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(target, samples, RATE, subtype="PCM_16")


def noise(seed: int, seconds: float = 1.0, colour: int = 0, decibel: float = -30.0) -> np.ndarray:
    """(samples,) float32 noise of the given RMS whose power falls with frequency to the power `colour` (0
    white, 1 pink, 2 brown); a stand-in where a corpus has no recordings of background noise."""
    samples = round(seconds * RATE)
    spectrum = np.fft.rfft(np.random.default_rng([seed, colour]).standard_normal(samples))
    spectrum *= np.maximum(np.arange(spectrum.size), 1) ** (-colour / 2)
    wave = np.fft.irfft(spectrum, samples)
    return (wave * (10 ** (decibel / 20) / np.sqrt(np.mean(wave ** 2)))).astype(np.float32)


def _second_of_noise(number: int) -> np.ndarray:
    colour = number % len(NOISE_DB)
    return noise(number, 1.0, colour, NOISE_DB[colour])


def _seconds(paths: Sequence[Path]) -> list[np.ndarray]:
    """The whole seconds of the recordings, one after the other."""
    waves = [read_audio(str(path)) for path in paths]
    return [wave[i:i + RATE] for wave in waves for i in range(0, len(wave) - RATE + 1, RATE)]


def _unusable(paths: Sequence[Path]) -> dict[str, AudioError]:
    """path -> why, of recordings that can't be read to their end."""
    def reason(path: Path) -> Optional[AudioError]:
        try:
            read_audio(str(path))
        except AudioError as error:
            return error
        return None

    with ThreadPoolExecutor() as pool:
        return {str(path): error for path, error in zip(paths, pool.map(reason, paths)) if error}


def prepare(data: "str | os.PathLike[str]", folder: "str | os.PathLike[str]",
            keywords: Optional[Sequence[str]] = None) -> Corpus:
    """Lay out the clips under `data` for S3PRL in `folder`, which must be new or empty. What went where is
    written to `folder`/corpus.json. ValueError for too few speakers or words."""
    clips, noises = find_clips(data)
    skipped = _unusable([*(clip.path for clip in clips), *noises])
    clips = [clip for clip in clips if str(clip.path) not in skipped]
    noises = [path for path in noises if str(path) not in skipped]
    if not clips:
        raise ValueError(f"data: none of {len(skipped)} clips could be read, first {next(iter(skipped.values()))}")
    parts, classes = divide(clips), assign([clip.label for clip in clips], keywords)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: expected a new or empty one, got {folder}")
    counts, tested, taken = Counter(), Counter(), Counter()
    for clip in clips:
        part = "test" if clip.label == SILENCE else parts[clip.speaker]
        where = "test" if part == "test" else "train"
        name = re.sub(r"\W|_", "-", clip.speaker) if where == "test" else speaker_name(clip.speaker, part)
        # Clips of one speaker and class are numbered; unknown words share a class in the test but not in the
        # training.
        group = classes[clip.label] if where == "test" or classes[clip.label] in WORDS else clip.label
        number = taken[where, group, name]
        taken[where, group, name] += 1
        _place(clip.path, folder / where / group / f"{name}_nohash_{number}.wav")
        counts[part] += 1
        if where == "test":
            tested[group] += 1
    # S3PRL cuts a random second out of a recording: from files of one second it is the same one every time,
    # so that an upstream's cache knows it.
    seconds = _seconds(noises) or [_second_of_noise(i) for i in range(NOISE_CLIPS)]
    for i, second in enumerate(seconds):
        _write(folder / "train" / NOISE / f"{i}.wav", second)
    if not tested[SILENCE] and not noises:
        for i in range(round(statistics.mean(tested.values()))):
            _write(folder / "test" / SILENCE / f"{i}.wav", _second_of_noise(NOISE_CLIPS + i))
            counts["test"] += 1
    members: dict[str, list[str]] = {}
    for word, name in sorted(classes.items()):
        members.setdefault(name, []).append(word)
    corpus = Corpus(folder, members, dict(counts), sorted(skipped.values(), key=lambda error: error.name))
    record = {"classes": members, "clips": corpus.clips, "speakers": {part: sorted(
        speaker for speaker, its in parts.items() if its == part) for part in PARTS}}
    (folder / "corpus.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8",
                                         errors="surrogateescape")
    return corpus


def config(corpus: Corpus, *, steps: int, eval_every: int, batch_size: int, lr: float) -> dict[str, Any]:
    """The experiment's config.yaml: SUPERB's classifier (mean of the frames between two linear layers) and
    optimiser, with a rate that falls to zero: over hundreds of steps, not SUPERB's 200,000, a constant one
    leaves the accuracy to chance."""
    return {
        "runner": {"total_steps": steps, "gradient_clipping": 1, "gradient_accumulate_steps": 1,
                   "log_step": eval_every, "eval_step": eval_every, "save_step": steps, "max_keep": 1,
                   "eval_dataloaders": ["dev", "test"]},
        "optimizer": {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": lr},
        "scheduler": {"name": "linear_schedule_with_warmup", "num_warmup_steps": steps // 20},
        "downstream_expert": {
            "datarc": {"speech_commands_root": str(corpus.folder / "train"),
                       "speech_commands_test_root": str(corpus.folder / "test"),
                       "num_workers": 0, "batch_size": batch_size},
            "modelrc": {"projector_dim": 256, "select": "UtteranceLevel",
                        "UtteranceLevel": {"pooling": "MeanPooling"}},
        },
    }


def result(expdir: "str | os.PathLike[str]") -> dict[str, float]:
    """{step, valid, test}: accuracies at the step of the best validation accuracy, from the run's log.log."""
    scores: dict[int, dict[str, float]] = {}
    for line in (Path(expdir) / "log.log").read_text().splitlines():
        match = re.fullmatch(r"(dev|test) at step (\d+): (\S+)", line)
        if match:
            scores.setdefault(int(match[2]), {})[match[1]] = float(match[3])
    whole = {step: score for step, score in scores.items() if len(score) == 2}
    if not whole:
        raise ValueError(f"{expdir}/log.log: expected accuracies of dev and test, found none")
    best = max(whole, key=lambda step: (whole[step]["dev"], -step))
    return {"step": best, "valid": whole[best]["dev"], "test": whole[best]["test"]}
