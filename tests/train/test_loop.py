"""The loop's promises: stop when asked, say when it goes wrong, keep the right checkpoints."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import pytest
import torch
import toy
from ranks import Ranks
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import Schedule
from galley.train.schedule import learning_rate

slow = pytest.mark.slow
SAMPLES = [[document] for document in make_documents(24)]


@slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_request_saves_and_ends(tmp_path: Path, llama: Path, ranks: Ranks, world: int) -> None:
    run = RunDir(tmp_path)
    make_spec(run, llama, world=world, steps=100_000)
    write_data(run, llama, SAMPLES, None, packed=False)
    ranks.start("galley.train.train:main", [str(run.spec)], world, tmp_path / "log")
    while not run.metrics.exists() or not metrics(run):
        time.sleep(0.01)
    run.attempt(1).request_stop("walltime")
    assert ranks.wait() == [0] * world
    ending = read_json(run.attempt(1).exit)
    assert ending is not None
    assert (ending["verdict"], ending["reason"], ending["step"]) == ("stopped", "walltime", len(metrics(run)))
    assert [each.step for each in run.checkpoints()] == [ending["step"]]


@slow
def test_a_stop_request_is_heeded_during_evaluation(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, steps=4, cadence={"eval_every": 2})
    write_data(run, llama, SAMPLES, [[document] for document in make_documents(20_000)], packed=False)
    stopper = threading.Thread(target=stop_at_step, args=(run, 2))
    stopper.start()
    started = time.monotonic()
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [0]
    stopper.join()
    ending = read_json(run.attempt(1).exit) or {}
    assert (ending["verdict"], ending["step"], spec.task.duration.steps) == ("stopped", 2, 4)
    assert metrics(run, "held_out_loss") == []
    assert time.monotonic() - started < 30


def stop_at_step(run: RunDir, step: int) -> None:
    while not run.metrics.exists() or len(metrics(run)) < step:
        time.sleep(0.005)
    time.sleep(0.2)
    run.attempt(1).request_stop("user")


@slow
def test_a_loss_that_is_not_finite_ends_the_run_with_the_rows(tmp_path: Path, ranks: Ranks) -> None:
    model = toy.make_model(tmp_path / "model")
    run = RunDir(tmp_path / "run")
    spec = make_spec(run, model, world=2, steps=4, duration={"epochs": 1.0})
    write_data(run, model, SAMPLES, None, packed=False)
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][SAMPLES[5][0][0][0]] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert ranks.run("galley.train.train:main", [str(run.spec)], 2, tmp_path / "log") == [2, 2]
    message = run.attempt(1).errors()[0]["message"]
    affected = [row for row, [(tokens, _)] in enumerate(SAMPLES) if SAMPLES[5][0][0][0] in tokens]
    named = json.loads(message.split("data rows ")[1].split(";")[0])
    assert "is not finite" in message
    assert "optimizer.lr" in message
    assert {row - 1 for row in named} & set(affected)
    assert len(named) <= len(affected) * spec.placement.micro_batch
    assert run.checkpoints() == []


@slow
def test_the_best_checkpoint_outlives_newer_ones_and_patience_ends_the_run(
    tmp_path: Path, llama: Path, train: Train
) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(
        run, llama, cadence={"eval_every": 2, "save_every": 1, "keep": 2}, duration={"steps": 60, "patience": 3},
        task={"optimizer": {"lr": 0.05}, "schedule": {"kind": "constant", "warmup": 0.0}},
    )  # fmt: skip
    write_data(run, llama, SAMPLES[:8], SAMPLES[12:], packed=False)
    train(run, spec)
    ending = read_json(run.attempt(1).exit) or {}
    losses = metrics(run, "held_out_loss")
    best = 2 * (losses.index(min(losses)) + 1)
    assert (ending["verdict"], ending["reason"]) == ("done", "early stopping")
    assert ending["step"] == best + 6 < 60
    assert [each.step for each in run.checkpoints()] == [best, ending["step"] - 1, ending["step"]]


@slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_measuring_and_saving_change_nothing(
    tmp_path: Path, llama: Path, train: Train, method: str, stage: int
) -> None:
    """To the bit; bitsandbytes repacks weights in evaluation mode, and adapters drop out only in training mode."""
    found = []
    for name, cadence in (("quiet", {}), ("busy", {"eval_every": 1, "save_every": 1})):
        run = RunDir(tmp_path / name)
        task = {"method": {"kind": method, "rank": 4, "dropout": 0.0 if method == "full" else 0.1}}
        spec = make_spec(run, llama, stage=stage, steps=5, cadence=cadence, task=task)
        write_data(run, llama, SAMPLES, SAMPLES[:7], packed=False)
        train(run, spec)
        found.append(metrics(run))
    assert found[0] == found[1]


@slow
@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_not_finite_is_not_stepped_on(tmp_path: Path, ranks: Ranks, stage: int) -> None:
    """A finite loss can have infinite gradients; DeepSpeed would leave the step out in silence."""
    from safetensors.torch import load_file, save_file

    model = toy.make_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 1e-30)
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], 1e30) * torch.rand(toy.VOCAB, 1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run = RunDir(tmp_path / "run")
    make_spec(run, model, stage=stage, steps=4)
    write_data(run, model, SAMPLES, None, packed=False)
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [2]
    message = run.attempt(1).errors()[0]["message"]
    assert "the gradient norm of step 1 is inf, though its loss is" in message
    assert run.checkpoints() == []
    assert not run.metrics.read_text()


@slow
def test_a_stop_before_the_measurement_does_not_lose_the_best(tmp_path: Path, llama: Path, train: Train) -> None:
    """A checkpoint that was saved before its held-out loss was known learns of it when the run goes on."""
    run = RunDir(tmp_path)
    steady = {"schedule": {"kind": "constant", "warmup": 0.0}}
    write_data(run, llama, SAMPLES, None, packed=False)
    train(run, make_spec(run, llama, steps=2, task=steady))  # ends without a held-out split, as if stopped
    write_data(run, llama, SAMPLES, SAMPLES[:5], packed=False)
    train(run, make_spec(run, llama, steps=4, task=steady, cadence={"eval_every": 2, "keep": 5}))
    losses = metrics(run, "held_out_loss")
    recorded = [(read_json(each.manifest) or {})["held_out_loss"] for each in run.checkpoints()]
    assert [each.step for each in run.checkpoints()] == [2, 4]
    assert recorded == losses


@slow
def test_a_lora_checkpoint_holds_the_adapter_and_nothing_else(tmp_path: Path, llama: Path, train: Train) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, method="lora", world=2, stage=3, dtype="bfloat16")
    write_data(run, llama, SAMPLES, None, packed=False)
    train(run, spec)
    adapter = 2 * 4 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)  # layers x rank x (in + out) of q o, k v, MLP
    size = sum(path.stat().st_size for path in run.checkpoints()[-1].root.glob("rank-*"))
    assert 12 * adapter <= size <= 12 * adapter + 40_000  # a weight and two moments in fp32, and two headers


@slow
def test_the_world_must_be_the_one_that_was_planned(tmp_path: Path, llama: Path, ranks: Ranks) -> None:
    run = RunDir(tmp_path)
    make_spec(run, llama, world=2)
    write_data(run, llama, SAMPLES, None, packed=False)
    assert ranks.run("galley.train.train:main", [str(run.spec)], 1, tmp_path / "log") == [2]
    assert "run.json is for 2 ranks, but 1 started" in run.attempt(1).errors()[0]["message"]


@slow
def test_what_each_step_records(tmp_path: Path, llama: Path, train: Train) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, steps=3)
    write_data(run, llama, SAMPLES, None, packed=False)
    train(run, spec)
    row = [row for line in run.metrics.read_text().splitlines() if "loss" in (row := json.loads(line))][-1]
    assert set(row) == {
        "step", "steps", "epoch", "loss", "lr", "grad_norm", "supervised_tokens", "tokens", "tokens_per_s", "mfu",
        "peak_memory_gb", "step_s", "left_s",
    }  # fmt: skip
    assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_s"], rel=0.05)
    assert 0 < row["mfu"] < 1
    assert row["left_s"] == 0
    assert any(run.tensorboard.iterdir())
    assert "step 3/3  loss" in run.attempt(1).log("rank-0").read_text()


@slow
def test_each_save_is_measured_once(tmp_path: Path, llama: Path, train: Train) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, steps=4, cadence={"save_every": 2, "eval_every": 1})
    write_data(run, llama, SAMPLES, SAMPLES[:5], packed=False)
    train(run, spec)
    train(run, spec)  # finds that everything stands
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    saves = [row for row in rows if "save_s" in row]
    better = [row["step"] for row in rows if "held_out_loss" in row]  # the loss falls in each of these steps
    assert [row["saved_step"] for row in saves] == better == [1, 2, 3, 4]
    assert all(set(row) == {"step", "save_s", "saved_step"} and 0 < row["save_s"] < 30 for row in saves)
    stalls = {row["step"]: row["stall_s"] for row in rows if "stall_s" in row}
    assert all(0 < stalls[row["saved_step"]] <= row["save_s"] + 1 for row in saves)
    assert run.attempt(1).log("rank-0").read_text().count("saved step ") == 4


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
def test_schedules_are_those_of_transformers(kind: str) -> None:
    from transformers import get_scheduler

    schedule, steps, peak = Schedule(kind=kind, warmup=0.2, decay=0.3), 20, 3e-4  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if kind == "wsd":
        settings = {"num_decay_steps": 6, "decay_type": "linear"}
        theirs = get_scheduler("warmup_stable_decay", optimizer, 4, steps, scheduler_specific_kwargs=settings)
    else:
        name = "constant_with_warmup" if kind == "constant" else kind
        theirs = get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=steps)
    for step in range(1, steps + 1):
        optimizer.step()
        theirs.step()  # theirs counts from 0 and wastes its first step on a rate of 0; ours starts one later
        assert learning_rate(schedule, peak, step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
    assert math.isclose(learning_rate(Schedule(warmup=0, min_lr_ratio=0.1), peak, steps, steps), 0.1 * peak)


def test_warm_up_stable_decay() -> None:
    schedule = Schedule(kind="wsd", warmup=0.1, decay=0.2, min_lr_ratio=0.1)
    rates = [learning_rate(schedule, 1.0, step, 20) for step in range(1, 21)]
    assert rates == pytest.approx([0.5, *[1.0] * 15, 0.775, 0.55, 0.325, 0.1])
    shortest = [learning_rate(Schedule(kind="wsd", warmup=0.0), 1.0, step, 3) for step in (1, 2, 3)]
    assert shortest == [1.0, 1.0, 0.0], "a run of a few steps still ends at the last rate"
    whole = [learning_rate(Schedule(kind="wsd", warmup=0.5, decay=0.5), 1.0, step, 3) for step in (1, 2, 3)]
    assert whole == [0.5, 1.0, 0.0], "rounding makes the two overlap by no step"
