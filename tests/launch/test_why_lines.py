"""What ``galley why`` prints."""

import fcntl
import json
import os
from pathlib import Path

import pytest
from launch.corpus import FILES, lay, read
from slurm.conftest import fakes as slurm_fakes
from slurm.fakes.scenario import Scenario

from galley.contract.rundir import Attempt, RunDir
from galley_launch import commands
from galley_launch.base.options import Settings
from galley_launch.runs import runs, why
from galley_launch.submit import queue
from launch import fakes

__all__ = ["slurm_fakes"]

CASES = {path.stem: path for path in FILES}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """``runs/x``, without an attempt."""
    monkeypatch.chdir(tmp_path)
    made = RunDir(Path("runs/x"))
    made.root.mkdir(parents=True)
    made.spec.write_text(fakes.spec(made.root.absolute()).to_json())
    return made


def put(run: RunDir, number: int, name: str, **end: object) -> Attempt:
    """A file of the corpus as attempt ``number`` of ``run``, with its ``exit.json``."""
    lay(read(CASES[name]), Path("laid") / str(number))
    attempt = run.attempt(number)
    attempt.root.parent.mkdir(exist_ok=True)
    RunDir(Path("laid") / str(number)).attempt(1).root.rename(attempt.root)
    if end:
        attempt.exit.write_text(json.dumps(end))
    return attempt


def save(run: RunDir, step: int) -> None:
    run.checkpoint(step).root.mkdir(parents=True)
    run.checkpoint(step).manifest.write_text(json.dumps({"files": {}}))


def rows(lines: list[str]) -> dict[str, str]:
    """The first line of each key."""
    return {line[:10].strip(): line[10:] for line in lines if line[:10].strip() and line[9:10] == " "}


def test_a_failure_on_one_box_in_full(run: RunDir) -> None:
    put(run, 1, "user_error_preparing", verdict="failed", reason="prepare", step=None, message="…", status=2)
    assert why.lines(run) == [
        "run x failed before its first step: a setting or the environment is wrong",
        "",
        "first     prepare",
        "shown by  errors/prepare.json: data.path: '/data/chats.jsonl' does not exist",
        "to do     Give the path of a file.",
        "retry     retrying will not help until this is fixed",
        "resumes   from the start: there is no checkpoint",
        "logs      runs/x/attempts/0001/logs",
    ]


def test_failures_of_several_attempts_line_up(run: RunDir) -> None:
    common = {"verdict": "failed", "reason": "failure", "again": True}
    put(run, 1, "nccl_remote_only", **common, kind="nccl", last_step=80)
    put(run, 2, "ecc_in_watchdog", **common, kind="node", last_step=1139, nodes=["node4"])
    put(
        run,
        3,
        "oom_with_fifteen_echoes",
        verdict="failed",
        reason="failure",
        again=False,
        kind="gpu_oom",
        last_step=1200,
    )
    save(run, 1000)
    lines = why.lines(run)
    assert lines[0] == "run x failed in attempt 3 after step 1200: a GPU ran out of memory"
    assert rows(lines)["first"] == "rank 11 on node3"
    assert rows(lines)["retry"] == "no attempt follows by itself"
    assert rows(lines)["resumes"] == "after step 1000"
    assert lines[-4:] == [
        "failed     step  what",
        "attempt 1  80    the network between GPUs (NCCL) failed (rank 1 on node1)",
        "attempt 2  1139  a node is broken (rank 12 on node4)",
        "attempt 3  1200  a GPU ran out of memory (rank 11 on node3)",
    ]
    assert max(map(len, lines)) <= 120


