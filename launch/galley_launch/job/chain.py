"""The jobs of a run, one after the other: submit the next, avoid bad nodes, ask to stop in time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from galley.rundir import RunDir, read_json, write_atomic
from galley_launch.job import slurm

DEFAULT_S = 300
"""What a stop before the time limit takes, in seconds, until it has been measured."""
_ROWS = 2000


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
    try:
        lines = run.submitted.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:  # torn by a power cut
            continue
    return [each for each in found if isinstance(each, dict) and "job" in each]


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


def live(run: RunDir, stages: Sequence[str] = ("prepare", "train", "export")) -> list[slurm.Job]:
    """The run's jobs that wait or run. Raises SlurmError where Slurm does not answer."""
    ids = [str(each["job"]) for each in submitted(run) if each.get("stage") in stages]
    return [job for job in slurm.jobs(ids[-20:]).values() if not job.is_over()]


def excluded(run: RunDir, now: float | None = None) -> dict[str, str]:
    """Node to why it is avoided, of those whose time is not over."""
    moment = time.time() if now is None else now
    known = read_json(run.excluded) or {}
    return {node: str(each.get("why", "")) for node, each in known.items() if float(each.get("until", 0)) > moment}


def exclude(run: RunDir, nodes: Sequence[str], why: str, hours: float) -> None:
    """Avoid ``nodes`` for ``hours``."""
    if not nodes or hours <= 0:
        return
    known: dict[str, Any] = {node: (read_json(run.excluded) or {})[node] for node in excluded(run)}
    known.update({node: {"until": time.time() + hours * 3600, "why": why} for node in nodes})
    write_atomic(run.excluded, json.dumps(known, indent=1) + "\n")


def measured(run: RunDir) -> tuple[float, float]:
    """The longest step and the longest save of the last attempts, in seconds; 0: not known."""
    try:
        rows = run.metrics.read_text(encoding="utf-8").splitlines()[-_ROWS:]
    except OSError:
        return 0.0, 0.0
    step = save = 0.0
    for line in rows:
        try:
            row: Mapping[str, Any] = json.loads(line)
            step, save = max(step, float(row.get("step_s") or 0)), max(save, float(row.get("save_s") or 0))
        except (ValueError, TypeError, AttributeError):
            continue
    return step, save


def need(run: RunDir, limit_s: float) -> float:
    """Seconds before the time limit at which the ranks are asked to stop: a step, a save that is on its way
    and another one, and some more.

    At most half of the limit. Five minutes until something has been measured.
    """
    step, save = measured(run)
    wanted = 2 * step + 2.5 * (save or 30.0) + 10 if step else DEFAULT_S
    return min(wanted, limit_s / 2)


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
