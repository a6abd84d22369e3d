"""``galley logs`` of a submitted run comes to an end where Slurm does not answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from galley.contract.rundir import RunDir
from galley_launch.runs import runs
from galley_launch.submit import queue

SILENT = "squeue: no answer from Slurm within 10 s"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of one attempt that was submitted; the queue is asked at every look."""
    made = RunDir(tmp_path / "x")
    made.submitted.parent.mkdir(parents=True)
    made.submitted.write_text(json.dumps({"job": "7", "stage": "train", "time": 1.0}) + "\n")
    made.attempt(1).logs.mkdir(parents=True)
    made.attempt(1).log("rank-0").write_text("step 1/9\n")
    monkeypatch.setattr(queue, "_POLL_S", 0.0)
    return made


def follow(run: RunDir, monkeypatch: pytest.MonkeyPatch, problem: str, silence: float = 0.3) -> list[str]:
    monkeypatch.setattr(queue, "_SILENCE_S", silence)
    monkeypatch.setattr(queue, "query", lambda _: {run.root: queue.Queue(problem=problem)})
    shown: list[str] = []
    runs.follow(run, lambda: [run.attempt(1).log("rank-0")], shown.append, poll=0.05)
    return shown


def test_a_slurm_that_is_silent_for_long(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = follow(run, monkeypatch, SILENT)
    assert "step 1/9" in shown
    assert f"-- {SILENT}: it is not known whether the run goes on" in " ".join(shown)


def test_a_machine_without_slurm(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = follow(run, monkeypatch, "squeue: no such command here", silence=1e9)
    assert "is not known whether the run goes on" in " ".join(shown)


@pytest.mark.parametrize("end", [{"verdict": "failed", "again": False}, {"verdict": "done", "exported": True}])
def test_a_run_that_is_over_by_its_own_records(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, end: dict[str, Any]
) -> None:
    run.attempt(1).exit.write_text(json.dumps(end))
    assert "step 1/9" in follow(run, monkeypatch, SILENT, silence=1e9)
