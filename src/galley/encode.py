"""Rows to documents to the arrays of :mod:`galley.data`, through flat files: memory stays small whatever the data."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from galley.chat import Document, Template, mark, tokenize
from galley.data import DTYPES, I32, I64, IGNORED, U32, SplitFacts
from galley.plain import tokenize_text
from galley.rows import Row

BATCH = 512
SAY_EVERY = 5.0
BLOCK = 1 << 22
KEPT, OVERLONG, UNSUPERVISED = 0, 1, 2


@dataclass(frozen=True)
class Limits:
    """What happens to long rows."""

    max_length: int
    overlong: Literal["drop", "truncate", "split"]


@dataclass
class Fates:
    """What became of each row, in reading order; lists of one entry a row, or for each piece of one that was split."""

    sources: list[int] = field(default_factory=list)
    """Row of the source."""
    lengths: list[int] = field(default_factory=list)
    """Tokens before anything was cut."""
    fates: list[int] = field(default_factory=list)
    """``KEPT``, ``OVERLONG`` or ``UNSUPERVISED``."""
    masked: list[int] = field(default_factory=list)
    """Assistant turns that are not learnt."""


@dataclass(frozen=True)
class Documents:
    """Every row's fate, and the tokens of the kept ones, mapped from disk."""

    sources: I64
    lengths: I64
    fates: npt.NDArray[np.int8]
    masked: I64
    offsets: I64
    """Where each kept document starts in ``tokens``, [kept + 1]."""
    tokens: U32
    labels: I32

    @property
    def kept(self) -> I64:
        """Indices of the kept rows, in the order of ``offsets``."""
        return np.flatnonzero(self.fates == KEPT)


def encode(rows: Iterable[Row], tokenizer: Any, template: Template, limits: Limits, folder: Path) -> Documents:
    """Tokenise all rows into two flat files in ``folder``; says how far it is every few seconds."""
    fates, kept = Fates(), [0]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tokens.flat").open("wb") as tokens, (folder / "labels.flat").open("wb") as labels:
        for row, document, masked in _documents(rows, tokenizer, template, limits):
            fate = _fate(document, limits)
            fates.sources.append(row.index)
            fates.lengths.append(len(document.tokens))
            fates.fates.append(fate)
            fates.masked.append(masked)
            if fate == KEPT:
                tokens.write(document.tokens[: limits.max_length].tobytes())
                labels.write(document.labels[: limits.max_length].tobytes())
                kept.append(kept[-1] + min(len(document.tokens), limits.max_length))
    return Documents(
        sources=np.array(fates.sources, np.int64),
        lengths=np.array(fates.lengths, np.int64),
        fates=np.array(fates.fates, np.int8),
        masked=np.array(fates.masked, np.int64),
        offsets=np.array(kept, np.int64),
        tokens=_map(folder / "tokens.flat", np.uint32),
        labels=_map(folder / "labels.flat", np.int32),
    )


def _documents(
    rows: Iterable[Row], tokenizer: Any, template: Template, limits: Limits
) -> Iterator[tuple[Row, Document, int]]:
    stream, done, began = iter(rows), 0, time.monotonic()
    said = began
    while batch := list(itertools.islice(stream, BATCH)):
        yield from _tokenized(batch, tokenizer, template, limits)
        done, now = done + len(batch), time.monotonic()
        if now - said >= SAY_EVERY:
            print(f"data: {done:,} rows tokenised, {done / (now - began):,.0f} rows/s", flush=True)
            said = now


def _tokenized(
    batch: list[Row], tokenizer: Any, template: Template, limits: Limits
) -> Iterator[tuple[Row, Document, int]]:
    if batch[0].text is not None:
        cut = limits.max_length if limits.overlong == "split" else None
        for row, documents in zip(batch, tokenize_text(tokenizer, batch, cut), strict=True):
            yield from ((row, document, 0) for document in documents)
        return
    rendered = [mark(template, row) for row in batch]
    for row, each, document in zip(batch, rendered, tokenize(tokenizer, rendered), strict=True):
        yield row, document, each.masked


