"""One bad recording never ends a run: the others are served, it is named with a reason and counted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
for module in ("soxr", "tqdm"):
    pytest.importorskip(module)

import bad_audio  # noqa: E402
import gendistiller_ext as gd  # noqa: E402
from gendistiller_ext import cli  # noqa: E402
from conftest import SMALL  # noqa: E402
from gendistiller_ext.audio.chunked import read_pieces  # noqa: E402
from gendistiller_ext.audio.files import AudioError, AudioFile, probe, read_audio  # noqa: E402
from gendistiller_ext.audio.find import find_audio  # noqa: E402
from gendistiller_ext.audio.shards import list_members  # noqa: E402
from gendistiller_ext.checkpoints import safetensors  # noqa: E402
from gendistiller_ext.commands import extract  # noqa: E402
from gendistiller_ext.superb import ks  # noqa: E402
from gendistiller_ext.training.data import TrainingData, dataset_hash, split_validation  # noqa: E402

LEAST = 400
ROOT = str(Path(gd.__file__).resolve().parent.parent)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder, name -> samples of the good, name -> why not of the bad, a student's path)"""
    folder = tmp_path_factory.mktemp("bad")
    good, bad = bad_audio.write_all(folder / "speech")
    gd.Model(gd.Config(**SMALL), seed=1).save(folder / "student.safetensors")
    return folder / "speech", good, bad, folder / "student.safetensors"


def gendistiller(*words, **environment):
    """A process of its own: what ends one shows as its exit code."""
    return subprocess.run([sys.executable, "-m", "gendistiller_ext", *map(str, words)], capture_output=True,
                          timeout=120, cwd=ROOT, env={**os.environ, "PYTHONPATH": ROOT, **environment})


def check_named(told: dict[str, str], bad: dict[str, str]) -> None:
    assert told.keys() == bad.keys()
    for name, reason in told.items():
        assert re.search(bad[name], reason) and "\n" not in reason and reason, (name, reason)


# ---- Finding and reading -----------------------------------------------------------------------------------

def test_each_is_used_or_named(corpus):
    folder, good, bad, _ = corpus
    files, skipped = find_audio([str(folder)], min_samples=LEAST)
    told = {error.name: error.reason for error in skipped}
    used = {}
    for file in files:
        try:
            used[file.name] = len(read_audio(file))
            if used[file.name] < LEAST:  # as training and extract look at it
                raise AudioError(file.name, f"too short: {used[file.name]} samples")
            assert used[file.name] == file.samples
        except AudioError as error:
            assert error.name == file.name
            used.pop(file.name, None)
            told[file.name] = error.reason
    assert used == good
    check_named(told, bad)


def test_each_alone(corpus):
    """Whole, cropped, in pieces and by its length alone: an AudioError, or the same samples."""
    folder, good, bad, _ = corpus
    for name in good:
        path = str(folder / name)
        whole = read_audio(path)
        assert probe(path) == len(whole) == good[name]
        assert np.array_equal(np.concatenate(list(read_pieces(AudioFile(name, path), 0.05))), whole)
        assert np.array_equal(read_audio(path, crop=300, position=1 - 1e-9), whole[-300:])
        assert np.array_equal(read_audio(path, crop=300, position=0.0), whole[:300])
    for name in set(bad) - {"claims-less.flac", "header-alone.wav"}:
        path = str(folder / name)
        for call in (lambda: read_audio(path), lambda: list(read_pieces(AudioFile(name, path), 0.05))):
            with pytest.raises(AudioError, match=re.escape(path) + "|" + re.escape(name)):
                call()


