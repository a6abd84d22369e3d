"""The held-out loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from galley.data.batches import NOBODY, collate
from galley.data.columns import Split
from galley.model import attention
from galley.objective.base import Objective
from galley.ranks.mesh import Mesh
from galley.ranks.world import World


class Measured(NamedTuple):
    """What an evaluation measured."""

    loss: float
    """Mean over the units of the whole split."""
    units: int


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
) -> Measured | None:
    """Mean loss over every unit (a supervised token, say) of ``split`` (collective).

    None where a stop was asked for meanwhile: measuring can take long, so it has boundaries like training's.
    """
    stride = micro * mesh.size  # samples that all ranks take together, a micro-batch each
    total, count = 0.0, 0
    engine.eval()
    try:
        for start in range(0, len(split), stride):
            if stopping():
                return None
            first = start + mesh.rank * micro
            # The last ranks may have no sample left: they take part with batches of nobody, since every forward pass
            # of a ZeRO-3 model is collective.
            ids = list(range(first, min(first + micro, len(split))))
            batch = collate(split, ids + [NOBODY] * (micro - len(ids)), packed, world.device)
            with attention.documents(batch.documents):
                total += float(objective.loss(engine, batch))
            count += objective.units(batch)
    finally:
        engine.train()
    total, units = world.sum(total, count)
    return Measured(total / max(units, 1.0), int(units))
