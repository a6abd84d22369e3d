"""How many rows each source gives to an epoch, and which. Arithmetic only: a function of counts and a seed.

For each source in turn: ``limit`` keeps so many of its rows; ``repeats`` has each of them so often (2.5: twice, and
half of them a third time); then ``weight`` sets what share of the epoch's rows comes from it. Nothing is repeated to
reach a weight: the source that is the first to run out sets the epoch's length, and the others give fewer rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from galley.data.columns import I64
from galley.data.seeding import random_order

MIXTURE = 5
"""Tells these draws from the others with the seed (1 to 3 in ``prepare.packing``, 4 in ``data.seeding``)."""


@dataclass(frozen=True)
class Portion:
    """What the task asks of one source."""

    limit: int | None = None
    """Most rows, drawn by the seed; None: all."""
    repeats: float = 1.0
    """How often an epoch has each row, above 0."""
    weight: float | None = None
    """Its share of the epoch's rows, beside the weights of the others; None (then for all): whatever it has."""


EVERYTHING = Portion()


def mix(counts: Sequence[int], portions: Sequence[Portion], seed: int) -> list[I64]:
    """The rows of each source that an epoch has, as indices among its ``counts`` rows: ascending, some more than once.

    Of a source without rows there are none, and it does not bound the others by its weight.
    """
    drawn = [
        _repeated(count, portion, seed, number)
        for number, (count, portion) in enumerate(zip(counts, portions, strict=True))
    ]
    weights = [portion.weight for portion in portions]
    if None in weights:
        return [np.sort(rows) for rows in drawn]
    sizes = _weighted([len(rows) for rows in drawn], [weight or 0.0 for weight in weights])
    return [np.sort(rows[:size]) for rows, size in zip(drawn, sizes, strict=True)]


def _repeated(count: int, portion: Portion, seed: int, number: int) -> I64:
    """Rows of one source in random order, those of a second round after all of the first."""
    order = random_order(count, seed, MIXTURE, number)
    order = order[: portion.limit] if portion.limit is not None else order
    whole = math.floor(portion.repeats)
    rest = round((portion.repeats - whole) * len(order))
    return np.concatenate([*[order] * whole, order[:rest]])


def _weighted(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows to take of each, in proportion to ``weights``, with none above its size: the scarcest gives all it has."""
    present = [(size, weight) for size, weight in zip(sizes, weights, strict=True) if size and weight]
    if not present:
        return [0] * len(sizes)
    per_weight = min(size / weight for size, weight in present)
    return [min(size, round(weight * per_weight)) for size, weight in zip(sizes, weights, strict=True)]
