"""A row as it was read from a data file."""

from __future__ import annotations

from typing import Any, NamedTuple

from galley.contract.errors import UserError


class Record(NamedTuple):
    """One row."""

    number: int
    """Of the row or line, from 0."""
    where: str
    """For an error line: ``file:line`` counted from 1, or ``file, row N`` counted from 0."""
    value: Any
    note: str | None = None
    """What is doubtful about how it was read."""
    error: UserError | None = None
    """Why it cannot be read, where the rows after it can."""