def _fate(document: Document, limits: Limits) -> int:
    if len(document.tokens) > limits.max_length and limits.overlong == "drop":
        return OVERLONG
    return KEPT if (document.labels[: limits.max_length] != IGNORED).any() else UNSUPERVISED


def _map(path: Path, dtype: type[np.generic]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # mmap(2) refuses empty files
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def write_split(folder: Path, documents: Documents, rows: I64, packing: list[list[int]], limits: Limits) -> SplitFacts:
    """Write one split's arrays.

    ``rows`` are the split's rows, kept or not, ascending; ``packing`` lists each sample's documents, counted among the
    kept ones of ``rows``.
    """
    folder.mkdir()
    chosen = np.searchsorted(documents.kept, rows[documents.fates[rows] == KEPT])
    order = chosen[np.fromiter(itertools.chain.from_iterable(packing), np.int64)]
    sizes = np.diff(documents.offsets)[order]
    ends = np.concatenate(([0], np.cumsum(sizes)))
    counts = np.array([len(sample) for sample in packing], np.int64)
    samples = ends[np.concatenate(([0], np.cumsum(counts)))]
    supervised = _copy(folder, documents, order, sizes, ends)
    per_sample = np.add.reduceat(supervised, np.concatenate(([0], np.cumsum(counts)[:-1])))
    small = {
        "samples": samples,
        "supervised": per_sample,
        "documents": ends,
        "sources": documents.sources[documents.kept[order]],
    }
    for name, array in small.items():
        np.save(folder / f"{name}.npy", array.astype(DTYPES[name]))
    return _facts(documents, rows, samples, per_sample, limits)


def _facts(documents: Documents, rows: I64, samples: I64, supervised: I64, limits: Limits) -> SplitFacts:
    fates, long = documents.fates[rows], documents.lengths[rows] > limits.max_length
    return SplitFacts(
        rows=len(np.unique(documents.sources[rows])),
        samples=len(samples) - 1,
        documents=int((fates == KEPT).sum()),
        tokens=int(samples[-1]),
        supervised=int(supervised.sum()),
        longest=int(np.diff(samples).max()),
        dropped_overlong=int((fates == OVERLONG).sum()),
        truncated=int(((fates == KEPT) & long).sum()),
        dropped_unsupervised=int((fates == UNSUPERVISED).sum()),
        pieces=len(rows) - len(np.unique(documents.sources[rows])),
        turns_masked=int(documents.masked[rows].sum()),
    )


def _copy(folder: Path, documents: Documents, order: I64, sizes: I64, ends: I64) -> I64:
    """Write tokens, labels and positions in the new order, a few million tokens at a time; supervised of each."""
    flat = {name: _create(folder, name, int(ends[-1])) for name in ("tokens", "labels", "positions")}
    supervised = np.empty(len(order), np.int64)
    cuts = np.unique(np.searchsorted(ends, np.arange(0, int(ends[-1]), BLOCK))).tolist()
    for first, last in itertools.pairwise([*cuts, len(order)]):
        block = slice(first, last)
        length = sizes[block]
        starts = np.concatenate(([0], np.cumsum(length)[:-1]))
        positions = np.arange(int(length.sum())) - np.repeat(starts, length)
        where = np.repeat(documents.offsets[order[block]], length) + positions
        target = slice(int(ends[first]), int(ends[first]) + len(where))
        flat["tokens"][target] = documents.tokens[where]
        flat["labels"][target] = documents.labels[where]
        flat["positions"][target] = positions
        supervised[block] = np.add.reduceat(documents.labels[where] != IGNORED, starts, dtype=np.int64)
    for array in flat.values():
        array.flush()
    return supervised


def _create(folder: Path, name: str, length: int) -> np.memmap[Any, Any]:
    return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=DTYPES[name], shape=(length,))
