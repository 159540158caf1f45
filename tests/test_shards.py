"""WebDataset shards: listed by headers, read by offset, the same as the files they were made of."""
import io
import os
import tarfile

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from gendistiller_ext.audio.files import AudioError, AudioFile, probe, read_audio  # noqa: E402
from gendistiller_ext.audio.find import find_audio, without  # noqa: E402
from gendistiller_ext.training.data import TrainingData, read_files  # noqa: E402
from gendistiller_ext.audio.shards import Member, expand_braces, list_members  # noqa: E402

RNG_LENGTHS = (4000, 5200, 6400, 7600, 8800, 10000)


@pytest.fixture
def corpus(tmp_path):
    """Six files in a folder, and the same in two shards of three with what WebDataset puts beside them."""
    rng = np.random.default_rng(0)
    (tmp_path / "files").mkdir()
    for i, (length, suffix, rate) in enumerate(zip(RNG_LENGTHS, ("wav", "flac", "wav", "flac", "ogg", "mp3"),
                                                   (16000, 16000, 8000, 44100, 16000, 16000))):
        wav = rng.uniform(-0.5, 0.5, (length, 2) if rate == 44100 else length)
        soundfile.write(str(tmp_path / "files" / f"84-{i}.{suffix}"), wav, rate)
    names = sorted(os.listdir(tmp_path / "files"))
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:03d}.tar", "w") as archive:
            for name in names[3 * shard:3 * shard + 3]:
                archive.add(tmp_path / "files" / name, name)
                text = tarfile.TarInfo(name.rsplit(".", 1)[0] + ".txt")
                text.size = 5
                archive.addfile(text, io.BytesIO(b"HELLO"))
    return tmp_path


def shards(corpus):
    return [str(corpus / "train-{000..001}.tar")]


