"""Carry out a plan on this box: hold the run, start each stage, watch it, say how it ended."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from signal import Signals

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.records import ExitRecord, read_exit, write_exit
from galley.contract.rundir import UNVERIFIED, Attempt, RunDir, write_atomic
from galley.contract.spec import RunSpec
from galley.contract.text import one_line
from galley_launch.base import locks, terminal
from galley_launch.base.terminal import say
from galley_launch.job.diagnose.evidence import tail
from galley_launch.local import supervise
from galley_launch.plan import compose, plan, resume
from galley_launch.plan.plan import Plan, Stage

MakePlan = Callable[[int], Plan]
"""Attempt number to plan."""

# torchrun's summary of a failed group: "rank : 1 (local_rank: 1)" and "exitcode : -9 (pid: 123)".
_LOG = 16 << 20
"""Bytes of torchrun's log that are looked through, from its end."""
_RANK_EXIT = re.compile(r"^\s*rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*(-\d+)", re.MULTILINE)
_CAUSE = "Root Cause (first observed failure):"
# What a rank says when another is gone.
_GONE = re.compile(
    r"(?i)connection|reset by peer|broken pipe|closed|gloo|nccl|DistBackendError|could not reach each other"
)


@dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    stage: str
    status: int
    """0: done. 2: the user's to fix. 3: exported, but not verified. Anything else: failed."""
    message: str = ""
    stopped: bool = False


def check_installed() -> None:
    """Raise ``UserError`` where this environment cannot train."""
    if importlib.util.find_spec("torch") is None:
        todo = "install the rest, in a checkout of Galley: pip install -c constraints.txt '.[train]'"
        raise UserError("environment", "torch is not installed here, so nothing can be trained", todo)


def _killed_rank(log: Path, errors: list[dict[str, object]]) -> str | None:
    """``rank 1 was killed by signal 9`` where torchrun's log says so.

    It ends the others with 15 itself: that is the cause only where it is the first failure, and what other ranks
    recorded is no more than that this one was gone.
    """
    text = tail(log, _LOG)
    for rank, code in _RANK_EXIT.findall(text):
        if code != "-15":
            return f"rank {rank} was killed by signal {code[1:]}"
    cause = _RANK_EXIT.search(text.partition(_CAUSE)[2])
    if cause and all(_GONE.search(str(error.get("message"))) for error in errors):
        return f"rank {cause[1]} was ended by signal 15 (SIGTERM), which neither galley nor torchrun sent"
    return None


def _outcome(stage: Stage, code: int, attempt: Attempt, now: bool) -> Outcome:
    """Judge a stage that ended with ``code``; ``now``: the user did not wait for it to save."""
    if code == 0:
        stopped = stages.named(stage.name).on_ranks and (read_exit(attempt.exit) or ExitRecord()).verdict == "stopped"
        return Outcome(stage.name, 0, stopped=stopped)
    errors = attempt.errors()
    if attempt.stop.exists() and (now or not errors):
        return Outcome(stage.name, 1, f"{stage.name} was ended before it was done", stopped=True)
    told = [error for error in errors if error.get("status") in (2, UNVERIFIED)]
    if told:
        return Outcome(stage.name, 2 if told[0]["status"] == 2 else UNVERIFIED, str(told[0].get("message")))
    killed = _killed_rank(attempt.log(stage.name), errors)
    if killed is None and code < 0:
        killed = f"{stage.name} was killed by signal {-code} ({Signals(-code).name})"
    if killed:
        return Outcome(stage.name, 1, f"{killed}; run the same command again to resume")
    return Outcome(stage.name, 1, _failure(stage, errors, attempt))


def _last_line(log: Path) -> str:
    return next((line.strip() for line in reversed(tail(log).split("\n")) if line.strip()), "it left no word")


def _failure(stage: Stage, errors: list[dict[str, object]], attempt: Attempt) -> str:
    if not errors:
        return f"{stage.name} failed: {_last_line(attempt.log(stage.name))}; see {attempt.log(stage.name)}"
    who = str(errors[0].get("who"))
    log = attempt.log(who) if attempt.log(who).exists() else attempt.log(stage.name)
    place = f" in {who}" if who != stage.name else ""
    return f"{stage.name} failed{place}: {errors[0].get('message')}; see {log}"


def run_stage(stage: Stage, run: RunDir, attempt: Attempt, interrupts: supervise.Interrupts, lock: int) -> Outcome:
    """Start ``stage``, show it, and return how it ended."""
    if attempt.stop.exists():
        return Outcome(stage.name, 1, f"stopped before {stage.name}", stopped=True)
    screen = terminal.screen(stage.name, run, attempt)
    process = supervise.start(stage, attempt.log(stage.name), lock)
    try:
        code = supervise.watch(process, attempt, stages.named(stage.name).on_ranks, interrupts, screen.show, say)
    finally:
        if process.poll() is None:
            supervise.end(process)
        screen.close()
    return _outcome(stage, code, attempt, interrupts.count > 1)


def write(todo: Plan, run: RunDir, attempt: Attempt) -> None:
    """Write the plan's files. Raises ``UserError`` where that fails."""
    try:
        _write(todo, run, attempt)
    except OSError as error:
        raise UserError(
            str(run.root), f"cannot be written to ({error.strerror})", "make room, or runs=DIRECTORY"
        ) from None