def test_a_node_to_avoid_and_what_follows(run: RunDir) -> None:
    put(run, 1, "ecc_in_watchdog", verdict="failed", reason="failure", again=True, kind="node", nodes=["node4"])
    found = rows(why.lines(run))
    assert (found["avoid"], found["retry"]) == ("node4", "another attempt follows by itself")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({"verdict": "done"}, "run x did not fail: it is done"),
        ({"verdict": "stopped", "reason": "user"}, "run x did not fail: it is stopped at step 3"),
    ],
)
def test_a_run_that_did_not_fail(run: RunDir, end: dict[str, object], words: str) -> None:
    put(run, 1, "nothing_left", **end)
    run.metrics.write_text('{"step": 3, "steps": 9}\n')
    assert why.lines(run) == [words]


def test_a_run_that_was_never_tried(run: RunDir) -> None:
    assert why.lines(run) == ["run x did not fail: it has no attempt yet"]


def test_a_live_run_and_what_it_failed_of_before(run: RunDir) -> None:
    put(run, 1, "gloo_full_mesh")
    run.attempt(2).logs.mkdir(parents=True)
    with run.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = why.lines(run)
    assert lines[0] == (
        "run x is live; it failed in attempt 1 before its first step: the network between ranks (gloo) failed"
    )
    assert why.lines(run)[0].startswith("run x failed in attempt 2")  # no launcher, no word: it was lost


def test_a_killed_stage_on_one_box(run: RunDir) -> None:
    message = "prepare was killed by signal 9 (SIGKILL); run the same command again to resume"
    put(run, 1, "killed_preparing", verdict="failed", reason="prepare", message=message, status=1)
    lines = why.lines(run)
    assert lines[0].endswith("before its first step: it was killed from outside")
    assert rows(lines)["shown by"] == "prepare was ended by signal 9"
    assert rows(lines)["retry"] == "the same may go well: galley run runs/x"


def test_the_jobs_own_verdict_stands(run: RunDir) -> None:
    """It knew Slurm's state of the job."""
    message = "node3: devices: 7 of 8 GPUs are visible"
    end = {"verdict": "failed", "reason": "preflight", "again": True, "kind": "node", "nodes": ["node3"]}
    put(run, 1, "nothing_left", **end, message=message)
    lines = why.lines(run)
    assert lines[0].endswith(": a node is broken")
    assert rows(lines)["shown by"] == f"exit.json: {message}"
    assert rows(lines)["avoid"] == "node3"


def test_time_that_ran_out(run: RunDir) -> None:
    end = {"verdict": "lost", "reason": "walltime", "again": True, "message": "ended before it could save"}
    put(run, 1, "nccl_remote_only", **end, last_step=7)
    lines = why.lines(run)
    assert lines[0] == "run x failed after step 7: it was killed from outside"
    assert rows(lines)["shown by"] == "exit.json: ended before it could save"


@pytest.mark.parametrize("exported", [{}, {"exported": False, "export_error": "the disk is full"}])
def test_an_export_that_failed(run: RunDir, exported: dict[str, object]) -> None:
    attempt = put(run, 1, "disk_full_export", verdict="done", step=600, **exported)
    assert attempt.log("export").exists()
    lines = why.lines(run)
    assert lines[0] == "run x failed in export: a disk is full"
    assert rows(lines)["retry"] == "retrying will not help until this is fixed"
    assert "resumes" not in rows(lines)
    (run.export).mkdir()
    (run.export / "export.json").write_text("{}")
    if not exported:
        assert why.lines(run) == ["run x did not fail: it is done"]
    else:  # what is there is an earlier attempt's
        assert why.lines(run) == lines


def test_an_export_that_was_killed(run: RunDir) -> None:
    attempt = put(run, 1, "nccl_remote_only", verdict="done", step=600)
    attempt.log("export").write_text("export: merging the adapter\n")
    lines = why.lines(run)
    assert lines[0] == "run x failed in export: it was killed from outside"
    assert rows(lines)["retry"] == "the same may go well: galley export runs/x"


def test_a_prepare_job_that_failed(run: RunDir) -> None:
    put(run, 0, "hub_gated", verdict="failed", reason="prepare", again=False, kind="configuration", message="gated")
    run.cluster.write_text("{}")
    assert why.lines(run)[0] == "run x failed in prepare: a setting or the environment is wrong"


