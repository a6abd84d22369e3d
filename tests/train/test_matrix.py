"""Every method trains under every ZeRO stage on one and two ranks, and learns what a plain PyTorch loop learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import toy
from toy import Train, make_documents, make_spec, metrics, write_data

from galley.contract.rundir import RunDir

pytestmark = pytest.mark.slow

STEPS = 4
SAMPLES = [[document] for document in make_documents(24)]
STAGES = [(0, False), (1, False), (2, False), (3, False), (3, True)]


def plain_loop(model_folder: Path, method: str, dtype: str) -> list[float]:
    """The same training in a few lines of PyTorch, a fp32 copy of each weight kept by hand."""
    import torch

    from galley.data import batches
    from galley.data.prepared import read_manifest
    from galley.model import model
    from galley.train.schedule import learning_rate

    run = RunDir(model_folder.parent / f"plain-{method}-{dtype}")
    spec = make_spec(run, model_folder, method=method, dtype=dtype, stage=1, steps=STEPS)
    write_data(run, model_folder, SAMPLES, None, packed=False)
    torch.manual_seed(spec.task.seed)
    net: Any = model.load(spec, read_manifest(run), torch.device("cpu"))
    low = list(model.trained(net).values())
    master = [each.detach().float().clone().requires_grad_() for each in low]
    groups = [
        {"params": [m for m in master if m.dim() >= 2], "weight_decay": 0.1},
        {"params": [m for m in master if m.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    order = batches.order(spec.task, len(SAMPLES))
    losses = []
    for step in range(1, STEPS + 1):
        terms: list[Any] = []
        count = 0
        for index in order.batch(step):
            tokens, learnt = SAMPLES[index][0]
            logits = net(input_ids=torch.tensor([tokens])).logits[0, -learnt - 1 : -1].float()
            answer = torch.tensor(tokens[-learnt:])
            terms.append(torch.nn.functional.cross_entropy(logits, answer, reduction="sum"))
            count += learnt
        loss = sum(terms) / count
        losses.append(float(loss))
        for copy, gradient in zip(master, torch.autograd.grad(loss, low), strict=True):
            copy.grad = gradient.float()
        torch.nn.utils.clip_grad_norm_(master, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec.task.schedule, 3e-3, step, STEPS)
        optimizer.step()
        for weight, copy in zip(low, master, strict=True):
            weight.data.copy_(copy.data)
    return losses


@pytest.fixture(scope="module")
def plain(llama: Path) -> dict[tuple[str, str], list[float]]:
    return {(m, d): plain_loop(llama, m, d) for m in ("full", "lora", "qlora") for d in ("float32", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("stage", "offload"), STAGES, ids=["zero0", "zero1", "zero2", "zero3", "zero3-offload"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("world", [1, 2])
def test_every_method_under_every_stage_learns_what_a_plain_loop_learns(
    tmp_path: Path, llama: Path, train: Train, plain: dict[tuple[str, str], list[float]],
    method: str, stage: int, offload: bool, world: int, dtype: str,
) -> None:  # fmt: skip
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, method=method, stage=stage, offload=offload, world=world, dtype=dtype, steps=STEPS)
    write_data(run, llama, SAMPLES, None, packed=False)
    train(run, spec)
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    assert metrics(run) == pytest.approx(plain[method, dtype], rel=tolerance)
    assert metrics(run)[0] != pytest.approx(metrics(run)[-1], rel=1e-3), "nothing was learnt"


@pytest.mark.parametrize(("stage", "world"), [(2, 2), (3, 2)])
def test_activation_checkpointing_changes_nothing(
    tmp_path: Path, llama: Path, train: Train, plain: dict[tuple[str, str], list[float]], stage: int, world: int
) -> None:
    run = RunDir(tmp_path)
    spec = make_spec(run, llama, method="lora", stage=stage, world=world, steps=STEPS, checkpointing=True)
    write_data(run, llama, SAMPLES, None, packed=False)
    train(run, spec)
    assert metrics(run) == pytest.approx(plain["lora", "float32"], rel=1e-4)


def test_buffers_keep_their_precision_when_the_model_is_built_sharded(tmp_path: Path, train: Train) -> None:
    """``zero.Init`` rounds rotary frequencies to bf16, which shows in the loss of long sequences."""
    model = toy.make_model(tmp_path / "model", max_position_embeddings=2048)
    long = [[([(7 * i) % 254 + 2 for i in range(1500)], 1000)] for _ in range(2)]
    losses = []
    for stage in (2, 3):
        run = RunDir(tmp_path / f"zero{stage}")
        spec = make_spec(run, model, method="lora", stage=stage, dtype="bfloat16", samples=2, micro=1, steps=1)
        write_data(run, model, long, None, packed=False)
        train(run, spec)
        losses.append(metrics(run)[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
