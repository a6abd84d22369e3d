"""Talking to Slurm: ask about jobs, partitions and nodes; submit, change, signal and cancel jobs.

Runs on login nodes and inside jobs. Every call has a time-out, an environment of its own, and times in UTC.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from galley.contract.sensitive import is_withheld
from galley_launch.job.slurm_parse import (
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    Job,
    SlurmError,
    hostnames,
    id_from_sbatch,
    jobs_from_sacct,
    jobs_from_squeue,
    start_from_test,
)
from galley_launch.job.slurm_sinfo import SINFO_FIELDS, Partition, partitions_from_sinfo, states_from_sinfo

__all__ = [
    "Job",
    "Partition",
    "SlurmError",
    "hostnames",
]  # those of other modules; what is defined here is public by its name

_NO_ANSWER = "no answer from Slurm's controller"  # what scontrol of 22.05 calls an "unexpected message"
_ASK_S = 10.0
# Longer than a question's: sbatch itself tries again while the controller restarts.
_CHANGE_S = 60.0

# Variables of a job or a launcher around this process, and those with which a user's shell changes the commands' output
# (SQUEUE_FORMAT, SLURM_TIME_FORMAT): the parsers below need the default.
_FOREIGN = re.compile(
    r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SACCT|SCONTROL|SCANCEL|PMI|OMPI_|MASTER_|TORCHELASTIC_)\w*"
    r"|(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME"
)
_KEPT = re.compile(r"HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|PATH|TERM|SLURM_CONF|XDG_\w+|TZ")


def environment() -> dict[str, str]:
    """The environment of every command: this process's, without jobs' and launchers' variables and without secrets."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not (_FOREIGN.fullmatch(name) or is_withheld(name, value))
    }
    return {**kept, "TZ": "UTC"}  # the commands print local time without its zone


def submit_environment() -> dict[str, str]:
    """The environment of sbatch, which passes it on to the job: the user's name, home, shell and locale, no more."""
    return {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name) and not is_withheld(name, value)}


# How Slurm's commands begin a refusal, and how sites' wrappers and plug-ins word one.
_PREFIXED = re.compile(
    r"^(?:\S*(?:sbatch|squeue|sacct|sinfo|scancel|scontrol|srun): )?(?:error|fatal): |^allocation failure"
)
_REFUSING = re.compile(
    r"error|fatal|fail|unrecognized|denied|disabled|cannot|can't|may not|must not|not (?:be |)(?:allowed|permitted)"
    r"|refuse|reject|invalid|forbidden|exceed|unable|login node",
    re.IGNORECASE,
)
_SHOWN = 500
"""Characters of such an error that are shown."""


def _complaint(command: str, text: str, status: int) -> str:
    """A command's error in one line: its own error lines, else the lines that refuse, else the last line.

    A site's banner may stand before and after these, on either stream.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if _PREFIXED.search(line)]
    # Without the frame of a banner, and without hints such as "Try sbatch --help".
    plain = [line for line in lines if line[0] not in "*#=|+~-_" and not line.startswith("Try ")] or lines
    reasons = errors or [line for line in plain if _REFUSING.search(line) or line is plain[-1]]
    reasons = [re.sub(rf"^(\S*{command}: )?(error: |fatal: )?", "", line) for line in reasons]
    reasons = [_NO_ANSWER if line.startswith("Unexpected message received") else line for line in reasons]
    reasons = list(dict.fromkeys(reasons))  # each once, in order: sbatch repeats itself while it tries again
    while len(reasons) > 1 and len("; ".join(reasons)) > _SHOWN:  # the reason stands last
        del reasons[0]
    return f"{command}: {'; '.join(reasons)[:_SHOWN] or f'exit status {status}'}"


def _run(command: Sequence[str], environ: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=environ,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise SlurmError(f"{command[0]}: no such command here") from None
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer from Slurm within {timeout:g} s") from None


def _environment_for(cluster: str) -> dict[str, str]:
    """The environment of a command that asks another cluster of a federation than this host's own."""
    return {**environment(), "SLURM_CLUSTERS": cluster} if cluster else environment()


def _ask(command: Sequence[str], cluster: str = "") -> str:
    """The output of a command that changes nothing. Raises SlurmError where it fails."""
    result = _run(command, _environment_for(cluster), _ASK_S)
    if result.returncode:
        raise SlurmError(_complaint(command[0], result.stderr, result.returncode))
    return result.stdout


def _queue(ids: Sequence[str], cluster: str) -> dict[str, Job]:
    """Jobs that the controller still has: that wait, run or ended minutes ago (slurm.conf(5), MinJobAge)."""
    # ":|" sets no width, so nothing is cut, and ends the column with "|".
    fields = ",".join(f"{field}:|" for field in SQUEUE_FIELDS)
    command = ["squeue", "-h", "-a", "-t", "all", "-j", ",".join(ids), "-O", fields]
    result = _run(command, _environment_for(cluster), _ASK_S)
    # squeue leaves out an unknown id among several, but fails where it is the only one.
    if result.returncode and "Invalid job id" not in result.stderr:
        raise SlurmError(_complaint("squeue", result.stderr, result.returncode))
    return jobs_from_squeue(result.stdout)


def _accounted(ids: Sequence[str], cluster: str) -> dict[str, Job]:
    """Jobs that accounting has; none where a site has no accounting."""
    # -X leaves out the steps of a job, --parsable2 the padding of columns.
    command = ["sacct", "-n", "-X", "--parsable2", "-j", ",".join(ids), "-o", ",".join(SACCT_FIELDS)]
    try:
        text = _ask(command, cluster)
    except SlurmError as error:
        if re.search(r"storage is disabled|no such command", str(error)):
            return {}
        raise
    return jobs_from_sacct(text)


