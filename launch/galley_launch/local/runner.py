"""Carry out a plan on this box: hold the run, start each stage, watch it, and report how it ended."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.records import ExitRecord, read_exit, write_exit
from galley.contract.rundir import UNVERIFIED, Attempt, RunDir, write_atomic
from galley.contract.spec import RunSpec
from galley.contract.text import one_line
from galley_launch.base import locks, terminal
from galley_launch.base.terminal import say
from galley_launch.job.ending import Ending, OnBox, judge
from galley_launch.local import supervise
from galley_launch.plan import plan, request, resume
from galley_launch.plan.plan import Plan, Stage

MakePlan = Callable[[int], Plan]
"""A function from the number of an attempt to its plan."""


def check_installed() -> None:
    """Raise ``UserError`` where this environment cannot train."""
    if importlib.util.find_spec("torch") is None:
        todo = "install the rest, in a checkout of Galley: pip install -c constraints.txt '.[train]'"
        raise UserError("environment", "torch is not installed here, so nothing can be trained", todo)


def run_stage(stage: Stage, run: RunDir, attempt: Attempt, interrupts: supervise.Interrupts, lock: int) -> Ending:
    """Start ``stage``, show it, and return how it ended."""
    # A request to stop may have come between two stages, when no process was there to see it.
    if attempt.stop.exists():
        return Ending("stopped", attempt.stop_reason(), None, f"stopped before {stage.name}", code=1)
    screen = terminal.screen(stage.name, run, attempt)
    process = supervise.start(stage, attempt.log(stage.name), lock)
    try:
        code = supervise.watch(process, attempt, stages.named(stage.name).on_ranks, interrupts, screen.show, say)
    finally:
        if process.poll() is None:  # an exception above: no stage is left behind
            supervise.end(process)
        screen.close()
    return judge(run, attempt, code, box=OnBox(stage.name, at_once=interrupts.count > 1))


def write(todo: Plan, run: RunDir, attempt: Attempt) -> None:
    """Write the plan's files. Raises ``UserError`` where that fails."""
    try:
        _write(todo, run, attempt)
    except OSError as error:
        raise UserError(
            str(run.root), f"cannot be written to ({error.strerror})", "make room, or runs=DIRECTORY"
        ) from None


