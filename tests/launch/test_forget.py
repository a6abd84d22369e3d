"""``galley forget``: runs are removed when somebody says so, and never one that is live or queued."""

import fcntl
import io
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from galley.contract.rundir import RunDir
from galley_launch import cli
from galley_launch.job import slurm
from galley_launch.submit import queue
from launch import fakes


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(name: str, base: str = "runs", **end: object) -> RunDir:
    run = RunDir(Path(base) / name)
    run.attempt(1).root.mkdir(parents=True)
    run.spec.write_text(fakes.spec(run.root.absolute()).to_json())
    run.attempt(1).exit.write_text(json.dumps({"verdict": "failed", "message": "broke"} | end))
    run.checkpoint(2).root.mkdir(parents=True)
    (run.checkpoint(2).root / "rank-0.safetensors").write_bytes(b"x" * 20_000_000)
    run.checkpoint(2).manifest.write_text(json.dumps({"files": {"rank-0.safetensors": 20_000_000}}))
    return run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "removed"), [("y\n", True), ("yes\n", True), ("n\n", False), ("", False), ("\n", False)]
)
def test_it_asks_first(
    answer: str, removed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made("old")
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert cli.main(["forget", "old"]) == (0 if removed else 1)
    out = capsys.readouterr().out
    assert out.startswith("runs/old: failed, 1 checkpoint, 20 MB\nRemove it for good? [y/N] ")
    assert out.endswith("removed runs/old\n" if removed else "nothing was removed\n")
    assert run.root.exists() != removed
    assert list(Path("runs").iterdir()) == ([] if removed else [run.root])


def test_scripts_say_yes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "kept"):
        made(name)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert cli.main(["forget", "a", "b"]) == 2
    assert "nobody can answer here; add yes=true" in capsys.readouterr().err
    assert cli.main(["forget", "a", "b", "--yes"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["kept"]
    assert cli.main(["forget", "kept", "yes=perhaps"]) == 2
    assert "neither true nor false" in capsys.readouterr().err


def test_an_exported_model_is_named_before_it_goes(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("good", verdict="done", exported=True)
    (run.export / "model").mkdir(parents=True)
    assert cli.main(["forget", "runs/good", "yes=true"]) == 0
    assert "done, 1 checkpoint, an exported model, " in capsys.readouterr().out


def test_a_live_run_stays(capsys: pytest.CaptureFixture[str]) -> None:
    run, other = made("live"), made("dead")
    with run.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cli.main(["forget", "dead", "live", "yes=true"]) == 2
    assert "runs/live: is live; end it first: galley stop runs/live" in capsys.readouterr().err
    assert run.root.exists()
    assert other.root.exists()  # all or none


@pytest.mark.parametrize("jobs", ["waiting", "away"])
def test_a_queued_run_stays(jobs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = made("queued")
    run.jobs.mkdir()
    run.submitted.write_text(json.dumps({"job": "7", "stage": "train", "time": 1.0}) + "\n")

    def answer(_ids: list[str], _cluster: str) -> dict[str, slurm.Job]:
        if jobs == "away":
            raise slurm.SlurmError("no answer")
        return {"7": replace(slurm.Job(*[None] * len(fields(slurm.Job))), id="7", state="PENDING", reason="Priority")}

    monkeypatch.setattr(queue.slurm, "jobs", answer)
    assert cli.main(["forget", "queued", "yes=true"]) == 2
    err = capsys.readouterr().err
    assert ("has jobs that wait or run" if jobs == "waiting" else "may have jobs in a queue") in err
    assert run.root.exists()


def test_a_link_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("real", "elsewhere")
    Path("runs").mkdir()
    Path("runs/link").symlink_to(run.root.absolute())
    assert cli.main(["forget", "link", "yes=true"]) == 2
    assert "is a link to a run" in capsys.readouterr().err
    assert run.spec.exists()


def test_only_runs_are_removed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/notes").mkdir(parents=True)
    for name in ("notes", "runs", ".", "..", "/"):
        assert cli.main(["forget", name, "yes=true"]) == 2
    assert capsys.readouterr().err.count("no run ") == 5
    assert Path("runs/notes").is_dir()


def test_runs_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    run = made("x", "other")
    assert cli.main(["forget", "x", "runs=other", "yes=true"]) == 0
    assert not run.root.exists()
