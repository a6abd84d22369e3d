"""Held-out loss, and the probes that an export is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from galley.data.batches import NOBODY, Batch, collate
from galley.data.columns import IGNORED, Split
from galley.model import attention
from galley.objective.sft import logits_only_at, output_head, sft_loss_sum
from galley.ranks.mesh import Mesh
from galley.ranks.world import World

PROBES, PROBE_TOKENS = 4, 64


@torch.no_grad()
def held_out_loss(
    engine: Any, split: Split, packed: bool, micro: int, world: World, mesh: Mesh, stopping: Callable[[], bool]
) -> tuple[float, int] | None:
    """Mean loss over every supervised token of ``split``, and their number (collective).

    None where a stop was asked for meanwhile: measuring can take long, so it has boundaries like training's.
    """
    whole = micro * mesh.size
    total, count, head = 0.0, 0, output_head(engine)
    engine.eval()
    try:
        for start in range(0, len(split), whole):
            if stopping():
                return None
            first = start + mesh.rank * micro
            ids = list(range(first, min(first + micro, len(split))))
            batch = collate(split, ids + [NOBODY] * (micro - len(ids)), packed, world.device)
            total += float(sft_loss_sum(engine, head, batch))
            count += batch.supervised
    finally:
        engine.train()
    total, count_all = world.sum(total, count)
    return total / max(count_all, 1.0), int(count_all)


def probe_batch(split: Split, device: torch.device) -> Batch:
    """The beginnings of the first few documents, one a row: the same on every rank."""
    starts = []
    for i in range(min(PROBES, len(split))):
        sample = split.sample(i)
        end = int(sample.document_starts[1]) if len(sample.document_starts) > 1 else len(sample.tokens)
        starts.append(torch.from_numpy(sample.tokens[: min(end, PROBE_TOKENS)].astype("int64")))
    length = max(len(each) for each in starts)
    tokens = torch.zeros(len(starts), length, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for row, each in enumerate(starts):
        tokens[row, : len(each)] = each
        targets[row, len(each) - 1] = 0  # marks the last token, whose logits are kept
    positions = torch.arange(length).repeat(len(starts), 1)
    return Batch([], tokens.to(device), positions.to(device), targets.to(device), tokens.numel())


@torch.no_grad()
def probe_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits (fp32, [probes, vocabulary], on the CPU) after the last token of each probe."""
    places = torch.nonzero(batch.targets.reshape(-1) != IGNORED).reshape(-1)
    training = model.training
    model.eval()
    attention.use_documents(None)
    with logits_only_at(output_head(model), places):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    model.train(training)
    last: torch.Tensor = logits[0].float().cpu()
    return last


def probes(engine: Any, split: Split, device: torch.device) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps for its export to be checked with (collective under ZeRO-3)."""
    batch = probe_batch(split, device)
    with torch.compiler.set_stance("force_eager"):  # as an export computes them; and compiling took a while
        logits = probe_logits(engine, batch)
    return {"tokens": batch.tokens.cpu(), "targets": batch.targets.cpu(), "logits": logits}
