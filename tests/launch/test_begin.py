"""The beginning of a job: whether there is anything to do, as which attempt, on which nodes, and who comes next."""

import json
import time
from typing import Any

import pytest
from launch.attempts import DONE, STOPPED, allocate, attempted, changes, nothing, run, stepped, training
from launch.submitting import sourced
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import RunDir
from galley_launch.job import begin, chain, verdict

__all__ = ["fakes", "run"]


def test_the_first_job_takes_the_first_attempt_and_queues_the_next(run: RunDir, fakes: Scenario) -> None:
    begun = time.time()
    facts = training(run)
    assert begun <= facts.pop("started") <= time.time()
    assert facts == {
        **{"job": "500", "restart": 0, "nodes": ["n1", "n2"], "head": "n1", "port": 61500},
        **{"ranks": 8, "successor": "100", "checkpoint": 0},
    }
    script = f"{run.jobs}/train.sbatch"
    assert changes(fakes) == [f"sbatch --parsable --dependency=afterany:500 --signal=B:USR1@300 {script}"]
    assert [(each["job"], each["stage"]) for each in chain.submitted(run)] == [("500", "train"), ("100", "train")]
    attempt = run.attempt(1)
    assert json.loads(attempt.placement.read_text()) == {"nodes": 2, "ranks_per_node": 4}
    assert all(place.is_dir() for place in (attempt.logs, attempt.stop.parent, attempt.preflight, attempt.heartbeats))
    assert (attempt.secret.stat().st_mode & 0o777, len(attempt.secret.read_text())) == (0o600, 32)
    names = ("ATTEMPT", "ATTEMPT_DIR", "LOGS", "PORT", "RENDEZVOUS", "HEAD", "PREPARE")
    found = sourced(attempt.root / "job.env", *(f"GALLEY_{name}" for name in names))
    values = ["1", str(attempt.root), str(attempt.logs), "61500", "500.0", "n1", "0"]
    assert [value.decode() for value in found.values()] == values


def test_data_that_is_not_prepared_is_prepared_by_the_job(run: RunDir) -> None:
    run.data_manifest.unlink()
    training(run)
    assert "export GALLEY_PREPARE=1\n" in (run.attempt(1).root / "job.env").read_text()


def test_a_successor_goes_on_from_the_checkpoint(run: RunDir, fakes: Scenario) -> None:
    attempted(run, 1, said=STOPPED)
    stepped(run, 10, 8, step_s=20.0, save_s=100.0)
    facts = training(run)
    assert (facts["checkpoint"], run.attempts()[-1].number) == (8, 2)
    assert "--signal=B:USR1@300" in changes(fakes)[0]  # two steps, two and a half saves, and ten seconds


def test_one_successor_is_enough(run: RunDir, fakes: Scenario) -> None:
    chain.note(run, "train", "400")
    chain.note(run, "export", "401")
    fakes.job("400")
    fakes.job("401")
    assert training(run)["successor"] == "400"
    assert changes(fakes) == []
    fakes.job("400", State="COMPLETED")
    assert training(run)["successor"] == "100"


def test_a_refused_successor_does_not_end_the_job(
    run: RunDir, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.set(refuses="Job violates accounting/QOS policy")
    assert training(run)["successor"] is None
    assert capsys.readouterr().out.startswith(
        "galley: no successor could be queued: sbatch: Batch job submission failed"
    )


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_that_is_done_is_exported_once(run: RunDir, fakes: Scenario, exported: bool) -> None:
    attempted(run, 1, said=DONE | {"exported": exported})
    chain.note(run, "train", "400")
    fakes.job("400")
    assert nothing(run) == "the run is done"
    export = [] if exported else [f"sbatch --parsable {run.jobs}/export.sbatch"]
    assert changes(fakes) == [*export, "scancel --quiet 400"]
    assert nothing(run) == "the run is done"
    assert len(changes(fakes)) == len(export) + 1


def test_an_export_that_cannot_be_submitted_is_said(
    run: RunDir, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    attempted(run, 1, said=DONE)
    fakes.set(refuses="no")
    assert nothing(run) == "the run is done"
    assert (
        "the export could not be submitted (sbatch: Batch job submission failed: no); submit" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            {"verdict": "failed", "reason": "failure", "again": False, "message": "boom"},
            "attempt 1 ended the run: boom",
        ),
        ({"verdict": "stopped", "reason": "budget", "again": False}, "attempt 1 ended the run: budget"),
    ],
)
def test_a_run_that_is_over_stays_over(run: RunDir, fakes: Scenario, said: dict[str, Any], words: str) -> None:
    attempted(run, 1, said=said)
    chain.note(run, "train", "400")
    fakes.job("400")
    assert nothing(run) == words
    assert changes(fakes) == ["scancel --quiet 400"]


