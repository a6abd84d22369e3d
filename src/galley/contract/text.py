"""Foreign text made harmless for a terminal. Part of the contract; the standard library only, in Python 3.9's grammar.

Data, logs, names and recipes may hold anything: sequences that move the cursor or set the clipboard, and marks that
turn letters around, so that a line does not say what it seems to.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

LONGEST = 480
"""Characters of a refusal."""
_END = 160
"""Characters that are kept of the end of a longer one: there stands what to do."""

# Colours and whatever moves the cursor (ECMA-48, 5.4), and strings for the terminal itself (5.6), ended or not.
_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b\n]*(?:\x07|\x1b\\)?")
# What is left of controls but for line breaks and tabs; marks of direction (UAX 9) and of lines; halves of characters.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def plain(text: str) -> str:
    """``text`` with its line breaks and tabs, without colours, and with ``?`` for what could act on a terminal."""
    if text.isascii() and text.isprintable():
        return text
    return _CONTROL.sub("?", _SEQUENCE.sub("", text.replace("\r\n", "\n")))


def one_line(text: str, limit: int = LONGEST) -> str:
    """``text`` in one plain line of at most ``limit`` characters; of a longer one the middle is left out."""
    line = " ".join(plain(text[: 100 * limit]).split())
    if len(text) > 100 * limit:
        line = f"{line} {' '.join(plain(text[-limit:]).split())}"
    if len(line) <= limit:
        return line
    return f"{line[: limit - _END - 3]} … {line[-_END:]}"


class Plain:
    """A stream whose every text is made plain; :attr:`stream` is the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write ``text``, made plain."""
        self.stream.write(plain(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
