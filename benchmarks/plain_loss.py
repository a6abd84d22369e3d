"""The losses of a run that Galley has trained, computed again by a plain loop: one process, one document at a time.

    python benchmarks/plain_loss.py RUN --steps 10

Nothing is packed, no attention is masked, logits are whole, and AdamW is torch's, over fp32 copies of what learns. What
it shares with Galley are the prepared tokens, their order, the learning rate and the adapter's first weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.data import batches
from galley.data.columns import Split
from galley.data.prepared import open_split, read_manifest
from galley.model import model
from galley.train.schedule import learning_rate


def documents(split: Split, ids: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens [1, length] and labels [1, length] of each document of samples."""
    for sample in map(split.sample, ids):
        tokens, labels = (torch.tensor(np.array(each, np.int64))[None] for each in (sample.tokens, sample.labels))
        for start, end in pairwise([*sample.document_starts.tolist(), len(sample.tokens)]):
            yield tokens[:, start:end], labels[:, start:end]


def losses(spec: RunSpec, run: RunDir, steps: int) -> Iterator[float]:
    """The mean loss of each step over its supervised tokens."""
    net: Any = model.load(spec, read_manifest(run), torch.device("cpu"))
    getattr(net, "get_base_model", lambda: net)().set_attn_implementation("sdpa")
    low = list(model.trained(net).values())
    master = [each.detach().float().clone().requires_grad_() for each in low]
    ours, split = spec.task.optimizer, open_split(run)
    groups = [{"params": [each], "weight_decay": ours.weight_decay if each.dim() >= 2 else 0.0} for each in master]
    optimizer = torch.optim.AdamW(groups, lr=ours.lr, betas=ours.betas, eps=ours.eps)
    order = batches.order(spec.task, len(split))
    for step in range(1, steps + 1):
        yield accumulate(net, low, master, list(documents(split, order.batch(step))))
        if ours.clip:
            torch.nn.utils.clip_grad_norm_(master, ours.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec.task.schedule, ours.lr, step, order.steps)
        optimizer.step()
        for weight, copy in zip(low, master, strict=True):
            weight.data.copy_(copy.data)


def accumulate(net: Any, low: list[Any], master: list[Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The mean loss, whose gradients ``master`` gets."""
    count, total = sum(int((labels[:, 1:] >= 0).sum()) for _, labels in pairs), 0.0
    for copy in master:
        copy.grad = torch.zeros_like(copy)
    for tokens, labels in pairs:
        if not (labels[:, 1:] >= 0).any():
            continue
        logits = net(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / count
        for copy, gradient in zip(master, torch.autograd.grad(loss, low), strict=True):
            copy.grad += gradient.float()
        total += float(loss.detach())
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    run = RunDir(given.run.absolute())
    rows = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    theirs = {row["step"]: row["loss"] for row in rows if "loss" in row}
    worst = 0.0
    print("| step | Galley | plain loop | difference |\n|---:|---:|---:|---:|")
    for step, loss in enumerate(losses(RunSpec.read(run.spec), run, given.steps), 1):
        apart = abs(theirs[step] / loss - 1)
        worst = max(worst, apart)
        print(f"| {step} | {theirs[step]:.4f} | {loss:.4f} | {apart:.2%} |", flush=True)
    print(f"\nat most {worst:.2%} apart")


if __name__ == "__main__":
    main()
