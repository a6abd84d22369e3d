"""The end of a job: the verdict that is written, and what becomes of the jobs that wait."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from launch.attempts import BUG, attempted, raised, report, submitted
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import RunDir
from galley_launch.job import chain, finish

__all__ = ["fakes"]


@dataclass(frozen=True)
class Ended:
    """What a training job did at its end."""

    status: int
    exit: dict[str, Any]
    programs: list[str]
    """Programs that changed the queue, with their last words."""


def end(run: RunDir, fakes: Scenario, number: int = 1, status: int = 0, where: str = "train") -> Ended:
    """The end of the job of an attempt, whose successor 900 waits."""
    if "900" not in str(chain.submitted(run)):
        chain.note(run, "train", f"{100 + number}")
        chain.note(run, "train", "900")
        fakes.job(f"{100 + number}", State="RUNNING")
        fakes.job("900")
    attempt = run.attempt(number)
    result = finish.end_training(run, attempt, status, where)
    changed = [call for call in fakes.calls() if call["program"] in ("sbatch", "scancel", "scontrol")]
    body = json.loads(attempt.exit.read_text()) if attempt.exit.exists() else {}
    return Ended(result, body, [" ".join([call["program"], *call["argv"]]) for call in changed])


def test_the_end_of_the_last_attempt(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempted(run, said={"verdict": "done", "reason": "finished", "step": 10})
    ended = end(run, fakes)
    assert (ended.status, ended.exit["verdict"]) == (0, "done")
    assert ended.programs == [f"sbatch --parsable {run.jobs}/export.sbatch", "scancel --quiet 900"]
    assert end(run, fakes).programs[2:] == []  # Twice is once: the export waits, and no successor does.


def test_the_end_of_an_attempt_that_another_follows(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempted(run, said={"verdict": "stopped", "reason": "walltime"}, stop="walltime")
    ended = end(run, fakes)
    assert (ended.status, ended.exit["again"], ended.programs) == (0, True, [])


def test_the_end_of_an_attempt_that_nobody_can_help(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempted(run, errors=raised(BUG), rank_0=BUG)
    ended = end(run, fakes, status=1)
    assert (ended.status, ended.exit["verdict"], ended.exit["kind"]) == (1, "failed", "code")
    assert ended.programs == ["scancel --quiet 900"]


def test_a_signal_is_settled_by_the_successor(tmp_path: Path, fakes: Scenario) -> None:
    """scancel sends one too, and only afterwards does Slurm say which it was."""
    run = submitted(tmp_path / "run")
    attempted(run, said={"verdict": "stopped", "reason": "signal"}, stop="signal")
    ended = end(run, fakes)
    assert (ended.status, ended.exit["again"], ended.programs) == (0, None, [])


def test_the_users_end_is_the_runs_end(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempted(run, said={"verdict": "stopped", "reason": "walltime"}, stop="walltime")
    run.end.parent.mkdir()
    run.end.write_text('{"reason": "stop"}')
    ended = end(run, fakes)
    assert (ended.exit["again"], ended.programs) == (False, ["scancel --quiet 900"])


def test_an_attempt_that_was_taken_over_does_nothing(
    tmp_path: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted(tmp_path / "run")
    attempted(run, 1, said={"verdict": "done", "reason": "finished"})
    attempted(run, 2)
    before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
    assert finish.end_training(run, run.attempt(1), 0, "train") == 1
    assert capsys.readouterr().out == "galley: a later attempt has taken over\n"
    assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before
    assert fakes.calls() == []


def test_nodes_that_are_not_fit_are_avoided(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempt = attempted(run, facts={"successor": "900"})
    report(attempt, "n1")
    report(attempt, "n2", "devices")
    ended = end(run, fakes, status=1, where="preflight")
    assert (ended.status, ended.exit["again"], ended.exit["kind"], ended.exit["nodes"]) == (1, True, "node", ["n2"])
    assert ended.exit["message"] == "n2: devices: devices is bad"
    assert ended.programs == ["scontrol update JobId=900 ExcNodeList=n2"]
    assert set(chain.excluded(run)) == {"n2"}


def test_where_no_node_is_fit_none_is_to_blame(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempt = attempted(run, facts={"successor": "900"})
    report(attempt, "n1", "devices")
    report(attempt, "n2", "devices")
    ended = end(run, fakes, status=1, where="preflight")
    assert (ended.exit["again"], ended.exit["kind"], ended.exit["status"]) == (False, "configuration", 2)
    assert "devices is bad" in ended.exit["message"]
    assert (chain.excluded(run), ended.programs) == ({}, ["scancel --quiet 900"])


def test_the_third_unfit_node_is_the_last(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    for number in (1, 2):
        attempted(run, number, said={"verdict": "failed", "reason": "preflight", "again": True})
    for number, again in ((3, False),):
        attempt = attempted(run, number, facts={"successor": "900", "nodes": ["n1"]})
        report(attempt, "n1", "disk")
        ended = end(run, fakes, number, status=1, where="preflight")
        assert (ended.exit["again"], ended.exit["message"][:28]) == (again, "no fit nodes in 3 attempts: ")
    run.attempt(1).exit.write_text('{"reason": "walltime"}')
    run.attempt(3).exit.unlink()
    assert end(run, fakes, 3, status=1, where="preflight").exit["again"] is True


def test_a_stop_during_the_preflight_is_a_stop(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run")
    attempt = attempted(run, stop="user")
    report(attempt, "n1", "devices")
    ended = end(run, fakes, status=1, where="preflight")
    assert (ended.exit["verdict"], ended.exit["reason"], chain.excluded(run)) == ("stopped", "user", {})


def test_a_slurm_that_does_not_answer_at_the_end(tmp_path: Path, fakes: Scenario) -> None:
    """The verdict stands; the successor will do what could not be done."""
    run = submitted(tmp_path / "run")
    attempted(run, said={"verdict": "done", "reason": "finished"})
    fakes.set(controller="down")
    assert finish.end_training(run, run.attempt(1), 0, "train") == 0
    assert json.loads(run.attempt(1).exit.read_text())["verdict"] == "done"


def test_the_end_of_a_job_aside(tmp_path: Path, fakes: Scenario) -> None:
    run = submitted(tmp_path / "run", secrets_file=str(tmp_path / "secrets"))
    chain.note(run, "train", "900")
    fakes.job("900")
    prepare = attempted(run, 0)
    assert finish.end_on_one_node(run, prepare, "prepare", 0) == 0
    assert json.loads(prepare.exit.read_text())["verdict"] == "prepared"
    assert fakes.calls("scancel") == []
    prepare.error("prepare").write_text(json.dumps({"who": "prepare", "status": 2, "message": "data.path: no; x"}))
    assert finish.end_on_one_node(run, prepare, "prepare", 2) == 2
    body = json.loads(prepare.exit.read_text())
    assert (body["verdict"], body["again"], body["message"]) == ("failed", False, "data.path: no; x")
    assert [call["argv"] for call in fakes.calls("scancel")] == [["--quiet", "900"]]

    (tmp_path / "secrets").write_text("A=b\n")
    attempt = attempted(run, 1, said={"verdict": "done"})
    assert finish.end_on_one_node(run, attempt, "export", 1) == 1
    body = json.loads(attempt.exit.read_text())
    assert (body["verdict"], body["exported"], body["export_error"]) == ("done", False, "exit status 1")
    assert finish.end_on_one_node(run, attempt, "export", 0) == 0
    assert json.loads(attempt.exit.read_text())["exported"] is True
    assert not (tmp_path / "secrets").exists()