def _write(todo: Plan, run: RunDir, attempt: Attempt) -> None:
    for folder in (attempt.root, attempt.stop.parent, attempt.logs, attempt.root / "errors"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, text in todo.files.items():
        write_atomic(run.root / name, text)


def _record(attempt: Attempt, stage: str, ending: Ending) -> None:
    """Write ``exit.json`` where the ranks did not. A verdict that they wrote stays, unless the ending differs."""
    before = read_exit(attempt.exit)
    unverified = ending.status == UNVERIFIED
    # An export that fails does not change the verdict on training, which is done.
    if before and stage == stages.EXPORT.name:
        record = replace(before, exported=False, export_error=ending.message, unverified=unverified)
    elif before and before.verdict == ending.verdict:
        return
    else:
        record = ExitRecord(ending.verdict, ending.reason, message=ending.message, status=ending.status)
    with contextlib.suppress(
        OSError
    ):  # The disk may be full, which is the failure itself; its message is printed anyway.
        write_exit(attempt.exit, record)


def _reopen(attempt: Attempt) -> None:
    """Remove the request and the errors with which an earlier export in ``attempt`` ended."""
    attempt.stop.unlink(missing_ok=True)
    for error in (attempt.root / "errors").glob("*.json"):
        error.unlink()


def attempt_stages(todo: Plan, run: RunDir, attempt: Attempt, lock: int) -> int:
    """Run every stage of ``todo`` in turn; returns the exit status for the shell."""
    with supervise.listening() as interrupts:
        for stage in todo.stages:
            ending = run_stage(stage, run, attempt, interrupts, lock)
            if ending.verdict != "done":
                return _leave(run, attempt, stage.name, ending)
    # Ranks that ended with 0 and left no record count as done; an export alone says nothing of the training.
    trained = any(stages.named(stage.name).on_ranks for stage in todo.stages)
    record = read_exit(attempt.exit) or ExitRecord("done" if trained else "lost")
    write_exit(attempt.exit, replace(record, exported=True, export_error=None, unverified=None))
    say(f"run {run.root.name} is {'done' if trained else 'exported'}: {_where(run)}")
    return 0


def _leave(run: RunDir, attempt: Attempt, stage: str, ending: Ending) -> int:
    """Record and print that ``stage`` stopped or failed; returns the exit status for the shell."""
    _record(attempt, stage, ending)
    if ending.verdict == "stopped":
        last = read_exit(attempt.exit) or ExitRecord()
        reason = last.reason or "user"
        at = f" at step {last.step}" if last.step is not None else ""
        lost = f" ({ending.message})" if ending.message else ""
        say(f"stopped{at} ({reason}){lost}; run the same command again to go on")
        # 0: it saved and stopped as asked; 130: it was ended at once, as a shell reports SIGINT (128 + 2).
        return 0 if ending.status == 0 else 130
    prefix = "" if ending.status == 2 else f"run {run.root.name}: "
    if ending.status == UNVERIFIED:
        prefix = f"run {run.root.name} is trained, but not verified: "
    print(f"galley: {one_line(prefix + ending.message)}", file=sys.stderr, flush=True)
    return 2 if ending.status == 2 else 1


def _where(run: RunDir) -> str:
    parts = [("model", run.export / "model"), ("adapter", run.export / "adapter"), ("metrics", run.metrics)]
    return ", ".join(f"{name} in {path}" for name, path in parts if path.exists()) or str(run.root)


def _refuse_if_queued(run: RunDir) -> None:
    """Raise ``UserError`` where jobs of a submitted run wait or run: they would write into the same directory."""
    if run.submitted.is_file():
        from galley_launch.submit import (
            submission,
        )  # here: its schemas take a while to import, and few runs were submitted

        submission.refuse_if_queued(run)


def start(spec: RunSpec, run: RunDir, make_plan: MakePlan) -> int:
    """Run ``spec`` in ``run``: a new attempt, or nothing where it is finished. Returns the exit status."""
    _refuse_if_queued(run)
    # The lock comes first: what is left to do is only certain once no other launcher can do it.
    with locks.held(run) as lock:
        action = resume.next_action(run, request.earlier(run), spec)
        if action.what == "nothing":
            say(f"run {run.root.name} is finished: {_where(run)}")
            return 0
        attempt = run.attempt(action.attempt)
        todo = plan.left(make_plan(attempt.number), action.what)
        if action.what == "export":
            _reopen(attempt)
        write(todo, run, attempt)
        if action.what == "train":
            say(_greeting(spec, run, attempt))
        return attempt_stages(todo, run, attempt, lock)


def prepare(spec: RunSpec, run: RunDir, todo: Plan) -> int:
    """Carry out ``todo``, the preparation of ``spec``, in the attempt of number 0. Returns the exit status."""
    _refuse_if_queued(run)
    with locks.held(run) as lock:
        if resume.next_action(run, request.earlier(run), spec).what != "train":
            say(f"run {run.root.name} is trained: nothing is left to prepare")
            return 0
        attempt = run.attempt(0)
        write(todo, run, attempt)
        _reopen(attempt)
        attempt.exit.unlink(missing_ok=True)
        with supervise.listening() as interrupts:
            (stage,) = todo.stages
            ending = run_stage(stage, run, attempt, interrupts, lock)
        if ending.verdict != "done":
            return _leave(run, attempt, stage.name, ending)
        write_exit(attempt.exit, ExitRecord("prepared", status=0))
        say(f"run {run.root.name} is prepared: {run.data}; galley run with the same words trains")
        return 0


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
