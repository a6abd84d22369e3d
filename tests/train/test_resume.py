"""Killed anywhere, a run goes on as if nothing had happened; on other ranks or another ZeRO stage, as if little had."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, rank_logs, write_data

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec

pytestmark = pytest.mark.slow

SAMPLES = [[document] for document in make_documents(30)]
STEPS = 9
BF16: dict[str, Any] = {"dtype": "bfloat16"}
QLORA: dict[str, Any] = {"method": "qlora"}


def make_run(root: Path, model: Path, **settings: Any) -> tuple[RunDir, RunSpec]:
    run = RunDir(root)
    settings = {"steps": STEPS, "cadence": {"save_every": 2, "eval_every": 3, "keep": 2}} | settings
    spec = make_spec(run, model, **settings)
    if not run.data_manifest.exists():
        write_data(run, model, SAMPLES, SAMPLES[:5], packed=False)
    return run, spec


def rows(run: RunDir) -> list[tuple[Any, ...]]:
    """What must be the same to the bit: every step's loss, norm and rate, and every held-out loss.

    How long a save took is no such thing, and a kill can come between a save and its row.
    """
    parsed = [
        row
        for line in run.metrics.read_text().splitlines()
        if not {"save_s", "stall_s"} & (row := json.loads(line)).keys()
    ]
    return [tuple(row.get(k) for k in ("step", "loss", "grad_norm", "lr", "tokens", "held_out_loss")) for row in parsed]


def kill_at(ranks: Ranks, run: RunDir, spec: RunSpec, step: int, victim: int) -> None:
    """Start the run and SIGKILL one rank as soon as step ``step`` is on record."""
    pids = ranks.start("galley.train.train:main", [str(run.spec)], spec.placement.data_parallel, run.root / "ranks.log")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (run.metrics.exists() and len(metrics(run)) >= step):
        time.sleep(0.005)
    os.kill(pids[victim], signal.SIGKILL)
    assert -signal.SIGKILL in ranks.wait(), rank_logs(run)


PLACES = [(stage, dtype, world) for stage in (0, 2, 3) for dtype in ("float32", "bfloat16") for world in (1, 2)]
CASES = [("full", *place) for place in PLACES]
CASES += [("lora", *place) for place in PLACES if (place[0], place[2]) in {(0, 1), (2, 2), (3, 2)}]


@pytest.mark.parametrize(("method", "stage", "dtype", "world"), CASES)
def test_a_killed_run_resumes_to_the_bit(
    tmp_path: Path, llama: Path, ranks: Ranks, train: Train, method: str, stage: int, dtype: str, world: int
) -> None:
    settings = {"stage": stage, "dtype": dtype, "world": world, "method": method}
    if method == "lora":
        settings["task"] = {"method": {"kind": "lora", "rank": 4, "dropout": 0.1}}
    whole, spec = make_run(tmp_path / "whole", llama, **settings)
    train(whole, spec)
    run, spec = make_run(tmp_path / "killed", llama, **settings)
    chance = random.Random(f"{method}{stage}{dtype}{world}")
    kill_at(ranks, run, spec, step=chance.randint(1, STEPS - 2), victim=chance.randrange(world))
    train(run, spec)
    assert rows(run) == rows(whole)
    assert len(metrics(run)) == STEPS


@pytest.mark.parametrize(
    "placements",
    [
        [{"world": 2}, {"world": 1}, {"world": 2}],
        [{"world": 2, "stage": 2}, {"world": 2, "stage": 3}, {"world": 1, "stage": 0}],
        [{"world": 1, "stage": 0}, {"world": 2, "stage": 3}, {"world": 4, "stage": 1}],
        [{"world": 1, "stage": 3}, {"world": 1, "stage": 3, "offload": True}, {"world": 2, "stage": 2}],
        [BF16 | {"world": 1, "stage": 1}, BF16 | {"world": 2, "stage": 3}, BF16 | {"stage": 0}],
        [QLORA | {"world": 2, "stage": 2}, QLORA | {"world": 1, "stage": 3}, QLORA | {"world": 2}],
    ],
    ids=["ranks-2-1-2", "zero-2-3-0", "zero-0-3-1", "offload", "bfloat16", "qlora"],
)  # fmt: skip
def test_a_run_goes_on_with_other_ranks_and_other_zero_stages(
    tmp_path: Path, llama: Path, train: Train, placements: list[dict[str, Any]]
) -> None:
    steady = {"schedule": {"kind": "constant", "warmup": 0.0}}  # so that a longer duration is the same run
    whole, spec = make_run(tmp_path / "whole", llama, micro=1, task=steady, **placements[0])
    train(whole, spec)
    for part, placement in enumerate(placements, start=1):
        steps = part * STEPS // len(placements)
        run, spec = make_run(tmp_path / "moved", llama, micro=1, task=steady, **placement | {"steps": steps})
        train(run, spec)
    assert len(metrics(run)) == STEPS
    assert metrics(run) == pytest.approx(metrics(whole), rel=1e-3)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path, llama: Path, train: Train) -> None:
    run, spec = make_run(tmp_path / "run", llama, world=1)
    train(run, spec)
    before = rows(run)
    for checkpoint in run.checkpoints()[1:]:
        shutil.rmtree(checkpoint.root)
    with run.metrics.open("a") as file:
        file.write('{"step": 99, "lo')
    train(run, spec)
    assert rows(run) == before
