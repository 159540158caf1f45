"""Lists of audio as programs and people write them; what can't be read is one line: file, line, what was expected."""

from __future__ import annotations

import random

import pytest

from gendistiller_ext.audio.lists import lines, read_csv, read_tsv, table

BOM = b"\xef\xbb\xbf"
CSV = [("a.wav", 16000), ("b c.wav", 320), ("caf\u00e9.wav", 0)]
CSV_TEXT = "file_path,length,label\na.wav,16000,X Y\nb c.wav,320,\"C, D\"\ncaf\u00e9.wav,,\n"
TSV_TEXT = "speaker\tpath\tseconds\n1\ta.wav\t1.0\n2\tb c.wav\t0.02\n3\tcaf\u00e9.wav\t\n"
MANIFEST_TEXT = "/root/of it\na.wav\t16000\nb c.wav\t320\ncaf\u00e9.wav\n"
READERS = {"csv": (read_csv, CSV_TEXT, "here"), "tsv": (read_tsv, TSV_TEXT, "here"),
           "manifest.tsv": (read_tsv, MANIFEST_TEXT, "/root/of it")}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\n \r\n"])
@pytest.mark.parametrize("mark", [b"", BOM])
@pytest.mark.parametrize("kind", READERS)
def test_byte_order_marks_and_ends_of_lines(kind, mark, end, tmp_path):
    reader, text, base = READERS[kind]
    path = tmp_path / f"x.{kind}"
    for content in (text, text.rstrip("\n")):
        path.write_bytes(mark + content.replace("\n", end).encode())
        rows = list(reader(str(path), None))
        assert [(row.path, row.samples) for row in rows] == CSV
        assert {row.base for row in rows} == {str(tmp_path) if base == "here" else base}
        assert {row.base for row in reader(str(path), "/elsewhere")} == {"/elsewhere"}


def test_line_ends_that_only_python_knows_are_part_of_a_name(tmp_path):
    name = "a\x0bb\x0c\x1c\x85\u2028.wav"
    (tmp_path / "x.tsv").write_text(f"/root\n{name}\t5\n", encoding="utf-8")
    assert [row.path for row in read_tsv(str(tmp_path / "x.tsv"), None)] == [name]


