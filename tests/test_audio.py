"""Finding and reading audio files: formats, rates, channels, lists, damaged files."""
import os

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from gendistiller_ext.audio.files import AudioError, AudioFile, probe, read_audio  # noqa: E402
from gendistiller_ext.audio.find import find_audio  # noqa: E402


def tone(rate, seconds=1.0, frequency=440.0, amplitude=0.5):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def write(path, wav, rate=16000, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(str(path), wav, rate, **options)
    return str(path)


def test_16_khz_float_wav_comes_back_bit_for_bit(tmp_path):
    wav = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    got = read_audio(write(tmp_path / "a.wav", wav, subtype="FLOAT"))
    assert got.dtype == np.float32 and got.ndim == 1
    assert np.array_equal(got, wav)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    path = write(tmp_path / "a.flac", tone(rate), rate)
    got = read_audio(path)
    assert abs(len(got) - 16000) <= 1 and probe(path) == 16000
    inner = slice(1000, 15000)  # the filter rings at the ends
    assert np.abs(got[inner] - tone(16000)[inner]).max() < 1e-3


def test_stereo_is_averaged(tmp_path):
    left, right = tone(16000, frequency=300), tone(16000, frequency=1000)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    assert np.allclose(read_audio(path), (left + right) / 2, atol=1e-7)


def test_44_khz_stereo(tmp_path):
    wav = np.stack([tone(44100), np.zeros(44100, np.float32)], axis=1)
    got = read_audio(write(tmp_path / "a.flac", wav, 44100))
    assert np.abs(got[1000:15000] - 0.5 * tone(16000)[1000:15000]).max() < 1e-3


def test_crop_is_a_piece_of_the_whole(tmp_path):
    wav = np.random.default_rng(1).uniform(-1, 1, 10000).astype(np.float32)
    path = write(tmp_path / "a.wav", wav, subtype="FLOAT")
    assert np.array_equal(read_audio(path, crop=3000, position=0.0), wav[:3000])
    assert np.array_equal(read_audio(path, crop=3000, position=0.5), wav[3500:6500])
    assert np.array_equal(read_audio(path, crop=3000, position=1 - 1e-9), wav[7000:])
    assert np.array_equal(read_audio(path, crop=10000, position=0.9), wav)
    assert np.array_equal(read_audio(path, crop=20000, position=0.9), wav)


def test_crop_of_another_rate_has_its_length(tmp_path):
    path = write(tmp_path / "a.wav", tone(44100, 2.0), 44100)
    for position in (0.0, 0.37, 0.99):
        assert len(read_audio(path, crop=16000, position=position)) == 16000


@pytest.mark.parametrize("content,reason", [
    (b"", "the file is empty"),
    (b"this is no audio at all, whatever its name says" * 20, "ormat"),
])
def test_unreadable_files_say_why(tmp_path, content, reason):
    path = tmp_path / "bad.flac"
    path.write_bytes(content)
    for call in (probe, read_audio):
        with pytest.raises(AudioError, match=reason) as caught:
            call(str(path))
        assert "bad.flac" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_names_the_system_reason(tmp_path):
    with pytest.raises(AudioError, match="No such file"):
        read_audio(str(tmp_path / "gone.wav"))


def test_truncated_flac_is_refused(tmp_path):
    path = write(tmp_path / "a.flac", np.random.default_rng(2).uniform(-1, 1, 50000).astype(np.float32))
    content = open(path, "rb").read()
    with open(path, "wb") as stream:
        stream.write(content[:len(content) // 2])
    with pytest.raises(AudioError):
        read_audio(path)


def test_mp3_cut_short_is_refused(tmp_path):
    """libsndfile believes the header's length and ends early, without an error."""
    if "MP3" not in soundfile.available_formats():
        pytest.skip("this libsndfile has no MP3")
    path = write(tmp_path / "a.mp3", tone(16000, 3.0))
    assert len(read_audio(path)) == probe(path)
    content = open(path, "rb").read()
    with open(path, "wb") as stream:
        stream.write(content[:len(content) // 2])
    with pytest.raises(AudioError, match="damaged: [0-9]+ of 48000 samples"):
        read_audio(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused(tmp_path, value):
    wav = tone(16000)
    wav[77] = value
    with pytest.raises(AudioError, match="NaN or Inf"):
        read_audio(write(tmp_path / "a.wav", wav, subtype="FLOAT"))


@pytest.fixture
def corpus(tmp_path):
    write(tmp_path / "set" / "b" / "two.wav", tone(16000, 2))
    write(tmp_path / "set" / "a" / "one.flac", tone(8000, 1), 8000)
    write(tmp_path / "set" / "deep" / "er" / "three.WAV", tone(16000, 3))
    write(tmp_path / "set" / "short.wav", tone(16000, 0.01))
    (tmp_path / "set" / "broken.wav").write_bytes(b"RIFF....WAVEjunk")
    (tmp_path / "set" / "notes.txt").write_text("no audio")
    (tmp_path / "set" / ".hidden.wav").write_bytes(b"no audio")
    return tmp_path


def test_folder_is_searched_and_unusable_files_are_named(corpus):
    files, skipped = find_audio([str(corpus / "set")], min_samples=400)
    assert [(file.name, file.samples) for file in files] == [
        ("a/one.flac", 16000), ("b/two.wav", 32000), ("deep/er/three.WAV", 48000)]
    assert [error.name for error in skipped] == ["broken.wav", "short.wav"]
    assert "too short: 160 samples" in skipped[1].reason


def test_links_that_lead_back_end(corpus):
    os.symlink(corpus / "set", corpus / "set" / "deep" / "loop")
    write(corpus / "elsewhere" / "four.wav", tone(16000, 1))
    os.symlink(corpus / "elsewhere", corpus / "set" / "linked")
    files, _ = find_audio([str(corpus / "set")], min_samples=400)
    assert [file.name for file in files] == ["a/one.flac", "b/two.wav", "deep/er/three.WAV", "linked/four.wav"]


def test_file_and_repeated_sources(corpus):
    one = str(corpus / "set" / "a" / "one.flac")
    assert find_audio([one])[0] == [AudioFile("one.flac", one, 16000)]
    assert len(find_audio([str(corpus / "set"), str(corpus / "set" / "a")], min_samples=400)[0]) == 3


@pytest.mark.parametrize("what", ["missing", "empty", "unusable", "unknown"])
def test_nothing_usable_is_an_error(tmp_path, what):
    source = tmp_path / {"unknown": "list.xyz"}.get(what, what)
    if what in ("empty", "unusable"):
        source.mkdir()
    if what == "unusable":
        (source / "x.wav").write_bytes(b"junk")
    if what == "unknown":
        source.write_text("x")
    kind = FileNotFoundError if what == "missing" else ValueError
    with pytest.raises(kind, match="^audio: ") as caught:
        find_audio([str(source)])
    assert {"unusable": "x.wav", "empty": "no audio files"}.get(what, source.name) in str(caught.value)


def test_bucket_csv(corpus):
    table = corpus / "lists" / "train.csv"
    table.parent.mkdir()
    table.write_text(",file_path,length,label\n0,b/two.wav,32000,A B\n1,a/one.flac,16000,\"C, D\"\n"
                     "2,gone.wav,99999,E\n")
    files, skipped = find_audio([str(table)], root=str(corpus / "set"))
    assert [(file.name, file.samples) for file in files] == [("a/one.flac", 16000), ("b/two.wav", 32000)]
    assert files[0].path == str(corpus / "set" / "a" / "one.flac")
    assert [error.name for error in skipped] == ["gone.wav"]
    with pytest.raises(ValueError, match="3 unusable"):
        find_audio([str(table)])  # beside the CSV there is nothing
    table.write_text("path,length\nx,1\n")
    with pytest.raises(ValueError, match="column file_path"):
        find_audio([str(table)])
    table.write_text("file_path,length\nx.wav,long\n")
    with pytest.raises(ValueError, match="line 2: expected a length, got 'long'"):
        find_audio([str(table)])


def test_fairseq_manifest(corpus):
    table = corpus / "train.tsv"
    table.write_text(f"{corpus / 'set'}\nb/two.wav\t32000\na/one.flac\t16000\n")
    files, _ = find_audio([str(table)])
    assert [(file.name, file.samples) for file in files] == [("a/one.flac", 16000), ("b/two.wav", 32000)]


def test_table_with_a_path_column(corpus):
    table = corpus / "set" / "manifest.tsv"
    table.write_text("speaker\tpath\tseconds\n1\ta/one.flac\t1.0\n2\tb/two.wav\t\n")
    files, _ = find_audio([str(table)])
    assert [(file.name, file.samples) for file in files] == [("a/one.flac", 16000), ("b/two.wav", 32000)]
    table.write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="column path"):
        find_audio([str(table)])


def test_names_stay_inside_the_output_folder(corpus):
    table = corpus / "deep.csv"
    elsewhere = write(corpus / "other" / "x.wav", tone(16000))
    table.write_text(f"file_path,length\n../other/x.wav,16000\n{corpus}/set/a/one.flac,16000\n")
    files, _ = find_audio([str(table)], root=str(corpus / "set"))
    assert [file.name for file in files] == ["a/one.flac", "other/x.wav"]
    assert os.path.samefile(files[1].path, elsewhere)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 192000])
def test_flac_lengths_from_the_first_block(tmp_path, rate, monkeypatch):
    """As libsndfile says, without it; by decoding where a header leaves the length open."""
    path = write(tmp_path / "a.flac", np.zeros((rate + 77, 2)), rate)
    expected = round((rate + 77) * 16000 / rate)
    with monkeypatch.context() as patch:
        patch.setattr(soundfile, "SoundFile", None)
        assert probe(path) == expected
    content = bytearray(open(path, "rb").read())
    content[21:26] = bytes([content[21] & 0xf0, 0, 0, 0, 0])
    (tmp_path / "open.flac").write_bytes(content)
    assert soundfile.info(tmp_path / "open.flac").frames > 1 << 62
    assert probe(str(tmp_path / "open.flac")) == expected
