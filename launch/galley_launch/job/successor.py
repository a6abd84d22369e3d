"""The job that takes over: queued as an attempt begins, tried again while Slurm does not answer, reported if missing.

Slurm's controller is busy or down now and then, and some sites accept no submission from their compute nodes. So the
beginning of an attempt tries for a while, its clock goes on trying beside training, and its end tries once more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from galley.contract import stages
from galley.contract.records import JobRecord, read_job, write_job
from galley.contract.rundir import Attempt, RunDir, read_json
from galley_launch.job import chain, slurm

BEGIN_S, END_S = 30.0, 600.0
"""Seconds for which an attempt tries before it trains, and after it: nodes are idle meanwhile."""
FIRST_S, LONGEST_S = 3.0, 60.0
"""The first pause between two tries, and the longest."""
_SPARE_S = 180.0
"""Seconds before the ranks must be asked to stop in which the clock no longer calls Slurm: a call may take a minute."""

Value = TypeVar("Value")


def insist(action: Callable[[], Value], seconds: float) -> Value:
    """What ``action`` returns; tried again, with pauses that grow, for ``seconds`` while Slurm does not answer.

    Raises:
        SlurmError: Slurm refused, or did not answer in all that time.
    """
    pause, end = FIRST_S, time.monotonic() + seconds
    while True:
        try:
            return action()
        except slurm.SlurmError as error:
            if not error.is_transient or time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_S)


def find(run: RunDir, here: str) -> str | None:
    """The job that waits to take over from job ``here``. Raises SlurmError.

    This may be one that is not in the run's list: sbatch may have been ended, or given up, after Slurm took the job.
    """
    waiting = [job.id for job in chain.live(run, stages.TRAIN.name) if job.id != here]
    if waiting:
        return waiting[-1]
    name, known = str(chain.cluster(run).get("job_name", "")), {str(row["job"]) for row in chain.submitted(run)}
    if not name or "," in name:
        return None  # squeue --name takes a list, with commas between its names
    unlisted = [job for job in slurm.jobs_named(name) if job not in known and job != here]
    if unlisted:
        chain.note(run, stages.TRAIN.name, unlisted[-1])
    return unlisted[-1] if unlisted else None


def queue(run: RunDir, here: str) -> str:
    """The job that takes over from job ``here``: the one that waits, or a new one. Raises SlurmError."""
    # Asked first, so that a second try after an unanswered one submits no second job.
    waiting = find(run, here)
    if waiting:
        return waiting
    if chain.is_beforehand(run):
        count = chain.cluster(run).get("attempts")
        raise slurm.SlurmError(f"it is the last of the {count} attempts that cluster.chain=login submitted")
    return chain.submit(run, stages.TRAIN.name, chain.options(run, chain.limit_s(run), here))


def at_begin(run: RunDir, here: str) -> tuple[str | None, str]:
    """The successor of job ``here``, or None and why there is none yet."""
    try:
        return insist(lambda: queue(run, here), BEGIN_S), ""
    except slurm.SlurmError as error:
        print(f"galley: no successor could be queued: {error}", flush=True)
        return None, str(error)


def may_submit(run: RunDir) -> str:
    """Why this node may not submit the jobs that follow, by a test; empty: it may, or Slurm does not answer."""
    if chain.is_beforehand(run):
        return ""
    # Without the bad nodes the test could fail for want of nodes, which says nothing about this one.
    options = [word for word in chain.options(run, chain.limit_s(run), None) if not word.startswith("--exclude")]
    try:
        slurm.test_only(run.jobs / "train.sbatch", options)
    except slurm.SlurmError as error:
        return "" if error.is_transient else str(error)
    return ""


def advise(attempt: Attempt, why: str) -> None:
    """Print that no job follows the attempt, and what helps; the attempt's own log gets the line, too."""
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    line = f"galley: chain: no job can be queued from {node} ({why}): nothing follows this attempt by itself; submit"
    line += " again when it has ended"
    if not chain.is_beforehand(RunDir(attempt.root.parent.parent)):
        line += ", or submit with cluster.chain=login, which queues a chain of jobs in advance"
    print(line, flush=True)
    with contextlib.suppress(OSError), attempt.log("job").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def _keep(attempt: Attempt, successor: str | None, why: str) -> None:
    """Write the successor, or why there is none, into the attempt's ``job.json``."""
    write_job(attempt.job, replace(read_job(attempt.job), successor=successor, no_successor=why or None))


class Keeper:
    """Tries to queue a successor beside training, where none could be queued as the attempt began."""

    def __init__(self, run: RunDir, attempt: Attempt) -> None:
        self.run, self.attempt = run, attempt
        job = read_job(attempt.job)
        self.here, why = job.job or "", job.no_successor or ""
        # A refusal is final: only where Slurm did not answer is there anything to try again.
        self.open = bool(self.here) and not job.successor and (not why or slurm.SlurmError(why).is_transient)
        self.pause, self.next = LONGEST_S / 4, time.monotonic()

    def tick(self, left: float) -> None:
        """Try again, if it is time to and ``left`` seconds until the ranks are asked to stop are enough."""
        if not self.open or time.monotonic() < self.next or left < _SPARE_S:
            return
        try:
            job = queue(self.run, self.here)
        except slurm.SlurmError as error:
            self.pause = min(2 * self.pause, 10 * LONGEST_S)
            self.next, self.open = time.monotonic() + self.pause, error.is_transient
            if not error.is_transient:
                _keep(self.attempt, None, str(error))
                advise(self.attempt, str(error))
            return
        self.open = False
        _keep(self.attempt, job, "")
        print(f"galley: job {job} takes over when this one has ended", flush=True)


def at_end(run: RunDir, attempt: Attempt, record: JobRecord) -> str:
    """Queue the job of the next attempt, unless it waits already; returns why none follows, or nothing."""
    here, before = record.job or "", record.successor

    def queue_unless_over() -> str:
        # Looked up at every try: in ten minutes the user may end the run, or another job take over.
        if attempt.is_superseded() or read_json(run.end):
            return ""
        return queue(run, here)

    known = before or chain.is_beforehand(run)  # queued long ago: only somebody else can have cancelled it since
    try:
        job = insist(queue_unless_over, BEGIN_S if known else END_S)
    except slurm.SlurmError as error:
        # Without an answer, a job that was queued before is taken to be there still.
        why = "" if before and error.is_transient else str(error)
        if why:
            _keep(attempt, None, why)
            print(f"galley: nothing follows this attempt ({why}); submit the run again", flush=True)
        return why
    if job and job != before:
        _keep(attempt, job, "")
        print(f"galley: job {job} takes over", flush=True)
    return ""