@pytest.mark.parametrize("said", [DONE, {"verdict": "stopped", "reason": "user", "again": False}])
def test_a_run_that_was_submitted_again_is_not_over(run: RunDir, said: dict[str, Any]) -> None:
    """It was made longer, or stopped and begun again: what the attempt before it came to is history."""
    attempted(run, 1, said=said)
    run.cluster.write_text(json.dumps(json.loads(run.cluster.read_text()) | {"first_attempt": 2}))
    training(run)
    assert run.attempts()[-1].number == 2


@pytest.mark.parametrize("reason", ["stop", "cancel"])
def test_the_users_end(run: RunDir, fakes: Scenario, reason: str) -> None:
    attempted(run, 1, said=STOPPED)
    run.end.parent.mkdir()
    run.end.write_text(json.dumps({"reason": reason}))
    chain.note(run, "train", "400")
    fakes.job("400")
    assert nothing(run) == f"the run was ended by galley {reason}"
    assert changes(fakes) == ["scancel --quiet 400"]


def test_data_that_could_not_be_prepared(run: RunDir) -> None:
    attempted(run, 0, said={"verdict": "failed", "again": False, "message": "data.path: no file"})
    training(run)  # It was prepared since.
    run.data_manifest.unlink()
    assert nothing(run) == "preparing failed: data.path: no file"


