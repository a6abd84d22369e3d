"""What stands between the columns of a CSV or TSV file, and what they are called. Standard library only."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from galley.contract.errors import UserError

DELIMITERS = ",;\t|"
NONE = "\x1f"
"""Of a file with one column, whose texts may hold any of those."""
SEPARATOR = re.compile(r'"?sep=(.)"?', re.IGNORECASE)
"""Excel's first line, which names the delimiter."""
TRIED = 20
"""Rows with which a delimiter is tried."""


class Layout(NamedTuple):
    """Of a file of text in columns, as its first lines show it."""

    delimiter: str
    skipped: int
    """Lines before the one that names the columns: blank ones, and Excel's ``sep=;``."""
    names: tuple[str, ...]
    """Of the columns, without blanks around them; one without a name is ``column 3``."""


def lines_of(text: str) -> Iterator[str]:
    """The lines of ``text`` with their ends, as the module csv counts them: a form feed or U+2028 ends none."""
    return iter(io.StringIO(text, newline=""))


def read_layout(path: Path, head: str, whole: bool) -> Layout | None:
    """The layout of the file ``path`` that begins with ``head``; None where it has no row, or the first is not whole.

    Raises :class:`UserError` where two columns have one name.
    """
    lines = list(lines_of(head))
    if not whole:
        lines.pop()
    skipped, mark = _preface(lines)
    if skipped == len(lines):
        return None
    mark = mark or _delimiter(path, lines[skipped:])
    reader = csv.reader(lines[skipped:], delimiter=mark)
    names = [name.strip("\ufeff").strip() or f"column {number}" for number, name in enumerate(next(reader), 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        where = f"{path}:{skipped + 1}"
        raise UserError(where, f"names the column {twice[0]!r} twice", "give each column its own name")
    return Layout(mark, skipped, tuple(names))


def _preface(lines: list[str]) -> tuple[int, str | None]:
    """How many lines come before the columns' names, and the delimiter if one of them tells it."""
    mark = None
    for number, line in enumerate(lines):
        separator = SEPARATOR.fullmatch(line.strip("\r\n"))
        if separator and mark is None:
            mark = separator[1]
        elif line.strip():
            return number, mark
    return len(lines), mark


def _delimiter(path: Path, lines: list[str]) -> str:
    """The one with which most of the first rows have as many cells as the header; of a ``.tsv`` file the tab."""
    if ".tsv" in (suffix.lower() for suffix in path.suffixes):
        return "\t"

    def fit(mark: str) -> tuple[float, int]:
        rows = [row for row in itertools.islice(csv.reader(lines, delimiter=mark), TRIED) if row]
        same = sum(1 for row in rows if len(row) == len(rows[0]))
        return (same / len(rows), len(rows[0])) if len(rows[0]) > 1 else (0, 0)

    best = max(DELIMITERS, key=fit)
    return best if fit(best)[1] > 1 else NONE
