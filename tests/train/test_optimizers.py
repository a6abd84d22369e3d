"""Optimizers and learning rates of layers: as their authors step, under every ZeRO stage, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks
from toy import Train, make_spec, metrics
from train.plain import plain_losses
from train.test_methods import ADAPTER, SAMPLES, go, resumes_to_the_bit

from galley.contract.rundir import RunDir

pytestmark = pytest.mark.slow


def depth(name: str) -> int:
    """Layers of two from the top, counted by hand."""
    return 2 if "embed_tokens" in name else 1 if ".layers.0." in name else 0


@pytest.mark.parametrize(
    ("stage", "world", "kind", "offload"),
    [(0, 1, "full", False), (1, 2, "full", False), (2, 2, "lora", False), (3, 2, "full", False), (3, 1, "full", True)],
)
def test_layers_learn_at_a_rate_of_their_own(
    tmp_path: Path, train: Train, untied: Path, stage: int, world: int, kind: str, offload: bool
) -> None:
    task = {
        "method": ADAPTER | {"kind": kind},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "layer_decay": 0.3},
    }
    run = go(train, tmp_path / "run", untied, stage=stage, world=world, offload=offload, task=task)
    expected = plain_losses(tmp_path / "p", untied, SAMPLES, scale=lambda n: 0.3 ** depth(n), steps=4, task=task)
    assert metrics(run) == pytest.approx(expected, rel=1e-4)
    alike = plain_losses(tmp_path / "alike", untied, SAMPLES, steps=4, task=task)
    assert metrics(run) != pytest.approx(alike, rel=1e-3), "all layers learnt alike"
    resumes_to_the_bit(train, run)


def lion(groups: list[dict[str, Any]], lr: float) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.Lion32bit(groups, lr=lr, betas=(0.9, 0.95))


def eight_bit(groups: list[dict[str, Any]], lr: float) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


@pytest.mark.parametrize(
    ("name", "stage", "world", "dtype", "close"),
    [
        ("lion", 0, 1, "float32", 1e-4), ("lion", 2, 2, "bfloat16", 1e-2), ("lion", 3, 2, "float32", 1e-4),
        # Blocks of 256 values lie otherwise in a flat tensor of many parameters: only ZeRO-0 has the same ones.
        ("adamw_8bit", 0, 1, "float32", 1e-4), ("adamw_8bit", 2, 2, "float32", 3e-3),
        ("adamw_8bit", 3, 2, "bfloat16", 1e-2),
    ],
)  # fmt: skip
def test_optimizers_step_as_their_authors_do(
    tmp_path: Path, train: Train, untied: Path, name: str, stage: int, world: int, dtype: str, close: float
) -> None:
    task = {"optimizer": {"name": name, "lr": 1e-3 if name == "lion" else 3e-3, "weight_decay": 0.1}}
    run = go(train, tmp_path / "run", untied, stage=stage, world=world, dtype=dtype, task=task)
    make = lion if name == "lion" else eight_bit
    expected = plain_losses(tmp_path / "plain", untied, SAMPLES, make=make, steps=4, dtype=dtype, task=task)
    assert metrics(run) == pytest.approx(expected, rel=close)
    if dtype == "float32":
        other = plain_losses(tmp_path / "other", untied, SAMPLES, steps=4, task=task)
        assert metrics(run) != pytest.approx(other, rel=1e-6), "AdamW it is"
    resumes_to_the_bit(train, run)


def state_keys(run: RunDir) -> set[str]:
    from safetensors import safe_open

    files = sorted(run.checkpoints()[-1].root.glob("rank-*.safetensors"))
    return {key.split(".")[0] for path in files for key in safe_open(path, "pt").keys()}  # noqa: SIM118


def test_a_checkpoint_has_what_its_optimizer_needs_and_other_ranks_may_read_it_or_are_refused(
    tmp_path: Path, ranks: Ranks, train: Train, untied: Path
) -> None:
    steady: dict[str, Any] = {"schedule": {"kind": "constant", "warmup": 0.0}}
    for name, keys in (("lion", {"weight", "exp_avg"}), ("adamw_8bit", {"state1", "state2", "absmax1", "absmax2"})):
        settings = {"stage": 2, "task": steady | {"optimizer": {"name": name, "lr": 1e-3}}}
        run = go(train, tmp_path / name, untied, world=2, steps=2, **settings)
        assert state_keys(run) >= keys
        assert "exp_avg_sq" not in state_keys(run)
        spec = make_spec(run, untied, world=1, steps=4, **settings)  # type: ignore[arg-type]
        if name == "lion":
            train(run, spec)
            whole = go(train, tmp_path / "whole", untied, world=1, steps=4, **settings)
            assert metrics(run) == pytest.approx(metrics(whole), rel=1e-3)
        else:
            assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [2]
            message = run.attempt(1).errors()[0]["message"]
            assert "has 8-bit optimizer state, which is of 2 ranks under ZeRO-2; go on with as many ranks" in message