def test_a_header_takes_no_memory_that_the_file_cannot_fill(corpus):
    """68,719,476,735 samples would be 256 GiB."""
    import tracemalloc
    path = str(corpus[0] / "claims-more.flac")
    tracemalloc.start()
    with pytest.raises(AudioError):
        read_audio(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


@pytest.mark.parametrize("error", [
    MemoryError(), MemoryError("Unable to allocate 2 TiB"), TypeError("odd"), ZeroDivisionError("division by zero"),
    OSError(5, "Input/output error"), KeyError(1)])
def test_any_exception_of_a_decoder_is_the_files(corpus, monkeypatch, error):
    def fail(*_, **__):
        raise error
    path = str(corpus[0] / "plain.wav")
    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    for call in (read_audio, lambda path: list(read_pieces(AudioFile(path, path)))):
        with pytest.raises(AudioError, match=r"plain\.wav: \S"):
            call(path)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        read_audio(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path):
    for name in ("a.wav", "locked/b.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bad_audio.encoded(bad_audio.noise(), "WAV"))
    (tmp_path / "c.wav").write_bytes(b"x")
    (tmp_path / "c.wav").chmod(0)
    (tmp_path / "locked").chmod(0)
    try:
        files, skipped = find_audio([str(tmp_path)])
    finally:
        (tmp_path / "locked").chmod(0o700)
    assert [file.name for file in files] == ["a.wav"]
    assert {error.name: error.reason for error in skipped} == {"c.wav": "Permission denied",
                                                              "locked": "Permission denied"}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.wav").write_bytes(bad_audio.encoded(bad_audio.noise(), "WAV"))
    (tmp_path / "b").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    files, skipped = find_audio([str(tmp_path)])
    assert [file.name for file in files] == ["a/x.wav"]
    assert [str(error) for error in skipped] == ["b: Permission denied"]


@pytest.mark.parametrize("name", ["pipe.wav", "pipe.csv", "pipe.tar", "dangling.wav", "dangling.tsv"])
def test_a_source_that_is_no_file(name, tmp_path):
    (os.mkfifo if "pipe" in name else lambda path: os.symlink("nowhere", path))(tmp_path / name)
    with pytest.raises(ValueError, match=rf"^audio: .*{name}"):
        find_audio([str(tmp_path / name)])


# ---- extract -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", [(), ("--chunk-seconds", 0.2, "--context-seconds", 0.1)])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_extract(corpus, tmp_path, cut, encoding):
    folder, good, bad, student = corpus
    words = ("extract", "--model", student, "--audio", folder, "--out", tmp_path / "out", *cut)
    done = gendistiller(*words, "--json", PYTHONIOENCODING=encoding)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout) == {"out": str(tmp_path / "out"), "written": len(good), "kept": 0,
                                       "skipped": len(bad)}
    assert b"Traceback" not in done.stderr
    told = dict(re.findall(r"skipped (\S+): (.+)", done.stderr.decode()))
    check_named(told, bad)
    for name, samples in good.items():
        arrays, _ = safetensors.parse((tmp_path / "out" / f"{name}.safetensors").read_bytes())
        assert arrays["hidden_states"].shape[1] == (samples - 400) // 320 + 1
    again = gendistiller(*words, "--quiet")
    assert again.returncode == 1 and f"{len(good)} already there, {len(bad)} skipped" in again.stdout.decode()


def test_extract_of_good_files_ends_with_0(corpus, tmp_path):
    folder, good, _, student = corpus
    done = gendistiller("extract", "--model", student, "--audio", *(folder / name for name in good), "--out",
                        tmp_path / "caf\udce9", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"caf\\udce9: " in done.stdout, done.stderr
    assert len(list((tmp_path / "caf\udce9").iterdir())) == len(good)


def test_a_name_that_the_output_folder_cannot_take(corpus, tmp_path, capsys):
    """With the suffix it is too long; another's place is a folder."""
    folder, _, _, student = corpus
    for name in ("x" * 250 + ".wav", "taken.wav", "good.wav"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes((folder / "plain.wav").read_bytes())
    (tmp_path / "out" / "taken.wav.safetensors" / "folder").mkdir(parents=True)
    for cut in ((), ("--chunk-seconds", "0.3")):
        code = cli.main(["extract", "--model", str(student), "--audio", str(tmp_path / "in"), "--out",
                            str(tmp_path / "out"), "--quiet", "--json", *cut])
        captured = capsys.readouterr()
        assert code == 1 and json.loads(captured.out)["written"] == 1, captured.err
        assert "skipped taken.wav: " in captured.err and "File name too long" in captured.err
        assert sorted(os.listdir(tmp_path / "out")) == ["good.wav.safetensors", "taken.wav.safetensors"]


def test_a_file_too_long_for_the_memory(corpus, tmp_path):
    """Batches that fail are computed file by file; the one that fails alone is named."""
    folder, good, _, student = corpus
    model = gd.Model.load(student)

    class Small:
        config, precision, params = model.config, model.precision, model.params

        def forward(self, wavs, **options):
            if max(map(len, wavs)) > 15000 and (len(wavs) > 1 or len(wavs[0]) == 15833):
                raise MemoryError
            return model.forward(wavs, **options)

    files, _ = find_audio([str(folder / name) for name in good])
    said = []
    counts = extract.extract(Small(), files, str(tmp_path), say=said.append)
    assert counts == {"written": len(good) - 1, "kept": 0, "skipped": 1} and said == ["skipped cut.wav: out of memory"]


def test_a_full_disk_is_no_files_fault(corpus, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x")
    monkeypatch.setattr(extract, "_write", full)
    files, _ = find_audio([str(corpus[0] / "plain.wav")])
    with pytest.raises(OSError, match="No space left"):
        extract.extract(gd.Model.load(corpus[3]), files, str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(40), b"PK\x05\x06" + bytes(18),
                                     b"\x93NUMPY\x01\x00", b"x" * 99])
def test_a_damaged_output_is_written_again(corpus, tmp_path, content, capsys):
    words = ["extract", "--model", str(corpus[3]), "--audio", str(corpus[0] / "plain.wav"), "--out", str(tmp_path),
             "--quiet", "--format"]
    for kind in ("npz", "safetensors"):
        (tmp_path / f"plain.wav.{kind}").write_bytes(content)
        assert cli.main([*words, kind]) == 0 and "1 files written" in capsys.readouterr().out


# ---- Training, shards, superb ------------------------------------------------------------------------------

def test_training_batches(corpus):
    folder, good, bad, _ = corpus
    files, skipped = find_audio([str(folder)], min_samples=LEAST)
    train, held = split_validation(files, 0.3)
    assert len(train) + len(held) == len(files) and len(dataset_hash(files)) == 64
    data = TrainingData(files, len(files), 3000, seed=0, min_samples=LEAST)
    with data.batches(0, 4) as batches:
        for batch in batches:
            assert {error.name for error in batch.failed} | {error.name for error in skipped} <= set(bad)
            # A crop that is whole can be had of a file that isn't.
            assert set(batch.names) <= {*good, "nan.wav", "cut.flac", "claims-more.flac"}
            assert len(batch.wavs) + len(batch.failed) == len(files)
            assert len(batch.wavs) > 1 and all(np.isfinite(wav).all() for wav in batch.wavs)


def test_the_hash_of_names_that_are_text_is_their_utf8s():
    assert dataset_hash([AudioFile("é.wav", "/x", 5)]) == hashlib.sha256("é.wav\t5\n".encode()).hexdigest()


def test_shards(corpus, tmp_path):
    folder, good, bad, _ = corpus
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in [*good, *bad]:
            if os.path.isfile(folder / name):
                archive.add(folder / name, name)
    files, skipped = find_audio([str(tmp_path / "s.tar")], min_samples=LEAST)
    used, told = {}, {error.name[2:]: error.reason for error in skipped}
    for file in files:
        try:
            used[file.name[2:]] = len(read_audio(file))
        except AudioError as error:
            told[error.name[2:]] = error.reason
    assert used == good
    check_named(told, {name: reason for name, reason in bad.items() if os.path.isfile(folder / name)})


def tar_with(name=b"b.wav", size=b"00000000012\0", kind=b"0"):
    """A tar file of a good member and one whose header is made by hand."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("a.wav")
        content = bad_audio.encoded(bad_audio.noise(), "WAV")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        end = archive.offset
    header = bytearray(512)
    header[:len(name)], header[100:108], header[124:136] = name, b"0000644\0", size
    header[156:157], header[257:265] = kind, b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return stream.getvalue()[:end] + bytes(header) + bytes(2048)


@pytest.mark.parametrize("change", [
    dict(size=b"\xff" * 12), dict(size=b"\xff" * 11 + b"\x00"), dict(size=b"\x80" + b"\xff" * 11),
    dict(size=b"77777777777\0"), dict(size=b"abcdefghijk\0"), dict(kind=b"x", size=b"00000000012\0"), dict(kind=b"g"),
    dict(kind=b"L"), dict(kind=b"S"), dict(name=b"\xff\xfe.wav")])
def test_a_damaged_shard_gives_what_is_whole(change, tmp_path):
    (tmp_path / "s.tar").write_bytes(tar_with(**change))
    members, problem = list_members(str(tmp_path / "s.tar"))
    assert members[0][0] == "a.wav" and len(members) <= 2
    if change.keys() == {"size"}:
        assert len(members) == 1 and problem.startswith("a damaged tar file: ")
    files, skipped = find_audio([str(tmp_path / "s.tar")])
    assert [file.name for file in files] == ["s/a.wav"] and len(read_audio(files[0])) == 16000
    assert all("\n" not in str(error) for error in skipped)


def test_one_shard_that_cannot_be_read(corpus, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_with())
    real = tarfile.open

    def fail(path, *more):
        if str(path).endswith("b.tar"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *more)
    monkeypatch.setattr(tarfile, "open", fail)
    files, skipped = find_audio([str(tmp_path / "{a,b}.tar")])
    assert [file.name for file in files] == ["a/a.wav"]
    assert "b.tar: Permission denied" in [str(error) for error in skipped]


def test_superb_leaves_bad_clips_out(corpus, tmp_path):
    folder, _, bad, _ = corpus
    rng = np.random.default_rng(0)
    for word in ("yes", "no", "cat"):
        for speaker in range(20):
            path = tmp_path / "data" / word / f"{speaker:08x}_nohash_0.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, rng.uniform(-0.5, 0.5, 4000), 16000)
    whole = ks.prepare(tmp_path / "data", tmp_path / "whole")
    names = [name for name in bad if name != "claims-less.flac" and os.path.isfile(folder / name)]
    for name in names:
        (tmp_path / "data" / "cat" / f"{1:08x}_{name}").write_bytes((folder / name).read_bytes())
    (tmp_path / "data" / "cat" / f"{2:08x}_dangling.wav").symlink_to("nowhere")
    (tmp_path / "data" / "_background_noise_").mkdir()
    (tmp_path / "data" / "_background_noise_" / "n.wav").write_bytes(b"RIFF")
    corpus = ks.prepare(tmp_path / "data", tmp_path / "part")
    assert corpus.clips == whole.clips and whole.skipped == [] and len(corpus.skipped) == len(names) + 2
    placed = [path for path in (tmp_path / "part").rglob("*.wav")]
    assert len(placed) == len(list((tmp_path / "whole").rglob("*.wav"))) and all(path.exists() for path in placed)
