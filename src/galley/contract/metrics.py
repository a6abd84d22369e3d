"""The rows of ``metrics.jsonl``: written and read here alone. Part of the contract; the standard library only.

Rows are read as far as they are sound: a line that a kill tore is left out, and a field is None where a row has
something else there than a number. Keys that this version does not know are ignored.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley.contract.files import open_regular, parse_json, read_bytes, reason, write_atomic
from galley.contract.records import converters

MOST = 1 << 30
"""Bytes of metrics that are read: a million steps have a third."""
TAIL = 64 * 1024
"""Bytes from the end of the metrics in which the newest numbers are looked for."""


@dataclass(frozen=True)
class MetricsRow:
    """A line of ``metrics.jsonl``: of a step, of an evaluation, of a save, or of a wait for one.

    Several merged (:func:`newest`) are the newest numbers of a run.
    """

    step: int | None = None
    """The optimizer step, from 1, that the row is of, or that came before it."""
    steps: int | None = None
    """Of the whole run."""
    epoch: float | None = None
    loss: float | None = None
    """Mean over the supervised tokens of the step's global batch."""
    lr: float | None = None
    grad_norm: float | None = None
    """Before clipping."""
    supervised_tokens: int | None = None
    tokens: int | None = None
    """Of the step's global batch, without padding."""
    tokens_per_s: float | None = None
    """Of all ranks together."""
    mfu: float | None = None
    """Model FLOPs utilisation (PaLM, 2022, appendix B); None where the hardware's peak is not known."""
    peak_memory_gb: float | None = None
    """Of the first rank's device, in 10^9 bytes."""
    step_s: float | None = None
    left_s: float | None = None
    """Until the last step, in seconds, as the last twenty steps suggest."""
    held_out_loss: float | None = None
    held_out_tokens: int | None = None
    stall_s: float | None = None
    """How long training stood still after the step, for copies of the state and for saves to end."""
    save_s: float | None = None
    """From the copy of the state to the checkpoint that stands."""
    saved_step: int | None = None


_FIELDS = converters(MetricsRow)
_TYPES = {field.name: int if field.type == "int | None" else float for field in fields(MetricsRow)}


def row_line(row: MetricsRow) -> str:
    """The line of ``metrics.jsonl`` for ``row``, with its end."""
    has_mfu = row.loss is not None  # a step's row has all keys of a step, also where the hardware's peak is not known
    body = {key: getattr(row, key) for key in _FIELDS}
    kept = {key: value for key, value in body.items() if value is not None or (key == "mfu" and has_mfu)}
    return json.dumps(kept) + "\n"


def parse_row(line: str | bytes) -> MetricsRow | None:
    """The row in a line of ``metrics.jsonl``; None for one that a kill tore, or that is not a JSON object."""
    try:
        body = parse_json(line.decode("utf-8", "replace") if isinstance(line, bytes) else line)
    except ValueError:
        return None
    if not isinstance(body, dict):
        return None
    # As MetricsRow(**values) would, but several times as fast (a report reads a million rows): what has its field's
    # own type needs no conversion, and fields that are not set are the class's own None.
    row = object.__new__(MetricsRow)
    row.__dict__.update(
        {
            key: value if type(value) is _TYPES[key] else _FIELDS[key](value)
            for key, value in body.items()
            if key in _FIELDS
        }
    )
    return row


def read_rows(path: Path) -> Iterator[MetricsRow]:
    """The rows of a ``metrics.jsonl``, oldest first; none where it cannot be read, or is larger than :data:`MOST`."""
    try:
        data = read_bytes(path, MOST)
    except OSError:
        return iter(())
    return filter(None, map(parse_row, data.splitlines()))


def last_rows(path: Path) -> list[MetricsRow]:
    """The rows in the last :data:`TAIL` bytes of a ``metrics.jsonl``, oldest first; none where it cannot be read."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read(TAIL).splitlines()
    except OSError:
        return []
    return list(filter(None, map(parse_row, lines)))


def newest(rows: Iterable[MetricsRow], before: MetricsRow | None = None) -> MetricsRow:
    """The newest of each number: rows of evaluations and saves do not hide those of steps."""
    values: dict[str, Any] = {}
    for row in itertools.chain([before] if before else [], rows):
        values |= {key: value for key, value in vars(row).items() if _is_finite(value)}
    return MetricsRow(**values)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and -1e300 < value < 1e300


def last_step(path: Path) -> int | None:
    """The last step in a ``metrics.jsonl``."""
    return next((row.step for row in reversed(last_rows(path)) if row.step is not None), None)


def drop_after(path: Path, step: int) -> None:
    """Forget rows of steps after ``step``: they belong to work that was lost, and will be done again.

    Raises ``UserError`` where the file is there and cannot be read.
    """
    if not path.exists():
        return
    try:
        lines = read_bytes(path, MOST).decode("utf-8", "replace").splitlines()
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {reason(error)}", "move it away") from None
    kept = [line for line in lines if (row := parse_row(line)) and row.step is not None and row.step <= step]
    write_atomic(path, "".join(line + "\n" for line in kept))


@dataclass
class Follower:
    """Reads the rows of a ``metrics.jsonl`` as they are appended; a file that does not exist yet has none."""

    path: Path
    position: int = 0
    torn: bytes = b""
    """A line whose end has not come yet."""

    def skip(self) -> Follower:
        """Start at the file's present end."""
        self.position = self.path.stat().st_size if self.path.exists() else 0
        return self

    def rows(self) -> tuple[list[MetricsRow], bool]:
        """The rows that have come since the last call, and whether they are the file's from its start: rows after a
        checkpoint were dropped, and all that was read before is void.
        """
        anew = False
        try:
            with open_regular(self.path) as file:
                if file.seek(0, os.SEEK_END) < self.position:
                    self.position, self.torn, anew = 0, b"", True
                file.seek(self.position)
                data = file.read(MOST)
        except OSError:
            return [], False
        self.position += len(data)
        *lines, self.torn = (self.torn + data).split(b"\n")
        return [row for line in lines if (row := parse_row(line)) is not None], anew