def jobs(ids: Sequence[str], cluster: str = "") -> dict[str, Job]:
    """The jobs that Slurm knows, by id: one call of squeue, and one of sacct for those that squeue has forgotten.

    Raises:
        SlurmError: no answer within 10 seconds, or a refusal. That says nothing about the jobs.
    """
    wanted = list(dict.fromkeys(ids))
    if not wanted:
        return {}
    known = _queue(wanted, cluster)
    # Accounting is asked last, for the rest only: its records lag behind the controller's.
    missing = [job_id for job_id in wanted if job_id not in known]
    if missing:
        known.update(_accounted(missing, cluster))
    return {job_id: known[job_id] for job_id in wanted if job_id in known}


def jobs_named(name: str) -> dict[str, Job]:
    """This user's jobs of that name which wait or run, by id. Raises SlurmError as :func:`jobs` does."""
    fields = ",".join(f"{field}:|" for field in SQUEUE_FIELDS)
    own_jobs = jobs_from_squeue(_ask(["squeue", "-h", "-a", "-u", str(os.getuid()), "-n", name, "-O", fields]))
    return {job_id: job for job_id, job in own_jobs.items() if job.name == name and not job.is_over()}


def job(job_id: str) -> Job | None:
    """The job, or None where neither the controller nor accounting knows it. Raises SlurmError as :func:`jobs` does."""
    return jobs([job_id]).get(job_id)


def now_left(job: Job, now: float | None = None) -> float | None:
    """Seconds until a running job's limit ends it, from 0 up; None: it does not run, or has no limit."""
    if job.state != "RUNNING" or job.end is None:
        return None
    return max(0.0, job.end - (time.time() if now is None else now))


def submit(script: Path, options: Sequence[str] = (), arguments: Sequence[str] = ()) -> str:
    """Submit ``script`` and return the job's id.

    Raises:
        SlurmError: refused; or no answer within 60 seconds, after which the job may or may not be there.
    """
    command = ["sbatch", "--parsable", *options, str(script), *arguments]
    result = _run(command, submit_environment(), _CHANGE_S)
    job_id = id_from_sbatch(result.stdout)
    if result.returncode or not job_id:
        raise SlurmError(_complaint("sbatch", f"{result.stdout}\n{result.stderr}", result.returncode))
    return job_id


def test_only(script: Path, options: Sequence[str] = ()) -> float | None:  # noqa: PT028 - not a test
    """Have Slurm check ``script`` without submitting it: when it would start (seconds since the epoch; None: unknown).

    Raises:
        SlurmError: Slurm would refuse it, with Slurm's reason.
    """
    command = ["sbatch", "--test-only", *options, str(script)]
    result = _run(command, {**submit_environment(), "TZ": "UTC"}, _CHANGE_S)
    if result.returncode:
        raise SlurmError(_complaint("sbatch", f"{result.stdout}\n{result.stderr}", result.returncode))
    return start_from_test(result.stderr + result.stdout)


def _scancel(options: Sequence[str], ids: Sequence[str], cluster: str = "") -> None:
    result = _run(["scancel", *options, *ids], _environment_for(cluster), _CHANGE_S)
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    # A job that has ended, or that Slurm has forgotten, needs no cancelling.
    bad = [line for line in lines if not re.search(r"Invalid job id|already complet", line)]
    if bad or (result.returncode and not lines):
        raise SlurmError(_complaint("scancel", "\n".join(bad) or result.stderr, result.returncode))


def cancel(ids: Sequence[str], cluster: str = "") -> None:
    """Cancel jobs: those that run get SIGTERM and, after the site's KillWait (slurm.conf(5)), SIGKILL.

    Raises:
        SlurmError: refused (another user's job), or no answer. Jobs that are over already are no error.
    """
    if ids:
        _scancel(("--quiet",), ids, cluster)


def signal(job_id: str, name: str, batch: bool) -> None:
    """Send signal ``name`` (``USR1``) to the batch script's shell only, or else to the tasks of every step.

    Raises:
        SlurmError: refused, or no answer. A job that is over is no error.
    """
    # Without --batch, scancel signals every step but not the batch shell (scancel(1)).
    options = [f"--signal={name}"]
    if batch:
        options.append("--batch")
    _scancel(options, (job_id,))


def update(job_id: str, **fields: str) -> None:
    """Change a job: ``update("7", TimeLimit="60", ExcNodeList="node3")``. Raises SlurmError where Slurm refuses."""
    changes = [f"{name}={value}" for name, value in fields.items()]
    result = _run(["scontrol", "update", f"JobId={job_id}", *changes], environment(), _CHANGE_S)
    if result.returncode:
        raise SlurmError(_complaint("scontrol", result.stderr, result.returncode))


def partitions(cluster: str = "") -> list[Partition]:
    """The partitions that this user can see, in Slurm's order. Raises SlurmError where there is no answer."""
    return partitions_from_sinfo(_ask(["sinfo", "-h", "-e", "--noconvert", "-o", "|".join(SINFO_FIELDS)], cluster))


def node_states(nodes: Sequence[str]) -> dict[str, str]:
    """States of the nodes that exist: ``IDLE``, ``MIXED``, ``DRAINED``, ``DOWN*`` (does not answer), ..."""
    if not nodes:
        return {}
    return states_from_sinfo(_ask(["sinfo", "-h", "-a", "-N", "-n", ",".join(nodes), "-o", "%N|%T"]))


def version() -> tuple[int, int] | None:
    """Slurm's version here, such as (22, 5); None: no Slurm, or an answer that has no version."""
    try:
        text = _ask(["sinfo", "--version"])
    except SlurmError:
        return None
    match = re.search(r"^slurm\S*\s+(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(match.group(1)), int(match.group(2))) if match else None
