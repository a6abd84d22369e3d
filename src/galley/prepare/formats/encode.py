"""Rows to documents to prepared arrays (:mod:`galley.data.columns`), through flat files: memory stays small."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from galley.data.columns import COLUMNS, I32, I64, IGNORED, U32
from galley.data.prepared import SourceShare, SplitFacts
from galley.prepare.formats.base import Document, Encoded, Example, Limits
from galley.prepare.parallel import in_order, processes

BATCH = 512
REPORT_EVERY = 5.0
"""Seconds between two lines of progress."""
BLOCK = 1 << 22
KEPT, OVERLONG, UNSUPERVISED = 0, 1, 2
Batch = list[tuple[int, Example]]
"""Numbers of rows, and their content."""
Encode = Callable[[Sequence[Any]], Encoded]


@dataclass
class Outcomes:
    """What became of each document, in reading order: lists of one entry a row, or a piece of one that was split."""

    sources: list[int] = field(default_factory=list)
    """Row of the source."""
    lengths: list[int] = field(default_factory=list)
    """Tokens before anything was cut."""
    outcomes: list[int] = field(default_factory=list)
    """``KEPT``, ``OVERLONG`` or ``UNSUPERVISED``."""
    masked: list[int] = field(default_factory=list)
    """Assistant turns that cannot be trained on."""
    muted: list[int] = field(default_factory=list)
    """Assistant turns that have a weight of 0."""
    hashes: list[int] = field(default_factory=list)
    """Of the tokens, kept documents only."""

    def add(self, row: int, document: Document, outcome: int) -> None:
        """Note what became of a document of row ``row``."""
        self.sources.append(row)
        self.lengths.append(len(document.tokens))
        self.outcomes.append(outcome)
        self.masked.append(document.masked)
        self.muted.append(document.muted)
        if outcome == KEPT:
            self.hashes.append(hash(document.tokens.tobytes()))


@dataclass(frozen=True)
class Documents:
    """Every document's outcome, all but the last three [documents]; tokens of the kept ones, mapped from disk."""

    sources: I64
    """Row of the source, which several pieces of one row share."""
    lengths: I64
    """Tokens before anything was cut."""
    outcomes: npt.NDArray[np.int8]
    masked: I64
    muted: I64
    hashes: I64
    """Of the tokens of each kept document, to find the same one again, [kept]."""
    notes: Mapping[str, int]
    """What was left out or passed over, and how often."""
    offsets: I64
    """Where each kept document starts in ``tokens``, [kept + 1]."""
    tokens: U32
    """Of all kept documents, cut to ``max_length`` each, [offsets[-1]]."""
    labels: I32

    first_rows: I64
    """Number of each source's first row, [parts]: rows are numbered on from one source to the next."""
    parts: I64
    """Where the documents of each source begin, and where the last ends, [parts + 1]."""

    @property
    def kept(self) -> I64:
        """Indices of the kept documents, in the order of ``offsets``."""
        return np.flatnonzero(self.outcomes == KEPT)


def encode(rows: Iterable[tuple[int, Example]], encode_rows: Encode, limits: Limits, folder: Path) -> Documents:
    """Tokenise a source's rows to the ends of two flat files in ``folder``; prints how far it is every few seconds."""
    outcomes, offsets, notes, left_out = Outcomes(), [0], Counter[str](), Counter[str]()
    # Tokens go to the disk as they come, 8 bytes each with their labels; per document only some numbers stay in memory.
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokens.flat").open("ab") as tokens, (folder / "labels.flat").open("ab") as labels:
        begin = tokens.tell()
        for index, row, document in _documents(rows, encode_rows, left_out):
            part = limits.apply(row.where, document)
            outcome = _outcome(part)
            if outcomes.sources[-1:] != [index]:  # not again for each piece of a row that was split
                notes.update(row.notes)
            outcomes.add(index, document, outcome)
            if part is not None and outcome == KEPT:
                tokens.write(part.tokens.tobytes())
                labels.write(part.labels.tobytes())
                offsets.append(offsets[-1] + len(part.tokens))
    return Documents(
        sources=np.array(outcomes.sources, np.int64),
        lengths=np.array(outcomes.lengths, np.int64),
        outcomes=np.array(outcomes.outcomes, np.int8),
        masked=np.array(outcomes.masked, np.int64),
        muted=np.array(outcomes.muted, np.int64),
        hashes=np.array(outcomes.hashes, np.int64),
        notes={**left_out, **notes},
        offsets=np.array(offsets, np.int64),
        tokens=_map(folder / "tokens.flat", np.uint32, begin),
        labels=_map(folder / "labels.flat", np.int32, begin),
        first_rows=np.zeros(1, np.int64),
        parts=np.array([0, len(outcomes.sources)], np.int64),
    )


