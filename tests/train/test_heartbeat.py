"""A watcher on the node sees where each rank is, and can make a rank that hangs say where."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import pytest
from ranks import Ranks
from toy import make_documents, make_spec, metrics, rank_logs, write_data

from galley.contract.rundir import RunDir, read_json
from galley.ranks import heartbeat

slow = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(16)]


def train_and_keep(argv: list[str]) -> int:
    """Run on each rank: train, keeping what the rank's file holds after each beat."""
    from galley.train import train

    rank, folder, beat = os.environ["RANK"], Path(os.environ["GALLEY_HEARTBEATS"]), heartbeat.beat

    def beat_and_keep(phase: heartbeat.Phase, step: int = 0) -> None:
        beat(phase, step)
        with (folder / f"history-{rank}").open("a") as history:
            history.write((folder / f"rank-{rank}.json").read_text() + "\n")

    heartbeat.beat = beat_and_keep
    return train.main(argv)


@slow
def test_each_rank_says_where_it_is(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run, folder = RunDir(tmp_path / "run"), tmp_path / "beats"
    make_spec(run, llama, world=2, steps=3, cadence={"eval_every": 2})
    write_data(run, llama, SAMPLES, SAMPLES[:6], packed=False)
    folder.mkdir()
    started, env = time.time(), {"GALLEY_HEARTBEATS": str(folder)}
    pids = ranks.start("test_heartbeat:train_and_keep", [str(run.spec)], 2, tmp_path / "log", env)
    assert ranks.wait() == [0, 0], rank_logs(run)
    assert sorted(path.name for path in folder.glob("rank-*")) == ["rank-0.json", "rank-1.json"]
    for rank, pid in enumerate(pids):
        beats = [json.loads(line) for line in (folder / f"history-{rank}").read_text().splitlines()]
        assert {(each["rank"], each["pid"], each["host"]) for each in beats} == {(rank, pid, os.uname().nodename)}
        assert started < beats[0]["time"] < beats[-1]["time"] < time.time()
        where = [(each["phase"], each["step"]) for each in beats]
        assert [place for place, _ in groupby(where)] == [
            ("start", 0), ("join", 0), ("load", 0), ("step", 0), ("step", 1), ("evaluate", 2), ("save", 2),
            ("step", 2), ("evaluate", 3), ("save", 3), ("end", 3),
        ]  # fmt: skip
        # Six held-out samples are two micro-batches a rank; a step has two, and a boundary.
        assert (where.count(("evaluate", 2)), where.count(("step", 1))) == (2, 3)


@slow
def test_a_rank_that_hangs_in_a_collective_says_where_on_sigusr2(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run, folder = RunDir(tmp_path / "run"), tmp_path / "beats"
    make_spec(run, llama, world=2, steps=100_000)
    write_data(run, llama, SAMPLES, None, packed=False)
    folder.mkdir()
    env = {"GALLEY_HEARTBEATS": str(folder)}
    pids = ranks.start("galley.train.train:main", [str(run.spec)], 2, tmp_path / "log", env)
    while not run.metrics.exists() or not metrics(run):
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGSTOP)
    time.sleep(1)
    last = read_json(folder / "rank-0.json") or {}
    assert (last["phase"], last["time"] < time.time() - 0.5) == ("step", True)
    os.kill(last["pid"], signal.SIGUSR2)
    log, deadline = run.attempt(1).log("rank-0"), time.monotonic() + 10
    while "most recent call first" not in log.read_text() or "in main" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    stacks = log.read_text()
    assert "distributed_c10d.py" in stacks, "the collective that it waits in"
    assert "galley/train/train.py" in stacks
    os.kill(pids[1], signal.SIGKILL)
    waited, died = ranks.wait()
    assert died == -signal.SIGKILL
    assert waited == 1, "it went on after the dump, and saw its neighbour die"


def test_the_first_beat_comes_before_the_libraries(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(3)\n")
    source = Path(heartbeat.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{source}", "GALLEY_HEARTBEATS": str(tmp_path), "RANK": "5"}
    assert subprocess.run([sys.executable, "-m", "galley.train"], env=env).returncode == 3
    assert (read_json(tmp_path / "rank-5.json") or {})["phase"] == "start"


def test_a_beat_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("GALLEY_HEARTBEATS", str(tmp_path / "not-there"))
    heartbeat.beat("step", 1)
    monkeypatch.setenv("GALLEY_HEARTBEATS", str(tmp_path))
    heartbeat.beat("step", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["rank-0.json"]


def test_without_a_directory_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GALLEY_HEARTBEATS", raising=False)
    monkeypatch.chdir(tmp_path)
    heartbeat.beat("step", 1)
    assert list(tmp_path.iterdir()) == []
