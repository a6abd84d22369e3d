"""Which samples a step is trained on: a function of (seed, epoch, step), so that resuming replays nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import NamedTuple

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
        drawn = range(first, min(first + self.per_step, self.total))  # counted over all epochs
        return [int(self._epoch(index // self.samples)[index % self.samples]) for index in drawn]

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
    ``work``, the most first, there and back (to ranks 0, 1, 1, 0, 0 …). Which samples the step has stays as it is.
    """
    # For 2 ranks and samples of work 9 8 7 6 5 4 3 2, rounds are (9 8) (7 6) (5 4) (3 2): rank 0 takes 9 6 5 2, rank 1
    # takes 8 7 4 3, and a micro-batch of 2 has neighbours in size: (9 6) and (5 2), (8 7) and (4 3).
    missing = micro * ranks * accumulation - len(ids)
    dealt = sorted(ids, key=work, reverse=True) + [NOBODY] * missing
    rounds = [dealt[start : start + ranks] for start in range(0, len(dealt), ranks)]  # each rank gets one of each
    mine = [taken[rank if number % 2 == 0 else -1 - rank] for number, taken in enumerate(rounds)]
    return [mine[start : start + micro] for start in range(0, len(mine), micro)]


class Segment(NamedTuple):
    """Neighbouring tokens of a flattened micro-batch: one document, or a run of documents of one token each."""

    length: int
    """In tokens."""
    single_tokens: bool = False
    """Each token is a document of its own, which attends to itself only. Padding is such."""


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
    documents: tuple[Segment, ...] | None = None
    """Packed documents, in order over the flattened tokens [samples x length]; None: each sample is one."""
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
    length = max([len(sample) for sample in samples if sample is not None], default=1)
    tokens = np.zeros((len(ids), length), dtype=np.int64)
    targets = np.full((len(ids), length), IGNORED, dtype=np.int64)
    positions = np.zeros_like(tokens) if packed else np.broadcast_to(np.arange(length), tokens.shape)
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        size = len(sample)
        tokens[row, :size] = sample.tokens
        # Shifted here, so that no model shifts: the target of token t is label t + 1, and the last token has none. Nor
        # does the last of a packed document: the first label of the next is IGNORED (data.columns).
        targets[row, : size - 1] = sample.labels[1:]
        if packed:
            positions[row, :size] = sample.positions
    rows = tuple(0 if sample is None else len(sample) for sample in samples)
    segments = segments_of(positions) if packed else None

    def on_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, order="C")).to(device)

    return Batch(ids, on_device(tokens), on_device(positions), on_device(targets), sum(rows), segments, rows)


def segments_of(positions: np.ndarray) -> tuple[Segment, ...]:
    """The segments that cover ``positions`` [samples, length], flattened: positions restart at 0 in each document."""
    # Rows follow one another, and each begins at position 0: so no document goes from one row into the next, and what
    # lies between two zeros is one document. Padding is zeros, hence documents of one token.
    flat = positions.reshape(-1)
    starts = np.flatnonzero(flat == 0)
    segments: list[Segment] = []
    for length in np.diff(np.append(starts, flat.size)).tolist():
        if length > 1:
            segments.append(Segment(length))
        elif segments and segments[-1].single_tokens:  # padding of thousands of tokens stays one segment
            segments[-1] = Segment(segments[-1].length + 1, single_tokens=True)
        else:
            segments.append(Segment(1, single_tokens=True))
    return tuple(segments)