def join(parts: Sequence[Documents], folder: Path) -> Documents:
    """The documents of several sources, which :func:`encode` wrote to ``folder`` one after the other, as one.

    Rows are numbered on: those of the second source begin where those of the first end.
    """
    if len(parts) == 1:
        return parts[0]
    rows = [int(part.sources.max(initial=-1)) + 1 for part in parts]
    sizes, lengths = [len(part.outcomes) for part in parts], [len(part.tokens) for part in parts]
    starts, begins = _bounds(np.array(rows, np.int64)), _bounds(np.array(lengths, np.int64))
    shifted = [part.offsets[:-1] + begin for part, begin in zip(parts, begins, strict=False)]

    def whole(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(part, name) for part in parts])

    return Documents(
        sources=np.concatenate([part.sources + start for part, start in zip(parts, starts, strict=False)]),
        lengths=whole("lengths"),
        outcomes=whole("outcomes"),
        masked=whole("masked"),
        muted=whole("muted"),
        hashes=whole("hashes"),
        notes={},
        offsets=np.concatenate([*shifted, begins[-1:]]),
        tokens=_map(folder / "tokens.flat", np.uint32),
        labels=_map(folder / "labels.flat", np.int32),
        first_rows=starts[:-1],
        parts=_bounds(np.array(sizes, np.int64)),
    )


def _documents(
    rows: Iterable[tuple[int, Example]], encode_rows: Encode, left_out: Counter[str]
) -> Iterator[tuple[int, Example, Document]]:
    """Every document with its row's number and content; in batches, which several processes share."""
    done, began = 0, time.monotonic()
    reported = began
    for batch, encoded in in_order(partial(_encoded, encode_rows), _batches(rows), processes()):
        left_out.update(encoded.left_out)
        for (index, example), documents in zip(batch, encoded.documents, strict=True):
            for document in documents:
                yield index, example, document
        done, now = done + len(batch), time.monotonic()
        if now - reported >= REPORT_EVERY:
            print(f"data: {done:,} rows tokenised, {done / (now - began):,.0f} rows/s", flush=True)
            reported = now


def _batches(rows: Iterable[tuple[int, Example]]) -> Iterator[Batch]:
    stream = iter(rows)
    while batch := list(itertools.islice(stream, BATCH)):
        yield batch


def _encoded(encode_rows: Encode, batch: Batch) -> Encoded:
    return encode_rows([example for _, example in batch])


def _outcome(part: Document | None) -> int:
    if part is None:
        return OVERLONG
    # What a truncated document is trained on may all lie outside the part that is left.
    return KEPT if (part.labels != IGNORED).any() else UNSUPERVISED


def _map(path: Path, dtype: type[np.generic], begin: int = 0) -> npt.NDArray[Any]:
    if path.stat().st_size == begin:  # mmap(2) refuses to map nothing
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=begin)


def write_split(folder: Path, documents: Documents, rows: I64, packing: list[list[int]], limits: Limits) -> SplitFacts:
    """Write one split's columns.

    ``rows`` are the split's documents, kept or not, ascending; ``packing`` lists each sample's documents, counted among
    the kept ones of ``rows``.
    """
    folder.mkdir()
    # Three numberings meet here: of all documents (`rows`), of the kept ones among them (`packing`), and of all kept
    # ones, which `documents.offsets` and the flat files go by. `order` is the last, as samples want them, [D].
    chosen = np.searchsorted(documents.kept, rows[documents.outcomes[rows] == KEPT])
    order = chosen[np.fromiter(itertools.chain.from_iterable(packing), np.int64)]
    sizes = np.diff(documents.offsets)[order]
    bounds = _bounds(sizes)  # of documents, in tokens, [D + 1]
    first = _bounds(np.array([len(sample) for sample in packing], np.int64))  # of samples, in documents, [S + 1]
    supervised = _copy(folder, documents, order, sizes, bounds)
    columns = {
        "samples": bounds[first],
        "supervised": np.add.reduceat(supervised, first[:-1]),
        "documents": bounds,
        "sources": documents.sources[documents.kept[order]],
    }
    for name, values in columns.items():
        COLUMNS[name].save(folder, values)
    facts = _facts(documents, rows, columns["samples"], columns["supervised"], limits)
    return facts.model_copy(update={"shares": _shares(documents, order, supervised)})


