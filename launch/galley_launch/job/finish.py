"""The end of a job: record its verdict, and make the queue agree: the right job follows, or none."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from galley.contract import stages
from galley.contract.metrics import last_step
from galley.contract.records import ExitRecord, JobRecord, read_exit, read_job, write_exit
from galley.contract.rundir import UNVERIFIED, Attempt, RunDir, read_json
from galley_launch.job import chain, slurm, successor
from galley_launch.job.diagnose.classify import classify
from galley_launch.job.diagnose.evidence import collect
from galley_launch.job.ending import Ending, judge, newest_checkpoint
from galley_launch.job.names import known_as
from galley_launch.job.node import preflight

_UNFIT = 3
"""After so many preflights in a row that find unfit nodes, the nodes are not the cause."""


def conclude(run: RunDir, attempt: Attempt, ending: Ending, ended: float | None = None) -> ExitRecord:
    """Write ``exit.json``: what the ranks recorded, and the verdict. Bad nodes are avoided from now on.

    ``ended``: when, in seconds since the epoch, where that was not just now.
    """
    before, checkpoint = read_exit(attempt.exit) or ExitRecord(), newest_checkpoint(run)
    record = replace(
        before,
        verdict=ending.verdict,
        reason=ending.reason,
        step=before.step if before.step is not None else checkpoint or None,
        again=ending.again,
        message="" if ending.verdict == "done" else ending.message,
        status=ending.status,
        kind=ending.kind or before.kind,
        nodes=ending.nodes if ending.kind else before.nodes,
        checkpoint=checkpoint,
        last_step=last_step(run.metrics) or 0,
        ended=before.ended if before.ended is not None else ended or time.time(),
    )
    write_exit(attempt.exit, record)
    _avoid(run, attempt, ending)
    return record


def _avoid(run: RunDir, attempt: Attempt, ending: Ending) -> None:
    """Exclude the nodes that ``ending`` blames from the jobs that follow."""
    cluster, known = read_json(run.cluster) or {}, read_job(attempt.job).nodes or ()
    # sbatch refuses --exclude with a name that Slurm does not know, and then no job would follow.
    bad = [known_as(node, known) for node in ending.nodes] if known else list(ending.nodes)
    chain.exclude(
        run,
        [node for node in bad if node],
        f"attempt {attempt.number}: {ending.kind}",
        float(cluster.get("exclude_hours", 0)),
    )


def drop_successor(run: RunDir, job: str) -> None:
    """Cancel the run's other jobs that wait to train."""
    with suppress(slurm.SlurmError):  # one that stays in the queue finds nothing to do, and ends as it begins
        slurm.cancel([other.id for other in chain.live(run, stages.TRAIN.name) if other.id != job])


def export(run: RunDir, attempt: Attempt) -> None:
    """Submit the job that exports, unless one already exists."""
    if chain.live(run, stages.EXPORT.name):
        return
    job = chain.submit(run, stages.EXPORT.name)
    print(f"galley: trained; job {job} exports attempt {attempt.number}", flush=True)


def end_training(run: RunDir, attempt: Attempt, status: int, where: str) -> int:
    """Judge the attempt that this job made. Returns the job's exit status."""
    if attempt.is_superseded():  # this job was cut off, and the later attempt decides what follows
        print("galley: a later attempt has taken over", flush=True)
        return 1
    job = read_job(attempt.job)
    ending = judge(run, attempt, status, chain.state_of(job.job or ""))
    if where == stages.PREFLIGHT and ending.verdict != "stopped":
        ending = _unfit(run, attempt, job, ending)
    if read_json(run.end):
        ending = Ending(ending.verdict, ending.reason, False, ending.message, ending.kind, ending.nodes)
    record = conclude(run, attempt, ending)
    if ending.again and attempt.stop_reason() == "signal":
        # scancel sends a signal, too, and only later does Slurm call the job CANCELLED: the verdict is left open, and
        # the successor judges with the state that it then sees.
        write_exit(attempt.exit, replace(record, again=None))
    print(f"galley: attempt {attempt.number}: {ending.verdict} ({ending.reason}) {ending.message}".rstrip(), flush=True)
    _follow(run, attempt, ending, job)
    return 0 if ending.verdict in ("done", "stopped") else 1


def _unfit(run: RunDir, attempt: Attempt, job: JobRecord, judged: Ending) -> Ending:
    """The ending of a job whose preflight failed: its unfit nodes are avoided.

    Where all of several nodes are unfit, something else is wrong, and the message of ``judged`` is preferred.
    """
    nodes = list(job.nodes or ())
    bad = preflight.bad_nodes(attempt, nodes)
    message = "; ".join(f"{node}: {why}" for node, why in bad.items()) or "the preflight did not run"
    if len(bad) == len(nodes) > 1:
        return Ending("failed", stages.PREFLIGHT, False, judged.message or message, "configuration")
    before = [read_exit(run.attempt(attempt.number - back).exit) for back in range(1, _UNFIT)]
    again = any(record is None or record.reason != stages.PREFLIGHT for record in before)
    message = message if again else f"no fit nodes in {_UNFIT} attempts: {message}"
    return Ending("failed", stages.PREFLIGHT, again, message, "node", tuple(bad))


def _follow(run: RunDir, attempt: Attempt, ending: Ending, job: JobRecord) -> None:
    """Make the queue agree with the verdict."""
    try:
        if ending.verdict == "done":
            # Where a successor waits, one try is enough: the successor submits the export if this job cannot.
            successor.insist(lambda: export(run, attempt), 0.0 if job.successor else successor.END_S)
        # The export is submitted first: only then is it safe to cancel the successor that could do it instead.
        if not ending.again:
            drop_successor(run, job.job or "")
        else:
            successor.at_end(run, attempt, job)
        waiting = read_job(attempt.job).successor
        if ending.again and ending.nodes and waiting and waiting == job.successor:
            slurm.update(waiting, ExcNodeList=",".join(sorted(chain.excluded(run))))
    except slurm.SlurmError as error:
        print(f"galley: {error}", flush=True)


def end_on_one_node(run: RunDir, attempt: Attempt, stage: str, status: int) -> int:
    """The end of a job on one node, which prepares or exports. Returns the job's exit status."""
    errors = [error for error in attempt.errors() if error.get("who") == stage]
    if stage == stages.EXPORT.name:
        before = read_exit(attempt.exit) or ExitRecord()
        why = str(errors[0].get("message")) if errors else "" if status == 0 else f"exit status {status}"
        unverified = any(error.get("status") == UNVERIFIED for error in errors)
        record = replace(before, exported=status == 0, export_error=why, unverified=unverified)
        write_exit(attempt.exit, record)
        _forget_secrets(run)
        return status
    if status:
        failure = classify(collect(run, attempt, status, ""))
        message = str(errors[0].get("message")) if errors else "; ".join(failure.lines[:1]) or f"exit status {status}"
        conclude(run, attempt, Ending("failed", stage, False, message, failure.kind))
        drop_successor(run, "")
    else:
        write_exit(attempt.exit, ExitRecord("prepared", "", message="", status=0))
    return status


def _forget_secrets(run: RunDir) -> None:
    """Remove the private file of secrets: no job of this run needs it any more."""
    path = (read_json(run.cluster) or {}).get("secrets_file")
    if path:
        with suppress(OSError):
            Path(str(path)).unlink()
