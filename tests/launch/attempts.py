"""Attempts of a submitted run as they leave their files, without a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import Attempt, RunDir
from galley_launch.job import begin

CLUSTER: dict[str, Any] = {"name": "x", "limit_s": 3600, "first_attempt": 1, "attempts": 20, "gpu_hours": None}
CLUSTER |= {"exclude_hours": 24.0, "secrets_file": ""}
BUG = "Traceback (most recent call last):\n  File \"/x/train.py\", line 3, in f\nKeyError: 'loss'\n"
STOPPED = {"verdict": "stopped", "reason": "walltime", "again": True, "checkpoint": 0, "last_step": 0, "ended": 2e9}
DONE = {"verdict": "done", "reason": "finished", "again": False}
PLACEMENT = {"nodes": 2, "ranks_per_node": 4}


def submitted(root: Path, **cluster: Any) -> RunDir:
    """A run that was submitted and whose data is prepared."""
    run = RunDir(root)
    run.jobs.mkdir(parents=True)
    for stage in ("prepare", "train", "export"):
        (run.jobs / f"{stage}.sbatch").write_text("#!/bin/bash\n")
    run.data.mkdir()
    run.data_manifest.write_text("{}")
    run.spec.write_text(json.dumps({"placement": PLACEMENT}))
    run.cluster.write_text(json.dumps(CLUSTER | cluster))
    return run


def attempted(
    run: RunDir,
    number: int = 1,
    *,
    said: dict[str, Any] | None = None,
    stop: str | None = None,
    facts: dict[str, Any] | None = None,
    errors: list[dict[str, Any]] | None = None,
    **logs: str,
) -> Attempt:
    """An attempt that ranks ``said`` something about, that was asked to ``stop``, and what its job left."""
    attempt = run.attempt(number)
    for folder in (attempt.logs, attempt.root / "errors", attempt.stop.parent, attempt.preflight):
        folder.mkdir(parents=True, exist_ok=True)
    begun = {"job": str(100 + number), "nodes": ["n1", "n2"], "ranks": 8, "checkpoint": 0, "started": 1e9}
    attempt.job.write_text(json.dumps(begun | (facts or {})))
    if said is not None:
        attempt.exit.write_text(json.dumps(said))
    if stop:
        attempt.request_stop(stop)
    for error in errors or []:
        attempt.error(str(error["who"])).write_text(json.dumps({"time": 1.0, "host": "n1"} | error))
    for name, text in logs.items():
        attempt.log(name.replace("_", "-")).write_text(text)
    return attempt


def stepped(run: RunDir, steps: int, saved: int | None = None, **more: float) -> None:
    """Metrics up to ``steps``, and a checkpoint of ``saved``."""
    rows = (json.dumps({"step": step, **more}) + "\n" for step in range(1, steps + 1))
    run.metrics.write_text("".join(rows))
    if saved is not None:
        run.checkpoint(saved).root.mkdir(parents=True, exist_ok=True)
        run.checkpoint(saved).manifest.write_text('{"files": {}}')


def report(attempt: Attempt, node: str, *failed: str) -> None:
    """What a node's preflight found."""
    checks = [{"name": name, "ok": False, "detail": f"{name} is bad"} for name in failed]
    checks.append({"name": "exchange", "ok": True, "detail": "", "missing": [] if node == "n1" else None})
    body = {"node": node, "number": 0, "ok": not failed, "seconds": 1, "checks": checks}
    attempt.preflight.mkdir(parents=True, exist_ok=True)
    (attempt.preflight / f"{node}.json").write_text(json.dumps(body))


def raised(text: str, status: int = 1) -> list[dict[str, Any]]:
    """The error that rank 0 recorded of a log."""
    return [{"who": "rank-0", "status": status, "message": text.strip().splitlines()[-1]}]


@pytest.fixture
def run(tmp_path: Path, fakes: Scenario, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A submitted run, seen from job 500 on two nodes."""
    allocate(monkeypatch)
    return submitted(tmp_path / "run")


def allocate(
    patch: pytest.MonkeyPatch, job: str = "500", nodes: str = "n[1-2]", count: int = 2, restart: int = 0
) -> None:
    values = {"JOB_ID": job, "JOB_NODELIST": nodes, "JOB_NUM_NODES": str(count), "RESTART_COUNT": str(restart)}
    for name, value in values.items():
        patch.setenv(f"SLURM_{name}", value)


def training(run: RunDir) -> dict[str, Any]:
    """Begin; returns what the job wrote down of itself."""
    path = begin.begin_training(run)
    facts: dict[str, Any] = json.loads((path.parent / "job.json").read_text())
    return facts


def nothing(run: RunDir) -> str:
    """Why there is nothing to do; no attempt is begun."""
    before = [each.number for each in run.attempts()]
    with pytest.raises(begin.NothingToDo) as caught:
        begin.begin_training(run)
    assert [each.number for each in run.attempts()] == before
    return str(caught.value)


def changes(fakes: Scenario) -> list[str]:
    """What was done to the queue, in order."""
    found = [call for call in fakes.calls() if call["program"] in ("sbatch", "scancel", "scontrol")]
    return [" ".join([call["program"], *call["argv"]]) for call in found]
