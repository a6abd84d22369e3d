"""How a submitted run is, and asking it to end: the files of the run and Slurm's word together."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.records import ExitRecord, read_exit, read_job
from galley.contract.rundir import RunDir, write_atomic
from galley_launch.job import chain, slurm
from galley_launch.job.diagnose.evidence import clean, tail, written

_POLL_S = 5.0
"""Slurm's controller answers everybody; nobody should ask it several times a second."""
_SILENCE_S = 300.0
"""Seconds without an answer from Slurm after which a run is followed no further."""


@dataclass(frozen=True)
class Queue:
    """The run's jobs that wait or run; Slurm may not answer."""

    jobs: tuple[slurm.Job, ...] = ()
    stages: tuple[str, ...] = ()
    """Of each job."""
    problem: str = ""

    @property
    def running(self) -> slurm.Job | None:
        """The job that runs, training first."""
        return next((job for job in reversed(self.jobs) if job.state in ("RUNNING", "COMPLETING", "SUSPENDED")), None)

    @property
    def waiting(self) -> slurm.Job | None:
        """The first job that waits."""
        return next((job for job in self.jobs if job is not self.running), None)

    def stage_of(self, job: slurm.Job) -> str:
        """The name of the stage that ``job`` is for."""
        return self.stages[self.jobs.index(job)]


def is_submitted(run: RunDir) -> bool:
    """Whether a job was ever submitted for the run."""
    return run.submitted.is_file()


def look(runs: Sequence[RunDir]) -> dict[Path, Queue]:
    """The queue of each submitted run, by root: one question for all runs of a cluster."""
    rows = {run.root: chain.submitted(run)[-chain.recent(run) :] for run in runs if is_submitted(run)}
    there = {run.root: chain.federated(run) for run in runs if run.root in rows}
    return {
        root: queue
        for name in set(there.values())
        for root, queue in _look({r: rows[r] for r in rows if there[r] == name}, name).items()
    }


def _look(rows: dict[Path, list[dict[str, str]]], cluster: str) -> dict[Path, Queue]:
    ids = [str(each["job"]) for found in rows.values() for each in found]
    try:
        known = {job: each for job, each in slurm.jobs(ids, cluster).items() if not each.is_over()} if ids else {}
    except slurm.SlurmError as error:
        return {root: Queue(problem=str(error)) for root in rows}
    return {root: _queue(found, known) for root, found in rows.items()}


def _queue(found: list[dict[str, str]], known: dict[str, slurm.Job]) -> Queue:
    there = [each for each in found if str(each["job"]) in known]
    return Queue(tuple(known[str(each["job"])] for each in there), tuple(str(each["stage"]) for each in there))


def word(queue: Queue) -> str:
    """The state of a submitted run while a job of it waits or runs; empty where none does."""
    if queue.problem:
        return "unknown"
    if queue.running:
        stage = queue.stage_of(queue.running)
        return stages.named(stage).state if stage in stages.names() else "live"
    return "queued" if queue.waiting else ""


def nothing_follows(run: RunDir, queue: Queue) -> str:
    """Why the run does not go on by itself although it is not over, and what to do; empty where it does, or is over."""
    attempts = run.attempts()
    if queue.problem or not attempts or run.end.exists():
        return ""
    last, todo = attempts[-1], f"galley submit {run.root}"
    end, refusal = read_exit(last.exit) or ExitRecord(), read_job(last.job).no_successor
    why = f" ({refusal})" if refusal else ""
    if queue.jobs:
        early = (
            last.number == 0
        )  # the prepare job found it out: the first attempt is in the queue, and nothing after it
        waits = [job for job in queue.jobs if job is not queue.running and queue.stage_of(job) == stages.TRAIN.name]
        if not why or end.again is False or (not early and (waits or not queue.running)):
            return ""
        beforehand = "" if chain.is_beforehand(run) else ", or submit with cluster.chain=login"
        which = "the first" if early else "this"
        return f"nothing follows {which} attempt{why}; when it has ended, submit again: {todo}{beforehand}"
    if end.verdict == "done":
        left = not (end.exported or end.export_error or last.log(stages.EXPORT.name).exists())
        return f"it is trained, but nothing follows: its export is not in the queue; submit again: {todo}" * left
    return "" if end.again is False else f"nothing follows{why}; submit again: {todo}"


def last_words(run: RunDir) -> list[str]:
    """What the job that ended last before it could begin an attempt left in ``jobs/logs``: its lines, newest last."""
    logs = sorted((run.jobs / "logs").glob("*.out"), key=written)
    texts = [text for path in logs if (text := clean(tail(path)).strip())]
    return [line for line in texts[-1].splitlines() if line.strip()] if texts else []


