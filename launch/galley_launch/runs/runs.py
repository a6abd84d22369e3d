"""Runs that exist: find one, tell its state, follow its logs, ask it to stop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.files import names_in, reason
from galley.contract.metrics import MetricsRow, last_rows, newest
from galley.contract.records import ExitRecord, read_exit
from galley.contract.rundir import Attempt, RunDir, read_json
from galley_launch.base import locks
from galley_launch.base.grammar import nearest
from galley_launch.base.numbers import duration
from galley_launch.base.terminal import Tail
from galley_launch.submit import queue


@dataclass(frozen=True)
class State:
    """The state of a run, as ``galley status`` shows it."""

    name: str
    state: str
    """``live``, ``stopping``, ``done``, ``unverified`` (trained, but the export's check failed), ``unexported``
    (trained, but the export failed), ``stopped``, ``failed``, ``lost`` (ended without a word), ``new`` or ``damaged``
    (its records cannot be read); of a submitted run also ``queued``, ``preparing``, ``exporting`` or ``unknown`` (Slurm
    does not answer)."""
    row: MetricsRow
    """The newest metrics, evaluation included."""
    attempt: int
    checkpoint: int | None
    """Step of the newest checkpoint that verifies."""
    message: str = ""
    reason: str = ""
    """The cause of the state, for the table: what failed, who stopped it, what a job waits for."""


def find(name: str, runs: Path) -> RunDir:
    """The run called ``name``: a directory, or a name under ``runs``. Raises ``UserError``."""
    for root in (Path(name), runs / name):
        if (root / "run.json").is_file():
            return RunDir(root)
    known = [run.root.name for run in every(runs)]
    todo = nearest(name, known) if known else "start one with galley run"
    raise UserError("run", f"no run {name!r} here or in {runs}/", todo)


def every(runs: Path) -> list[RunDir]:
    """All runs under ``runs``, by name, with those that cannot be read. Raises ``OSError`` where ``runs`` cannot."""
    roots = [runs / name for name in sorted(names_in(runs)) if not name.startswith(".")]
    return [RunDir(root) for root in roots if _is_run(root)]


def _is_run(root: Path) -> bool:
    """Whether ``root`` is a run, or a folder that this user may not look into, which may be one."""
    try:
        (root / "run.json").lstat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True


def last_row(path: Path) -> MetricsRow:
    """The newest numbers of a ``metrics.jsonl``, from its end: evaluation rows do not hide step rows."""
    return newest(last_rows(path))


def state(run: RunDir, jobs: queue.Queue | None = None) -> State:
    """The state of ``run`` now; ``jobs``: its queue, if it was submitted."""
    attempts, checkpoints = run.attempts(), run.checkpoints()
    # No exit.json: killed, or still at it. An empty record has the verdict None, which is "lost" below.
    end = (read_exit(attempts[-1].exit) if attempts else None) or ExitRecord()
    current = _state_after(end) if attempts else "new"
    if jobs and jobs.problem and end.again is False:
        # Slurm does not answer, but the last attempt recorded that none follows: so nothing is queued, and the state is
        # known. That is so for a copy of the run on a machine without Slurm, too.
        jobs = None
    # What the run does now comes before how its last attempt ended.
    now = (queue.state(jobs) if jobs else "") or ("live" if locks.is_live(run) else "")
    if now:
        current = "stopping" if now == "live" and attempts and attempts[-1].stop.exists() else now
    no_attempt = queue.why_no_attempt(run, jobs) if jobs and not attempts else ""
    if no_attempt:
        current = "stopped" if run.end.exists() else "failed"
    damaged = _damage(run, attempts)
    current = "damaged" if damaged and not now else current
    nothing = queue.nothing_follows(run, jobs) if jobs else ""
    messages = [no_attempt if current == "failed" else damaged, _message(end, current), nothing]
    return State(
        name=run.root.absolute().name,
        state=current,
        row=last_row(run.metrics),
        attempt=attempts[-1].number if attempts else 0,
        checkpoint=checkpoints[-1].step if checkpoints else None,
        message="; ".join(filter(None, messages)),
        reason="; ".join(filter(None, [*messages, _reason(current, end, jobs)])),
    )


def states(all_runs: Sequence[RunDir]) -> list[State]:
    """The state of each of ``all_runs``; of one that cannot be read, why not."""
    queues = queue.query(all_runs)  # one question to Slurm for all of them
    return [_state_or_damage(run, queues.get(run.root)) for run in all_runs]


def _state_or_damage(run: RunDir, jobs: queue.Queue | None) -> State:
    try:
        return state(run, jobs)
    except OSError as error:
        why = f"{error.filename or run.root} cannot be read ({reason(error)})"
        return State(run.root.absolute().name, "damaged", MetricsRow(), 0, None, why, why)


def _reason(current: str, end: ExitRecord, jobs: queue.Queue | None) -> str:
    """What the table adds to the state and its message."""
    match current:
        case "stopped":
            return end.reason or ""
        case "lost":
            return "ended without a word (killed, or its machine went down)"
        case "done":
            return "" if end.exported else "not exported"
        case "failed":
            return end.kind or end.reason or ""
        case "unknown" if jobs:
            return jobs.problem
        case "queued" if jobs and jobs.waiting:
            return jobs.waiting.reason
        case "stopping":
            return "waits for the step, then saves"
    return ""


def _damage(run: RunDir, attempts: list[Attempt]) -> str:
    """The record of ``run`` that exists but cannot be read, as a sentence; empty where there is none."""
    records = [run.spec, *([attempts[-1].exit] if attempts else [])]
    # lexists is true of a dangling link as well: such a record is damaged, not missing.
    present = [path for path in records if os.path.lexists(path) and (path == run.spec or not _is_empty(path))]
    return next((f"{path} cannot be read" for path in present if read_json(path) is None), "")


def _is_empty(path: Path) -> bool:
    """Whether a file has no bytes, as a killed process or a full disk leaves it: taken for missing, not for damaged."""
    return path.is_file() and path.stat().st_size == 0


def _state_after(end: ExitRecord) -> str:
    """The state of a run whose newest attempt ended so; one that trained is not ``done`` if its export failed."""
    if end.verdict == "done" and end.exported is False:
        return "unverified" if end.unverified else "unexported"
    return "lost" if end.verdict is None else end.verdict


def _message(end: ExitRecord, current: str) -> str:
    if current in ("unverified", "unexported"):
        return end.export_error or ""
    return end.message or "" if current in ("failed", "stopped") else ""


def log_paths(run: RunDir, rank: int | None, number: int | None, since: int = 0) -> list[Path]:
    """The logs that ``galley logs`` shows, in order: of attempt ``number``, or of every attempt from ``since`` on."""
    paths: list[Path] = []
    for attempt in run.attempts():
        if attempt.number == number or (number is None and attempt.number >= since):
            paths += _logs_of(attempt, rank)
    return paths


def _logs_of(attempt: Attempt, rank: int | None) -> list[Path]:
    if rank is not None:
        return [attempt.log(f"rank-{rank}")]
    return [attempt.log("job"), *(path for stage in stages.STAGES for path in _logs_of_stage(attempt, stage))]


def _logs_of_stage(attempt: Attempt, stage: stages.Stage) -> list[Path]:
    first = attempt.log(stage.log)
    if not stage.on_ranks or first.exists():
        return [first]
    # torchrun's logs (one for each node of a job) repeat what its ranks print, so they are left out where ranks have
    # logs of their own; where no rank came up, they are all there is.
    return [attempt.log(stage.name), *sorted(attempt.logs.glob(f"{stage.name}-*.log"))]


def first_logs(run: RunDir, rank: int | None, number: int | None) -> int:
    """The attempt that ``galley logs`` begins with. Raises ``UserError`` where what was asked for is not there."""
    attempts = run.attempts()
    if not attempts:
        if queue.is_submitted(run):
            return 0
        raise UserError(str(run.root), "has no attempt yet", "start it with galley run")
    attempt = run.attempt(number) if number is not None else attempts[-1]
    if not attempt.root.is_dir():
        numbers = ", ".join(str(attempt.number) for attempt in attempts)
        raise UserError("attempt", f"{number} does not exist", f"choose from {numbers}")
    if rank is not None and not attempt.log(f"rank-{rank}").is_file():
        ranks = sorted(path.stem.removeprefix("rank-") for path in attempt.logs.glob("rank-*.log"))
        todo = f"choose from {', '.join(ranks)}" if ranks else "the ranks have not started"
        raise UserError("rank", f"no log of rank {rank} in attempt {attempt.number}", todo)
    return attempt.number


def follow(run: RunDir, paths: Callable[[], list[Path]], show: Callable[[str], None], poll: float = 0.3) -> None:
    """Show the lines of all ``paths()`` as they come, while the run is live.

    ``paths`` is called again and again, as new attempts bring new logs; ``poll``: seconds between two looks at them.
    """
    tails: dict[Path, Tail] = {}
    watch = queue.Watch(run) if queue.is_submitted(run) else None
    shown = 0
    live = True
    while live:
        # Asked before the logs are read, so that what a run writes last is shown in one more round.
        live = watch.is_live(show) if watch else locks.is_live(run)
        for number, line in _new_lines(paths(), tails):
            if watch and number != shown:
                show(f"-- attempt {number}" if number else "-- prepare")
                shown = number
            show(line)
        if live:
            time.sleep(poll)


def _new_lines(paths: list[Path], tails: dict[Path, Tail]) -> Iterator[tuple[int, str]]:
    """The lines that logs grew by, each with the number of its attempt; ``tails`` keeps how far each was read."""
    for path in paths:
        number = int(path.parent.parent.name)  # attempts/NUMBER/logs/NAME.log
        for line in tails.setdefault(path, Tail(path)).lines():
            yield number, line


def stop(run: RunDir) -> str:
    """Ask a live run to save and end; returns what to tell the user. Raises ``UserError`` where it is not live."""
    if queue.is_submitted(run):
        return queue.stop(run)
    attempts = run.attempts()
    if not attempts or not locks.is_live(run):
        raise UserError(str(run.root), "is not running", "see galley status")
    try:
        attempts[-1].request_stop("user")
    except OSError as error:
        what = f"cannot be asked to stop here: {error.filename} cannot be written ({reason(error)})"
        raise UserError(str(run.root), what, f"end it where it runs: {locks.holder(run)}") from None
    return f"asked {run.root.name} to save and stop: {_waits_for(run)}; galley logs {run.root} follows it"


def _waits_for(run: RunDir) -> str:
    """What the run finishes before it stops: the step that it is at, and how long a step takes."""
    row = last_row(run.metrics)
    if row.step_s is None or row.step is None:
        return "it ends what it is at, then saves"
    return f"it waits for step {row.step + 1} (a step takes {duration(row.step_s)}), then saves"
