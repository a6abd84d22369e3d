"""A chain of jobs goes on past a controller that is slow or away, and says so where it cannot go on."""

import json
from pathlib import Path
from typing import Any

import pytest
from launch.attempts import BUG, DONE, STOPPED, attempted, changes, raised, run, training
from launch.submitting import RUN, galley, here, submitted
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import Attempt, RunDir
from galley_launch import commands
from galley_launch.base.options import Settings
from galley_launch.job import begin, chain, finish, slurm, successor
from galley_launch.runs import runs
from galley_launch.submit import queue
from launch import fakes as made_up

__all__ = ["fakes", "here", "run"]

REFUSES = """#!/bin/bash
# sbatch on a compute node of a site that takes submissions from its login nodes only.
echo "Jobs cannot be submitted from this host; use a login node."
exit 1
"""


def nodes_may_not_submit(fakes: Scenario) -> None:
    (fakes.bin / "sbatch").write_text(REFUSES)


def facts(attempt: Attempt) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(attempt.job.read_text())
    return body


def set_cluster(run: RunDir, **values: Any) -> None:
    run.cluster.write_text(json.dumps(json.loads(run.cluster.read_text()) | values))


def ended(run: RunDir, fakes: Scenario, reason: str = "walltime", **more: Any) -> Attempt:
    """Attempt 1 of job 500, asked to stop, whose job is over at once."""
    stop = {"verdict": "stopped", "reason": reason}
    attempt = attempted(run, 1, said=stop, stop=reason, facts={"job": "500", "successor": None, **more})
    fakes.job("500", State="RUNNING")
    return attempt


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_the_beginning_asks_again_while_the_controller_is_away(run: RunDir, fakes: Scenario, calls: int) -> None:
    fakes.set(away=calls)
    found = training(run)
    assert (found["successor"], "no_successor" in found) == ("100", False)


def test_a_controller_that_stays_away_does_not_keep_the_attempt(run: RunDir, fakes: Scenario) -> None:
    fakes.set(controller="down")
    found = training(run)
    assert found["successor"] is None
    assert "Unable to contact slurm controller" in found["no_successor"]
    assert not run.attempt(1).log("job").exists()  # it will be asked again


def test_the_clock_asks_beside_training(run: RunDir, fakes: Scenario) -> None:
    fakes.set(controller="down")
    training(run)
    attempt = run.attempt(1)
    keeper = successor.Keeper(run, attempt)
    keeper.tick(1000.0)
    assert (keeper.open, facts(attempt)["successor"]) == (True, None)
    fakes.set(controller="up")
    before = len(fakes.calls())
    keeper.tick(1000.0)
    assert len(fakes.calls()) == before  # not at once: everybody else asks, too
    keeper.next = 0.0
    keeper.tick(10.0)
    assert len(fakes.calls()) == before  # not when the ranks must be asked soon
    keeper.tick(1000.0)
    assert (keeper.open, facts(attempt)["successor"], "no_successor" in facts(attempt)) == (False, "100", False)
    keeper.tick(1000.0)
    assert len(fakes.calls("sbatch")) == 1
    assert not successor.Keeper(run, attempt).open


@pytest.mark.parametrize("reason", ["walltime", "preemption", "signal"])
@pytest.mark.parametrize("away", [0, 3])
def test_the_end_queues_the_successor_that_is_missing(run: RunDir, fakes: Scenario, reason: str, away: int) -> None:
    attempt = ended(run, fakes, reason, no_successor="squeue: no answer from Slurm within 10 s")
    fakes.set(away=away)
    finish.end_training(run, attempt, 0, "train")
    script = f"{run.jobs}/train.sbatch"
    assert changes(fakes)[-1] == f"sbatch --parsable --dependency=afterany:500 --signal=B:USR1@300 {script}"
    job = fakes.calls("sbatch")[-1]["argv"] and facts(attempt)["successor"]
    assert job is not None
    assert "no_successor" not in facts(attempt)
    assert chain.submitted(run)[-1]["job"] == job


def test_a_failure_that_a_retry_can_cure_has_a_successor(run: RunDir, fakes: Scenario) -> None:
    attempt = attempted(run, 1, facts={"job": "500", "successor": None}, rank_0="NCCL WARN x\nncclRemoteError: y\n")
    fakes.job("500", State="NODE_FAIL")
    finish.end_training(run, attempt, 1, "train")
    assert json.loads(attempt.exit.read_text())["again"] is True
    assert [call.split()[0] for call in changes(fakes)] == ["sbatch"]


def test_a_successor_that_somebody_took_out_of_the_queue_is_queued_again(run: RunDir, fakes: Scenario) -> None:
    attempt = ended(run, fakes, successor="400")
    chain.note(run, "train", "400")
    fakes.job("400", State="CANCELLED")
    finish.end_training(run, attempt, 0, "train")
    assert facts(attempt)["successor"] == "100"


