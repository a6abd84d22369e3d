"""Which samples are this rank's: its place among the ranks that see different samples."""

from __future__ import annotations

from dataclasses import dataclass

from galley.ranks.world import World


@dataclass(frozen=True)
class Mesh:
    """This rank's data-parallel place. Sharing out samples, and the mean over gradients, ask here and not the world."""

    rank: int
    """0 … size - 1."""
    size: int
    """Ranks that see different samples; DeepSpeed averages gradients over them."""


def mesh(world: World) -> Mesh:
    """Every rank sees samples of its own (ZeRO shards states, not samples), so this is the world."""
    return Mesh(world.rank, world.size)
