"""Tables on a terminal: columns that line up, and cells cut to what fits."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence

from galley.contract.text import one_line

_WIDEST, _LONGEST = 120, 1000
"""Columns of a table by default; characters of a cell."""


def screen_width() -> int:
    """Columns to write in: those of the terminal, where there is one, and at most 120."""
    # Notes go to stderr, so that one stream may be a pipe while the other is still read on a terminal.
    terminal = any(os.isatty(stream) for stream in (1, 2))
    return min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST) if terminal else _WIDEST


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` under ``columns``. (Not by rich: importing it would be a quarter of what ``recipes`` takes.)"""
    # A name or message of others' may hold line breaks, and would look like further rows.
    rows = [[one_line(cell, _LONGEST) for cell in row] for row in rows]
    widths = [max(map(width, cells)) for cells in zip(columns, *rows, strict=True)]
    _print_bold(_line(columns, widths))
    for row in rows:
        print(_line(row, widths))


def _print_bold(line: str) -> None:
    if sys.stdout.isatty():
        # Straight to the stream below: `galley.contract.text.Plain`, which guards stdout, would take the codes for bold
        # (ESC [1m … ESC [0m) out again.
        getattr(sys.stdout, "stream", sys.stdout).write(f"\033[1m{line}\033[0m\n")
    else:
        print(line)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (room - width(cell)) for cell, room in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def cut(text: str, room: int) -> str:
    """``text`` in at most ``room`` columns, with ``…`` at the end where something is cut off."""
    return text if len(text) <= room else f"{text[: max(room - 1, 0)].rstrip()}…"


def width(text: str) -> int:
    """Columns of a terminal that ``text`` takes: wide letters (Chinese, Japanese, Korean, emoji) take two."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)  # wide or full-width
    # Combining accents are drawn over the letter before them, and format characters (a soft hyphen) not at all.
    return len(text) + wide - sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in text)
