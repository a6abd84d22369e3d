"""How an attempt ended, and whether another follows. Pure but for the files that it reads."""

from __future__ import annotations

import time
from dataclasses import dataclass

from galley.contract.records import ExitRecord, read_exit, read_job
from galley.contract.rundir import Attempt, RunDir
from galley_launch.job.diagnose.classify import Failure, classify
from galley_launch.job.diagnose.evidence import being_ended, collect

# Requests to stop that come from outside: the run goes on in its next attempt.
_INTERRUPTIONS = ("walltime", "preemption", "node failure", "signal")
# What a signal was about, where Slurm knows.
_SLURMS_WORD = {"PREEMPTED": "preemption", "TIMEOUT": "walltime", "NODE_FAIL": "node failure"}
_MEMORY = ("gpu_oom", "host_oom")


@dataclass(frozen=True)
class Ending:
    """What ``exit.json`` says of an attempt in a job."""

    verdict: str
    """``done``, ``stopped``, ``failed`` or ``lost`` (ended without a word)."""
    reason: str
    again: bool
    """Whether another attempt follows."""
    message: str = ""
    kind: str = ""
    """Kind of failure, as :class:`Failure` has it."""
    nodes: tuple[str, ...] = ()
    """Nodes to avoid."""

    @property
    def status(self) -> int:
        """As ``exit.json`` has it."""
        return 0 if self.verdict in ("done", "stopped") else 2 if self.kind == "configuration" else 1


def newest_checkpoint(run: RunDir) -> int:
    """Step of the newest checkpoint that verifies; 0: none."""
    standing = run.checkpoints()
    return standing[-1].step if standing else 0


def judge(run: RunDir, attempt: Attempt, status: int | None, state: str) -> Ending:
    """How ``attempt`` ended: what its ranks said, its exit ``status`` and Slurm's ``state`` of its job, together."""
    if state == "COMPLETING":
        state = being_ended(run, attempt) or state
    record, asked = read_exit(attempt.exit) or ExitRecord(), attempt.stop_reason()
    if record.verdict == "done":
        return Ending("done", record.reason or "", again=False)
    if state == "CANCELLED" or asked == "cancel":
        return Ending("stopped", "cancel", again=False, message="the job was cancelled")
    if record.verdict == "stopped":
        reason = asked or record.reason or ""
        reason = _SLURMS_WORD.get(state, reason) if reason == "signal" else reason
        return _progress(run, attempt, Ending("stopped", reason, again=reason in _INTERRUPTIONS))
    return _unfinished(run, attempt, status, state, asked)


def _unfinished(run: RunDir, attempt: Attempt, status: int | None, state: str, asked: str) -> Ending:
    """The ending of an attempt that did not get to save and say so."""
    if asked in ("user", "budget"):
        return Ending("stopped", asked, again=False, message="ended before it could save")
    evidence = collect(run, attempt, status, state)
    if not evidence.errors and (state in ("PREEMPTED", "TIMEOUT") or asked in ("walltime", "preemption")):
        reason = "preemption" if "PREEMPTED" in state or asked == "preemption" else "walltime"
        return _progress(run, attempt, Ending("lost", reason, again=True, message="ended before it could save"))
    failure = classify(evidence)
    return _failed(run, attempt, failure, evidence.step)


def _failed(run: RunDir, attempt: Attempt, failure: Failure, step: int | None) -> Ending:
    shown = failure.lines[0] if failure.lines else failure.kind
    message = shown if not failure.who or shown.startswith(failure.who) else f"{failure.who}: {shown}"
    again = failure.retry
    if failure.kind in _MEMORY and (step or 0) <= _start(attempt):
        again = False
    if again and _failed_before(run, attempt, failure.kind, step):
        again, message = False, f"failed twice at step {step or 0}: {message}"
    return Ending("failed", "failure", again, message, failure.kind, failure.nodes)


def _start(attempt: Attempt) -> int:
    """Step that ``attempt`` resumed from."""
    return read_job(attempt.job).checkpoint or 0


def _before(run: RunDir, attempt: Attempt) -> ExitRecord:
    """How the attempt before this one ended."""
    before = read_exit(run.attempt(attempt.number - 1).exit) if attempt.number > 1 else None
    return before or ExitRecord()


def _failed_before(run: RunDir, attempt: Attempt, kind: str, step: int | None) -> bool:
    """Whether the attempt before died of the same at the same step: what a retry cured once, it will not cure again."""
    before = _before(run, attempt)
    return before.kind == kind and before.last_step == (step or 0)


def _progress(run: RunDir, attempt: Attempt, ending: Ending) -> Ending:
    """End a run whose time limit is too short to get from one checkpoint to the next."""
    before, now = _before(run, attempt), newest_checkpoint(run)
    twice = before.reason == ending.reason == "walltime"
    if not (ending.again and twice and before.checkpoint == now and now <= _start(attempt)):
        return ending
    message = f"two attempts in a row reached their time limit without a checkpoint after step {now}"
    message += "; raise cluster.time"
    return Ending("failed", "no progress", again=False, message=message, kind="configuration")


def used_hours(run: RunDir, until: float | None = None) -> float:
    """GPU-hours (on CPUs: rank-hours) of every attempt; one that has not ended counts until ``until``."""
    total = 0.0
    for attempt in run.attempts():
        job, end = read_job(attempt.job), read_exit(attempt.exit) or ExitRecord()
        if job.started is not None:
            ended = end.ended or until or time.time()
            total += max(0.0, ended - job.started) / 3600 * (1 if job.ranks is None else job.ranks)
    return total
