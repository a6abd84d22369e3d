"""Which samples a step learns from: a pure function of (seed, epoch, step), so that resuming computes, not replays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import torch

from galley.contract import pace
from galley.contract.spec import Task
from galley.data.columns import IGNORED, Split
from galley.data.seeding import sample_order

NOBODY = -1
"""Stands for no sample: fills the last, short global batch so that every rank takes the same micro-steps."""


@dataclass(frozen=True)
class Order:
    """The order of all samples over a run of ``total`` samples: a fresh permutation each epoch."""

    samples: int
    per_step: int
    total: int
    seed: int
    seeding: int = 1
    """Version of :mod:`galley.data.seeding`."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return ceil(self.total / self.per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        return min(step * self.per_step, self.total) / self.samples

    def batch(self, step: int) -> list[int]:
        """Sample ids of step ``step`` (counted from 1); the last may be shorter than ``per_step``."""
        first = (step - 1) * self.per_step
        places = range(first, min(first + self.per_step, self.total))
        return [int(self._epoch(place // self.samples)[place % self.samples]) for place in places]

    def _epoch(self, epoch: int) -> np.ndarray:
        return _sample_order(self.seed, epoch, self.samples, self.seeding)


_sample_order = lru_cache(maxsize=2)(sample_order)
"""A step may span two epochs; shuffling millions of samples takes a second."""


def order(task: Task, samples: int) -> Order:
    """The order of a task over ``samples`` prepared samples; steps follow from epochs, steps or tokens as written."""
    return Order(samples, task.samples_per_step, pace.total_samples(task, samples), task.seed, task.seeding)


def share(
    ids: list[int], work: Callable[[int], int], micro: int, accumulation: int, rank: int, ranks: int
) -> list[list[int]]:
    """Micro-batches of ``rank``, of a global batch over ``ranks``: always ``accumulation`` lists of ``micro`` ids.

    Ranks wait for one another, and a short sample is padded to the longest beside it: so samples are dealt by their
    ``work``, the most first, there and back (to ranks 0, 1, 1, 0, 0 …). What a step learns from stays as it is.
    """
    missing = micro * ranks * accumulation - len(ids)
    dealt = sorted(ids, key=work, reverse=True) + [NOBODY] * missing
    rounds = [dealt[start : start + ranks] for start in range(0, len(dealt), ranks)]
    mine = [one[rank if number % 2 == 0 else -1 - rank] for number, one in enumerate(rounds)]
    return [mine[start : start + micro] for start in range(0, len(mine), micro)]


@dataclass(frozen=True)
class Batch:
    """One micro-batch, right-padded: ``tokens``, ``positions`` and ``targets`` are int64 [samples, length].

    ``targets[i, t]`` is the token after ``tokens[i, t]`` where it is supervised, else ``IGNORED``.
    """

    ids: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    token_count: int
    documents: tuple[int, ...] | None = None
    """Lengths of packed documents (:func:`document_lengths`); None: each sample is one."""
    rows: tuple[int, ...] = ()
    """Tokens of each sample, without padding."""

    @property
    def supervised(self) -> int:
        """Tokens that the loss is summed over."""
        return int((self.targets != IGNORED).sum())


def collate(split: Split, ids: list[int], packed: bool, device: torch.device) -> Batch:
    """Build a micro-batch on ``device``.

    Packed samples keep the positions of their documents and padding tokens are each a document of their own
    (position 0), so that attention stays inside documents. Unpacked samples need no mask at all: padding is on the
    right, where causal attention never looks from.
    """
    samples = [split.sample(i) if i != NOBODY else None for i in ids]
    length = max([len(each.tokens) for each in samples if each is not None], default=1)
    tokens = np.zeros((len(ids), length), dtype=np.int64)
    targets = np.full((len(ids), length), IGNORED, dtype=np.int64)
    positions = np.zeros_like(tokens) if packed else np.broadcast_to(np.arange(length), tokens.shape)
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        size = len(sample.tokens)
        tokens[row, :size] = sample.tokens
        targets[row, : size - 1] = sample.labels[1:]
        if packed:
            positions[row, :size] = sample.positions
    rows = tuple(0 if each is None else len(each.tokens) for each in samples)
    made = [torch.from_numpy(np.array(each, order="C")).to(device) for each in (tokens, positions, targets)]
    return Batch(ids, made[0], made[1], made[2], sum(rows), document_lengths(positions) if packed else None, rows)


def document_lengths(positions: np.ndarray) -> tuple[int, ...]:
    """Lengths of the documents in ``positions`` [samples, length], which restart at 0 in each. They sum to its size.

    Documents of one token in a row (padding is such) are one negative length: each of them sees itself only.
    """
    flat = positions.reshape(-1)
    starts = np.flatnonzero(flat == 0)
    lengths = np.diff(np.append(starts, flat.size))
    found: list[int] = []
    for length in lengths.tolist():
        if length > 1:
            found.append(length)
        elif found and found[-1] < 0:
            found[-1] -= 1
        else:
            found.append(-1)
    return tuple(found)
