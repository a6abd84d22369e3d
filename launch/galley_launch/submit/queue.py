"""The state of a submitted run, from its files and from Slurm's answer, and asking it to end."""

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
"""Seconds between two questions to Slurm's controller, which serves all users of the cluster: squeue(1), PERFORMANCE,
asks not to call it in a loop."""
_SILENCE_S = 300.0
"""Seconds without an answer from Slurm after which a run is followed no further."""


@dataclass(frozen=True)
class Queue:
    """The run's jobs that wait or run, or why that is not known."""

    jobs: tuple[slurm.Job, ...] = ()
    stages: tuple[str, ...] = ()
    """Of each job, in the same order."""
    problem: str = ""
    """Why Slurm did not answer; ``jobs`` is empty then, which means nothing."""

    @property
    def running(self) -> slurm.Job | None:
        """The job that runs; of several the one submitted last, so that training comes before its preparation."""
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


def _is_known_to_be(run: RunDir) -> bool:
    """As :func:`is_submitted`, and False of a run that cannot be read."""
    try:
        return is_submitted(run)
    except OSError:
        return False


def query(runs: Sequence[RunDir]) -> dict[Path, Queue]:
    """The queue of each submitted run, by its root. Slurm is asked once for all runs of a cluster."""
    # Only the newest jobs of each run: older ones are over, and a long run has had many.
    rows = {run.root: chain.submitted(run)[-chain.recent(run) :] for run in runs if _is_known_to_be(run)}
    clusters = {run.root: chain.federated(run) for run in runs if run.root in rows}
    queues: dict[Path, Queue] = {}
    for name in set(clusters.values()):
        queues |= _query_cluster({root: rows[root] for root in rows if clusters[root] == name}, name)
    return queues


def _query_cluster(rows: dict[Path, list[dict[str, str]]], cluster: str) -> dict[Path, Queue]:
    """The queue of each run of one ``cluster`` ("": this host's own). ``rows``: root to its submitted jobs."""
    ids = [str(row["job"]) for submitted in rows.values() for row in submitted]
    try:
        live = {number: job for number, job in slurm.jobs(ids, cluster).items() if not job.is_over()} if ids else {}
    except slurm.SlurmError as error:
        return {root: Queue(problem=str(error)) for root in rows}
    return {root: _queue(submitted, live) for root, submitted in rows.items()}


def _queue(submitted: list[dict[str, str]], live: dict[str, slurm.Job]) -> Queue:
    rows = [row for row in submitted if str(row["job"]) in live]
    return Queue(tuple(live[str(row["job"])] for row in rows), tuple(str(row["stage"]) for row in rows))


def state(queue: Queue) -> str:
    """The state of a submitted run while a job of it waits or runs; empty where none does."""
    if queue.problem:
        return "unknown"
    if queue.running:
        stage = queue.stage_of(queue.running)
        return stages.named(stage).state if stage in stages.names() else "live"
    return "queued" if queue.waiting else ""


def nothing_follows(run: RunDir, queue: Queue) -> str:
    """Why a run that is not over does not continue by itself, and what to do; empty where it does, or is over."""
    attempts = run.attempts()
    if queue.problem or not attempts or run.end.exists():
        return ""
    last, todo = attempts[-1], f"galley submit {run.root}"
    end, refusal = read_exit(last.exit) or ExitRecord(), read_job(last.job).no_successor
    why = f" ({refusal})" if refusal else ""
    if queue.jobs:
        # Attempt 0 is the preparation. If its job could queue no successor, the first attempt, which was submitted with
        # it, still waits, but nothing comes after that. Later, a job that waits is the successor.
        preparing = last.number == 0
        waits = [job for job in queue.jobs if job is not queue.running and queue.stage_of(job) == stages.TRAIN.name]
        if not why or end.again is False or (not preparing and (waits or not queue.running)):
            return ""
        beforehand = "" if chain.is_beforehand(run) else ", or submit with cluster.chain=login"
        which = "the first" if preparing else "this"
        return f"nothing follows {which} attempt{why}; when it has ended, submit again: {todo}{beforehand}"
    if end.verdict == "done":
        if end.exported or end.export_error or last.log(stages.EXPORT.name).exists():
            return ""
        return f"it is trained, but nothing follows: its export is not in the queue; submit again: {todo}"
    return "" if end.again is False else f"nothing follows{why}; submit again: {todo}"


def last_output(run: RunDir) -> list[str]:
    """The lines of the newest log in ``jobs/logs``, where jobs write until they have begun an attempt."""
    logs = sorted((run.jobs / "logs").glob("*.out"), key=written)
    texts = [text for path in logs if (text := clean(tail(path)).strip())]
    return [line for line in texts[-1].splitlines() if line.strip()] if texts else []


def why_no_attempt(run: RunDir, queue: Queue) -> str:
    """Why a submitted run has neither an attempt nor a job, as a line. Empty: it has jobs, or Slurm does not answer."""
    if queue.problem or queue.jobs:
        return ""
    lines = last_output(run)
    # Galley's own error, if there is one: after it a shell or Slurm may add lines that only follow from it.
    errors = [line for line in lines if line.startswith("galley: ")] or lines
    return errors[-1] if errors else "its jobs are gone from the queue and left no record (sacct says how they ended)"