def ended_before(run: RunDir, queue: Queue) -> str:
    """Why a submitted run has no attempt and no job left: the line that says it. Empty: jobs wait, or Slurm is away."""
    if queue.problem or queue.jobs:
        return ""
    lines = last_words(run)
    told = [line for line in lines if line.startswith("galley: ")] or lines
    return told[-1] if told else "its jobs are gone from the queue and left no record (sacct says how they ended)"


def details(queue: Queue) -> list[str]:
    """What ``galley status RUN`` says of the jobs."""
    if queue.problem:
        return [f"{'queue':<11}{queue.problem}"]
    return [f"{'job':<11}{_sentence(job, queue.stage_of(job))}" for job in queue.jobs]


def _sentence(job: slurm.Job, stage: str) -> str:
    text = f"{job.id} ({stage}) {job.state.lower()}"
    if job.state == "PENDING":
        start = f", expected to start {clock(job.start)}" if job.start else ""
        return f"{text}: {job.reason}{start}"
    left = slurm.now_left(job)
    limit = f", {round(left / 60)} min of its time limit left" if left is not None else ""
    return f"{text} on {', '.join(job.nodes)}{limit}"


def clock(moment: float) -> str:
    """``14:05``, with the day where it is not today's."""
    when, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if when[:3] == now[:3] else "%a %d %b %H:%M", when)


@dataclass
class Watch:
    """Whether a submitted run goes on, asked of Slurm a few times a minute, and said when it changes."""

    run: RunDir
    said: str = ""
    live: bool = True
    _next: float = 0.0
    _answered: float = field(default_factory=time.monotonic)

    def is_live(self, show: Callable[[str], None]) -> bool:
        """Whether a job waits or runs. Shows a line when the word about a waiting job changes."""
        if time.monotonic() < self._next:
            return self.live
        self._next = time.monotonic() + _POLL_S
        queue = look([self.run])[self.run.root]
        self._answered = self._answered if queue.problem else time.monotonic()
        self.live = bool(queue.jobs) or (bool(queue.problem) and self._goes_on(queue.problem, show))
        job = None if queue.running else queue.waiting
        text = f"-- {_sentence(job, queue.stage_of(job))}" if job else f"-- {queue.problem}" if queue.problem else ""
        if text and text != self.said:
            show(text)
        self.said = text
        return self.live

    def _goes_on(self, problem: str, show: Callable[[str], None]) -> bool:
        """Whether a run of which Slurm says nothing is to be watched further; shows why where it is not."""
        attempts = self.run.attempts()
        end = (read_exit(attempts[-1].exit) if attempts else None) or ExitRecord()
        if self.run.end.exists() or end.again is False or end.exported:
            return False
        if not problem.endswith("no such command here") and time.monotonic() < self._answered + _SILENCE_S:
            return True
        show(f"-- {problem}: it is not known whether the run goes on; ask again later, or look at: galley status")
        return False


def _ask_end(run: RunDir, reason: str) -> None:
    run.end.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(run.end, json.dumps({"reason": reason, "time": time.time()}))


def stop(run: RunDir) -> str:
    """Save, then end: no further attempt. Returns what to tell. Raises ``UserError`` where nothing waits or runs."""
    queue = _live(run)
    _ask_end(run, "stop")
    running = queue.running
    slurm.cancel([job.id for job in queue.jobs if job is not running], chain.federated(run))
    if running is None:
        return f"took {run.root.name} out of the queue (job {', '.join(job.id for job in queue.jobs)})"
    stage = queue.stage_of(running)
    if stage != stages.TRAIN.name:
        slurm.cancel([running.id], chain.federated(run))
        early = ", which did not train yet" if stage == stages.PREPARE.name else ""
        return f"ended job {running.id}{early}"
    attempts = [each for each in run.attempts() if each.number > 0]
    if attempts and not attempts[-1].exit.exists():
        attempts[-1].request_stop("user")
    return f"asked {run.root.name} (job {running.id}) to save and stop; galley logs {run.root} follows it"


def cancel(run: RunDir) -> str:
    """End all jobs of the run now, without saving. Returns what to tell."""
    queue = _live(run)
    _ask_end(run, "cancel")
    attempts = [each for each in run.attempts() if each.number > 0]
    if queue.running and attempts and not attempts[-1].exit.exists():
        attempts[-1].request_stop("cancel")
    slurm.cancel([job.id for job in queue.jobs], chain.federated(run))
    return f"cancelled job {', '.join(job.id for job in queue.jobs)} of {run.root.name}"


def _live(run: RunDir) -> Queue:
    queue = look([run])[run.root]
    if queue.problem:
        raise UserError("slurm", queue.problem, "try again where Slurm answers")
    if not queue.jobs:
        raise UserError(str(run.root), "has no job in the queue", "see galley status")
    return queue
