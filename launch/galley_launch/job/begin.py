"""The beginning of a job: is there anything to do, as which attempt, on which nodes, and which job comes next."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from galley.contract import stages
from galley.contract.records import ExitRecord, JobRecord, read_exit, read_job, write_job
from galley.contract.rundir import Attempt, RunDir, read_json, write_atomic
from galley_launch.job import chain, slurm, successor
from galley_launch.job.ending import Ending, judge, newest_checkpoint, used_hours
from galley_launch.job.finish import conclude, drop_successor, export
from galley_launch.job.names import reachable

# Above Linux's ephemeral range (32768 to 60999, ip(7)), so that no outgoing connection has taken it.
_FIRST_PORT, _PORTS = 61000, 4500


class NothingToDo(Exception):
    """The job has no work and ends at once; the text is why."""


@dataclass(frozen=True)
class Allocation:
    """What Slurm gave this job."""

    job: str
    restart: int
    nodes: tuple[str, ...]

    @property
    def port(self) -> int:
        """A port of its own for each job and restart, above the ephemeral range."""
        # 97, a prime, keeps the ports of a restart apart from those of the jobs with the next numbers.
        digits = "".join(letter for letter in self.job if letter.isdigit()) or "0"
        return _FIRST_PORT + (int(digits) + 97 * self.restart) % _PORTS


def allocation() -> Allocation:
    """The allocation in Slurm's environment. Raises NothingToDo where that contradicts itself."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        raise NothingToDo("not inside a Slurm job; hand this script to sbatch")
    nodes = tuple(slurm.hostnames(env["SLURM_JOB_NODELIST"]))
    count = int(env.get("SLURM_JOB_NUM_NODES", len(nodes)))
    if len(nodes) != count:
        raise NothingToDo(f"Slurm names {len(nodes)} nodes ({env['SLURM_JOB_NODELIST']}) but says {count}")
    return Allocation(env["SLURM_JOB_ID"], int(env.get("SLURM_RESTART_COUNT", "0")), nodes)


def settle(run: RunDir, attempt: Attempt, here: Allocation) -> ExitRecord:
    """How an earlier attempt ended: by its own record, or else judged now by what it left."""
    before = read_exit(attempt.exit)
    if before and before.again is not None:
        return before
    job = read_job(attempt.job).job or ""
    same = job == here.job  # requeued under its own number: pre-empted, or its node died
    ending = judge(run, attempt, None, "PREEMPTED" if same else chain.state_of(job) if job else "")
    # Where Slurm does not know when it ended, its logs do: hours that this job waited in the queue are no GPU-hours.
    ended = chain.ended(job) if job and not same else None
    return conclude(run, attempt, ending, ended or _last_write(attempt))


def _last_write(attempt: Attempt) -> float | None:
    """When a log of ``attempt`` was last written to, in seconds since the epoch."""
    return max((path.stat().st_mtime for path in attempt.logs.glob("*.log")), default=None)


def _check_over(run: RunDir, here: Allocation, cluster: dict[str, Any]) -> None:
    """Raise NothingToDo where the run needs no further attempt."""
    request = read_json(run.end)
    if request:
        raise NothingToDo(f"the run was ended by galley {request.get('reason', 'stop')}")
    # The outcome of an earlier submission does not end this one: the run was made longer, or stopped and started again.
    first = max(1, int(cluster.get("first_attempt", 1)))
    attempts = [attempt for attempt in run.attempts() if attempt.number >= first]
    prepared = read_exit(run.attempt(0).exit) or ExitRecord()
    if not run.data_manifest.is_file() and prepared.verdict == "failed" and prepared.again is False:
        raise NothingToDo(f"preparing failed: {prepared.message}")
    if not attempts:
        return
    last = settle(run, attempts[-1], here)
    if last.verdict == "done":
        if not last.exported:
            _export(run, attempts[-1])
        raise NothingToDo("the run is done")
    if not last.again:
        raise NothingToDo(f"attempt {attempts[-1].number} ended the run: {last.message or last.reason}")
    _check_budget(run, attempts[-1], cluster)


