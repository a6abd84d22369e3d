"""What a run recorded: the rows of ``metrics.jsonl``, and TensorBoard's events, read without TensorBoard.

A row has how long its step took, but not when that was. Events have both, also for steps that were lost and done again.
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
"""Bytes up to which a file of events is read: ten million steps take less."""

Row = dict[str, Any]
Curves = dict[str, list[tuple[float, float]]]
"""``(step, value)`` by the name that ``metrics.jsonl`` has for the value."""

KEYS = (
    *("loss", "held_out_loss", "lr", "grad_norm", "tokens_per_s", "peak_memory_gb", "mfu"),
    *("tokens", "supervised_tokens", "step_s", "stall_s"),
)
"""The values that are read from ``metrics.jsonl``."""

_NUMBER = (int, float)  # isinstance is quicker with a tuple than with int | float, which counts a million times
_LARGEST = 1e300
"""Larger numbers are left out: JSON has no limit, and sums of them would overflow."""
_EVENTS = {b"step_s": "step", b"stall_s": "save", b"held_out_loss": "evaluate"}
# A record of one scalar: tensorflow.Event {1: wall_time, 2: step, 5: Summary {1: Value {1: tag, 2: simple_value}}}. In
# protobuf's encoding a field begins with a byte of its number and type: \x09 wall_time (8 bytes, a double), \x10 step
# (a varint: 7 bits a byte, all but the last with the high bit set), \x2a the summary and \x0a the value (both with a
# byte of length), \x0a the tag (6, 7 or 13 letters), \x15 simple_value (4 bytes, a float). Python's re reads it a
# hundred times faster than a loop over records; what is torn does not match.
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
    """``value`` as a float if it is a finite number, else None."""
    if not isinstance(value, _NUMBER) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value)


def section(record: Mapping[str, Any], key: str) -> Row:
    """The object under ``key``; empty where there is none, or where a damaged record has something else there."""
    value = record.get(key)
    return value if isinstance(value, dict) else {}


def objects(record: Mapping[str, Any], key: str) -> list[Row]:
    """The objects in the list under ``key``."""
    value = record.get(key)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def read_curves(path: Path) -> Curves:
    """Each of :data:`KEYS` in a ``metrics.jsonl``, over steps. Of two rows for a step the later one counts.

    Lines that were torn by a kill are left out, and so is what is no finite number.
    """
    values: dict[str, dict[float, float]] = {key: {} for key in KEYS}
    for row in read_rows(path):
        if row.step is None or not 0 <= row.step < 10**12:
            continue
        # vars(): the fields of a dataclass as a dict, which for a million rows is quicker than getattr for every key.
        for key, value in vars(row).items():
            if key in values and value is not None and -_LARGEST < value < _LARGEST:
                values[key][row.step] = value
    return {key: sorted(by_step.items()) for key, by_step in values.items()}


def read_events(path: Path) -> list[Event]:
    """Steps, saves and evaluations of one TensorBoard file, in order."""
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if len(data) > _MOST:
                return []
            events = [_event(match.groups()) for match in _SCALAR.finditer(data)]
    except (OSError, ValueError):  # an empty file cannot be mapped
        return []
    return list(_with_evaluations(event for event in events if event is not None))


def _event(groups: Sequence[bytes]) -> Event | None:
    when, varint, tag, value = groups
    # Little-endian, as protobuf has its fixed-width numbers. The lowest seven bits of a varint come first.
    (ended,), (seconds,) = struct.unpack("<d", when), struct.unpack("<f", value)
    step = sum((byte & 127) << (7 * index) for index, byte in enumerate(varint))
    # Bytes that match by chance give absurd times: a time is from 2001 on, and nothing lasts thirty years.
    plausible = 1e9 < ended < 1e11 and (tag == b"held_out_loss" or 0 <= seconds < 1e9)
    return Event(_EVENTS[tag], step, seconds, ended) if plausible else None


def _with_evaluations(events: Iterator[Event]) -> Iterator[Event]:
    """``events`` with how long evaluations took: their value is a loss, so the time since the event before is taken."""
    before: float | None = None
    for event in events:
        if event.what == "evaluate":
            event = event._replace(seconds=max(0.0, (event.ended or 0.0) - before) if before else 0.0)
        before = event.ended
        yield event
