"""Which documents are held out, and which share a sample. Arithmetic only: a function of lengths and a seed.

Random order comes from the raw 64-bit output of PCG64, the one stream that numpy promises never to change, so that
the same task packs the same samples with any version.
"""

from __future__ import annotations

import numpy as np

from galley.data.columns import I64
from galley.data.seeding import random_order, random_ranks

SPLIT, DOCUMENTS, SAMPLES = 1, 2, 3


def pick_held_out(count: int, share: float, seed: int, kept: I64) -> tuple[I64, I64]:
    """Rows for training and rows held out, each ascending, of ``count`` rows of which ``kept`` have a document.

    Rows stand in one random order that does not depend on which are kept; held out is the beginning of that order,
    up to the row with which it holds ``share`` of the kept ones (at least one where ``share`` is above 0). So other
    lengths or templates move few rows across.
    """
    if share <= 0:
        return np.arange(count), np.empty(0, np.int64)
    ranks = random_ranks(count, seed, SPLIT)
    wanted = max(1, round(share * len(kept)))
    last = np.sort(ranks[kept])[wanted - 1]
    return np.flatnonzero(ranks > last), np.flatnonzero(ranks <= last)


def pack(lengths: I64, capacity: int, seed: int) -> list[list[int]]:
    """Put documents into samples of at most ``capacity`` tokens, best fit decreasing; every document once, none cut.

    ``lengths`` are tokens, [documents], each 1 … capacity. Documents of one length come in the seed's order, and so
    do the finished samples. Takes about a microsecond a document: which remaining capacities exist is one big
    integer, whose lowest set bit from ``length`` on is the best fit.
    """
    order = random_ranks(len(lengths), seed, DOCUMENTS)
    samples: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(capacity + 1)]
    present = 0
    for document in np.lexsort((order, -lengths)).tolist():
        length = int(lengths[document])
        fitting = present >> length
        room = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
        if fitting:
            sample = waiting[room].pop()
            present ^= 0 if waiting[room] else 1 << room
            samples[sample].append(document)
        else:
            sample = len(samples)
            samples.append([document])
        if room > length:
            waiting[room - length].append(sample)
            present |= 1 << (room - length)
    return shuffle(samples, seed)


def separate(count: int, seed: int) -> list[list[int]]:
    """One document a sample, in the seed's order."""
    return shuffle([[document] for document in range(count)], seed)


def shuffle(samples: list[list[int]], seed: int) -> list[list[int]]:
    """The samples in the seed's order, so that long documents are not all at the beginning."""
    return [samples[index] for index in random_order(len(samples), seed, SAMPLES).tolist()]
