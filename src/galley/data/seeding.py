"""How the order of samples, and the noise of each step, follow from a task's seed.

numpy promises the raw stream of PCG64 for ever, but not what ``Generator.permutation`` makes of it (NEP 19), and
Python promises nothing about the hash of a tuple. So version 2 (``task.seeding``) is arithmetic that is written out
here. Version 1 is what earlier runs began with; they keep it.
"""

from __future__ import annotations

import numpy as np

from galley.data.columns import I64

EPOCH = 4
"""Tells the order of an epoch from what else is drawn with the seed (1 to 3, in ``prepare.packing``)."""
_MASK = (1 << 64) - 1


def random_ranks(count: int, *entropy: int) -> I64:
    """Where each of ``count`` things stands in :func:`random_order`, [count]: its inverse permutation."""
    ranks = np.empty(count, np.int64)
    ranks[random_order(count, *entropy)] = np.arange(count)
    return ranks


def random_order(count: int, *entropy: int) -> I64:
    """A permutation of 0 … count - 1 that depends on ``entropy`` only, [count]: raw 64-bit draws, sorted."""
    # A stable sort, so that equal draws (a pair among billions) are in one order, too, whatever the algorithm.
    draws = np.random.PCG64(list(entropy)).random_raw(count)
    return np.argsort(draws, kind="stable")


def sample_order(seed: int, epoch: int, samples: int, version: int) -> I64:
    """The samples of one epoch (from 0) in the order in which training takes them, [samples]."""
    if version == 1:  # numpy may change this: kept for the runs that began with it
        return np.random.default_rng((seed, epoch)).permutation(samples)
    return random_order(samples, seed, EPOCH, epoch)


def step_seed(seed: int, step: int, rank: int, version: int) -> int:
    """The seed of dropout and noise in one step on one rank: 0 … 2^63 - 1."""
    if version == 1:
        return hash((seed, step, rank)) % 2**63
    # Mixed after each number, not once at the end: (seed 1, step 2) and (seed 2, step 1) must not meet.
    state = 0
    for number in (seed, step, rank):
        state = _mix(state ^ number)
    return state >> 1  # 63 bits: torch.manual_seed takes a signed 64-bit number


def _mix(number: int) -> int:
    """SplitMix64: 64 bits in, 64 well-mixed bits out (Steele, Lea and Flood, 2014, with Stafford's mix 13)."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)