def _write(todo: Plan, run: RunDir, attempt: Attempt) -> None:
    for place in (attempt.root, attempt.stop.parent, attempt.logs, attempt.root / "errors"):
        place.mkdir(parents=True, exist_ok=True)
    for name, text in todo.files.items():
        write_atomic(run.root / name, text)


def _record(attempt: Attempt, verdict: str, outcome: Outcome) -> None:
    """Leave ``exit.json`` where the ranks did not; a verdict of theirs stands, unless training itself failed."""
    before = read_exit(attempt.exit)
    unverified = outcome.status == UNVERIFIED
    if before and outcome.stage == stages.EXPORT.name:
        record = replace(before, exported=False, export_error=outcome.message, unverified=unverified)
    elif before and before.verdict == verdict:
        return
    else:
        reason = attempt.stop_reason() if outcome.stopped else outcome.stage
        record = ExitRecord(verdict, reason, message=outcome.message, status=outcome.status)
    with contextlib.suppress(OSError):  # A full disk is what may have failed; the message is printed all the same.
        write_exit(attempt.exit, record)


def _reopen(attempt: Attempt) -> None:
    """Forget why an earlier export in ``attempt`` stopped or failed."""
    attempt.stop.unlink(missing_ok=True)
    for error in (attempt.root / "errors").glob("*.json"):
        error.unlink()


def attempt_stages(todo: Plan, run: RunDir, attempt: Attempt, lock: int) -> int:
    """Run every stage of ``todo`` in turn; returns the exit status for the shell."""
    with supervise.listening() as interrupts:
        for stage in todo.stages:
            outcome = run_stage(stage, run, attempt, interrupts, lock)
            if outcome.status or outcome.stopped:
                return _leave(run, attempt, outcome)
    trained = any(stages.named(stage.name).on_ranks for stage in todo.stages)
    record = read_exit(attempt.exit) or ExitRecord("done" if trained else "lost")
    write_exit(attempt.exit, replace(record, exported=True, export_error=None, unverified=None))
    say(f"run {run.root.name} is {'done' if trained else 'exported'}: {_where(run)}")
    return 0


def _leave(run: RunDir, attempt: Attempt, outcome: Outcome) -> int:
    if outcome.stopped:
        _record(attempt, "stopped", outcome)
        last = read_exit(attempt.exit) or ExitRecord()
        reason = last.reason or "user"
        at = f" at step {last.step}" if last.step is not None else ""
        lost = f" ({outcome.message})" if outcome.message else ""
        say(f"stopped{at} ({reason}){lost}; run the same command again to go on")
        return 0 if outcome.status == 0 else 130
    _record(attempt, "failed", outcome)
    prefix = "" if outcome.status == 2 else f"run {run.root.name}: "
    if outcome.status == UNVERIFIED:
        prefix = f"run {run.root.name} is trained, but not verified: "
    print(f"galley: {one_line(prefix + outcome.message)}", file=sys.stderr, flush=True)
    return 2 if outcome.status == 2 else 1


def _where(run: RunDir) -> str:
    parts = [("model", run.export / "model"), ("adapter", run.export / "adapter"), ("metrics", run.metrics)]
    return ", ".join(f"{name} in {path}" for name, path in parts if path.exists()) or str(run.root)


def _refuse_if_queued(run: RunDir) -> None:
    """Raise ``UserError`` where jobs of a submitted run wait or run: two would write into it."""
    if run.submitted.is_file():
        from galley_launch.submit import submission  # Its schemas take a while, and few runs were submitted.

        submission.refuse_if_queued(run)


def start(spec: RunSpec, run: RunDir, make_plan: MakePlan) -> int:
    """Run ``spec`` in ``run``: a new attempt, or nothing where it is finished. Returns the exit status."""
    _refuse_if_queued(run)
    with locks.held(run) as lock:
        outlook = resume.outlook(run, compose.earlier(run), spec)
        if outlook.what == "nothing":
            say(f"run {run.root.name} is finished: {_where(run)}")
            return 0
        attempt = run.attempt(outlook.attempt)
        todo = plan.left(make_plan(attempt.number), outlook.what)
        if outlook.what == "export":
            _reopen(attempt)
        write(todo, run, attempt)
        if outlook.what == "train":
            say(_greeting(spec, run, attempt))
        return attempt_stages(todo, run, attempt, lock)


def _greeting(spec: RunSpec, run: RunDir, attempt: Attempt) -> str:
    place = spec.placement
    where = f"{place.ranks_per_node} {'CPU rank' if place.device == 'cpu' else 'GPU'}"
    where += "s" if place.ranks_per_node > 1 else ""
    again = f", attempt {attempt.number}" if attempt.number > 1 else ""
    return f"run {spec.name} on {where}{again}: {run.root}"


def export(run: RunDir, make_stage: Callable[[int], Stage]) -> int:
    """Write the export of a run again. Returns the exit status."""
    _refuse_if_queued(run)
    with locks.held(run) as lock:
        attempts = run.attempts()
        if not attempts or not run.checkpoints():
            raise UserError(str(run.root), "has no checkpoint yet", "train it first: galley run")
        attempt = attempts[-1]
        _reopen(attempt)
        return attempt_stages(Plan({}, (make_stage(attempt.number),)), run, attempt, lock)
