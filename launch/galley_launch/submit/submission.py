"""Submit a run to a cluster: check, write its files, copy the code into it, hand the job scripts to ``sbatch``."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import galley
import galley_launch
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir, fsync_path, write_atomic
from galley.contract.spec import RunSpec
from galley_launch.base import assets, locks
from galley_launch.base.terminal import say
from galley_launch.cluster.profile import Cluster, seconds
from galley_launch.job import chain, slurm
from galley_launch.plan import resume
from galley_launch.submit import clusters, environments, refusals, scripts
from galley_launch.submit.job_requests import JobRequest, Submission


def code() -> dict[str, Path]:
    """Every file that jobs run, by its path in the run's ``code/``: all of ``galley``, and of the launcher ``job/``."""
    package = Path(str(galley_launch.__file__)).parent
    packages = {"galley": Path(str(galley.__file__)).parent, "galley_launch/job": package / "job"}
    sources = {"galley_launch/__init__.py": package / "__init__.py"}
    sources |= {name: assets.folder("slurm") / name for name in ("node.sh", "verdict.py")}
    for name, folder in packages.items():
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        sources |= {f"{name}/{path.relative_to(folder)}": path for path in files}
    return dict(sorted(sources.items()))


def _needs_preparing(run: RunDir, old: RunSpec | None, new: RunSpec) -> bool:
    """Whether the data have to be prepared; ``old``: what the data in ``run`` were prepared for, if there are any."""
    if old is None or not run.data_manifest.is_file():
        return True
    # How long a run trains is the one part of the task that leaves the prepared data as they are.
    return old.task.model_copy(update={"duration": new.task.duration}) != new.task


def make(
    spec: RunSpec, run: RunDir, old: RunSpec | None, name: str, cluster: Cluster, action: resume.NextAction
) -> Submission:
    """The files of the run and the jobs to submit, one for each stage that is left.

    ``old``: the spec that ``run`` holds already; ``name``: the cluster's; ``action``: where the run continues.
    """
    if action.what == "nothing":
        return Submission({}, ())
    files = scripts.scripts(spec, run, cluster) | {"cluster.json": scripts.facts(run, name, cluster, action.attempt)}
    files |= {"run.json": spec.to_json()}
    if action.what == "export":
        return Submission(files, (_export(run, cluster),))
    options = (*_federated(cluster), *chain.options(run, seconds(cluster.time), None))
    train = JobRequest("train", _script(run, "train"), options)
    jobs = [train]
    if cluster.side.prepare == "job" and _needs_preparing(run, old, spec):
        jobs.insert(0, JobRequest("prepare", _script(run, "prepare"), _federated(cluster)))
    if cluster.chain == "login":
        # Nodes cannot submit there, so all attempts are queued now. One that finds nothing left to do ends at once.
        jobs += [replace(train, follows=True) for _ in range(cluster.attempts - 1)]
        jobs.append(replace(_export(run, cluster), follows=True))
    return Submission(files, tuple(jobs))


def _export(run: RunDir, cluster: Cluster) -> JobRequest:
    return JobRequest("export", _script(run, "export"), _federated(cluster))


def _script(run: RunDir, stage: str) -> Path:
    return run.jobs.absolute() / f"{stage}.sbatch"


def _federated(cluster: Cluster) -> tuple[str, ...]:
    """The option that sends a job to another cluster.

    It is not in the script: a job submits its successor on its own nodes, which belong to that cluster already.
    """
    return (f"--clusters={cluster.clusters}",) if cluster.clusters else ()


def check(run: RunDir, cluster: Cluster, submission: Submission) -> list[str]:
    """Raise ``UserError`` for what can be checked before anything is queued; returns what may go wrong, a line each."""
    refuse_if_queued(run)
    if locks.is_live(run):
        raise locks.in_use(run)
    notes = environments.check(cluster)
    # Attempts that are queued beforehand have the same script as the first.
    jobs = [job for job in submission.jobs if not job.follows]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        tests = []
        for job in jobs:
            path = Path(folder) / f"{job.stage}.sbatch"
            path.write_text(submission.script(job), encoding="utf-8")
            # sbatch --test-only may take seconds each, so they run at the same time.
            tests.append(pool.submit(slurm.test_only, path, job.options))
        for job, test in zip(jobs, tests, strict=True):
            try:
                test.result()
            except slurm.SlurmError as error:
                raise _refusal(job, submission.script(job), error, cluster) from None
    return [*notes, *_against_sinfo(cluster, [job.stage for job in submission.jobs])]