def _shares(documents: Documents, order: I64, supervised: I64) -> list[SourceShare]:
    """What each of several sources gave: documents in ``order``, counted among the kept ones, [D], and tokens."""
    count = len(documents.parts) - 1
    if count == 1:
        return []
    source = np.searchsorted(documents.parts, documents.kept[order], side="right") - 1  # of each document, [D]
    used, tokens = np.bincount(source, minlength=count), np.bincount(source, supervised, count)
    counts = zip(documents.first_rows.tolist(), used.tolist(), tokens.tolist(), strict=True)
    return [
        SourceShare(path="", first=first, rows=0, documents=used, supervised=int(tokens))
        for first, used, tokens in counts
    ]


def _bounds(sizes: I64) -> I64:
    """Where things of these sizes begin when they follow one another, and where the last ends, [sizes + 1]."""
    return np.concatenate(([0], np.cumsum(sizes)))


def _facts(documents: Documents, rows: I64, samples: I64, supervised: I64, limits: Limits) -> SplitFacts:
    outcomes, long = documents.outcomes[rows], documents.lengths[rows] > limits.max_length
    return SplitFacts(
        rows=len(np.unique(documents.sources[rows])),
        samples=len(samples) - 1,
        documents=int((outcomes == KEPT).sum()),
        tokens=int(samples[-1]),
        supervised=int(supervised.sum()),
        longest=int(np.diff(samples).max()),
        dropped_overlong=int((outcomes == OVERLONG).sum()),
        truncated=int(((outcomes == KEPT) & long).sum()),
        dropped_unsupervised=int((outcomes == UNSUPERVISED).sum()),
        pieces=len(np.unique(rows)) - len(np.unique(documents.sources[rows])),
        turns_masked=int(documents.masked[rows].sum()),
        turns_muted=int(documents.muted[rows].sum()),
    )


def _copy(folder: Path, documents: Documents, order: I64, sizes: I64, bounds: I64) -> I64:
    """Write the columns over tokens, documents in ``order``, and return the supervised tokens of each, [D].

    ``sizes``: tokens of each document, [D]; ``bounds``: where each begins in what is written, [D + 1]. A few million
    tokens at a time, in whole documents: what is held in memory does not grow with the data.
    """
    columns = {name: COLUMNS[name].create(folder, int(bounds[-1])) for name in ("tokens", "labels", "positions")}
    supervised = np.empty(len(order), np.int64)
    # Documents at which about every BLOCK tokens begin; long documents may hold several such points, hence `unique`.
    cuts = np.unique(np.searchsorted(bounds, np.arange(0, int(bounds[-1]), BLOCK))).tolist()
    for first, last in itertools.pairwise([*cuts, len(order)]):
        block = slice(first, last)
        length = sizes[block]
        starts = _bounds(length)[:-1]  # in this block
        positions = np.arange(int(length.sum())) - np.repeat(starts, length)
        # Index of each token in the flat files: its document's begin there, and its position in the document.
        indices = np.repeat(documents.offsets[order[block]], length) + positions
        labels = documents.labels[indices]
        target = slice(int(bounds[first]), int(bounds[first]) + len(indices))
        columns["tokens"][target] = documents.tokens[indices]
        columns["labels"][target] = labels
        columns["positions"][target] = positions
        supervised[block] = np.add.reduceat(labels != IGNORED, starts, dtype=np.int64)  # sums from start to start
    for column in columns.values():
        column.flush()
    return supervised
