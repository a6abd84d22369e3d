"""Run directories that were damaged or half copied: `status` goes on past them, other verbs refuse in a line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import world

from galley.contract.rundir import RunDir
from galley_launch import cli
from galley_launch.base import devices
from galley_launch.runs import runs
from launch import fakes

VERBS = ["status bad", "why bad", "logs bad", "report bad", "stop bad", "plan runs/bad device=cpu ranks=1",
         "export bad step=9"]  # fmt: skip


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sound runs of two attempts and checkpoints, ``good`` and the one that is to be damaged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(devices, "visible", list)
    spec = fakes.spec(tmp_path / "x").to_json()
    for name in ("good", "bad"):
        world.run(tmp_path / "runs" / name, spec, submitted=False)
    return tmp_path


def text(path: str, body: str | bytes) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else None
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body if isinstance(body, bytes) else body.encode())

    return write


def folder(path: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / path).unlink(missing_ok=True)
        (root / path).mkdir(parents=True)

    return make


def fifo(path: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / path).unlink(missing_ok=True)
        os.mkfifo(root / path)

    return make


def endless(path: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        with (root / path).open("wb") as file:
            file.truncate(1 << 40)

    return make


EXIT, ROW = "attempts/0002/exit.json", '{"step": 6, "steps": 9, "loss": '
DAMAGE: dict[str, Callable[[Path], None]] = {
    "checkpoint of another name": folder("checkpoints/step-x"),
    "checkpoint of a Roman numeral": folder("checkpoints/step-²"),
    "checkpoint that is a file": text("checkpoints/step-000009", "x"),
    "attempt of another name": folder("attempts/foo"),
    "attempt of Arabic digits": folder("attempts/٣"),
    "attempt that is a file": text("attempts/0003", "x"),
    "attempt with a number of 60 digits": folder("attempts/" + "9" * 60),
    "attempts that are a file": text("attempts", "x"),
    "manifest that is a list": text("checkpoints/step-000006/manifest.json", "[1]"),
    "manifest whose files are a list": text("checkpoints/step-000006/manifest.json", '{"files": ["a"]}'),
    "manifest with a name that is none": text("checkpoints/step-000006/manifest.json", '{"files": {"\\u0000": 1}}'),
    "manifest of strings": text("checkpoints/step-000006/manifest.json", '{"files": {}, "held_out_loss": "x"}'),
    "verdict left out": text(EXIT, '{"step": "x", "message": 5}'),
    "verdict that is a list": text(EXIT, '{"verdict": ["failed"], "reason": {}, "nodes": 5}'),
    "exit.json that is a list": text(EXIT, "[]"),
    "exit.json cut short": text(EXIT, '{"verdict": "fai'),
    "exit.json nested": text(EXIT, "[" * 9000),
    "exit.json of bytes": text(EXIT, b"\xff\xfe"),
    "exit.json a pipe": fifo(EXIT),
    "exit.json without end": endless(EXIT),
    "metrics of strings": text("metrics.jsonl", '{"step": "6", "steps": "9", "loss": "x", "tokens_per_s": []}\n'),
    "metrics of lists": text("metrics.jsonl", '{"step": [1], "steps": {}, "loss": [], "left_s": "x"}\n[]\n5\n'),
    "metrics without steps": text("metrics.jsonl", '{"steps": 9, "held_out_loss": "nan"}\n'),
    "metrics of infinities": text("metrics.jsonl", f"{ROW}1e999}}\n{ROW}NaN}}\n{ROW}{'9' * 400}}}\n"),
    "metrics of 5,000 digits": text("metrics.jsonl", f"{ROW}{'9' * 5000}}}\n"),
    "metrics nested": text("metrics.jsonl", "[" * 50_000 + "\n" + '{"a":' * 50_000),
    "metrics of bytes": text("metrics.jsonl", b"\xff\x00\n" * 99),
    "metrics a folder": folder("metrics.jsonl"),
    "metrics a pipe": fifo("metrics.jsonl"),
    "metrics without end": endless("metrics.jsonl"),
    "run.json of bytes": text("run.json", b"\xff\xfe{\x00}\x00"),
    "run.json a list": text("run.json", "[]"),
    "run.json empty": text("run.json", ""),
    "run.json nested": text("run.json", '{"a":' * 9000),
    "run.json a folder": folder("run.json"),
    "run.json a pipe": fifo("run.json"),
    "lock a folder": folder(".launcher.lock"),
    "lock a pipe": fifo(".launcher.lock"),
    "ranks' lock a folder": folder(".ranks.lock"),
    "log a pipe": fifo("attempts/0002/logs/rank-0.log"),
    "log a folder": folder("attempts/0002/logs/rank-0.log"),
    "log without end": endless("attempts/0002/logs/rank-0.log"),
    "error of lists": text("attempts/0002/errors/rank-0.json", '{"who": [], "time": "x", "status": {}, "message": 5}'),
    "error a pipe": fifo("attempts/0002/errors/rank-0.json"),
    "placement of numbers": text("attempts/0002/placement.json", '{"nodes": "x", "deepspeed": 5}'),
    "data's manifest of numbers": text("data/manifest.json", '{"model": 5, "train": "x", "sources": {"a": 1}}'),
    "export's record of numbers": text("export/export.json", '{"step": [], "checks": {"a": 5}}'),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_status_goes_on_and_verbs_refuse(
    here: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(here / "runs" / "bad")
    assert cli.main(["status"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["run", "bad", "good"], "each run has its row"
    assert rows[2].split()[1] == "failed"
    for words in VERBS:
        status = cli.main(words.split())
        _, err = capsys.readouterr()
        assert status in (0, 2), words
        assert "Traceback" not in err
        if status == 2:
            assert err.count("galley: ") == err.count("\n") == 1, words
            assert len(err) <= 500


@pytest.mark.parametrize("name", ["run.json of bytes", "run.json a list", "run.json a folder", "exit.json cut short"])
def test_a_damaged_run_is_named_with_its_file(here: Path, name: str) -> None:
    DAMAGE[name](here / "runs" / "bad")
    state = runs.state(RunDir(here / "runs" / "bad"))
    assert state.state == "damaged"
    assert f"{name.split()[0]} cannot be read" in state.reason


def test_what_is_sound_is_still_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A torn row or a stranger's folder takes nothing away from the rest."""
    run = RunDir(here / "runs" / "bad")
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 7, "loss": "x"}\n{"step": "8"}\n\xff\xff\n{"step": 9, "lo')
    for name in ("checkpoints/step-x", "attempts/foo"):
        folder(name)(run.root)
    row = runs.last_row(run.metrics)
    assert (row.step, row.steps) == (7, 9)
    assert row.loss == pytest.approx(3 - 6 / 9)
    assert [each.step for each in run.checkpoints()] == [4, 6]
    assert [each.number for each in run.attempts()] == [1, 2]
    assert json.loads(run.attempt(2).exit.read_text())["verdict"] == runs.state(run).state == "failed"