@pytest.mark.parametrize("name, content, message", [
    ("x.csv", b"", "line 1: expected a column file_path, got an empty file"),
    ("x.csv", b"\n\n", "line 1: expected a column file_path, got an empty file"),
    ("x.csv", b"file_path;length\na.wav;5\n", "line 1: expected a column file_path, parted by ',' from others, "
                                              "got 'file_path;length'"),
    ("x.csv", b"path,length\na.wav,5\n", "line 1: expected a column file_path, .* got 'path,length'"),
    ("x.csv", b"id,file_path\n1\n", "line 2: expected at least 2 columns, got '1'"),
    ("x.csv", b"file_path,length\n\n,5\n", "line 3: expected a path, got ''"),
    ("x.csv", b"file_path\n a\0b \n", r"line 2: expected a path, got ' a\\x00b '"),
    ("x.csv", b"file_path,length\na.wav,long\n", "line 2: expected a length, got 'long'"),
    ("x.csv", b"file_path,length\na.wav,1e300\n", "line 2: expected a length, got '1e300'"),
    ("x.csv", b"file_path,length\na.wav,inf\n", "line 2: expected a length, got 'inf'"),
    ("x.csv", b"file_path,length\na.wav,nan\n", "line 2: expected a length, got 'nan'"),
    ("x.csv", b"file_path,length\na.wav,-5\n", "line 2: expected a length, got '-5'"),
    ("x.csv", b'file_path,label\na.wav,"open\nb.wav,x\n', "line 3: expected cells parted by ',': unexpected end"),
    ("x.csv", b'file_path,label\na.wav,"b"c\n', "line 2: expected cells parted by ','"),
    ("x.csv", b"file_path\n" + b"x" * 200_000 + b"\n", "line 2: expected cells parted by ',': field larger"),
    ("x.csv", b"file_path\ncaf\xe9.wav\n", r"line 2: expected UTF-8, got the byte 0xe9 in b'caf\\xe9.wav\\n'"),
    ("x.csv", BOM + b"file_path\r\n\xff\n", r"line 2: expected UTF-8, got the byte 0xff"),
    ("x.csv", "file_path\n".encode("utf-16"), "line 1: expected UTF-8, got the byte 0xff"),
    ("x.csv", b"file_path\n" + b"y" * (1 << 21), "line 2: expected at most 1048576 bytes, got more"),
    ("x.tsv", b"", "line 1: expected fairseq's manifest .* or a header with a column path, got ''"),
    ("x.tsv", b"a\tb\n1\t2\n", "line 1: expected fairseq's manifest .* or a header with a column path"),
    ("x.tsv", b"id\tpath\n1\n", "line 2: expected at least 2 columns, got '1'"),
    ("x.tsv", b"path\tseconds\na.wav\tlong\n", "line 2: expected a length, got 'long'"),
    ("x.tsv", b"/root\na.wav\t5\n\t7\n", "line 3: expected a path, got ''"),
    ("x.tsv", b"/root\na.wav\t5s\n", "line 2: expected a length, got '5s'"),
    ("x.tsv", b"path\tseconds\n\ncaf\xe9.wav\t1.0\n", "line 3: expected UTF-8, got the byte 0xe9"),
])
def test_what_cannot_be_read_is_one_line(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        list((read_csv if name.endswith("csv") else read_tsv)(str(path), None))
    text = str(caught.value)
    assert text.startswith(f"{path}: line ") and "\n" not in text and len(text) < 500 + len(str(path))


@pytest.mark.parametrize("name", ["semicolon.csv", "latin1.tsv"])
@pytest.mark.parametrize("words", [("extract", "--model", "STUDENT", "--out", "OUT", "--audio"),
                                   ("distill", "--teacher", "STUDENT", "--out", "OUT", "--steps", "1", "--audio")])
def test_commands_end_with_2_and_one_line(name, words, tmp_path, capsys):
    for module in ("soundfile", "soxr", "tqdm", "yaml"):
        pytest.importorskip(module)
    from gendistiller_ext import cli
    from gendistiller_ext.weights import wavlm_tiny
    path = tmp_path / name
    path.write_bytes(b"file_path;length\na.wav;5\n" if name.endswith("csv") else b"path\tseconds\ncaf\xe9.wav\t1.0\n")
    places = {"STUDENT": str(wavlm_tiny()), "OUT": str(tmp_path / "out")}
    assert cli.main([*(places.get(word, word) for word in words), str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path}: line {1 if name.endswith('csv') else 2}: expected " in err


@pytest.mark.parametrize("content, message", [
    (b"path\ttasks\tspeaker\n", "line 1: expected a column label"),
    (b"path\ttasks\tspeaker\tlabel\nx.wav\tKS\n", "line 2: expected at least 4 columns"),
    (b"path\ttasks\tspeaker\tlabel\ncaf\xe9.wav\tKS\ta\tyes\n", "line 2: expected UTF-8"),
])
def test_superbs_manifest(content, message, tmp_path):
    from gendistiller_ext.superb import ks
    (tmp_path / "manifest.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=f"manifest.tsv: {message}"):
        ks.find_clips(tmp_path)
    (tmp_path / "manifest.tsv").write_bytes(BOM + b"path\ttasks\tspeaker\tlabel\r\nx.wav\tASR,KS\ta\tyes\r\n")
    assert [clip.label for clip in ks.find_clips(tmp_path)[0]] == ["yes"]
    (tmp_path / "manifest.tsv").unlink()
    (tmp_path / "yes").mkdir()
    (tmp_path / "yes" / "a_0.wav").write_bytes(b"")
    (tmp_path / "testing_list.txt").write_bytes(BOM + b"yes/a_0.wav\r\n")
    assert [clip.part for clip in ks.find_clips(tmp_path)[0]] == ["test"]


def test_random_bytes_are_rows_or_a_value_error(tmp_path):
    chance = random.Random(0)
    good = (BOM + CSV_TEXT.encode(), TSV_TEXT.encode(), MANIFEST_TEXT.encode())
    refused = 0
    for turn in range(1500):
        content = bytearray(good[turn % 3])
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(len(content))
            content[at:at + chance.randrange(3)] = chance.choice([b'"', b"\r", b"\n", b"\0", b"\xff", b",", b"\t", b""])
        path = tmp_path / ("x.csv" if turn % 3 == 0 else "x.tsv")
        path.write_bytes(content)
        try:
            assert all(row.path and row.samples >= 0 for row in
                       (read_csv if turn % 3 == 0 else read_tsv)(str(path), None))
        except ValueError as error:
            assert str(error).startswith(f"{path}: line ")
            refused += 1
    assert refused > 300


def test_lines_count_as_an_editor_counts_them(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(BOM + b"one\rtwo\r\n\nfour")
    assert list(lines(str(path))) == ["one\r", "two\r\n", "\n", "four"]
    path.write_bytes(b'a,b\n"x\ny",1\n\n"z",2\n')
    assert list(table(str(path), ",", ["a"])) == [(3, {"a": "x\ny", "b": "1"}), (5, {"a": "z", "b": "2"})]
