"""Rows of CSV and TSV files, of which some quote cells and some write quotes as they stand.

A cell that begins with a quote goes on to the quote that closes it, over line ends too (RFC 4180). In a file that does
not mean its quotes so, that joins rows in silence. So the file is first read through both ways: with quotes, and with
each line as one row.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from galley.contract.data_files import HEAD, first_bytes, opened
from galley.contract.delimited import Layout, read_layout
from galley.contract.errors import UserError
from galley.prepare.record import Record

LARGEST = 1 << 26
"""Characters of one cell; more are a quote that is never closed."""


@dataclass(frozen=True)
class Quoting:
    """How quotes of a file are read."""

    literal: bool = False
    """They are characters like any other, and each line is a row."""
    note: str | None = None
    """What is doubtful about it, of the rows that it concerns."""


@dataclass
class Scan:
    """What is found by reading a file with its quotes."""

    line: str = ""
    """The last one that was read."""
    uneven: int = 0
    """Lines that do not have as many cells as the header when quotes are characters like any other."""
    joined: int = 0
    """First row that takes several lines, each of which could be a row; its line, 0 for none."""
    bare: bool = False
    """Whether a cell that is not quoted holds a quote, which who quotes cells does not write."""
    wrong: bool = False
    """Whether some row does not have as many cells as the header."""
    error: UserError | None = None
    """Where it cannot be read with its quotes."""


def read_delimited(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """The rows of ``path``, open as ``file``. Raises :class:`UserError` naming the line of one that cannot be read."""
    head = first_bytes(path)
    layout = read_layout(path, head.decode("utf-8-sig", "replace"), len(head) < HEAD)
    if layout is None:
        return
    status = path.stat()
    quoting = _quoting(path, layout, status.st_size, status.st_mtime_ns)
    rows = _rows(path, layout, _lines(file, layout), quoting.literal)
    for index, (line, last, cells) in enumerate(rows):
        if len(cells) != len(layout.names):
            yield Record(index, f"{path}:{line}", None, error=_uneven(path, line, last, len(cells), layout))
            continue
        if tuple(cell.strip("\ufeff").strip() for cell in cells) == layout.names:
            yield Record(index, f"{path}:{line}", None, error=_header_again(path, line))
            continue
        concerned = any(cell.startswith('"') for cell in cells) if quoting.literal else last > line
        value = dict(zip(layout.names, cells, strict=True))
        yield Record(index, f"{path}:{line}", value, quoting.note if concerned else None)


def _lines(file: IO[bytes], layout: Layout) -> Iterator[str]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    for _ in range(layout.skipped):
        next(text)
    return text


def _rows(path: Path, layout: Layout, lines: Iterator[str], literal: bool) -> Iterator[tuple[int, int, list[str]]]:
    """First and last line, and cells, of each row below the header. Raises :class:`UserError`.

    A row without anything in it is as a blank line: spreadsheets end in such.
    """
    csv.field_size_limit(LARGEST)
    how: Any = csv.QUOTE_NONE if literal else csv.QUOTE_MINIMAL
    reader = csv.reader(lines, delimiter=layout.delimiter, strict=not literal, quoting=how)
    header = True
    while True:
        line = reader.line_num + layout.skipped + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _not_csv(path, line, reader.line_num + layout.skipped, str(error)) from None
        last = reader.line_num + layout.skipped
        if cells is None:
            return
        if any(cells) and not header:
            yield line, last, cells
        header = header and not any(cells)


def _not_csv(path: Path, line: int, last: int, error: str) -> UserError:
    what = f"not CSV: {error}"
    if last > line:
        what = f"not CSV: a quote that is opened here is not closed as one by line {last} ({error})"
    return UserError(f"{path}:{line}", what, 'quote cells that hold quotes, and double these: "say ""no"""')


def _uneven(path: Path, line: int, last: int, count: int, layout: Layout) -> UserError:
    over = f" by line {last}, where a quote is closed" if last > line else ""
    what = f"has {count} cells{over}, but the first line names {len(layout.names)} columns"
    return UserError(f"{path}:{line}", what, f"quote cells that hold {layout.delimiter!r}, quotes or line ends")


def _header_again(path: Path, line: int) -> UserError:
    what = "names the columns again, as in files that were joined"
    return UserError(f"{path}:{line}", what, "remove such lines, or use data.gates.unreadable=drop")


@functools.lru_cache(maxsize=1024)
def _quoting(path: Path, layout: Layout, size: int, mtime_ns: int) -> Quoting:
    """How quotes of the file are read. Raises :class:`UserError` where they cannot be."""
    del size, mtime_ns  # for the cache: what has changed is read again
    with opened(path) as file:
        scan = _scan(path, layout, _lines(file, layout))
    # A tab stands in no text, so lines that have the right number of cells are rows; a comma does, and is no proof. In
    # a file of one column every line has the right number.
    doubtful = scan.joined and (scan.bare or len(layout.names) > 1)
    if layout.delimiter == "\t" and not scan.uneven and (scan.error or scan.wrong or doubtful):
        return Quoting(True, "rows have a cell that begins with a quote; none of the file's quotes were taken as CSV's")
    if scan.error:
        raise scan.error
    if doubtful or (scan.joined and layout.delimiter == "\t"):
        what = f"rows go over several lines inside quotes, at line {scan.joined} over lines that could be rows"
        return Quoting(False, f"{what} of their own: look whether a quote is missing there")
    return Quoting()


def _has_bare_quote(line: str, cells: list[str]) -> bool:
    return '"' in line and any('"' in cell and f'"{cell.replace(chr(34), chr(34) * 2)}"' not in line for cell in cells)


def _scan(path: Path, layout: Layout, lines: Iterator[str]) -> Scan:
    scan, marks = Scan(), len(layout.names) - 1

    def counted() -> Iterator[str]:
        for line in lines:
            scan.line = line
            scan.uneven += bool(line.strip()) and line.count(layout.delimiter) != marks
            yield line

    source, before = counted(), 0
    try:
        for line, last, cells in _rows(path, layout, source, literal=False):
            if len(cells) != len(layout.names):
                scan.wrong = True
                if last > line:  # where it ends is in doubt, too
                    raise _uneven(path, line, last, len(cells), layout)
            if last == line:
                scan.bare = scan.bare or _has_bare_quote(scan.line, cells)
            elif scan.uneven == before:
                scan.joined = scan.joined or line
            before = scan.uneven
    except UserError as error:
        scan.error = error
        for _ in source:  # the rest, which the other way of reading needs
            pass
    return scan