def test_a_job_that_ended_before_its_first_attempt(run: RunDir) -> None:
    run.cluster.write_text("{}")
    logs = run.jobs / "logs"
    logs.mkdir(parents=True)
    assert why.lines(run) == ["run x did not fail: it has no attempt yet"]
    (logs / "train-41.out").write_text("ERROR: Unable to locate a modulefile for 'cuda/13.1'\n")
    (logs / "train-42.out").write_text("")
    os.utime(logs / "train-42.out", (2e9, 2e9))
    lines = why.lines(run)
    assert lines[0] == (
        "run x has no attempt: its job ended before it could begin one (a setting or the environment is wrong)"
    )
    assert rows(lines)["shown by"] == "jobs/logs/train-41.out: ERROR: Unable to locate a modulefile for 'cuda/13.1'"
    assert rows(lines)["log"] == "runs/x/jobs/logs/train-41.out"


OLD = "galley: host_python: /usr/bin/python3 is 3.6.8, older than 3.9; name another: cluster.host_python=/usr/bin/x"


@pytest.mark.parametrize(
    ("text", "shown", "todo"),
    [
        (f"Welcome to node 7\n{OLD}\n", OLD, "Name a Python of the nodes that is 3.9 or newer: cluster.host_python="),
        (
            "slurm_script: line 30: python3: command not found\n",
            "python3: command not found",
            "Install what is missing",
        ),
        ("set-up: the licence server is away\n", "set-up: the licence server is away", "Read that log: only modules"),
    ],
)
def test_a_job_that_ended_before_its_attempt_is_a_failure_with_a_reason(
    text: str, shown: str, todo: str, run: RunDir, slurm_fakes: Scenario, capsys: pytest.CaptureFixture[str]
) -> None:
    run.cluster.write_text("{}")
    (run.jobs / "logs").mkdir(parents=True)
    (run.jobs / "logs" / "prepare-41.out").write_text(text)
    run.submitted.write_text('{"job": "41", "stage": "prepare", "time": 1.0}\n')
    found = rows(why.lines(run))
    assert shown[:60] in found["shown by"]
    assert found["to do"].startswith(todo)
    assert found["log"] == "runs/x/jobs/logs/prepare-41.out"
    assert commands.status("x", Settings()) == 0
    state = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("state"))
    assert state.startswith("state      failed: ")
    assert shown in state
    run.end.parent.mkdir()
    run.end.write_text('{"reason": "stop"}')
    assert runs.state(run, queue.query([run])[run.root]).state == "stopped"
    run.end.unlink()
    slurm_fakes.job("41")
    assert runs.state(run, queue.query([run])[run.root]).state == "queued"
    slurm_fakes.job("41", State="COMPLETED")
    (run.jobs / "logs" / "prepare-41.out").write_text("")
    assert "left no record" in why.lines(run)[0]


def test_where_slurm_does_not_answer_nothing_is_called_lost(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    put(run, 1, "gloo_full_mesh")
    run.cluster.write_text("{}")
    run.jobs.mkdir()
    run.submitted.write_text('{"job": "42", "stage": "train", "time": 1.0}\n')
    assert why.lines(run) == ["run x is not known to have failed: Slurm does not say whether it still runs"]


@pytest.mark.parametrize("name", CASES)
def test_every_failure_of_the_corpus_reads_well(run: RunDir, name: str) -> None:
    put(run, 1, name, verdict="failed", status=1)
    lines = why.lines(run)
    assert all(line.strip() and len(line) <= 120 for line in (*lines[:1], *lines[2:]))
    assert list(rows(lines))[-1] == "logs"
    assert {"shown by", "to do", "retry", "resumes"} <= rows(lines).keys()


def test_the_verb(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    put(run, 1, "key_error_with_echoes", verdict="failed", status=1)
    assert commands.why("x", Settings()) == 0
    assert "shown by  rank-5.log: KeyError: 'labels'\n" in capsys.readouterr().out
