"""SIGKILL at every file operation of a save, and a disk that fills up during it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from ranks import Ranks
from toy import make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(16)]
STEPS = 2


def make_run(root: Path, model: Path) -> tuple[RunDir, RunSpec]:
    """Two steps, each saved, the first pruned after the second: every operation that a save can do."""
    run = RunDir(root)
    spec = make_spec(run, model, stage=2, steps=STEPS, cadence={"save_every": 1, "keep": 1})
    write_data(run, model, SAMPLES, None, packed=False)
    return run, spec


def go(ranks: Ranks, run: RunDir, **fault: str) -> int:
    env = {f"GALLEY_FAULT_{key.upper()}": value for key, value in fault.items()}
    if fault:
        env["GALLEY_FAULT_DIR"] = "/checkpoints"
    return ranks.run("galley.train.train:main", [str(run.spec)], 1, run.root / "log", env)[0]


def newest(run: RunDir) -> int:
    return max((each.step for each in run.checkpoints()), default=0)


@pytest.mark.long
def test_sigkill_at_every_file_operation(tmp_path: Path, llama: Path, faulty: Ranks) -> None:
    """Before each operation; after one is before the next, since nothing but memory changes in between.

    Writing is slowed down, so that training goes on meanwhile.
    """
    whole, _ = make_run(tmp_path / "whole", llama)
    assert go(faulty, whole, count=str(tmp_path / "count")) == 0
    operations = (tmp_path / "count").stat().st_size
    assert operations > 20, "the shim saw too little"
    seen = set()
    for number in range(1, operations + 2):
        run, _ = make_run(tmp_path / f"killed-{number}", llama)
        status = go(faulty, run, at=str(number), slow="10")
        assert status == (-signal.SIGKILL if number <= operations else 0)
        stood, taken = newest(run), len(metrics(run)) if run.metrics.exists() else 0
        seen.add((stood, taken))
        assert go(faulty, run) == 0, f"operation {number}"
        log = run.attempt(1).log("rank-0").read_text()
        assert (f"resuming after step {stood}" in log) == (stood > 0)
        assert metrics(run) == metrics(whole), f"operation {number}"
        assert [each.step for each in run.checkpoints()] == [STEPS]
        shutil.rmtree(run.root)
    assert seen - {(1, 1)} == {(0, 1), (0, 2), (1, 2), (2, 2)}, "a kill before, during, between and after the two saves"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, llama: Path, faulty: Ranks) -> None:
    run = RunDir(tmp_path)
    make_spec(run, llama, stage=2, steps=100, cadence={"save_every": 60})
    write_data(run, llama, SAMPLES, None, packed=False)
    assert go(faulty, run, slow="20") == 0
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    order = [(next(key for key in ("loss", "stall_s", "save_s") if key in row), row["step"]) for row in rows]
    assert [step for _, step in order] == sorted(step for _, step in order), "whoever reads the last row knows the step"
    saves = {row["saved_step"]: row["save_s"] for row in rows if "save_s" in row}
    stalls = {row["step"]: row["stall_s"] for row in rows if "stall_s" in row}
    assert list(saves) == [60, 100]
    assert 62 <= next(row["step"] for row in rows if row.get("saved_step") == 60) < 100
    assert stalls[60] < saves[60] / 2
    assert stalls[100] == pytest.approx(saves[100], rel=0.5), "the last one is waited for"


def test_a_full_disk_ends_with_one_line_and_the_previous_checkpoint_intact(
    tmp_path: Path, llama: Path, faulty: Ranks
) -> None:
    whole, _ = make_run(tmp_path / "whole", llama)
    assert go(faulty, whole, count=str(tmp_path / "count")) == 0
    first_save = (tmp_path / "count").stat().st_size // 2
    for number in (1, first_save + 6, first_save + 9):
        run, _ = make_run(tmp_path / f"full-{number}", llama)
        assert go(faulty, run, at=f"{number}-full") == 2
        stood = newest(run)
        message = run.attempt(1).errors()[0]["message"]
        assert "the disk is full" in message
        assert ("the checkpoint of step 1 is intact" in message) == (stood == 1)
        assert len(message.splitlines()) == 1
        assert go(faulty, run) == 0
        assert metrics(run) == metrics(whole)
    assert os.listdir(whole.root / "checkpoints") == ["step-000002"]  # noqa: PTH208


def test_who_may_read_a_checkpoint_follows_the_umask(tmp_path: Path, llama: Path, faulty: Ranks) -> None:
    """safetensors makes its files for their owner alone, whatever the umask."""
    mask = os.umask(0o022)
    os.umask(mask)
    run, _ = make_run(tmp_path / "run", llama)
    assert go(faulty, run) == 0
    files = [path for path in run.checkpoint(STEPS).root.iterdir() if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask & ~0o002}