def test_a_job_that_was_requeued_begins_another_attempt(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its own number: it was pre-empted, or its node died."""
    first = training(run)
    allocate(monkeypatch, restart=1)
    second = training(run)
    end = json.loads(run.attempt(1).exit.read_text())
    assert (end["verdict"], end["reason"], end["again"]) == ("lost", "preemption", True)
    assert (first["job"], first["restart"], second["job"], second["restart"]) == ("500", 0, "500", 1)
    assert first["port"] != second["port"]
    assert second["successor"] == first["successor"] == "100"


@pytest.mark.parametrize(
    ("state", "verdict", "reason", "goes_on"),
    [
        ("TIMEOUT", "lost", "walltime", True),
        ("PREEMPTED", "lost", "preemption", True),
        ("NODE_FAIL", "failed", "failure", True),
        ("CANCELLED", "stopped", "cancel", False),
    ],
)
def test_an_attempt_that_left_no_word_is_judged_by_slurms(
    run: RunDir, fakes: Scenario, state: str, verdict: str, reason: str, goes_on: bool
) -> None:
    attempted(run, 1, facts={"job": "400"})
    fakes.job("400", State=state, EndTime="2026-11-23T10:00:00")
    if goes_on:
        training(run)
    else:
        assert nothing(run) == "attempt 1 ended the run: the job was cancelled"
    end = json.loads(run.attempt(1).exit.read_text())
    assert (end["verdict"], end["reason"], end["again"]) == (verdict, reason, goes_on)
    assert end["ended"] == 1795428000.0  # when the job did, not when its successor began


def test_an_undecided_signal_is_settled(run: RunDir, fakes: Scenario) -> None:
    said = {"verdict": "stopped", "reason": "signal", "again": None}
    attempted(run, 1, said=said, stop="signal", facts={"job": "400"})
    fakes.job("400", State="CANCELLED")
    assert nothing(run) == "attempt 1 ended the run: the job was cancelled"
    attempted(run, 1, said=said, stop="signal", facts={"job": "400"})
    fakes.job("400", State="COMPLETED")
    training(run)
    assert json.loads(run.attempt(1).exit.read_text())["again"] is True


def test_the_hours_of_an_attempt_that_slurm_forgot_end_with_its_logs(run: RunDir) -> None:
    attempt = attempted(run, 1, facts={"job": "400"}, rank_0="step 1\n")
    training(run)
    end = json.loads(attempt.exit.read_text())
    assert end["ended"] == attempt.log("rank-0").stat().st_mtime


def test_the_number_of_attempts_is_limited(run: RunDir, fakes: Scenario) -> None:
    run.cluster.write_text(json.dumps(json.loads(run.cluster.read_text()) | {"attempts": 2, "first_attempt": 3}))
    for number in (1, 2, 3):
        attempted(run, number, said=STOPPED)
    assert training(run)["job"] == "500"
    run.attempt(4).exit.write_text(json.dumps(STOPPED))
    words = "2 attempts were made, as many as cluster.attempts allows"
    assert nothing(run) == words
    end = json.loads(run.attempt(4).exit.read_text())
    assert (end["verdict"], end["reason"], end["again"], end["message"]) == ("stopped", "budget", False, words)
    assert changes(fakes)[-1] == "scancel --quiet 100"


def test_the_hours_are_limited(run: RunDir) -> None:
    run.cluster.write_text(json.dumps(json.loads(run.cluster.read_text()) | {"gpu_hours": 4.0}))
    attempted(run, 1, said=STOPPED | {"ended": 1e9 + 0.4 * 3600})
    training(run)
    run.attempt(2).exit.write_text(json.dumps(STOPPED))
    run.attempt(2).job.write_text(json.dumps({"started": 1e9, "ranks": 8}))
    run.attempt(2).exit.write_text(json.dumps(STOPPED | {"ended": 1e9 + 0.1 * 3600}))
    assert nothing(run) == "4.00 GPU-hours are used, and cluster.gpu_hours is 4.0"


def test_jobs_aside(run: RunDir) -> None:
    with pytest.raises(begin.NothingToDo, match="nothing was trained yet"):
        begin.begin_on_one_node(run, "export", "last")
    attempted(run, 0, said={"verdict": "failed"}, errors=[{"who": "prepare", "message": "x", "status": 2}])
    path = begin.begin_on_one_node(run, "prepare", "last")
    assert path == run.attempt(0).root / "job.env"
    assert not run.attempt(0).exit.exists()
    assert run.attempt(0).errors() == []
    assert json.loads(run.attempt(0).job.read_text()) == {"job": "500", "nodes": ["n1", "n2"]}
    attempt = attempted(run, 1, said=DONE)
    facts = attempt.job.read_text()
    path = begin.begin_on_one_node(run, "export", "best")
    assert sourced(path, "GALLEY_EXPORT_STEP", "GALLEY_ATTEMPT") == {
        "GALLEY_EXPORT_STEP": b"best",
        "GALLEY_ATTEMPT": b"1",
    }
    assert attempt.job.read_text() == facts  # those of training
    run.end.parent.mkdir()
    run.end.write_text('{"reason": "stop"}')
    begin.begin_on_one_node(run, "export", "best")
    for stage, reason in (("prepare", "stop"), ("prepare", "cancel"), ("export", "cancel")):
        run.end.write_text(json.dumps({"reason": reason}))
        with pytest.raises(begin.NothingToDo, match=f"ended by galley {reason}"):
            begin.begin_on_one_node(run, stage, "last")


def test_what_the_script_is_told(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    """The file's path on stdout, and nothing else; a status of its own where there is nothing to do."""
    assert verdict.main(["begin", str(run.root), "train"]) == 0
    assert capsys.readouterr().out == f"{run.attempt(1).root}/job.env\n"
    run.attempt(1).exit.write_text(json.dumps(DONE | {"exported": True}))
    assert verdict.main(["begin", str(run.root), "train"]) == verdict.NOTHING
    assert capsys.readouterr() == ("", "galley: the run is done\n")
