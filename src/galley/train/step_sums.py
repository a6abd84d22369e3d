"""What the ranks add up at the beginning of each step."""

from __future__ import annotations

from typing import NamedTuple

from galley.ranks.world import World


class StepSums(NamedTuple):
    """One all-reduce of six numbers, which serves all that ranks have to agree on before a step.

    A rank fills it with its own numbers; :meth:`over_ranks` gives the sums, the same on every rank.
    """

    units: float
    """Terms of the loss (supervised tokens, say): the global batch's loss is their mean."""
    tokens: float
    """Tokens without padding."""
    stop: float
    """Whether to go on, see ``ranks.stop``: only the first rank's is not 0."""
    written: float
    """Of the save that is under way: ranks whose file is on the disk (``checkpoint.pending``)."""
    failed: float
    """Ranks that could not write it."""
    published: float
    """1 where the first rank has published it."""

    def over_ranks(self, world: World) -> StepSums:
        """The sum of each field over all ranks (collective). In float64, where counts below 2^53 are exact."""
        return StepSums(*world.sum(*self))
