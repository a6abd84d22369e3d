"""Submit a run to a cluster: check, write, freeze the code, hand the job scripts to ``sbatch``."""

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
from galley_launch.submit.requests import JobRequest, Submission


def code() -> dict[str, Path]:
    """What a job runs, by path in the run's ``code/``: the data plane, and the job's own decisions."""
    package = Path(str(galley_launch.__file__)).parent
    packages = {"galley": Path(str(galley.__file__)).parent, "galley_launch/job": package / "job"}
    sources = {"galley_launch/__init__.py": package / "__init__.py"}
    sources |= {name: assets.folder("slurm") / name for name in ("node.sh", "verdict.py")}
    for name, folder in packages.items():
        files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        sources |= {f"{name}/{path.relative_to(folder)}": path for path in files}
    return dict(sorted(sources.items()))


def _needs_preparing(run: RunDir, old: RunSpec | None, new: RunSpec) -> bool:
    if old is None or not run.data_manifest.is_file():
        return True
    return old.task.model_copy(update={"duration": new.task.duration}) != new.task


def make(
    spec: RunSpec, run: RunDir, old: RunSpec | None, name: str, cluster: Cluster, action: resume.NextAction
) -> Submission:
    """The files of the run and the jobs to submit, one a stage. ``old``: what ``run`` holds already."""
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
    if cluster.chain == "login":  # All attempts are submitted beforehand: jobs cannot submit any.
        jobs += [replace(train, follows=True)] * (cluster.attempts - 1)
        jobs.append(replace(_export(run, cluster), follows=True))
    return Submission(files, tuple(jobs))


def _export(run: RunDir, cluster: Cluster) -> JobRequest:
    return JobRequest("export", _script(run, "export"), _federated(cluster))


def _script(run: RunDir, stage: str) -> Path:
    return run.jobs.absolute() / f"{stage}.sbatch"


def _federated(cluster: Cluster) -> tuple[str, ...]:
    """Not in the script: a job's successor is submitted where the job runs."""
    return (f"--clusters={cluster.clusters}",) if cluster.clusters else ()


def check(run: RunDir, cluster: Cluster, todo: Submission) -> list[str]:
    """Raise ``UserError`` for what can be known before anything is queued; returns what may go wrong, a line each."""
    refuse_if_queued(run)
    if locks.is_live(run):
        raise locks.in_use(run)
    notes = environments.check(cluster)
    jobs = [job for job in todo.jobs if not job.follows]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        tests = []
        for job in jobs:
            path = Path(folder) / f"{job.stage}.sbatch"
            path.write_text(todo.script(job), encoding="utf-8")
            tests.append(pool.submit(slurm.test_only, path, job.options))
        for job, test in zip(jobs, tests, strict=True):
            try:
                test.result()
            except slurm.SlurmError as error:
                raise _refusal(job, todo.script(job), error, cluster) from None
    return [*notes, *_against_sinfo(cluster, [job.stage for job in todo.jobs])]


def _against_sinfo(cluster: Cluster, stages: Sequence[str]) -> list[str]:
    """What sbatch takes, but sinfo says cannot run: raises ``UserError`` for a time that no partition allows."""
    try:
        partitions = slurm.partitions(cluster.clusters or "")
    except slurm.SlurmError:
        return []
    if not partitions:
        return []
    for key, what in refusals.too_long(cluster, stages, partitions):
        if not cluster.qos:  # which may allow more
            limit = what.rpartition(" ")[2]
            raise UserError(key, f"{what}: the job would wait for ever", f"write {key}={limit}, or another partition")
    return [f"against sinfo: {problem}" for problem in clusters.check(cluster, partitions)]


def refuse_if_queued(run: RunDir) -> None:
    """Raise ``UserError`` where jobs of the run wait or run."""
    if not run.submitted.is_file():
        return
    try:
        there = chain.live(run)
    except slurm.SlurmError as error:
        todo = f"try again where Slurm answers, or remove {run.submitted} if none of its jobs is left"
        raise UserError("slurm", str(error), todo) from None
    if there:
        jobs = ", ".join(f"{job.id} ({job.state})" for job in there)
        todo = f"galley stop {run.root} (or cancel) ends them, then try again"
        raise UserError(str(run.root), f"is in the queue: job {jobs}", todo)


def write(files: dict[str, str], run: RunDir, shared: Sequence[str]) -> None:
    """Write ``files`` and the code into the run, and make ``shared`` directories. Raises ``UserError``."""
    for directory in shared:
        _make(directory)
    try:
        (run.jobs / "logs").mkdir(parents=True, exist_ok=True)  # Slurm fails without a word where it is missing.
        _freeze(run)
        for name, text in files.items():
            write_atomic(run.root / name, text)
        run.end.unlink(missing_ok=True)
        fsync_path(run.jobs)
    except OSError as error:
        todo = "make room, or runs=DIRECTORY"
        raise UserError(str(run.root), f"cannot be written to ({error.strerror})", todo) from None