def _against_sinfo(cluster: Cluster, stages: Sequence[str]) -> list[str]:
    """What sbatch accepts although no node can run it, by what sinfo lists, a line each.

    Raises ``UserError`` for a time limit that no partition allows.
    """
    try:
        partitions = slurm.partitions(cluster.clusters or "")
    except slurm.SlurmError:
        return []
    if not partitions:
        return []
    # A QOS may override its partition's limit (sacctmgr(1), flag PartitionTimeLimit), and sinfo does not show it.
    for limit in refusals.too_long(cluster, stages, partitions) if not cluster.qos else ():
        what = f"{limit.time} is more than partition {limit.partition} allows, {limit.allowed}"
        todo = f"write {limit.key}={limit.allowed}, or another partition"
        raise UserError(limit.key, f"{what}: the job would wait for ever", todo)
    return [f"against sinfo: {problem}" for problem in clusters.check(cluster, partitions)]


def refuse_if_queued(run: RunDir) -> None:
    """Raise ``UserError`` where jobs of the run wait or run."""
    if not run.submitted.is_file():
        return
    try:
        live = chain.live(run)
    except slurm.SlurmError as error:
        todo = f"try again where Slurm answers, or remove {run.submitted} if none of its jobs is left"
        raise UserError("slurm", str(error), todo) from None
    if live:
        jobs = ", ".join(f"{job.id} ({job.state})" for job in live)
        todo = f"galley stop {run.root} (or cancel) ends them, then try again"
        raise UserError(str(run.root), f"is in the queue: job {jobs}", todo)


def write(files: dict[str, str], run: RunDir, shared: Sequence[str]) -> None:
    """Write ``files`` and the code into the run, and create the ``shared`` directories. Raises ``UserError``."""
    for directory in shared:
        _create(directory)
    try:
        (run.jobs / "logs").mkdir(
            parents=True, exist_ok=True
        )  # where it is missing, Slurm fails a job without any message
        _freeze(run)
        for name, text in files.items():
            write_atomic(run.root / name, text)
        # A stop or cancel of an earlier submission would end the new jobs as they begin.
        run.end.unlink(missing_ok=True)
        # The job may begin on another node at once: its script must be on the shared disk before sbatch returns.
        fsync_path(run.jobs)
    except OSError as error:
        todo = "make room, or runs=DIRECTORY"
        raise UserError(str(run.root), f"cannot be written to ({error.strerror})", todo) from None


def _create(directory: str) -> None:
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = "name a directory that you can write to: cluster.cache=DIRECTORY, or HF_HOME"
        raise UserError(directory, f"cannot be made ({error.strerror})", todo) from None


def _freeze(run: RunDir) -> None:
    """Copy the code into the run, so that edits made while a job waits do not reach it."""
    # Complete before it takes the old one's place; nothing runs the old code, as no job of the run is in the queue.
    new = run.root / ".code.new"
    shutil.rmtree(new, ignore_errors=True)
    for name, source in code().items():
        target = new / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    shutil.rmtree(run.code, ignore_errors=True)
    new.rename(run.code)


def keep_secrets(run: RunDir, names: Sequence[str]) -> list[str]:
    """Write those of the variables ``names`` that are set to the run's private file; returns their names.

    Raises ``UserError`` where it cannot be written. No message shows a value.
    """
    path, given = scripts.secrets_file(run), [name for name in names if os.environ.get(name)]
    text = "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in given)
    names_file = run.jobs / chain.SECRETS
    try:
        path.unlink(missing_ok=True)
        names_file.unlink(missing_ok=True)
        if given:
            # The names go into the run, so that a job can tell when the private file does not reach its node.
            names_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(names_file, json.dumps(given))
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.chmod(0o700)  # mkdir leaves the mode of a folder that exists
            # Created with its mode, and only if no file is there (O_EXCL): readable by nobody else at any moment.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.fsencode(text))
    except OSError as error:
        todo = "jobs read the secrets there; set XDG_CONFIG_HOME to a private folder that nodes can read"
        raise UserError(str(path), f"cannot be written to ({error.strerror})", todo) from None
    return given


