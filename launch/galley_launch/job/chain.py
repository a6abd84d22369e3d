"""The jobs of a run, one after the other: submit the next, avoid bad nodes, ask to stop in time."""

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
_JOB, _NODE = re.compile(r"[0-9][0-9_]{0,30}", re.ASCII), re.compile(r"[\w.-]{1,200}", re.ASCII)


SECRETS = "secrets.json"
"""Names of the variables that jobs get through the private file, in ``jobs/``; nothing of their values."""


def cluster(run: RunDir) -> dict[str, Any]:
    """What the run knows of its cluster; empty where nothing can be read."""
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
    job = slurm.submit(run.jobs / f"{stage}.sbatch", options, arguments)
    note(run, stage, job)
    return job


def note(run: RunDir, stage: str, job: str) -> None:
    """Write down that ``job`` is the run's, unless that is known."""
    if all(str(each["job"]) != job for each in submitted(run)):
        with run.submitted.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": job, "stage": stage, "time": round(time.time(), 1)}) + "\n")


def submitted(run: RunDir) -> list[dict[str, Any]]:
    """Every job of the run, oldest first: ``{"job", "stage", "time"}``."""
    rows = [{"stage": "", **row} for row in read_rows(run.submitted)]
    return [row for row in rows if _JOB.fullmatch(str(row.get("job"))) and isinstance(row["stage"], str)]


def state_of(job: str) -> str:
    """Slurm's word for a job, ``PREEMPTED`` as soon as it is being pre-empted; empty where it does not say."""
    try:
        found = slurm.job(job)
    except slurm.SlurmError:
        return ""
    return "" if found is None else "PREEMPTED" if found.preempted else found.state


def ended(job: str) -> float | None:
    """When Slurm saw a job end, in seconds since the epoch; None where it does not say, or it has not ended."""
    try:
        found = slurm.job(job)
    except slurm.SlurmError:
        return None
    return found.end if found is not None and found.is_over() else None


def live(run: RunDir, stage: str = "") -> list[slurm.Job]:
    """The run's jobs (of ``stage``, else of all) that wait or run. Raises SlurmError where Slurm does not answer."""
    ids = [str(job["job"]) for job in submitted(run) if job["stage"] in ([stage] if stage else stages.names())]
    return [job for job in slurm.jobs(ids[-max(20, recent(run)) :], federated(run)).values() if not job.is_over()]


def federated(run: RunDir) -> str:
    """The cluster to ask for the run's jobs, where that is not this host's own; a job's nodes belong to its cluster."""
    return "" if "SLURM_JOB_ID" in os.environ else str(cluster(run).get("clusters") or "")


def recent(run: RunDir) -> int:
    """How many of the jobs that were submitted last may wait or run."""
    return int(number(cluster(run).get("attempts"))) + 6 if is_beforehand(run) else 6


def excluded(run: RunDir, now: float | None = None) -> dict[str, str]:
    """Node to why it is avoided, of those whose time is not over."""
    moment = time.time() if now is None else now
    known = read_json(run.excluded) or {}
    sound = {node: each for node, each in known.items() if isinstance(each, dict) and _NODE.fullmatch(node)}
    return {node: str(each.get("why", "")) for node, each in sound.items() if number(each.get("until")) > moment}


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
        rows, anew = self._follower.rows()
        if anew:  # rows after a checkpoint were dropped
            self._rows.clear()
        self._rows.extend(rows)
        step = max((row.step_s or 0.0 for row in self._rows), default=0.0)
        return step, max((row.save_s or 0.0 for row in self._rows), default=0.0)

    def need(self, limit_s: float) -> float:
        """Seconds before the time limit at which the ranks are asked to stop: a step, a save that is on its way and
        another one, and some more.

        At most half of the limit. Five minutes until something has been measured.
        """
        step, save = self.longest()
        wanted = 2 * step + 2.5 * (save or 30.0) + 10 if step else DEFAULT_S
        return min(wanted, limit_s / 2)


def need(run: RunDir, limit_s: float) -> float:
    """What :meth:`Measures.need` says of the run's metrics as they are."""
    return Measures(run).need(limit_s)


def lead(run: RunDir, limit_s: int) -> int:
    """Seconds before the time limit at which Slurm signals, in case the job's own clock does not run any more.

    Slurm signals up to a minute early; counted from the end, this is later than the job's own request.
    """
    return max(1, min(int(need(run, limit_s)), 65535))


def options(run: RunDir, limit_s: int, after: str | None) -> list[str]:
    """What a train job is submitted with beyond its script: after which job, when to signal, which nodes to avoid."""
    found = [f"--signal=B:USR1@{lead(run, limit_s)}"]
    if after:
        found.insert(0, f"--dependency=afterany:{after}")
    bad = excluded(run)
    return [*found, f"--exclude={','.join(sorted(bad))}"] if bad else found
