"""How an attempt ended, and whether another follows. Pure but for the files that it reads."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from galley.contract.files import number
from galley.contract.rundir import Attempt, RunDir, read_json
from galley_launch.job.diagnose.classify import Failure, classify
from galley_launch.job.diagnose.evidence import being_ended, collect

# Requests to stop that come from outside: the run goes on in its next attempt.
_INTERRUPTIONS = ("walltime", "preemption", "node failure", "signal", "watchdog")
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

    def body(self) -> dict[str, Any]:
        """The fields of ``exit.json``."""
        found: dict[str, Any] = {"verdict": self.verdict, "reason": self.reason, "again": self.again}
        found["message"] = self.message
        found["status"] = 0 if self.verdict in ("done", "stopped") else 2 if self.kind == "configuration" else 1
        return {**found, "kind": self.kind, "nodes": list(self.nodes)} if self.kind else found


def newest_checkpoint(run: RunDir) -> int:
    """Step of the newest checkpoint that verifies; 0: none."""
    standing = run.checkpoints()
    return standing[-1].step if standing else 0


def judge(run: RunDir, attempt: Attempt, status: int | None, state: str) -> Ending:
    """How ``attempt`` ended: what its ranks said, its exit ``status`` and Slurm's ``state`` of its job, together."""
    if state == "COMPLETING":
        state = being_ended(run, attempt) or state
    said = read_json(attempt.exit) or {}
    asked = str((read_json(attempt.stop) or {}).get("reason", ""))
    if said.get("verdict") == "done":
        return Ending("done", str(said.get("reason", "")), again=False)
    if state == "CANCELLED" or asked == "cancel":
        return Ending("stopped", "cancel", again=False, message="the job was cancelled")
    if said.get("verdict") == "stopped":
        reason = asked or str(said.get("reason", ""))
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
    return int(number((read_json(attempt.job) or {}).get("checkpoint")))


def _before(run: RunDir, attempt: Attempt) -> dict[str, Any]:
    return (read_json(run.attempt(attempt.number - 1).exit) or {}) if attempt.number > 1 else {}


def _failed_before(run: RunDir, attempt: Attempt, kind: str, step: int | None) -> bool:
    """Whether the attempt before died of the same at the same step: what a retry cured once, it will not cure again."""
    before = _before(run, attempt)
    return before.get("kind") == kind and before.get("last_step") == (step or 0)


def _progress(run: RunDir, attempt: Attempt, ending: Ending) -> Ending:
    """End a run whose time limit is too short to get from one checkpoint to the next."""
    before, now = _before(run, attempt), newest_checkpoint(run)
    twice = before.get("reason") == ending.reason == "walltime"
    if not (ending.again and twice and before.get("checkpoint") == now and now <= _start(attempt)):
        return ending
    message = f"two attempts in a row reached their time limit without a checkpoint after step {now}"
    message += "; raise cluster.time"
    return Ending("failed", "no progress", again=False, message=message, kind="configuration")


def used_hours(run: RunDir, until: float | None = None) -> float:
    """GPU-hours (on CPUs: rank-hours) of every attempt; one that has not ended counts until ``until``."""
    total = 0.0
    for attempt in run.attempts():
        facts, end = read_json(attempt.job) or {}, read_json(attempt.exit) or {}
        if "started" in facts:
            ended = number(end.get("ended")) or until or time.time()
            total += max(0.0, ended - number(facts["started"], ended)) / 3600 * int(number(facts.get("ranks"), 1))
    return total
