"""Quoting of everything that a job script's template fills in."""

from __future__ import annotations

import re
import shlex

from galley.contract.errors import UserError
from galley_launch.base.grammar import is_text

VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?", re.ASCII)
"""A variable in a path of a profile: ``$SLURM_JOB_ID`` or ``${SLURM_JOB_ID}``."""


class OnNode(str):
    """A word of a job script with variables that the node's shell expands, as :func:`marked` writes them.

    A type of its own, so that :func:`quote` expands variables in such words only, and in no other text.
    """

    __slots__ = ()


def marked(text: str) -> str:
    """``text`` with each ``$NAME`` as NUL, ``NAME``, NUL: no path, option or variable's value can hold a NUL itself."""
    return VARIABLE.sub("\0\\1\0", text)


def quote(value: object) -> str:
    """``value`` as one word of a shell, or of an ``#SBATCH`` line.

    sbatch reads quotes as a shell does, but removes backslashes, which values of such lines must not hold
    (``cluster.options.sbatch_value``). Raises ``UserError`` for characters that could end the line.
    """
    text = str(value)
    if isinstance(value, OnNode):
        parts = text.split("\0")  # text, name, text, name, ..., text
        # Variables go into double quotes, where the shell expands but does not split them; the text between is quoted
        # like any other. An empty piece is left out: as '' it would be harmless, but ugly.
        return "".join(f'"${{{part}}}"' if number % 2 else part and quote(part) for number, part in enumerate(parts))
    # Control characters of ASCII, and what Unicode calls line breaks: NEL, line and paragraph separator.
    if any(ord(letter) < 32 or letter in "\x7f\x85\u2028\u2029" for letter in text):
        raise UserError("job script", f"{text!r} holds a newline or another control character", "remove it")
    if not is_text(text):
        raise UserError("job script", f"{text!r} is not UTF-8", "choose another name")
    return shlex.quote(text)