def _export(run: RunDir, attempt: Attempt) -> None:
    """Submit the export that the job which trained could not submit."""
    try:
        successor.insist(lambda: export(run, attempt), successor.END_S)
    except slurm.SlurmError as error:
        print(f"galley: trained, but the export could not be submitted ({error}); submit the run again", flush=True)


def _check_budget(run: RunDir, last: Attempt, cluster: dict[str, Any]) -> None:
    """Raise NothingToDo, and record it, where the attempts or the GPU-hours that the profile allows are used up."""
    tried = last.number - int(cluster["first_attempt"]) + 1
    most, hours = int(cluster["attempts"]), cluster.get("gpu_hours")
    message = ""
    if tried >= most:
        message = f"{tried} attempts were made, as many as cluster.attempts allows"
    elif hours and used_hours(run) >= float(hours):
        message = f"{used_hours(run):.2f} GPU-hours are used, and cluster.gpu_hours is {hours}"
    if message:
        conclude(run, last, Ending("stopped", "budget", again=False, message=message))
        raise NothingToDo(message)


def _check_nodes(run: RunDir, here: Allocation, limit_s: int) -> None:
    """Submit another job where Slurm gave a node that is known to be bad (as was noticed after submitting this one)."""
    bad = sorted(set(here.nodes) & set(chain.excluded(run)))
    if not bad or chain.is_beforehand(run):
        return
    options = chain.options(run, limit_s, here.job)
    try:
        # Slurm may refuse it: without the bad node, too few are left. The dependency on this very job is
        # no part of that question.
        tested = [option for option in options if "--dependency" not in option]
        slurm.test_only(Path(chain.script(run, stages.TRAIN.name)), tested)
        job = chain.submit(run, stages.TRAIN.name, options)
    except slurm.SlurmError as error:
        print(f"galley: {', '.join(bad)} should be avoided, but without it: {error}", flush=True)
        return
    raise NothingToDo(f"{', '.join(bad)} is excluded ({chain.excluded(run)[bad[0]]}); job {job} takes over")


def begin_training(run: RunDir) -> Path:
    """Begin the next attempt; returns the file of shell variables for the job script. Raises NothingToDo."""
    cluster, spec = read_json(run.cluster) or {}, read_json(run.spec) or {}
    here, placement = allocation(), spec["placement"]
    try:
        _check_over(run, here, cluster)
    except NothingToDo:
        drop_successor(run, here.job)
        raise
    if len(here.nodes) != placement["nodes"]:
        raise NothingToDo(f"the run is for {placement['nodes']} nodes, but Slurm gave {len(here.nodes)}")
    chain.note(run, stages.TRAIN.name, here.job)  # a user may have submitted the script by hand
    _check_nodes(run, here, int(cluster["limit_s"]))
    # The successor is queued before the attempt begins: a node that dies at once then still has one.
    waiting, why_not = successor.at_begin(run, here.job)
    attempt = run.begin_attempt()
    record = JobRecord(
        job=here.job,
        restart=here.restart,
        nodes=here.nodes,
        head=here.nodes[0],
        port=here.port,
        started=time.time(),
        ranks=len(here.nodes) * int(placement["ranks_per_node"]),
        successor=waiting,
        checkpoint=newest_checkpoint(run),
    )
    write_atomic(attempt.placement, json.dumps(placement, indent=2) + "\n")
    prepare = "0" if run.data_manifest.is_file() else "1"
    return _open(attempt, record, {"GALLEY_HEAD": reachable(here.nodes[0]), "GALLEY_PREPARE": prepare}, why_not)


