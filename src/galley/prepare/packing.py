"""Which documents are held out, and which share a sample. Arithmetic only: a function of lengths and a seed.

Random order comes from the raw 64-bit output of PCG64, the one stream that numpy promises never to change, so that
the same task packs the same samples with any version.
"""

from __future__ import annotations

import numpy as np

from galley.data.columns import I64
from galley.data.seeding import random_order, random_ranks

SPLIT, DOCUMENTS, SAMPLES = 1, 2, 3
"""What is drawn with the seed, so that the draws differ (``data.seeding`` has the next number)."""


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
    # The rank of the last kept row that is held out. Rows without a document fall on either side of it.
    last = np.sort(ranks[kept])[wanted - 1]
    return np.flatnonzero(ranks > last), np.flatnonzero(ranks <= last)


def pack(lengths: I64, capacity: int, seed: int) -> list[list[int]]:
    """Put documents into samples of at most ``capacity`` tokens, best fit decreasing; every document once, none cut.

    ``lengths`` are tokens, [documents], each 1 … capacity. Documents of one length come in the seed's order, and so
    do the finished samples. Takes about a microsecond a document.

    Samples that still have room are kept by how much they have, and the rooms that occur are the set bits of one big
    integer, so that the best fit (the least room that is enough) is its lowest set bit from ``length`` on. With
    capacity 10 and lengths 7, 6, 3, 2: the 7 opens a sample with room 3, the 6 one with room 4; ``rooms`` is 0b11000.
    For the 3, ``rooms >> 3`` is 0b11, lowest bit 0: room 3, which it fills; ``rooms`` is 0b10000. For the 2,
    ``rooms >> 2`` is 0b100, lowest bit 2: room 4, of which 2 is left.
    """
    ranks = random_ranks(len(lengths), seed, DOCUMENTS)
    samples: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # room in tokens to the samples that have it
    rooms = 0  # bit r is set where by_room[r] is not empty
    for document in np.lexsort((ranks, -lengths)).tolist():  # the longest first; of equals, by the seed
        length = int(lengths[document])
        enough = rooms >> length
        if enough:
            lowest = (enough & -enough).bit_length() - 1  # in two's complement x & -x keeps the lowest set bit
            room = length + lowest
            sample = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
            samples[sample].append(document)
        else:
            room, sample = capacity, len(samples)
            samples.append([document])
        if room > length:
            by_room[room - length].append(sample)
            rooms |= 1 << (room - length)
    return shuffle(samples, seed)


def separate(count: int, seed: int) -> list[list[int]]:
    """One document a sample, in the seed's order."""
    return shuffle([[document] for document in range(count)], seed)


def shuffle(samples: list[list[int]], seed: int) -> list[list[int]]:
    """The samples in the seed's order, so that long documents are not all at the beginning."""
    return [samples[index] for index in random_order(len(samples), seed, SAMPLES).tolist()]