def _refusal(job: JobRequest, script: str, error: slurm.SlurmError, cluster: Cluster) -> UserError:
    return refusals.refusal(job, script, error, cluster.clusters or "", cluster.side.partition)


def submit(run: RunDir, submission: Submission, cluster: str = "") -> list[tuple[str, str]]:
    """Submit each job; returns (number, stage) of each.

    Raises ``UserError`` where one is refused; those that were queued before it are cancelled then.
    """
    queued: list[tuple[str, str]] = []
    run = RunDir(run.root.absolute())
    for job in submission.jobs:
        previous = queued[-1][0] if queued else ""
        try:
            queued.append((chain.submit(run, job.stage, job.options_after(previous)), job.stage))
        except slurm.SlurmError as error:
            rest = _cancel([number for number, _ in queued], cluster)
            refusal = refusals.refusal(job, submission.script(job), error, cluster)
            raise UserError(refusal.where, refusal.what, f"{refusal.todo}; {rest}") from None
    return queued


def _cancel(ids: list[str], cluster: str) -> str:
    """Cancel jobs; returns what the user has to do after that, or that there is nothing."""
    try:
        slurm.cancel(ids, cluster)
    except slurm.SlurmError:
        return f"end what was queued before it: scancel {' '.join(ids)}"
    return "nothing is left in the queue"


def _prepare_here(spec: RunSpec, run: RunDir, cluster: Cluster) -> None:
    """Prepare on this host, with the script that a job's node would run. Raises ``UserError`` where that fails."""
    attempt = run.attempt(0)
    attempt.logs.mkdir(parents=True, exist_ok=True)
    variables = scripts.environment(spec, run, cluster, "prepare") | {"GALLEY_ATTEMPT": "0"}
    variables |= {"GALLEY_ATTEMPT_DIR": str(attempt.root)}
    variables.pop("GALLEY_SCRATCH_PATTERN", None)  # its variables are those of a job, which are not set here
    process = subprocess.run(["bash", str(run.code / "node.sh"), "prepare"], env=os.environ | variables, check=False)
    if process.returncode:
        raise UserError("prepare", f"ended with status {process.returncode} (above)", "fix that; nothing was queued")


def export(spec: RunSpec, run: RunDir, name: str, cluster: Cluster, step: str) -> int:
    """Submit a job that exports the checkpoint of ``step``. Returns the exit status."""
    refuse_if_queued(run)
    environments.check(cluster)
    script = scripts.scripts(spec, run, cluster)["jobs/export.sbatch"]
    files = {"jobs/export.sbatch": script, "cluster.json": scripts.facts(run, name, cluster, len(run.attempts()) + 1)}
    write(files, run, scripts.shared(spec, scripts.environment(spec, run, cluster, "export")))
    keep_secrets(run, cluster.secrets)
    job = _export(run, cluster)
    try:
        number = chain.submit(RunDir(run.root.absolute()), job.stage, job.options, [step])
    except slurm.SlurmError as error:
        raise _refusal(job, script, error, cluster) from None
    say(f"submitted the export of run {run.root.name}, step {step}: job {number}")
    return 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def start(spec: RunSpec, run: RunDir, cluster: Cluster, submission: Submission) -> int:
    """Check, write and submit. Returns the exit status. Raises ``UserError``."""
    notes = check(run, cluster, submission)
    # All files are there before the first job is: it may begin before this function ends.
    write(submission.files, run, scripts.shared(spec, scripts.environment(spec, run, cluster, "train")))
    keep_secrets(run, cluster.secrets)
    for note in notes:
        print(f"galley: note: {note}", file=sys.stderr, flush=True)
    if cluster.side.prepare == "here" and submission.jobs[0].stage == "train":
        _prepare_here(spec, run, cluster)
    queued = submit(run, submission, cluster.clusters or "")
    placement = spec.placement
    ids = ", then ".join(f"{job} ({stage})" for job, stage in queued)
    kind = "CPU rank" if placement.device == "cpu" else "GPU"
    size = f"{_count(placement.nodes, 'node')} of {_count(placement.ranks_per_node, kind)}"
    say(f"submitted run {spec.name} on {size}: job {ids}")
    say(f"  galley status {run.root}    how it is")
    say(f"  galley logs {run.root}      what it prints")
    return 0
