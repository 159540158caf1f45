"""Lists of audio as people have them: S3PRL's bucket CSV, fairseq's manifest, tables with a `path` column.

UTF-8, with or without a byte order mark, lines ended in any way. Whatever else can't be read is a ValueError that
names the file, the line and what was expected.
"""
from __future__ import annotations

import codecs
import csv
import os
import re
from typing import Iterator, NamedTuple, Optional, Sequence

from . import RATE

_LONGEST_LINE = 1 << 20  # bytes
_LARGEST = 1 << 48  # samples
_PIECES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Row(NamedTuple):
    """What a line of a list names. path: as it stands there, below `base` where it is relative; samples: its length
    at 16 kHz, 0 where the list doesn't say."""
    path: str
    base: str
    samples: int


def lines(source: str) -> Iterator[str]:
    """The lines of a text file with their ends. Raises OSError, ValueError for a line that is no UTF-8 or longer
    than 1 MiB."""
    number = 0
    with open(source, "rb") as stream:
        while raw := stream.readline(_LONGEST_LINE + 1):
            if len(raw) > _LONGEST_LINE:
                raise ValueError(f"{source}: line {number + 1}: expected at most {_LONGEST_LINE} bytes, got more")
            if number == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{source}: line {number + 1}: expected UTF-8, got the byte "
                                 f"0x{raw[error.start]:02x} in {raw[:60]!r}") from None
            for piece in _PIECES.findall(text):
                number += 1
                yield piece


def table(source: str, delimiter: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, column -> cell) of each row but the header and blank lines. Raises ValueError where the header
    lacks one of `columns` or a row doesn't reach them."""
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    rows = csv.reader(lines(source), delimiter=delimiter, quoting=quoting, strict=True)
    header: Optional[list[str]] = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(f"{source}: line {rows.line_num}: expected cells parted by {delimiter!r}: "
                             f"{error}") from None
        if not any(map(str.strip, row)):
            continue
        if header is None:
            header = row
            missing = [name for name in columns if name not in header]
            if missing:
                raise ValueError(f"{source}: line {rows.line_num}: expected a column {missing[0]}, parted by "
                                 f"{delimiter!r} from others, got {delimiter.join(header)[:200]!r}")
            least = max(map(header.index, columns)) + 1
            continue
        if len(row) < least:
            raise ValueError(f"{source}: line {rows.line_num}: expected at least {least} columns, "
                             f"got {delimiter.join(row)[:200]!r}")
        yield rows.line_num, dict(zip(header, row))
    if header is None:
        raise ValueError(f"{source}: line 1: expected a column {columns[0]}, got an empty file")


def read_csv(source: str, root: Optional[str]) -> Iterator[Row]:
    """S3PRL's bucket CSV: columns file_path and perhaps length, in samples; paths below `root`, else beside it."""
    base = root or os.path.dirname(source)
    for number, cells in table(source, ",", ["file_path"]):
        where = f"{source}: line {number}"
        yield Row(_path(cells["file_path"], where), base, _length(cells.get("length"), 1, where))


def read_tsv(source: str, root: Optional[str]) -> Iterator[Row]:
    """fairseq's manifest (first line the root, then path<TAB>samples), or a table with a column path and perhaps
    samples or seconds; paths below `root`, else beside it."""
    first = next(lines(source), "").rstrip("\r\n")
    header = first.split("\t")
    if len(header) == 1 and header[0].strip() and header != ["path"]:
        yield from _read_manifest(source, root or first.strip())
        return
    if "path" not in header:
        raise ValueError(f"{source}: line 1: expected fairseq's manifest (a folder) or a header with a column path, "
                         f"got {first[:200]!r}")
    base = root or os.path.dirname(source)
    column, scale = next(((name, scale) for name, scale in (("samples", 1), ("seconds", RATE)) if name in header),
                         ("", 1))
    for number, cells in table(source, "\t", ["path"]):
        where = f"{source}: line {number}"
        yield Row(_path(cells["path"], where), base, _length(cells.get(column), scale, where))


def _read_manifest(source: str, base: str) -> Iterator[Row]:
    for number, line in enumerate(lines(source), 1):
        cells = line.rstrip("\r\n").split("\t")
        if number > 1 and any(map(str.strip, cells)):
            where = f"{source}: line {number}"
            yield Row(_path(cells[0], where), base, _length(cells[1] if len(cells) > 1 else None, 1, where))


def _path(cell: str, where: str) -> str:
    if not cell.strip() or "\0" in cell:
        raise ValueError(f"{where}: expected a path, got {cell[:200]!r}")
    return cell


def _length(cell: Optional[str], scale: float, where: str) -> int:
    if cell is None or not cell.strip():
        return 0
    try:
        length = round(float(cell) * scale)
    except (ValueError, OverflowError):
        length = -1
    if not 0 <= length <= _LARGEST:
        raise ValueError(f"{where}: expected a length, got {cell[:200]!r}")
    return length
