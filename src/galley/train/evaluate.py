"""The held-out loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from galley.data.batches import NOBODY, collate
from galley.data.columns import Split
from galley.model import attention
from galley.objective.base import Objective
from galley.ranks.mesh import Mesh
from galley.ranks.world import World


@torch.no_grad()
def held_out_loss(
    objective: Objective,
    engine: Any,
    split: Split,
    packed: bool,
    micro: int,
    world: World,
    mesh: Mesh,
    stopping: Callable[[], bool],
) -> tuple[float, int] | None:
    """Mean loss over every unit (a supervised token, say) of ``split``, and their number (collective).

    None where a stop was asked for meanwhile: measuring can take long, so it has boundaries like training's.
    """
    whole = micro * mesh.size
    total, count = 0.0, 0
    engine.eval()
    try:
        for start in range(0, len(split), whole):
            if stopping():
                return None
            first = start + mesh.rank * micro
            ids = list(range(first, min(first + micro, len(split))))
            batch = collate(split, ids + [NOBODY] * (micro - len(ids)), packed, world.device)
            with attention.documents(batch.documents):
                total += float(objective.loss(engine, batch))
            count += objective.units(batch)
    finally:
        engine.train()
    total, count_all = world.sum(total, count)
    return total / max(count_all, 1.0), int(count_all)
