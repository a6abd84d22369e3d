"""The jobs of a run, one after the other: submit the next one, avoid bad nodes, and measure when to stop in time."""

from __future__ import annotations

import json
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from galley.contract import stages
from galley.contract.files import number, read_rows
from galley.contract.metrics import Follower, MetricsRow
from galley.contract.rundir import RunDir, read_json, write_atomic
from galley_launch.job import slurm

DEFAULT_S = 300
"""What a stop before the time limit takes, in seconds, until it has been measured."""
_ROWS = 2000
"""Rows of metrics that are measured, from the last."""
# Job ids and node names from files are checked before they become words of a command: none may begin with a dash.
_JOB, _NODE = re.compile(r"[0-9][0-9_]{0,30}", re.ASCII), re.compile(r"[\w.-]{1,200}", re.ASCII)


SECRETS = "secrets.json"
"""The file in ``jobs/`` with the names, not the values, of the variables that jobs get through the private file."""


def cluster(run: RunDir) -> dict[str, Any]:
    """The content of the run's ``cluster.json``; empty where it cannot be read."""
    return read_json(run.cluster) or {}


def limit_s(run: RunDir) -> int:
    """Time limit of one attempt, in seconds."""
    return int(cluster(run)["limit_s"])


def is_beforehand(run: RunDir) -> bool:
    """Whether all of the run's jobs were submitted from a login node, and nodes submit none."""
    return cluster(run).get("chain") == "login"


def script(run: RunDir, stage: str) -> str:
    """Path of the job script of ``stage``."""
    return str(run.jobs / f"{stage}.sbatch")


def submit(run: RunDir, stage: str, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Submit the job of ``stage`` and write down its number. Raises SlurmError."""
    # If this process dies between the two lines, the job is not written down: successor.find looks for it by its name.
    job = slurm.submit(run.jobs / f"{stage}.sbatch", options, arguments)
    note(run, stage, job)
    return job


def note(run: RunDir, stage: str, job: str) -> None:
    """Add ``job`` to the list of the run's jobs, unless it is there."""
    if all(str(row["job"]) != job for row in submitted(run)):
        with run.submitted.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": job, "stage": stage, "time": round(time.time(), 1)}) + "\n")


def submitted(run: RunDir) -> list[dict[str, Any]]:
    """Every job of the run, oldest first: ``{"job", "stage", "time"}``."""
    rows = [{"stage": "", **row} for row in read_rows(run.submitted)]
    return [row for row in rows if _JOB.fullmatch(str(row.get("job"))) and isinstance(row["stage"], str)]


def state_of(job: str) -> str:
    """Slurm's state of a job, ``PREEMPTED`` as soon as it is being pre-empted; empty where Slurm does not answer."""
    try:
        record = slurm.job(job)
    except slurm.SlurmError:
        return ""
    return "" if record is None else "PREEMPTED" if record.preempted else record.state


def ended(job: str) -> float | None:
    """When a job ended, in seconds since the epoch; None where Slurm does not answer, or the job has not ended."""
    try:
        record = slurm.job(job)
    except slurm.SlurmError:
        return None
    return record.end if record is not None and record.is_over() else None


def live(run: RunDir, stage: str = "") -> list[slurm.Job]:
    """The run's jobs (of ``stage``, else of all) that wait or run. Raises SlurmError where Slurm does not answer."""
    ids = [str(job["job"]) for job in submitted(run) if job["stage"] in ([stage] if stage else stages.names())]
    # Only the last ones: each call names its jobs on the command line, and earlier ones have ended long ago.
    return [job for job in slurm.jobs(ids[-max(20, recent(run)) :], federated(run)).values() if not job.is_over()]


def federated(run: RunDir) -> str:
    """The cluster to ask about the run's jobs; empty: this host's own, as it always is inside a job."""
    return "" if "SLURM_JOB_ID" in os.environ else str(cluster(run).get("clusters") or "")


def recent(run: RunDir) -> int:
    """How many of the run's last jobs may still wait or run: all attempts of a chain, or a few, and some to spare."""
    return int(number(cluster(run).get("attempts"))) + 6 if is_beforehand(run) else 6


def excluded(run: RunDir, now: float | None = None) -> dict[str, str]:
    """Nodes that are avoided at present, each with the reason."""
    moment = time.time() if now is None else now
    known = read_json(run.excluded) or {}
    entries = {node: entry for node, entry in known.items() if isinstance(entry, dict) and _NODE.fullmatch(node)}
    return {node: str(entry.get("why", "")) for node, entry in entries.items() if number(entry.get("until")) > moment}


def exclude(run: RunDir, nodes: Sequence[str], why: str, hours: float) -> None:
    """Avoid ``nodes`` for ``hours``."""
    if not nodes or hours <= 0:
        return
    known: dict[str, Any] = {node: (read_json(run.excluded) or {})[node] for node in excluded(run)}
    known.update({node: {"until": time.time() + hours * 3600, "why": why} for node in nodes})
    write_atomic(run.excluded, json.dumps(known, indent=1) + "\n")


class Measures:
    """The longest step and the longest save of the last rows of a run's metrics, read as they are appended."""

    def __init__(self, run: RunDir) -> None:
        self._follower = Follower(run.metrics)
        self._rows: deque[MetricsRow] = deque(maxlen=_ROWS)

    def longest(self) -> tuple[float, float]:
        """Seconds of the longest step and of the longest save; 0: not known."""
        rows, restarted = self._follower.rows()
        if restarted:  # the file was cut back to a checkpoint: all of its rows come again
            self._rows.clear()
        self._rows.extend(rows)
        step = max((row.step_s or 0.0 for row in self._rows), default=0.0)
        return step, max((row.save_s or 0.0 for row in self._rows), default=0.0)

    def need(self, limit_s: float) -> float:
        """Seconds before the time limit at which the ranks are asked to stop.

        That is enough for the step and the save that are under way, the step and the save that follow the request, and
        some more; at most half of the limit. :data:`DEFAULT_S` until something has been measured.
        """
        # Twice the longest step, and two saves and a half: a save may take longer than any before. Until the first one
        # is measured, 30 s are assumed; 10 s are for what else there is to do.
        step, save = self.longest()
        wanted = 2 * step + 2.5 * (save or 30.0) + 10 if step else DEFAULT_S
        return min(wanted, limit_s / 2)


def need(run: RunDir, limit_s: float) -> float:
    """:meth:`Measures.need` of the run's metrics as they are now."""
    return Measures(run).need(limit_s)


def lead(run: RunDir, limit_s: int) -> int:
    """Seconds before the time limit at which Slurm signals, in case the job's own clock does not run any more.

    Slurm signals up to a minute earlier than that, and takes at most 65535 s (sbatch(1), --signal).
    """
    return max(1, min(int(need(run, limit_s)), 65535))


def options(run: RunDir, limit_s: int, after: str | None) -> list[str]:
    """Options of sbatch for a train job: the job that it follows, when to signal, and which nodes to avoid."""
    # B: the signal goes to the batch shell alone, which decides what to do, and not to the steps (sbatch(1), --signal).
    words = [f"--signal=B:USR1@{lead(run, limit_s)}"]
    if after:
        words.insert(0, f"--dependency=afterany:{after}")
    bad = excluded(run)
    return [*words, f"--exclude={','.join(sorted(bad))}"] if bad else words