def begin_on_one_node(run: RunDir, stage: str, step: str) -> Path:
    """Open a job on one node: ``prepare`` belongs to attempt 0, ``export`` to the last. Raises NothingToDo."""
    request = read_json(run.end)
    if request and (stage == stages.PREPARE.name or request.get("reason") == "cancel"):
        raise NothingToDo(f"the run was ended by galley {request.get('reason')}")
    attempts = run.attempts()
    attempt = run.attempt(0) if stage == stages.PREPARE.name or not attempts else attempts[-1]
    if stage == stages.EXPORT.name and attempt.number == 0:
        raise NothingToDo("nothing was trained yet")
    if stage == stages.EXPORT.name and not step and chain.is_beforehand(run):
        _check_trained(attempt)
    if stage == stages.PREPARE.name:
        attempt.exit.unlink(missing_ok=True)
    here = allocation()
    for error in (attempt.root / "errors").glob(f"{stage}.json"):
        error.unlink()
    record = JobRecord(job=here.job, nodes=here.nodes) if stage == stages.PREPARE.name else None
    why_not = successor.may_submit(run) if stage == stages.PREPARE.name else ""
    return _open(attempt, record, {"GALLEY_EXPORT_STEP": step or "last"}, why_not)


def _check_trained(attempt: Attempt) -> None:
    """Raise NothingToDo where the last job of a chain, which exports, has nothing to export."""
    end = read_exit(attempt.exit) or ExitRecord()
    if end.verdict != "done":
        state = end.message or end.reason or "it left no record"
        raise NothingToDo(f"the run is not done, so nothing is exported: attempt {attempt.number}: {state}")
    if end.exported:
        raise NothingToDo("the run is exported")


def missing_secrets(run: RunDir) -> str:
    """A line on secrets that ``galley submit`` had but that did not reach this job; or nothing."""
    try:
        given = json.loads((run.jobs / chain.SECRETS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    lost = [str(name) for name in given if str(name) not in os.environ] if isinstance(given, list) else []
    if not lost:
        return ""
    path = str(chain.cluster(run).get("secrets_file", ""))
    why = "cannot be read" if os.path.exists(path) else "does not exist"  # noqa: PTH110 - False where it may not be read
    return (
        f"galley: secrets: {', '.join(lost)} of galley submit did not reach the job: {path} {why} on this node; set "
        "XDG_CONFIG_HOME to a private folder that nodes can read, and submit again"
    )


def _open(attempt: Attempt, record: JobRecord | None, more: dict[str, str], why_not: str = "") -> Path:
    """Make the attempt's directories, write ``job.json`` and the shell's variables. ``why_not``: no job can follow."""
    here = allocation()
    for folder in (attempt.logs, attempt.stop.parent, attempt.root / "errors", attempt.preflight, attempt.heartbeats):
        folder.mkdir(parents=True, exist_ok=True)
    # The mode is given as the file is made: never is there a moment in which others can read the secret.
    with contextlib.suppress(FileExistsError):
        attempt.secret.touch(0o600, exist_ok=False)
        attempt.secret.write_text(secrets.token_hex(16), encoding="ascii")
    if record is not None:
        write_job(attempt.job, replace(record, no_successor=why_not or None))
    if why_not and not slurm.SlurmError(why_not).is_transient:
        successor.advise(attempt, why_not)
    shell = {
        "GALLEY_ATTEMPT": str(attempt.number),
        "GALLEY_ATTEMPT_DIR": str(attempt.root),
        "GALLEY_LOGS": str(attempt.logs).replace("%", "%%"),  # srun fills in what follows a percent sign
        "GALLEY_PORT": str(here.port),
        "GALLEY_RENDEZVOUS": f"{here.job}.{here.restart}",
        **more,
    }
    lost = missing_secrets(RunDir(attempt.root.parent.parent))
    if lost:
        print(lost, flush=True)
        with attempt.log("job").open("a", encoding="utf-8") as log:
            log.write(f"{lost}\n")
    path = attempt.root / "job.env"
    write_atomic(path, "".join(f"export {key}={shlex.quote(value)}\n" for key, value in shell.items()))
    return path
