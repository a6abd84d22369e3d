"""The program that a job script (``slurm/train.sbatch.j2``) runs as ``verdict.py``: begin, stop, clock, end, end-aside.

``begin`` and ``end`` open and judge the job's attempt, ``stop`` answers a signal, and ``clock`` runs beside training.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from galley.contract import stages
from galley.contract.records import read_job
from galley.contract.rundir import Attempt, RunDir, read_json
from galley_launch.job import begin, chain, finish, slurm, successor
from galley_launch.job.ending import used_hours

NOTHING = 3
"""Status of ``begin`` where the job has nothing to do; the script then ends with 0."""
_TICK_S = 2.0
_EARLY_S = 75.0  # Slurm signals up to a minute before it was asked to (sbatch(1), --signal).


def _begin(run: RunDir, stage: str, step: str) -> int:
    """Print the path of the shell variables that the job script reads; or print why there is nothing to do."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # the script reads the path from stdout
            path = (
                begin.begin_training(run) if stage == stages.TRAIN.name else begin.begin_on_one_node(run, stage, step)
            )
    except begin.NothingToDo as end:
        print(f"galley: {end}", file=sys.stderr, flush=True)
        return NOTHING
    print(path)
    return 0


def _stop_reason(job: slurm.Job | None, need: float, limit_s: float) -> str:
    """Why Slurm signalled the batch script, by the job's state: the signal is the same for every reason."""
    if job is None:
        return "signal"
    if job.preempted:
        return "preemption"
    if job.state == "CANCELLED":
        return "cancel"
    left = slurm.now_left(job)
    lead = max(need, min(chain.DEFAULT_S, limit_s / 2))  # what the job was submitted with, at most
    return "walltime" if left is not None and left < lead + _EARLY_S else "signal"


def _stop(attempt: Attempt, signal: str) -> int:
    """Turn a signal into a request to save and stop.

    Slurm's warning of the time limit may come early. It then starts another clock, which asks the ranks in time, in
    case the job's own clock does not run any more.
    """
    try:
        job = slurm.job(os.environ["SLURM_JOB_ID"])
    except (slurm.SlurmError, KeyError):
        job = None
    run = RunDir(attempt.root.parent.parent)
    limit_s = float((read_json(run.cluster) or {})["limit_s"])
    need = chain.need(run, limit_s)
    reason, left = _stop_reason(job, need, limit_s), (slurm.now_left(job) if job else None) or 0.0
    if signal == "USR1" and reason == "walltime" and left > need:
        print(f"galley: SIGUSR1: {left:.0f} s are left; {need:.0f} s before the end the ranks are asked", flush=True)
        # It outlives this process, in a session of its own; -E and -s keep the user's Python settings out of it.
        clock = [sys.executable, "-E", "-s", str(run.code / "verdict.py"), "clock", str(run.root), str(attempt.root)]
        subprocess.Popen([*clock, str(os.getppid()), "time-only"], start_new_session=True)
        return 0
    print(f"galley: SIG{signal}: {reason}; asking the ranks to save and stop", flush=True)
    attempt.request_stop(reason)
    return 0


def _clock(run: RunDir, attempt: Attempt, parent: int, keeps: bool) -> int:
    """Ask for a stop when the time that is left is what saving needs, or when the GPU-hours are used up.

    Slurm's own signal is only exact to a minute, and its time was set when the job was submitted; this follows the
    steps and saves as they are measured. ``keeps``: also try to queue a successor, where none could be queued so far.
    """
    cluster, job = read_json(run.cluster) or {}, read_job(attempt.job)
    deadline = _deadline(job.job or "", float(cluster["limit_s"]), job.started or time.time())
    hours, measures = cluster.get("gpu_hours"), chain.Measures(run)
    keeper = successor.Keeper(run, attempt) if keeps else None
    # The parent is the batch shell: when it has ended, so has the job. Any request to stop ends the clock.
    while Path(f"/proc/{parent}").is_dir() and not attempt.stop.exists():
        left = deadline - measures.need(cluster["limit_s"]) - time.time()
        if left < 0:
            attempt.request_stop("walltime")
        elif hours and used_hours(run) >= float(hours):
            attempt.request_stop("budget")
        elif keeper:
            keeper.tick(left)
        time.sleep(_TICK_S)
    return 0


def _deadline(job: str, limit_s: float, started: float) -> float:
    """When the job's time limit ends it, in seconds since the epoch: by Slurm, or by the profile where it is silent."""
    # Slurm's own is better: a site may have changed the limit of this job, and the job began before ``started``.
    try:
        record = slurm.job(job)
    except slurm.SlurmError:
        record = None
    return record.end if record and record.end else started + limit_s


def main(argv: list[str]) -> int:
    """Run one decision; returns the exit status."""
    # begin RUN STAGE [STEP]; stop ATTEMPT SIGNAL; clock RUN ATTEMPT PID [time-only]; end RUN ATTEMPT STATUS [WHERE];
    # end-aside RUN ATTEMPT STATUS STAGE, for a job on one node.
    decision, first, *rest = argv
    if decision == "begin":
        return _begin(RunDir(Path(first)), rest[0], rest[1] if len(rest) > 1 else "")
    if decision == "stop":
        return _stop(Attempt(Path(first)), rest[0])
    run, attempt = RunDir(Path(first)), Attempt(Path(rest[0]))
    if decision == "clock":
        return _clock(run, attempt, int(rest[1]), keeps=len(rest) < 3)
    if decision == "end":
        return finish.end_training(run, attempt, int(rest[1]), rest[2] if len(rest) > 2 else stages.TRAIN.name)
    assert decision == "end-aside", decision
    return finish.end_on_one_node(run, attempt, rest[2], int(rest[1]))