def test_no_successor_of_a_run_that_is_over(run: RunDir, fakes: Scenario) -> None:
    attempt = attempted(run, 1, facts={"job": "500", "successor": None}, errors=raised(BUG), rank_0=BUG)
    fakes.job("500", State="RUNNING")
    finish.end_training(run, attempt, 1, "train")
    attempt = ended(run, fakes, "user")
    finish.end_training(run, attempt, 0, "train")
    run.end.parent.mkdir()
    run.end.write_text('{"reason": "stop"}')
    finish.end_training(run, ended(run, fakes), 0, "train")
    assert fakes.calls("sbatch") == []


def test_the_export_is_asked_for_again(run: RunDir, fakes: Scenario) -> None:
    attempt = attempted(run, 1, said=DONE, facts={"job": "500", "successor": None})
    fakes.set(away=4)
    finish.end_training(run, attempt, 0, "train")
    assert f"sbatch --parsable {run.jobs}/export.sbatch" in changes(fakes)[-1]


def test_a_job_that_sbatch_did_not_tell_of_is_found_by_its_name(run: RunDir, fakes: Scenario) -> None:
    """sbatch was given up, or ended, after Slurm had taken the job: a second one would be one too many."""
    set_cluster(run, job_name="galley-x-1234")
    fakes.job("777", Name="galley-x-1234")
    fakes.job("778", Name="galley-xx-1234")
    fakes.job("500", Name="galley-x-1234", State="RUNNING")
    assert training(run)["successor"] == "777"
    assert fakes.calls("sbatch") == []
    assert [each["job"] for each in chain.submitted(run)] == ["500", "777"]


