"""What a run wrote down as it went: the rows of ``metrics.jsonl``, and TensorBoard's events, read without TensorBoard.

A row has the seconds of its step but not the hour. Events have both, and of steps too that were lost and done again.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from galley.contract.files import open_regular
from galley.contract.metrics import read_rows

_MOST = 1 << 30
"""Bytes of events that are read: ten million steps have less."""

Row = dict[str, Any]
Curves = dict[str, list[tuple[float, float]]]
"""``(step, value)`` by the name that ``metrics.jsonl`` has for the value."""

KEYS = (
    *("loss", "held_out_loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_gb", "mfu"),
    *("tokens", "supervised_tokens", "step_s", "stall_s"),
)
"""What is read of the metrics."""

_NUMBER = (int, float)  # quicker to ask for than int | float, a million times
_LARGEST = 1e300
"""Numbers in JSON have no limit."""
_EVENTS = {b"step_s": "step", b"stall_s": "save", b"held_out_loss": "evaluate"}
# A record of one scalar: tensorflow.Event {1: wall_time, 2: step, 5: Summary {1: Value {1: tag, 2: simple_value}}}.
# Python's re reads it a hundred times faster than a loop over records; what is torn does not match.
_SCALAR = re.compile(
    rb"\x09(.{8})\x10([\x80-\xff]{0,9}[\x00-\x7f])\x2a.\x0a.\x0a[\x06\x07\x0d](step_s|stall_s|held_out_loss)\x15(.{4})",
    re.DOTALL,
)


class Event(NamedTuple):
    """Something that took time: a step, a save or an evaluation."""

    what: str
    """``step``, ``save`` or ``evaluate``."""
    step: int
    seconds: float
    ended: float | None
    """When, in seconds since the epoch."""


def number(value: object) -> float | None:
    """``value`` where it is a finite number, else None."""
    if not isinstance(value, _NUMBER) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value)


def section(record: Mapping[str, Any], key: str) -> Row:
    """The object under ``key``; empty where a damaged record has something else there, or nothing."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def objects(record: Mapping[str, Any], key: str) -> list[Row]:
    """The objects in the list under ``key``."""
    value = record.get(key)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def read_curves(path: Path) -> Curves:
    """Each of :data:`KEYS` in a ``metrics.jsonl`` over steps; a step's last value stands.

    Lines that a kill tore are left out, and what is no finite number.
    """
    found: dict[str, dict[float, float]] = {key: {} for key in KEYS}
    for row in read_rows(path):
        if row.step is None or not 0 <= row.step < 10**12:
            continue
        for key, value in vars(row).items():  # what the row has; a million rows are read in seconds this way
            if key in found and value is not None and -_LARGEST < value < _LARGEST:
                found[key][row.step] = value
    return {key: sorted(values.items()) for key, values in found.items()}


def read_events(path: Path) -> list[Event]:
    """Steps, saves and evaluations of one TensorBoard file, in order."""
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if len(data) > _MOST:
                return []
            found = [_event(match.groups()) for match in _SCALAR.finditer(data)]
    except (OSError, ValueError):  # an empty file cannot be mapped
        return []
    return list(_with_evaluations(event for event in found if event is not None))


def _event(groups: Sequence[bytes]) -> Event | None:
    when, number, tag, value = groups
    (ended,), (seconds,) = struct.unpack("<d", when), struct.unpack("<f", value)
    step = sum((byte & 127) << (7 * place) for place, byte in enumerate(number))
    sound = 1e9 < ended < 1e11 and (tag == b"held_out_loss" or 0 <= seconds < 1e9)
    return Event(_EVENTS[tag], step, seconds, ended) if sound else None


def _with_evaluations(events: Iterator[Event]) -> Iterator[Event]:
    """An evaluation's value is a loss; its time is what passed since the event before it."""
    before: float | None = None
    for event in events:
        if event.what == "evaluate":
            event = event._replace(seconds=max(0.0, (event.ended or 0.0) - before) if before else 0.0)
        before = event.ended
        yield event