@pytest.mark.parametrize("pattern,names", [
    ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
    ("a-{9..11}.tar", ["a-9.tar", "a-10.tar", "a-11.tar"]),
    ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
    ("{2..0}", ["2", "1", "0"]),
    ("{dev,test}-{0..1}.tar", ["dev-0.tar", "dev-1.tar", "test-0.tar", "test-1.tar"]),
    ("plain.tar", ["plain.tar"]),
])
def test_braces_are_the_shells(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize("pattern,message", [
    ("a-{}.tar", r"expected \{000..099\} or \{a,b\} in 'a-\{\}.tar', got \{\}"),
    ("a-{0..}.tar", r"got \{0..\}"), ("a-{1}.tar", r"got \{1\}"),
    ("{0..99999999}", "expected at most 1000000 names"), ("{0..9999}{0..9999}", "has 100000000"),
])
def test_other_braces_are_refused(pattern, message):
    with pytest.raises(ValueError, match=f"^audio: .*{message}"):
        expand_braces(pattern)


def test_a_file_with_braces_in_its_name_is_that_file(corpus):
    os.rename(corpus / "train-000.tar", corpus / "{0..1}.tar")
    files, _ = find_audio([str(corpus / "{0..1}.tar")])
    assert [file.name for file in files][0] == "{0..1}/84-0.wav" and len(files) == 3


def test_members_are_what_the_files_are(corpus):
    members, skipped = find_audio(shards(corpus))
    files, _ = find_audio([str(corpus / "files")])
    assert skipped == [] and [file.name for file in members] == [
        "train-000/84-0.wav", "train-000/84-1.flac", "train-000/84-2.wav", "train-001/84-3.flac",
        "train-001/84-4.ogg", "train-001/84-5.mp3"]
    assert [file.samples for file in members] == [file.samples for file in files]
    for member, file in zip(members, files):
        assert member.path == str(corpus / (member.name[:9] + ".tar"))
        assert probe(member) == probe(file)
        assert np.array_equal(read_audio(member), read_audio(file)), member.name
        for position in (0.0, 0.6, 0.999):
            assert np.array_equal(read_audio(member, crop=1500, position=position),
                                  read_audio(file, crop=1500, position=position)), member.name


def test_training_batches_are_those_of_the_files(corpus):
    """Names differ, order and crops do not: the same set in shards is the same run."""
    data = [TrainingData(find_audio(source)[0], 2, 3000, seed=3)
            for source in (shards(corpus), [str(corpus / "files")])]
    for number in range(6):
        member, file = (each.load((number, each.plan[number])) for each in data)
        assert member.failed == file.failed == []
        assert all(np.array_equal(a, b) for a, b in zip(member.wavs, file.wavs))
        assert [name.rsplit("/", 1)[-1] for name in member.names] == file.names


def test_folders_in_a_shard_links_and_hidden_members(tmp_path):
    wav = io.BytesIO()
    soundfile.write(wav, np.zeros(1000), 16000, format="WAV")
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        long = "./a/" + "x" * 150 + "/one.wav"  # a name that needs a header of its own
        for name in (long, "._one.wav", "../../two.wav", "readme.md"):
            entry = tarfile.TarInfo(name)
            entry.size = len(wav.getvalue())
            archive.addfile(entry, io.BytesIO(wav.getvalue()))
        for kind in (tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE):
            entry = tarfile.TarInfo("link.wav")
            entry.type, entry.linkname = kind, long
            archive.addfile(entry)
    files, skipped = find_audio([str(tmp_path / "s.tar")])
    assert [file.name for file in files] == [f"s/a/{'x' * 150}/one.wav", "s/two.wav"] and skipped == []
    assert all(len(read_audio(file)) == 1000 for file in files)


def test_unusable_members_are_named_with_their_shard(corpus):
    with tarfile.open(corpus / "train-000.tar", "a") as archive:
        for name, content in (("junk.flac", b"no audio at all" * 50), ("empty.wav", b"")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    files, skipped = find_audio(shards(corpus), min_samples=2800)
    assert [error.name for error in skipped] == ["train-000/empty.wav", "train-000/junk.flac", "train-001/84-3.flac"]
    assert skipped[0].reason == "the file is empty" and "too short: 2757" in skipped[2].reason
    assert "ormat" in skipped[1].reason and "\n" not in str(skipped[1]) and "Member" not in str(skipped[1])
    assert len(files) == 5


def test_a_member_that_breaks_later_is_named(corpus):
    """Bytes of a member's FLAC frames overwritten after the listing."""
    files, _ = find_audio(shards(corpus))
    flac = next(file for file in files if file.name.endswith("84-1.flac"))
    with open(flac.path, "r+b") as stream:
        stream.seek(flac.offset + flac.size // 2)
        stream.write(bytes(flac.size // 3))
    batch = read_files(files)
    assert [error.name for error in batch.failed] == ["train-000/84-1.flac"] and len(batch.wavs) == 5


@pytest.mark.parametrize("how,left", [("cut in a member", 1), ("cut in a header", 1), ("junk in a header", 1),
                                      ("no end", 3)])
def test_damaged_shards_give_what_is_whole(corpus, how, left):
    """Members of train-000: 84-0.wav, 84-0.txt, 84-1.flac, 84-1.txt, 84-2.wav, 84-2.txt."""
    path = corpus / "train-000.tar"
    whole = {name: offset for name, offset, _ in list_members(str(path))[0]}
    content = path.read_bytes()
    last = whole["84-2.txt"] + 512
    changed = {"cut in a member": content[:whole["84-1.flac"] + 100],
               "cut in a header": content[:whole["84-1.flac"] - 100],
               "junk in a header": content[:whole["84-1.flac"] - 512] + b"x" * 512 + content[whole["84-1.flac"]:],
               "no end": content[:last]}[how]
    path.write_bytes(changed)
    files, skipped = find_audio([str(path)])
    assert [file.name for file in files] == [f"train-000/84-{i}.{'flac' if i == 1 else 'wav'}" for i in range(left)]
    assert [error.name for error in skipped] == ["train-000.tar"] and "damaged tar file" in skipped[0].reason
    assert all(len(read_audio(file)) for file in files)


@pytest.mark.parametrize("content", [b"", b"junk" * 1000, b"\x1f\x8b" + bytes(2000)])
def test_what_is_no_tar_is_named(corpus, content):
    (corpus / "train-001.tar").write_bytes(content)
    files, skipped = find_audio(shards(corpus))
    assert len(files) == 3
    assert [error.name for error in skipped] == ["train-001.tar"]
    assert "expected an uncompressed tar file" in skipped[0].reason


def test_missing_and_compressed_shards_and_a_folder_of_shards(corpus):
    with pytest.raises(FileNotFoundError, match="audio: no such file or folder: .*train-002.tar"):
        find_audio([str(corpus / "train-{000..002}.tar")])
    with tarfile.open(corpus / "x.tar.gz", "w:gz") as archive:
        archive.add(corpus / "files", "files")
    with pytest.raises(ValueError, match="audio: expected a folder, .* a .tar, .*must not be compressed"):
        find_audio([str(corpus / "x.tar.gz")])
    (corpus / "only").mkdir()
    os.rename(corpus / "train-000.tar", corpus / "only" / "train-000.tar")
    with pytest.raises(ValueError, match=r"shards are named themselves, as in FOLDER/\*\.tar"):
        find_audio([str(corpus / "only")])


def test_a_shard_named_twice_and_held_out_members(corpus):
    link = corpus / "link"
    link.symlink_to(corpus)
    files, _ = find_audio(shards(corpus) + [str(link / "train-001.tar")])
    assert len(files) == 6
    held, _ = find_audio([str(link / "train-000.tar")])
    assert [file.name[:9] for file in without(files, held)] == ["train-001"] * 3
    alias = corpus / "files" / "alias.wav"
    alias.symlink_to(corpus / "files" / "84-0.wav")
    folder, _ = find_audio([str(corpus / "files")])
    assert len(folder) == 6
    assert len(without(folder, [AudioFile("x", str(alias))])) == 5


def test_a_member_as_a_file():
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x")
        with open(path, "wb") as stream:
            stream.write(bytes(range(100)))
        with Member(path, 10, 20) as member:
            assert member.read() == bytes(range(10, 30)) and member.read(5) == b""
            assert member.seek(-3, os.SEEK_END) == 17 and member.read(10) == bytes([27, 28, 29])
            assert member.seek(5) == 5 and member.seek(2, os.SEEK_CUR) == 7 and member.tell() == 7
            assert member.seek(1000) == 1000 and member.read(4) == b""
            with pytest.raises(ValueError, match="got -1"):
                member.seek(-1)
        assert member.closed
        assert io.BufferedReader(Member(path, 10, 20)).read() == bytes(range(10, 30))


def test_a_shard_that_is_gone_is_an_audio_error(corpus):
    files, _ = find_audio(shards(corpus))
    os.unlink(corpus / "train-000.tar")
    with pytest.raises(AudioError, match="train-000/84-0.wav: No such file"):
        read_audio(files[0])