def test_a_site_whose_nodes_may_not_submit_is_found_out_by_the_first_job(
    run: RunDir, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes_may_not_submit(fakes)
    begin.begin_on_one_node(run, "prepare", "")
    said = facts(run.attempt(0))["no_successor"]
    assert said == "sbatch: Jobs cannot be submitted from this host; use a login node."
    line = run.attempt(0).log("job").read_text()
    assert line.startswith("galley: chain: no job can be queued from ")
    assert said in line
    assert "cluster.chain=login" in line
    assert line in capsys.readouterr().out


def test_status_says_at_once_what_the_first_job_found_out(run: RunDir, fakes: Scenario) -> None:
    nodes_may_not_submit(fakes)
    begin.begin_on_one_node(run, "prepare", "")
    for job, stage in (("500", "prepare"), ("501", "train")):
        chain.note(run, stage, job)
        fakes.job(job, State="RUNNING" if stage == "prepare" else "PENDING")
    for _ in range(2):  # while it prepares, and while training waits
        said = runs.state(run, queue.query([run])[run.root]).message
        assert said.startswith("nothing follows the first attempt (sbatch: Jobs cannot be submitted from this host")
        fakes.job("500", State="COMPLETED")


@pytest.mark.parametrize("state", [{"controller": "down"}, {}])
def test_a_site_whose_nodes_may_submit_is_left_alone(run: RunDir, fakes: Scenario, state: dict[str, str]) -> None:
    fakes.set(**state)
    begin.begin_on_one_node(run, "prepare", "")
    assert "no_successor" not in facts(run.attempt(0))
    assert not run.attempt(0).log("job").exists()


def status(run: RunDir, capsys: pytest.CaptureFixture[str], verb: str = "status") -> str:
    capsys.readouterr()
    assert getattr(commands, verb)(str(run.root), Settings()) == 0
    return " ".join(capsys.readouterr().out.split())


def test_status_and_why_say_that_nothing_follows(
    run: RunDir, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes_may_not_submit(fakes)
    training(run)
    run.spec.write_text(made_up.spec(run.root).to_json())
    attempt = run.attempt(1)
    fakes.job("500", State="RUNNING")
    why = "(sbatch: Jobs cannot be submitted from this host; use a login node.)"
    live = f"nothing follows this attempt {why}; when it has ended, submit again: galley submit {run.root}"
    assert f"{live}, or submit with cluster.chain=login" in status(run, capsys)
    attempt.exit.write_text(json.dumps(STOPPED))
    attempt.request_stop("walltime")
    finish.end_training(run, attempt, 0, "train")
    fakes.job("500", State="COMPLETED")
    over = f"nothing follows {why}; submit again: galley submit {run.root}"
    assert f"state stopped: {over}" in status(run, capsys)
    assert over in status(run, capsys, "why")
    attempt.exit.write_text(json.dumps({"verdict": "failed", "again": True, "message": "x", "kind": "node"}))
    assert over in status(run, capsys, "why")
    attempt.exit.unlink()
    assert over in status(run, capsys)
    attempt.exit.write_text(json.dumps(DONE))
    trained = "it is trained, but nothing follows: its export is not in the queue; submit again: galley submit"
    assert trained in status(run, capsys)
    assert trained in status(run, capsys, "why")


def test_nothing_is_said_of_runs_that_go_on_or_are_over(run: RunDir, fakes: Scenario) -> None:
    def said() -> str:
        return queue.nothing_follows(run, queue.query([run])[run.root])

    chain.note(run, "train", "500")
    attempt = attempted(run, 1, said=STOPPED, facts={"job": "500", "successor": "400"})
    assert "nothing follows; submit again" in said()
    chain.note(run, "train", "400")
    fakes.job("400")
    assert said() == ""
    fakes.job("400", State="COMPLETED")
    attempt.exit.write_text(json.dumps({"verdict": "failed", "again": False}))
    assert said() == ""
    for over in ({"exported": True}, {"exported": False, "export_error": "exit status 1"}):
        attempt.exit.write_text(json.dumps(DONE | over))
        assert said() == ""
    attempt.exit.write_text(json.dumps(STOPPED))
    fakes.set(controller="down")
    assert said() == ""  # nobody knows
    assert runs.state(run, queue.query([run])[run.root]).state == "unknown"


LOGIN = ["my.yaml", "cluster=venv", "nodes=2", "cluster.chain=login"]


@pytest.mark.parametrize(("words", "attempts"), [([], 5), (["cluster.attempts=3"], 3), (["cluster.attempts=1"], 1)])
def test_a_chain_that_is_submitted_beforehand(
    words: list[str], attempts: int, here: Path, fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plan, _ = galley(capsys, "plan", *LOGIN, *words)
    assert plan.count("--dependency=afterany:PREVIOUS") == attempts
    code, out, err = galley(capsys, "submit", *LOGIN, *words)
    assert (code, err) == (0, "")
    jobs = [json.loads(line) for line in RUN.submitted.read_text().splitlines()]
    assert [each["stage"] for each in jobs] == ["prepare", *["train"] * attempts, "export"]
    argv = submitted(fakes)
    assert not any("PREVIOUS" in word for words in argv for word in words)
    after = [next((word for word in words if word.startswith("--dependency=")), "") for words in argv]
    # The first waits for the prepare job by its name, as its script says.
    assert after == ["", "", *(f"--dependency=afterany:{each['job']}" for each in jobs[1:-1])]
    assert f"{jobs[-1]['job']} (export)" in out
    assert json.loads(RUN.cluster.read_text())["attempts"] == attempts
    assert len(queue.query([RUN])[RUN.root].jobs) == attempts + 2
    assert galley(capsys, "cancel", str(RUN.root))[0] == 0
    assert not queue.query([RUN])[RUN.root].jobs


@pytest.fixture
def beforehand(run: RunDir, fakes: Scenario) -> RunDir:
    """A run whose jobs were submitted from a login node, on a site whose nodes may not submit."""
    set_cluster(run, chain="login", attempts=2)
    nodes_may_not_submit(fakes)
    for job, stage in (("500", "train"), ("501", "train"), ("502", "export")):
        chain.note(run, stage, job)
        fakes.job(job)
    return run


def test_a_chain_beforehand_goes_from_job_to_job(
    beforehand: RunDir, fakes: Scenario, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = beforehand
    assert training(run)["successor"] == "501"
    run.attempt(1).exit.write_text(json.dumps(STOPPED))
    run.attempt(1).request_stop("walltime")
    finish.end_training(run, run.attempt(1), 0, "train")
    fakes.job("500", State="COMPLETED")
    monkeypatch.setenv("SLURM_JOB_ID", "501")
    found = training(run)
    assert "the last of the 2 attempts that cluster.chain=login submitted" in found["no_successor"]
    assert "chain=login, which" not in capsys.readouterr().out  # it does already
    assert fakes.calls("sbatch") == []
    # Nothing to export while the run is not done; once it is, the export that waits does it.
    with pytest.raises(begin.NothingToDo, match="the run is not done, so nothing is exported"):
        begin.begin_on_one_node(run, "export", "")
    run.attempt(2).exit.write_text(json.dumps(DONE))
    assert finish.end_training(run, run.attempt(2), 0, "train") == 0
    assert fakes.calls("sbatch") == []
    begin.begin_on_one_node(run, "export", "")
    assert "GALLEY_EXPORT_STEP=last" in (run.attempt(2).root / "job.env").read_text()
    run.attempt(2).exit.write_text(json.dumps(DONE | {"exported": True}))
    with pytest.raises(begin.NothingToDo, match="the run is exported"):
        begin.begin_on_one_node(run, "export", "")
    begin.begin_on_one_node(run, "export", "best")  # somebody asks for another one


@pytest.mark.parametrize(
    ("said", "passes"),
    [
        ("squeue: no answer from Slurm within 10 s", True),
        ("sbatch: Batch job submission failed: Unable to contact slurm controller (connect failure)", True),
        ("sbatch: Batch job submission failed: Socket timed out on send/recv operation", True),
        ("sbatch: Batch job submission failed: Zero Bytes were transmitted or received", True),
        ("sbatch: Batch job submission failed: Slurm backup controller in standby mode", True),
        ("sbatch: Slurm temporarily unable to accept job, sleeping and retrying", True),
        ("sbatch: Batch job submission failed: Access/permission denied", False),
        ("sbatch: Jobs cannot be submitted from this host; use a login node.", False),
        ("sbatch: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", False),
        ("sbatch: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)", False),
        ("sbatch: no such command here", False),
    ],
)
def test_what_passes_and_what_is_a_refusal(said: str, passes: bool) -> None:
    assert slurm.SlurmError(said).is_transient == passes
