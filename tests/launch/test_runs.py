"""What is said of runs that exist, and how their logs are followed."""

import fcntl
import json
import os
import threading
import time
from pathlib import Path

import pytest

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch import commands
from galley_launch.base import locks
from galley_launch.base.options import read
from galley_launch.runs import runs
from launch import fakes


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """``runs/x`` in the current directory: one failed attempt, three steps, one checkpoint."""
    monkeypatch.chdir(tmp_path)
    made = RunDir(Path("runs/x"))
    attempt = made.attempt(1)
    attempt.logs.mkdir(parents=True)
    made.spec.write_text(fakes.spec(made.root.absolute()).to_json())
    attempt.exit.write_text(json.dumps({"verdict": "failed", "message": "train failed"}))
    rows = [{"step": n, "steps": 9, "loss": 2.0 - n / 8, "tokens_per_s": 1234.5, "left_s": 70.0} for n in (1, 2, 3)]
    rows.insert(2, {"step": 2, "held_out_loss": 1.5})
    made.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    made.checkpoint(2).root.mkdir(parents=True)
    made.checkpoint(2).manifest.write_text(json.dumps({"files": {}}))
    attempt.log("prepare").write_text("42 documents\n")
    attempt.log("rank-0").write_text("step 1\nstep 2\n")
    attempt.log("rank-1").write_text("hello from rank 1\n")
    return made


def hold(path: Path, how: int) -> int:
    file = path.open("w")
    fcntl.flock(file, how)
    _held.append(file)
    return file.fileno()


_held: list[object] = []


@pytest.fixture(autouse=True)
def _let_go() -> object:
    yield
    _held.clear()


def test_status_shows_the_newest_step_and_the_verdict(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.status("", read([])) == 0
    words = capsys.readouterr().out.splitlines()[1].split()
    assert words == ["x", "failed", "3/9", "1.6250", "1,234", "1", "step", "2", "train", "failed"]


def test_status_of_one_run(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.status("x", read([])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "state      failed: train failed" in lines
    assert "held-out   1.5000" in lines


def test_status_where_there_are_no_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert commands.status("", read([])) == 0
    assert capsys.readouterr().out == "no runs in runs/ yet; start one with galley run (see galley recipes)\n"


def test_a_run_without_a_word_is_lost(run: RunDir) -> None:
    run.attempt(1).exit.unlink()
    assert runs.state(run).state == "lost"


@pytest.mark.parametrize(("name", "how"), [("lock", fcntl.LOCK_EX), ("ranks_lock", fcntl.LOCK_SH)])
def test_a_locked_run_is_live(run: RunDir, name: str, how: int) -> None:
    assert not locks.is_live(run)
    hold(getattr(run, name), how)
    assert runs.state(run).state == "live"
    run.attempt(1).request_stop("user")
    assert runs.state(run).state == "stopping"


def test_ranks_that_outlive_their_launcher_keep_the_run(run: RunDir) -> None:
    hold(run.ranks_lock, fcntl.LOCK_SH)
    with pytest.raises(UserError, match="in use by a live run"), locks.held(run):
        pass


def test_one_who_only_looks_does_not_keep_a_run(run: RunDir) -> None:
    looking = hold(run.lock, fcntl.LOCK_SH)
    threading.Timer(0.3, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
    with locks.held(run):
        assert locks.is_live(run)


def test_a_run_that_may_only_be_read_is_seen_live(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(run.lock, fcntl.LOCK_EX)
    real = os.open

    def reader(path: Path, flags: int, *mode: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", reader)
    assert runs.state(run).state == "live"
    _held.clear()
    assert not locks.is_live(run)


def test_stop_leaves_the_request(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="is not running"):
        commands.stop("x", read([]))
    hold(run.lock, fcntl.LOCK_EX)
    assert commands.stop("x", read([])) == 0
    assert json.loads(run.attempt(1).stop.read_text())["reason"] == "user"
    assert (
        capsys.readouterr().out
        == "asked x to save and stop: it ends what it is at, then saves; galley logs runs/x follows it\n"
    )


def test_logs_of_a_run_that_is_over(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.logs("x", read([])) == 0
    assert capsys.readouterr().out == "42 documents\nstep 1\nstep 2\n"


def test_logs_of_one_rank(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.logs("x", read(["rank=1", "attempt=1"])) == 0
    assert capsys.readouterr().out == "hello from rank 1\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["rank=7"], "rank: no log of rank 7 in attempt 1; choose from 0, 1"),
        (["attempt=2"], "attempt: 2 does not exist; choose from 1"),
        (["rank=²"], "rank: '²' is not a whole number from 0; write rank=0, rank=1 …"),
        (["rank=-1"], "rank: '-1' is not a whole number from 0; write rank=0, rank=1 …"),
    ],
)
def test_logs_that_are_not_there(run: RunDir, settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        commands.logs("x", read(settings))
    assert str(error.value) == message


def test_logs_follow_a_live_run_to_its_end(run: RunDir) -> None:
    lock = run.lock.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    shown: list[str] = []
    log = run.attempt(1).log("rank-0")
    follower = threading.Thread(target=runs.follow, args=(run, lambda: [log], shown.append, 0.02))
    follower.start()
    fakes.wait_for(lambda: shown == ["step 1", "step 2"])
    with run.attempt(1).log("rank-0").open("a") as file:
        file.write("step 3\n")
    fakes.wait_for(lambda: shown[-1] == "step 3")
    time.sleep(0.1)
    assert follower.is_alive()
    lock.close()
    follower.join(10)
    assert not follower.is_alive()


def test_an_unknown_run_gets_the_nearest_name(run: RunDir) -> None:
    with pytest.raises(UserError, match="did you mean 'x'"):
        runs.find("xx", Path("runs"))


def test_stop_says_which_step_it_waits_for(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    hold(run.lock, fcntl.LOCK_EX)
    run.metrics.write_text('{"step": 7, "steps": 9, "step_s": 83.2}\n')
    assert commands.stop("x", read([])) == 0
    assert "it waits for step 8 (a step takes 1 min 23 s), then saves;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ({"verdict": "failed", "message": "rank 1 was killed by signal 9"}, "rank 1 was killed by signal 9"),
        ({"verdict": "failed", "kind": "gpu_memory"}, "gpu_memory"),
        ({"verdict": "stopped", "reason": "user"}, "user"),
        ({"verdict": "stopped", "reason": "walltime"}, "walltime"),
        ({"verdict": "done", "step": 9}, "not exported"),
        ({"verdict": "done", "step": 9, "exported": True}, ""),
        (None, "ended without a word (killed, or its machine went down)"),
    ],
)
def test_the_table_has_a_reason(
    end: dict[str, object] | None, reason: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run.attempt(1).exit.write_text(json.dumps(end) if end else "")
    assert runs.state(run).reason == reason
    assert commands.status("", read([])) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert ("reason" in head) == bool(reason)
    assert not reason or row[head.index("reason") :] == reason


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_fits_the_terminal(
    columns: int, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.attempt(1).exit.write_text(json.dumps({"verdict": "failed", "message": "train failed: " + "why " * 90}))
    monkeypatch.setattr("os.isatty", lambda _stream: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    assert commands.status("", read([])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[1].endswith("…")
    assert ("tokens/s" in lines[0]) == (columns == 120)
