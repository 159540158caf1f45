"""Recordings of the kinds that end badly, written by hand: what a header says and what follows differ."""

from __future__ import annotations

import io
import os
import struct

import numpy as np
import soundfile

RATE = 16000


def noise(samples=16000, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


def encoded(wav, kind="FLAC", **options) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wav, RATE, format=kind, **options)
    return stream.getvalue()


def wav_file(samples, rate=RATE, channels=1, claimed=None) -> bytes:
    """16 bits, of any rate and number of channels, its data's length as it is or as `claimed`."""
    data = np.round(32767 * samples).astype("<i2").tobytes()
    size = len(data) if claimed is None else claimed
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2 & 0xFFFFFFFF, channels * 2 & 0xFFFF, 16)
    return (b"RIFF" + struct.pack("<I", 36 + size & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
            + b"data" + struct.pack("<I", size) + data)


def flac_saying(samples, content: bytes) -> bytes:
    """A FLAC file whose STREAMINFO has another number of samples (36 bits; 0: unknown)."""
    field = int.from_bytes(content[21:26], "big") >> 36 << 36 | samples
    return content[:21] + field.to_bytes(5, "big") + content[26:]


def good_files() -> dict[str, tuple[bytes, int]]:
    """name -> (content, samples at 16 kHz) of what can be used though it looks odd."""
    flac = encoded(noise())
    return {
        "plain.wav": (encoded(noise(), "WAV"), 16000),
        "streamed.flac": (flac_saying(0, flac), 16000),
        "streamed.wav": (wav_file(noise(), claimed=0xFFFFFFFF), 16000),
        "claims-more.wav": (wav_file(noise(), claimed=320000), 16000),
        "claims-less.wav": (wav_file(noise(), claimed=8000), 4000),
        "cut.wav": (wav_file(noise())[:-333], 15833),
        "64-channels.wav": (wav_file(noise(64000), channels=64), 1000),
        "no-length.au": (b".snd" + struct.pack(">IIIII", 24, 0xFFFFFFFF, 3, RATE, 1)
                         + (30000 * noise(4000)).astype(">i2").tobytes(), 4000),
    }


def bad_files() -> dict[str, tuple[bytes, str]]:
    """name -> (content, a regular expression of why it can't be used)."""
    flac = encoded(noise())
    broken = noise()
    broken[77] = np.nan
    return {
        "empty.wav": (b"", "the file is empty"),
        "text.flac": (b"no audio, whatever its name says\n" * 30, "ormat"),
        "cut.flac": (flac[:len(flac) // 2], ""),
        "claims-more.flac": (flac_saying((1 << 36) - 1, flac), "damaged: 16000 of 68719476735 samples|eek|rror|lost"),
        "claims-less.flac": (flac_saying(100, flac), "too short: 100 samples"),
        "streamed-and-cut.flac": (flac_saying(0, flac)[:len(flac) // 2], "rror|lost|damaged"),
        "header.flac": (flac[:60], ""),
        "nan.wav": (encoded(broken, "WAV", subtype="FLOAT"), "NaN or Inf samples"),
        "0-hertz.wav": (wav_file(noise(), rate=0), ""),
        "1-hertz.wav": (wav_file(noise(), rate=1), "expected a rate of 1000 to 1000000 Hz, got 1"),
        "2-gigahertz.wav": (wav_file(noise(), rate=(1 << 31) - 1), "expected a rate of .*, got 2147483647"),
        "4-gigahertz.wav": (wav_file(noise(), rate=1 << 31), ""),
        "0-channels.wav": (wav_file(noise(), channels=0), "hannel"),
        "1025-channels.wav": (wav_file(noise(), channels=1025), "hannel"),
        "header-alone.wav": (wav_file(noise())[:44], "too short: 0 samples|no samples"),
    }


def write_all(folder) -> tuple[dict[str, int], dict[str, str]]:
    """Good and bad files in a folder, and what is no file: (name -> samples, name -> why not)."""
    os.makedirs(folder, exist_ok=True)
    good, bad = good_files(), bad_files()
    for name, (content, _) in {**good, **bad}.items():
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(content)
    reasons = {name: reason for name, (_, reason) in bad.items()}
    os.mkdir(os.path.join(folder, "folder.wav"))
    os.symlink("nowhere.wav", os.path.join(folder, "dangling.wav"))
    reasons["dangling.wav"] = "No such file"
    if hasattr(os, "mkfifo"):
        os.mkfifo(os.path.join(folder, "pipe.wav"))
        reasons["pipe.wav"] = "expected a file, got a pipe"
    samples = {name: count for name, (_, count) in good.items()}
    return {**samples, **not_text(folder)}, reasons


def not_text(folder) -> dict[str, int]:
    """A file whose name is no UTF-8, where the file system takes it."""
    name = b"caf\xe9.wav"
    try:
        with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
            stream.write(encoded(noise(5000), "WAV"))
    except OSError:
        return {}
    return {os.fsdecode(name): 5000}
