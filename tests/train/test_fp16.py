"""fp16 with scaled losses. DeepSpeed refuses it on a CPU for want of speed; torch's kernels compute it all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, rank_logs, write_data

from galley.contract.rundir import RunDir

pytestmark = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(16)]
STEPS = 6


def train_in_fp16(argv: list[str]) -> int:
    """Run on each rank."""
    from deepspeed.accelerator import get_accelerator

    from galley.train import train

    get_accelerator().is_fp16_supported = lambda: True
    return train.main(argv)


def go(ranks: Ranks, root: Path, model: Path, scale_power: int, **settings: Any) -> RunDir:
    run = RunDir(root)
    spec = make_spec(
        run, model, dtype="float16", world=2, steps=STEPS, cadence={"save_every": 1, "keep": 9}, **settings
    )
    spec.placement.deepspeed["fp16"] |= {"initial_scale_power": scale_power, "loss_scale_window": 2, "hysteresis": 1}
    run.spec.write_text(spec.to_json())
    if not run.data.exists():
        write_data(run, model, SAMPLES, None, packed=False)
    start(ranks, run)
    return run


def start(ranks: Ranks, run: RunDir) -> None:
    assert ranks.run("test_fp16:train_in_fp16", [str(run.spec)], 2, run.root / "log") == [0, 0], rank_logs(run)


@pytest.mark.parametrize(("stage", "method"), [(1, "lora"), (2, "full"), (3, "qlora")])
def test_it_learns_what_fp32_learns(
    tmp_path: Path, llama: Path, ranks: Ranks, train: Train, stage: int, method: str
) -> None:
    run = go(ranks, tmp_path / "fp16", llama, 8, stage=stage, method=method)
    exact = RunDir(tmp_path / "fp32")
    spec = make_spec(exact, llama, dtype="float32", world=2, steps=STEPS, stage=stage, method=method)
    write_data(exact, llama, SAMPLES, None, packed=False)
    train(exact, spec)
    assert metrics(run) == pytest.approx(metrics(exact), rel=3e-3)
    assert "overflow" not in run.attempt(1).log("rank-0").read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_that_overflows_is_left_out_and_a_resumed_run_knows(
    tmp_path: Path, llama: Path, ranks: Ranks, stage: int
) -> None:
    run = go(ranks, tmp_path / "run", llama, 20, stage=stage)
    log, whole = run.attempt(1).log("rank-0").read_text(), metrics(run)
    skipped = log.count("its gradients overflow fp16")
    assert 2 <= skipped < STEPS
    assert whole[0] != whole[-1]
    # Go on after and before the first steps that count: scale and bias correction follow from what was skipped.
    for step in (skipped + 1, skipped - 1):
        for later in range(step + 1, STEPS + 1):
            run.checkpoint(later).manifest.unlink()
        start(ranks, run)
        assert metrics(run) == whole, step
