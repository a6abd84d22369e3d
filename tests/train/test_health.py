"""Training that breaks a model ends in one line that names the rate, or with a warning: never with "done" alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import toy
from ranks import Ranks
from toy import make_documents, make_spec, write_data

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir, read_json
from galley.train.health import Health

SAMPLES = [[document] for document in make_documents(24)]


@pytest.fixture
def health(tmp_path: Path) -> Health:
    return Health(make_spec(RunDir(tmp_path), tmp_path, task={"optimizer": {"lr": 1000}}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_rate_that_destroys_the_model_is_named(tmp_path: Path, llama: Path, ranks: Ranks, method: str) -> None:
    run = RunDir(tmp_path)
    make_spec(run, llama, method=method, world=2, steps=30, task={"optimizer": {"lr": 1000}})
    write_data(run, llama, SAMPLES, SAMPLES[:4], packed=False)
    assert ranks.run("galley.train.train:main", [str(run.spec)], 2, tmp_path / "log") == [2, 2]
    message = str((read_json(run.attempt(1).error("rank-0")) or {})["message"])
    assert "gradient norm" in message
    assert "optimizer.lr is 1000: try a lower one" in message
    assert run.checkpoints() == []


@pytest.mark.slow
def test_the_end_of_a_short_run_says_that_it_was_short(tmp_path: Path, llama: Path, train: toy.Train) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, duration={"epochs": 1})
    write_data(run, llama, SAMPLES, None, packed=False)
    train(run, spec)
    assert "warning: only 3 optimizer steps from 24 samples" in toy.rank_logs(run).splitlines()[-1]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_ends_the_run(health: Health, norm: float) -> None:
    with pytest.raises(UserError, match=r"the gradient norm of step 3 is (nan|inf).*optimizer.lr is 1000"):
        health.step(3, 2.0, norm)


def test_five_steps_without_any_gradient_end_the_run_and_fewer_do_not(health: Health) -> None:
    for step in range(1, 5):
        health.step(step, 5.5, 0.0)
    health.step(5, 5.5, 1e-9)
    for step in range(6, 10):
        health.step(step, 5.5, 0.0)
    with pytest.raises(UserError, match="exactly 0 for 5 steps up to step 10"):
        health.step(10, 5.5, 0.0)


def test_a_model_that_knows_its_data_by_heart_may_stand_still(health: Health) -> None:
    for step in range(20):
        health.step(step, 1e-6, 0.0)
    assert health.end(vocab=256) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_ends_the_run(health: Health, loss: float) -> None:
    health.held_out(10, 3.0)
    with pytest.raises(UserError, match="the held-out loss after step 10"):
        health.held_out(10, loss)


def test_weights_that_compute_nothing_finite_are_not_saved(health: Health) -> None:
    logits = torch.zeros(4, 256)
    health.probes(10, logits)
    logits[2, 7] = math.nan
    with pytest.raises(UserError, match="not finite; not saved"):
        health.probes(10, logits)


def test_a_loss_of_blind_guesses_is_no_success(health: Health) -> None:
    health.step(1, math.log(256), 1.0)
    (warning,) = health.end(vocab=256)
    assert "no better than guessing" in warning
    assert "optimizer.lr is 1000" in warning
