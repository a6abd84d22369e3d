"""What an attempt left behind, read from its directory: records of errors, the ends of its logs, heartbeats, checks.

Nothing here judges (:mod:`.classify` does), and nothing here fails: what is torn, missing or malformed is left out.
These files are read *because* something went wrong, which may have been the writing of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galley.contract import stages
from galley.contract.files import open_regular
from galley.contract.metrics import last_step
from galley.contract.records import read_job
from galley.contract.rundir import Attempt, RunDir, read_json
from galley.contract.text import plain
from galley_launch.job.names import known_as

TAIL = 64 * 1024
"""Bytes of a log that are read, from its end."""
LONGEST = 1000
"""Characters of a line that are read; the rest is cut off."""


@dataclass(frozen=True)
class Evidence:
    """Everything that is known of an attempt that failed."""

    status: int | None
    """Exit status of the job step, of torchrun or of the stage; above 128: the signal that ended it. None: unknown."""
    state: str
    """Slurm's state of the job: RUNNING, TIMEOUT, NODE_FAIL, OUT_OF_MEMORY, PREEMPTED, CANCELLED … Empty: unknown."""
    errors: list[dict[str, Any]]
    """``{"who", "status", "message", "time", "host"}``, first failure first."""
    logs: dict[str, str]
    """Name (``rank-3``, ``train-node1``, ``job``, ``prepare``) to its last :data:`TAIL` bytes.

    A name with a slash is a file of the run: what Slurm itself wrote, ``jobs/logs/train-4242.out``.
    """
    heartbeats: list[dict[str, Any]]
    """``{"rank", "pid", "host", "phase", "step", "time"}``."""
    preflight: list[dict[str, Any]]
    """``{"node", "ok", "checks": [{"name", "ok", "detail"}]}``."""
    hang: dict[str, Any] | None
    """``{"node", "rank", "phase", "step", "silent_s"}`` of the watcher that called it a hang first."""
    step: int | None
    """Last step in the run's metrics."""


def tail(path: Path, size: int = TAIL) -> str:
    """The last ``size`` bytes of ``path``, from a line's beginning; nothing where it cannot be read."""
    try:
        with open_regular(path) as file:
            # The size is taken from the open file: a log may grow between a stat and the read.
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            data = file.read(size)
    except OSError:
        return ""
    text = data.decode("utf-8", "replace")  # the cut may split a character in two
    cut = length > size and "\n" in text
    return text[text.index("\n") + 1 :] if cut else text


def clean(text: str) -> str:
    """``text`` in lines of at most :data:`LONGEST` characters, without control characters.

    A carriage return begins a line too: progress bars draw over what they drew before.
    """
    lines = text.replace("\t", "    ").splitlines()
    return "\n".join(plain(line[:LONGEST]).rstrip() for line in lines)


def _objects(paths: list[Path]) -> list[dict[str, Any]]:
    return [value for value in map(read_json, paths) if value is not None]


def _errors(attempt: Attempt) -> list[dict[str, Any]]:
    try:
        return attempt.errors()
    except (TypeError, ValueError):  # a record whose time is no number
        return _objects(sorted((attempt.root / "errors").glob("*.json")))


def _hang(attempt: Attempt) -> dict[str, Any] | None:
    # Each node's watcher writes one. The first is the cause: its node ended ranks that all others then wait for.
    records = sorted(attempt.root.glob("hang-*.json"), key=written)
    return next(iter(_objects(records)), None)


def written(path: Path) -> float:
    """When a file was last written to, in seconds since the epoch; infinity where that cannot be known."""
    try:
        return path.stat().st_mtime
    except OSError:
        return float("inf")


def slurm_log(run: RunDir, job: str | None, stage: str) -> dict[str, str]:
    """The output file of a job, into which Slurm itself writes why it ended the job: name to text, or nothing."""
    path = run.jobs / "logs" / f"{stage}-{job}.out"
    text = tail(path) if job and re.fullmatch(r"[0-9_]{1,30}", job, re.ASCII) else ""
    return {str(path.relative_to(run.root)): text} if text.strip() else {}


# slurmstepd: error: *** JOB 42 ON node1 CANCELLED AT 2026-11-23T10:15:04 DUE TO TIME LIMIT ***
_CANCELLED = re.compile(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+([^*]*)\*\*\*")
_CAUSES = {"TIME LIMIT": "TIMEOUT", "PREEMPTION": "PREEMPTED", "NODE FAILURE": "NODE_FAIL"}


def being_ended(run: RunDir, attempt: Attempt) -> str:
    """The state in which a job that Slurm is ending will be, from slurmstepd's line in the job's output.

    Until the job has ended, the controller calls it ``COMPLETING``, whatever the cause. Empty: there is no such line.
    """
    job = read_job(attempt.job).job
    causes = _CANCELLED.findall("\n".join(slurm_log(run, job, stages.TRAIN.name).values()))
    if not causes:
        return ""
    # The last line counts: a job that was requeued appends to the same file.
    return next((state for cause, state in _CAUSES.items() if cause in causes[-1]), "CANCELLED")


def _as_slurm(records: list[dict[str, Any]], key: str, nodes: Sequence[str]) -> list[dict[str, Any]]:
    """``records`` with Slurm's name of the node in ``key``, where the node called itself by a longer one."""
    return [
        {**record, key: known_as(str(record[key]), nodes) or record[key]} if key in record else record
        for record in records
    ]


def collect(run: RunDir, attempt: Attempt, status: int | None, state: str) -> Evidence:
    """Read what ``attempt`` left. ``status`` and ``state`` are as in :class:`Evidence`."""
    record = read_job(attempt.job)
    job, nodes = record.job, record.nodes or ()
    logs = {path.stem: tail(path) for path in sorted(attempt.logs.glob("*.log"))}
    return Evidence(
        status=status,
        state=state,
        errors=_as_slurm(_errors(attempt), "host", nodes),
        logs={**logs, **slurm_log(run, job, (stages.TRAIN if attempt.number else stages.PREPARE).name)},
        heartbeats=_as_slurm(_objects(sorted(attempt.heartbeats.glob("*.json"))), "host", nodes),
        preflight=_as_slurm(_objects(sorted(attempt.preflight.glob("*.json"))), "node", nodes),
        hang=next(iter(_as_slurm([hang] if (hang := _hang(attempt)) else [], "node", nodes)), None),
        step=last_step(run.metrics),
    )