def details(queue: Queue) -> list[str]:
    """The lines of ``galley status RUN`` about its jobs."""
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
    """``14:05`` in local time, with the day where that is not today. ``moment``: seconds since the epoch."""
    when, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if when[:3] == now[:3] else "%a %d %b %H:%M", when)


@dataclass
class Watch:
    """Asks Slurm every few seconds whether a submitted run has jobs, and shows a line when the state of one changes."""

    run: RunDir
    shown: str = ""
    """The line that was shown last, which is not repeated."""
    live: bool = True
    """The answer to the last question."""
    _next: float = 0.0
    """Time of the next question, by ``time.monotonic``."""
    _answered: float = field(default_factory=time.monotonic)
    """Time of the last answer, by ``time.monotonic``."""

    def is_live(self, show: Callable[[str], None]) -> bool:
        """Whether a job waits or runs. Shows a line when what Slurm says about a waiting job changes."""
        if time.monotonic() < self._next:
            return self.live
        self._next = time.monotonic() + _POLL_S
        queue = query([self.run])[self.run.root]
        self._answered = self._answered if queue.problem else time.monotonic()
        self.live = bool(queue.jobs) or (bool(queue.problem) and self._continue_without_slurm(queue.problem, show))
        job = None if queue.running else queue.waiting
        # Nothing about a job that runs: its own log is followed.
        text = f"-- {_sentence(job, queue.stage_of(job))}" if job else f"-- {queue.problem}" if queue.problem else ""
        if text and text != self.shown:
            show(text)
        self.shown = text
        return self.live

    def _continue_without_slurm(self, problem: str, show: Callable[[str], None]) -> bool:
        """Whether to go on watching while Slurm does not answer; shows why where that is pointless."""
        attempts = self.run.attempts()
        end = (read_exit(attempts[-1].exit) if attempts else None) or ExitRecord()
        # The run's own records may say that it is over; no answer is needed then.
        if self.run.end.exists() or end.again is False or end.exported:
            return False
        # Without Slurm's commands on this host no answer will ever come; a controller that restarts is waited for.
        if not problem.endswith("no such command here") and time.monotonic() < self._answered + _SILENCE_S:
            return True
        show(f"-- {problem}: it is not known whether the run goes on; ask again later, or look at: galley status")
        return False


def _ask_end(run: RunDir, reason: str) -> None:
    """Leave the file that jobs of the run look for when they begin or end: then they do nothing and queue nothing."""
    run.end.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(run.end, json.dumps({"reason": reason, "time": time.time()}))


def stop(run: RunDir) -> str:
    """Ask the run to save and end, without a further attempt; returns the message for the user.

    Raises ``UserError`` where no job of it waits or runs, or Slurm does not answer.
    """
    queue = _live(run)
    # The file comes before the cancelling: a job that ends in between would otherwise queue a successor.
    _ask_end(run, "stop")
    running = queue.running
    slurm.cancel([job.id for job in queue.jobs if job is not running], chain.federated(run))
    if running is None:
        return f"took {run.root.name} out of the queue (job {', '.join(job.id for job in queue.jobs)})"
    stage = queue.stage_of(running)
    if stage != stages.TRAIN.name:
        slurm.cancel([running.id], chain.federated(run))
        untrained = ", which did not train yet" if stage == stages.PREPARE.name else ""
        return f"ended job {running.id}{untrained}"
    # The job of training is asked by a file instead of a signal: its ranks save, and it ends by itself.
    attempts = [attempt for attempt in run.attempts() if attempt.number > 0]
    if attempts and not attempts[-1].exit.exists():
        attempts[-1].request_stop("user")
    return f"asked {run.root.name} (job {running.id}) to save and stop; galley logs {run.root} follows it"


def cancel(run: RunDir) -> str:
    """End all jobs of the run now, without saving; returns the message for the user. Raises as :func:`stop` does."""
    queue = _live(run)
    _ask_end(run, "cancel")
    # Recorded first, so that the attempt counts as stopped and not as lost when scancel has ended its job.
    attempts = [attempt for attempt in run.attempts() if attempt.number > 0]
    if queue.running and attempts and not attempts[-1].exit.exists():
        attempts[-1].request_stop("cancel")
    slurm.cancel([job.id for job in queue.jobs], chain.federated(run))
    return f"cancelled job {', '.join(job.id for job in queue.jobs)} of {run.root.name}"


def _live(run: RunDir) -> Queue:
    """The queue of a run that has jobs. Raises ``UserError`` where it has none, or Slurm does not answer."""
    queue = query([run])[run.root]
    if queue.problem:
        raise UserError("slurm", queue.problem, "try again where Slurm answers")
    if not queue.jobs:
        raise UserError(str(run.root), "has no job in the queue", "see galley status")
    return queue
