"""What is written down of an attempt: ``exit.json`` and ``job.json`` (rows of metrics: ``contract.metrics``).

Each is a frozen dataclass, written and read here alone. Part of the contract; the standard library only, and the
grammar of Python 3.9, since jobs read them with a node's own interpreter.

A field is None where the file does not have it, or has something else there than the field can hold: damaged and half
copied runs are read as far as they are sound. Keys that this version does not know are ignored, and kept where a
record is written again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from galley.contract.files import read_json, write_atomic


@dataclass(frozen=True)
class ExitRecord:
    """``exit.json``: what became of an attempt.

    Written by the first rank when training ends in good order; by the launcher, or the end of the attempt's job, where
    it did not; completed by that job and by the export.
    """

    verdict: str | None = None
    """``done``, ``stopped``, ``failed``, ``lost`` (ended without a word); of attempt 0 ``prepared``."""
    reason: str | None = None
    """Of ``done``: ``finished`` or ``early stopping``; of ``stopped``: who asked (as in ``ctl/stop``) or ``budget``; of
    ``failed``: the stage on one box; ``failure``, ``preflight``, ``prepare`` or ``no progress`` in a job."""
    step: int | None = None
    """Optimizer steps taken when it ended."""
    steps: int | None = None
    """Optimizer steps of the whole run as the attempt saw it."""
    again: bool | None = None
    """In a job: whether another attempt follows; None where that is not known yet."""
    message: str | None = None
    """What a person is told of it, in one line; empty where all is well."""
    status: int | None = None
    """0: done or stopped after saving; 1: failed; 2: the user's to fix; 3: exported, but not verified."""
    kind: str | None = None
    """In a job: the kind of failure, a key of ``diagnose.advice.WORDS``."""
    nodes: tuple[str, ...] | None = None
    """In a job that failed: nodes that the next ones avoid."""
    checkpoint: int | None = None
    """In a job: step of the newest checkpoint when it ended; 0: there was none."""
    last_step: int | None = None
    """In a job: last step in the metrics when it ended; 0: there was none."""
    ended: float | None = None
    """In a job: when it ended, in seconds since the epoch."""
    exported: bool | None = None
    """Whether the export stands; None: none was tried."""
    export_error: str | None = None
    """Why the export does not stand."""
    unverified: bool | None = None
    """Whether the export was written, but its check failed."""
    unknown: Mapping[str, object] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class JobRecord:
    """``job.json``: the Slurm job that an attempt runs in. Attempt 0 (preparing) has ``job`` and ``nodes`` only."""

    job: str | None = None
    restart: int | None = None
    """How often Slurm has requeued the job."""
    nodes: tuple[str, ...] | None = None
    """By Slurm's names."""
    head: str | None = None
    """The node of rank 0."""
    port: int | None = None
    """A port that is the job's own on its nodes."""
    started: float | None = None
    """When the attempt began, in seconds since the epoch."""
    ranks: int | None = None
    """Of all nodes together."""
    successor: str | None = None
    """The job that takes over when this one has ended."""
    checkpoint: int | None = None
    """Step that the attempt went on from; 0: the beginning."""
    no_successor: str | None = None
    """Why no job could be queued to take over."""
    unknown: Mapping[str, object] = field(default_factory=dict, repr=False)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _whole(value: object) -> int | None:
    number = _real(value)
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


def _real(value: object) -> float | None:
    """``value`` where it is a number; JSON's integers have no limit, and NaN and infinity are Python's extension."""
    if isinstance(value, float):
        return value
    return value if isinstance(value, int) and not isinstance(value, bool) and -1e300 < value < 1e300 else None


def _flag(value: object) -> bool | None:
    return None if value is None else bool(value)


def _words(value: object) -> tuple[str, ...] | None:
    return tuple(map(str, value)) if isinstance(value, list) else None


_CONVERT: dict[str, Callable[[object], object]] = {
    "str | None": _text,
    "int | None": _whole,
    "float | None": _real,
    "bool | None": _flag,
    "tuple[str, ...] | None": _words,
}
"""From what JSON may hold to a field, by the field's annotation (a string, with ``annotations`` of ``__future__``)."""


def converters(kind: type) -> dict[str, Callable[[object], object]]:
    """For each field of a record, the converter from a value that JSON may hold."""
    return {field.name: _CONVERT[str(field.type)] for field in fields(kind) if field.name != "unknown"}


_EXIT, _JOB = converters(ExitRecord), converters(JobRecord)


def _split(body: Mapping[str, object], known: Mapping[str, Callable[[object], object]]) -> dict[str, Any]:
    """The keyword arguments of a record's class: its fields, converted, and all other keys as ``unknown``."""
    values: dict[str, Any] = {key: known[key](value) for key, value in body.items() if key in known}
    return {**values, "unknown": {key: value for key, value in body.items() if key not in known}}


def _body(record: ExitRecord | JobRecord) -> dict[str, object]:
    """A record as a JSON object: the fields that are not None, in their order, then ``unknown`` as it was read."""
    known = {field.name: getattr(record, field.name) for field in fields(record) if field.name != "unknown"}
    return {**{key: value for key, value in known.items() if value is not None}, **record.unknown}


def read_exit(path: Path) -> ExitRecord | None:
    """An ``exit.json``; None where there is no such file, or it is not a JSON object."""
    body = read_json(path)
    return None if body is None else ExitRecord(**_split(body, _EXIT))


def write_exit(path: Path, record: ExitRecord) -> None:
    """Write an ``exit.json`` whole. Raises ``OSError``."""
    body = _body(record)
    if record.ended is not None:  # a job has judged it, and says so where it does not know yet
        body.setdefault("again", None)
    write_atomic(path, json.dumps(body))


def read_job(path: Path) -> JobRecord:
    """A ``job.json``; empty where there is no such file (on one box), or it is not a JSON object."""
    return JobRecord(**_split(read_json(path) or {}, _JOB))


def write_job(path: Path, record: JobRecord) -> None:
    """Write a ``job.json`` whole. Raises ``OSError``."""
    body = _body(record)
    if record.started is not None:  # the record of training says so where nothing takes over
        body.setdefault("successor", None)
    write_atomic(path, json.dumps(body, indent=1) + "\n")
