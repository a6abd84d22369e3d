"""How an attempt ended, and whether another follows: a function of the files in its directory, which writes nothing.

Used by ``local.runner`` for a stage on one box, and in a job by :mod:`.finish` (at its end) and :mod:`.begin` (for an
attempt before it that left no record).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from galley.contract import stages
from galley.contract.records import ExitRecord, read_exit, read_job
from galley.contract.rundir import Attempt, RunDir
from galley_launch.job.box import failure
from galley_launch.job.diagnose.classify import Failure, classify
from galley_launch.job.diagnose.evidence import being_ended, collect

# Requests to stop that come from outside: the run goes on in its next attempt.
_INTERRUPTIONS = ("walltime", "preemption", "node failure", "signal")
# The reason behind a signal, by the state that Slurm gives the job.
_REASON_OF_STATE = {"PREEMPTED": "preemption", "TIMEOUT": "walltime", "NODE_FAIL": "node failure"}
_MEMORY = ("gpu_oom", "host_oom")


@dataclass(frozen=True)
class Ending:
    """How an attempt ended, as ``exit.json`` has it."""

    verdict: str
    """``done``, ``stopped``, ``failed`` or ``lost`` (ended without a record)."""
    reason: str
    again: bool | None
    """Whether another attempt follows; None on one box, where a person decides."""
    message: str = ""
    kind: str = ""
    """Kind of failure, as :class:`Failure` has it."""
    nodes: tuple[str, ...] = ()
    """Nodes to avoid."""
    code: int | None = None
    """:attr:`status`, where it does not follow from verdict and kind."""

    @property
    def status(self) -> int:
        """The exit status in ``exit.json``: 0 done or stopped, 2 a wrong configuration, 1 any other failure."""
        if self.code is not None:
            return self.code
        return 0 if self.verdict in ("done", "stopped") else 2 if self.kind == "configuration" else 1


@dataclass(frozen=True)
class OnBox:
    """What a launcher on one box knows of a stage whose process it waited for."""

    stage: str
    at_once: bool = False
    """Whether the user asked twice, so that it was ended without saving."""


def newest_checkpoint(run: RunDir) -> int:
    """Step of the newest checkpoint that verifies; 0: none."""
    checkpoints = run.checkpoints()
    return checkpoints[-1].step if checkpoints else 0


def judge(run: RunDir, attempt: Attempt, status: int | None, state: str = "", box: OnBox | None = None) -> Ending:
    """How ``attempt`` ended, by its ranks' record, its exit ``status`` and Slurm's ``state`` of its job together.

    ``box``: it ran on one box, and this stage of it ended with ``status`` (negative: a signal).
    """
    if state == "COMPLETING":
        state = being_ended(run, attempt) or state
    # The order: ranks that got to the end are done, however the job ended around them; a cancelled job is not resumed,
    # even where its ranks saved; and only an attempt that is neither is asked why it failed.
    record, asked = read_exit(attempt.exit) or ExitRecord(), attempt.stop_reason()
    verdict = _recorded_verdict(record, status, box)
    if verdict == "done":
        return Ending("done", record.reason or "", again=False)
    if box is None and (state == "CANCELLED" or asked == "cancel"):
        return Ending("stopped", "cancel", again=False, message="the job was cancelled")
    if verdict == "stopped":
        reason = asked or record.reason or ""
        reason = _REASON_OF_STATE.get(state, reason) if reason == "signal" else reason
        again = reason in _INTERRUPTIONS if box is None else None
        return _progress(run, attempt, Ending("stopped", reason, again))
    return _unfinished(run, attempt, status, state, asked) if box is None else _failed_on_box(attempt, status or 0, box)


def _recorded_verdict(record: ExitRecord, status: int | None, box: OnBox | None) -> str | None:
    """The verdict that the ranks recorded, where it counts; else None.

    In a job it counts whatever the exit status, which is no evidence: srun's is the highest of its tasks' (srun(1)). On
    one box a stage that ended with a status other than 0 has failed, even if its ranks had recorded a verdict before.
    """
    if box is None:
        return record.verdict
    if status:
        return None
    return "stopped" if stages.named(box.stage).on_ranks and record.verdict == "stopped" else "done"


def _failed_on_box(attempt: Attempt, status: int, box: OnBox) -> Ending:
    """The ending of a stage on one box that did not get to its end."""
    if attempt.stop.exists() and (box.at_once or not attempt.errors()):
        message = f"{box.stage} was ended before it was done"
        return Ending("stopped", attempt.stop_reason(), None, message, code=1)
    code, message = failure(attempt, box.stage, status)
    return Ending("failed", box.stage, None, message, code=code)


def _unfinished(run: RunDir, attempt: Attempt, status: int | None, state: str, asked: str) -> Ending:
    """The ending of an attempt that could not save and record its verdict."""
    if asked in ("user", "budget"):
        return Ending("stopped", asked, again=False, message="ended before it could save")
    evidence = collect(run, attempt, status, state)
    # Without an error, time or pre-emption was the end; with one, the attempt failed before that.
    if not evidence.errors and (state in ("PREEMPTED", "TIMEOUT") or asked in ("walltime", "preemption")):
        reason = "preemption" if "PREEMPTED" in state or asked == "preemption" else "walltime"
        return _progress(run, attempt, Ending("lost", reason, again=True, message="ended before it could save"))
    return _failed(run, attempt, classify(evidence), evidence.step)


def _failed(run: RunDir, attempt: Attempt, cause: Failure, step: int | None) -> Ending:
    """The ending of an attempt that failed of ``cause`` after ``step``; whether to retry depends on its progress."""
    shown = cause.lines[0] if cause.lines else cause.kind
    message = shown if not cause.who or shown.startswith(cause.who) else f"{cause.who}: {shown}"
    again = cause.retry
    # Memory that did not suffice for one step since the checkpoint will not suffice for it in the next attempt.
    if cause.kind in _MEMORY and (step or 0) <= _start(attempt):
        again = False
    if again and _failed_before(run, attempt, cause.kind, step):
        again, message = False, f"failed twice at step {step or 0}: {message}"
    return Ending("failed", "failure", again, message, cause.kind, cause.nodes)


def _start(attempt: Attempt) -> int:
    """Step that ``attempt`` resumed from."""
    return read_job(attempt.job).checkpoint or 0


def _before(run: RunDir, attempt: Attempt) -> ExitRecord:
    """How the attempt before this one ended."""
    before = read_exit(run.attempt(attempt.number - 1).exit) if attempt.number > 1 else None
    return before or ExitRecord()


def _failed_before(run: RunDir, attempt: Attempt, kind: str, step: int | None) -> bool:
    """Whether the attempt before failed in the same way at the same step, so that a retry has not helped."""
    before = _before(run, attempt)
    return before.kind == kind and before.last_step == (step or 0)


def _progress(run: RunDir, attempt: Attempt, ending: Ending) -> Ending:
    """``ending``, or a failure where the time limit is too short to get from one checkpoint to the next."""
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
