"""Jobs one after the other: which nodes they avoid, when they are told to save, and on which port they meet."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch.attempts import STOPPED, allocate, attempted, changes, nothing, run, training
from slurm.conftest import fakes as fakes
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import RunDir
from galley_launch.job import chain
from galley_launch.job.begin import Allocation

__all__ = ["fakes", "run"]


def test_a_bad_node_sends_the_job_back_into_the_queue(run: RunDir, fakes: Scenario) -> None:
    attempted(run, 1, said=STOPPED)
    chain.exclude(run, ["n2"], "attempt 1: node", 24)
    assert nothing(run) == "n2 is excluded (attempt 1: node); job 101 takes over"
    options = "--dependency=afterany:500 --signal=B:USR1@300 --exclude=n2"
    script = f"{run.jobs}/train.sbatch"
    test = f"sbatch --test-only --signal=B:USR1@300 --exclude=n2 {script}"
    assert changes(fakes) == [test, f"sbatch --parsable {options} {script}"]


def test_a_bad_node_is_better_than_none(run: RunDir, fakes: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    chain.exclude(run, ["n2"], "attempt 1: node", 24)
    fakes.set(refuses="Requested node configuration is not available")
    assert training(run)["nodes"] == ["n1", "n2"]
    assert "galley: n2 should be avoided, but without it: sbatch: allocation failure: " in capsys.readouterr().out


def test_a_node_is_forgiven(run: RunDir) -> None:
    chain.exclude(run, ["n1"], "attempt 1: node", 1e-9)
    chain.exclude(run, ["n3"], "attempt 1: node", 24)
    time.sleep(0.01)
    assert training(run)["nodes"] == ["n1", "n2"]
    assert chain.excluded(run) == {"n3": "attempt 1: node"}


def test_an_allocation_that_contradicts_itself(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    allocate(monkeypatch, count=3)
    assert nothing(run) == "Slurm names 2 nodes (n[1-2]) but says 3"
    allocate(monkeypatch, nodes="n[1-3]", count=3)
    assert nothing(run) == "the run is for 2 nodes, but Slurm gave 3"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert nothing(run) == "not inside a Slurm job; hand this script to sbatch"


@given(st.integers(1, 2**31), st.integers(0, 60), st.integers(0, 60))
def test_ports(job: int, restart: int, other: int) -> None:
    """Above what connections take by themselves, and another one after a requeue."""
    one = Allocation(str(job), restart, ("n1",)).port
    assert 61000 <= one <= 65499
    assert (one == Allocation(str(job), other, ("n1",)).port) == (restart == other)
    assert one != Allocation(str(job + 1), restart, ("n1",)).port
    assert Allocation(f"{job}_4", 0, ("n1",)).port in range(61000, 65500)


@pytest.mark.parametrize(
    ("rows", "limit", "need"),
    [
        ([], 3600, 300),
        ([], 300, 150),
        ([{"step_s": 10.0}], 3600, 105),
        ([{"step_s": 10.0, "save_s": 60.0}], 3600, 180),
        ([{"step_s": 10.0}, {"step_s": 2.0, "save_s": 100.0}, {"step_s": None}], 3600, 280),
        ([{"step_s": 1000.0}], 3600, 1800),
        (["torn", "[]", {"step_s": "x"}, {"step_s": 5.0}], 3600, 95),
        ([{"step_s": 1e9}], 10**6, 65535),
    ],
)
def test_how_long_before_its_limit_a_job_asks(
    run: RunDir, rows: list[dict[str, float] | str], limit: int, need: int
) -> None:
    """Two steps, two and a half saves (of 30 s where none is known) and ten seconds; at most half of the limit."""
    lines = [each if isinstance(each, str) else json.dumps(each) for each in rows]
    run.metrics.write_text("".join(f"{line}\n" for line in lines))
    assert chain.lead(run, limit) == need
    assert chain.need(run, limit) >= need