def _make(directory: str) -> None:
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        todo = "name a directory that you can write to: cluster.cache=DIRECTORY, or HF_HOME"
        raise UserError(directory, f"cannot be made ({error.strerror})", todo) from None


def _freeze(run: RunDir) -> None:
    """Copy the code into the run: what is edited while the job waits changes nothing."""
    fresh = run.root / ".code.new"
    shutil.rmtree(fresh, ignore_errors=True)
    for name, source in code().items():
        target = fresh / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    shutil.rmtree(run.code, ignore_errors=True)
    fresh.rename(run.code)


def keep_secrets(run: RunDir, names: Sequence[str]) -> list[str]:
    """Write the named variables, as far as they are set, to the run's private file; returns the names.

    Raises ``UserError`` where it cannot be written. No message shows a value.
    """
    path, given = scripts.secrets_file(run), [name for name in names if os.environ.get(name)]
    text = "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in given)
    named = run.jobs / chain.SECRETS
    try:
        path.unlink(missing_ok=True)
        named.unlink(missing_ok=True)
        if given:
            named.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(named, json.dumps(given))  # their names, so that a job can miss them
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.chmod(0o700)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(os.fsencode(text))
    except OSError as error:
        todo = "jobs read the secrets there; set XDG_CONFIG_HOME to a private folder that nodes can read"
        raise UserError(str(path), f"cannot be written to ({error.strerror})", todo) from None
    return given


def _refusal(job: JobRequest, script: str, error: slurm.SlurmError, cluster: Cluster) -> UserError:
    return refusals.refusal(job, script, error, cluster.clusters or "", cluster.side.partition)


def submit(run: RunDir, todo: Submission, cluster: str = "") -> list[tuple[str, str]]:
    """Submit each job; returns (number, stage) of each. Raises ``UserError``; what was queued by then is cancelled."""
    queued: list[tuple[str, str]] = []
    run = RunDir(run.root.absolute())
    for job in todo.jobs:
        previous = queued[-1][0] if queued else ""
        try:
            queued.append((chain.submit(run, job.stage, job.options_after(previous)), job.stage))
        except slurm.SlurmError as error:
            left = _take_back([number for number, _ in queued], cluster)
            refusal = refusals.refusal(job, todo.script(job), error, cluster)
            raise UserError(refusal.where, refusal.what, f"{refusal.todo}; {left}") from None
    return queued


def _take_back(ids: list[str], cluster: str) -> str:
    """Cancel jobs; returns what is left to do."""
    try:
        slurm.cancel(ids, cluster)
    except slurm.SlurmError:
        return f"end what was queued before it: scancel {' '.join(ids)}"
    return "nothing is left in the queue"


def _prepare_here(spec: RunSpec, run: RunDir, cluster: Cluster) -> None:
    """Prepare on this host, as the job would. Raises ``UserError`` where that fails; nothing is queued then."""
    attempt = run.attempt(0)
    attempt.logs.mkdir(parents=True, exist_ok=True)
    variables = scripts.environment(spec, run, cluster, "prepare") | {"GALLEY_ATTEMPT": "0"}
    variables |= {"GALLEY_ATTEMPT_DIR": str(attempt.root)}
    variables.pop("GALLEY_SCRATCH_PATTERN", None)  # of a job's variables, which nobody has here
    done = subprocess.run(["bash", str(run.code / "node.sh"), "prepare"], env=os.environ | variables, check=False)
    if done.returncode:
        raise UserError("prepare", f"ended with status {done.returncode} (above)", "fix that; nothing was queued")


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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def start(spec: RunSpec, run: RunDir, cluster: Cluster, todo: Submission) -> int:
    """Check, write and submit. Returns the exit status."""
    notes = check(run, cluster, todo)
    write(todo.files, run, scripts.shared(spec, scripts.environment(spec, run, cluster, "train")))
    keep_secrets(run, cluster.secrets)
    for note in notes:
        print(f"galley: note: {note}", file=sys.stderr, flush=True)
    if cluster.side.prepare == "here" and todo.jobs[0].stage == "train":
        _prepare_here(spec, run, cluster)
    queued = submit(run, todo, cluster.clusters or "")
    place = spec.placement
    ids = ", then ".join(f"{job} ({stage})" for job, stage in queued)
    kind = "CPU rank" if place.device == "cpu" else "GPU"
    size = f"{_count(place.nodes, 'node')} of {_count(place.ranks_per_node, kind)}"
    say(f"submitted run {spec.name} on {size}: job {ids}")
    say(f"  galley status {run.root}    how it is")
    say(f"  galley logs {run.root}      what it prints")
    return 0
