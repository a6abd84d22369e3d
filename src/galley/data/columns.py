"""The arrays of prepared data, and a split of them as ranks map it. numpy only.

``data/train`` and ``data/held_out`` hold a ``.npy`` file for each of :data:`COLUMNS`, opened with ``mmap_mode="r"`` so
that ranks of one node share the page cache. The first token of every document has label -100, for nothing predicts it:
so the supervised count of a sample is also its number of loss terms after the shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

IGNORED = -100
"""Label of a token that is not trained on, as in torch's cross-entropy."""

U32 = npt.NDArray[np.uint32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

Over = Literal["tokens", "samples", "sample bounds", "documents", "document bounds"]
"""What a column has one entry for. Bounds are where each sample or document starts, and where the last one ends: one
more than there are.
"""


@dataclass(frozen=True)
class Column:
    """One array."""

    name: str
    dtype: type[np.generic]
    over: Over
    meaning: str

    def path(self, folder: Path) -> Path:
        """Its file in a split's folder."""
        return folder / f"{self.name}.npy"

    def open(self, folder: Path) -> npt.NDArray[Any]:
        """Map it. Raises ``OSError`` where it is missing, ``ValueError`` for another type."""
        path = self.path(folder)
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r")
        # From another version, or not Galley's: a wrong dtype would be read as other numbers, in silence.
        if array.dtype != self.dtype or array.ndim != 1:
            what = f"{array.dtype} with {array.ndim} dimensions, not a row of {np.dtype(self.dtype)}"
            raise ValueError(f"{path}: {what}")
        return array

    def create(self, folder: Path, length: int) -> np.memmap[Any, Any]:
        """A new file of ``length`` entries, mapped to be filled piece by piece."""
        return np.lib.format.open_memmap(self.path(folder), mode="w+", dtype=self.dtype, shape=(length,))

    def save(self, folder: Path, values: npt.ArrayLike) -> None:
        """Write it whole."""
        np.save(self.path(folder), np.asarray(values).astype(self.dtype))


COLUMNS = {
    column.name: column
    for column in (
        Column("tokens", np.uint32, "tokens", "token ids of all samples, one after the other"),
        Column("labels", np.int32, "tokens", "the token itself where it is supervised, else -100 (not shifted)"),
        Column("positions", np.uint32, "tokens", "0, 1, 2 … from the start of each document"),
        Column("samples", np.int64, "sample bounds", "where each sample starts in tokens"),
        Column("supervised", np.int64, "samples", "supervised tokens of each sample"),
        Column("documents", np.int64, "document bounds", "where each document starts; none spans two samples"),
        Column("sources", np.int64, "documents", "row of the source that it came from (line number from 0)"),
    )
}


@dataclass(frozen=True)
class Sample:
    """One sample of T tokens and D documents: numpy views of the mapped files, [T] each but for the last two, [D]."""

    tokens: U32
    labels: I32
    positions: U32
    document_starts: I64
    """Where each document starts, counted from the start of the sample; the first is 0."""
    sources: I64
    """Source row of each document."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Split:
    """One split's mapped columns."""

    columns: Mapping[str, npt.NDArray[Any]]
    """By name: :data:`COLUMNS`, and whatever else was opened."""

    @classmethod
    def open(cls, folder: str | Path, columns: Mapping[str, Column] = COLUMNS) -> Self:
        """Map the files in ``folder``.

        Raises ``OSError`` where one is missing, ``ValueError`` for another type and for lengths that do not agree.
        """
        arrays = {name: column.open(Path(folder)) for name, column in columns.items()}
        split = cls(arrays)
        lengths = split.lengths_by_kind()
        for name, column in columns.items():
            if len(arrays[name]) != lengths[column.over]:
                what = f"{len(arrays[name]):,} entries for {lengths[column.over]:,} {column.over}"
                raise ValueError(f"{column.path(Path(folder))}: {what}")
        return split

    def lengths_by_kind(self) -> dict[Over, int]:
        """How long a column is, by what it has one entry for."""
        samples, documents = len(self.samples), len(self.documents)  # bounds, one more than there are
        return {
            "tokens": self.tokens_total if samples else 0,
            "samples": samples - 1,
            "sample bounds": samples,
            "documents": documents - 1,
            "document bounds": documents,
        }

    @property
    def tokens(self) -> U32:
        """Token ids, [tokens]."""
        return self.columns["tokens"]

    @property
    def labels(self) -> I32:
        """Labels, not shifted, [tokens]."""
        return self.columns["labels"]

    @property
    def samples(self) -> I64:
        """Where each sample starts, [samples + 1]."""
        return self.columns["samples"]

    @property
    def supervised(self) -> I64:
        """Supervised tokens of each sample, [samples]."""
        return self.columns["supervised"]

    @property
    def documents(self) -> I64:
        """Where each document starts, [documents + 1]."""
        return self.columns["documents"]

    @property
    def positions(self) -> U32:
        """Places in their documents, [tokens]."""
        return self.columns["positions"]

    @property
    def sources(self) -> I64:
        """Source row of each document, [documents]."""
        return self.columns["sources"]

    def __len__(self) -> int:
        return len(self.samples) - 1

    @property
    def lengths(self) -> I64:
        """Tokens of each sample, [samples]."""
        return np.diff(self.samples)

    @property
    def tokens_total(self) -> int:
        """Tokens of all samples."""
        return int(self.samples[-1])

    @property
    def supervised_total(self) -> int:
        """Supervised tokens of all samples."""
        return int(self.supervised.sum())

    def pairs(self, index: int) -> int:
        """Pairs of tokens that attention inside documents may compare in sample ``index``: the sum of L² over documents
        of L tokens. It is what the time of a sample grows with beside its tokens.
        """
        first, last = self._documents(index)
        return int((np.diff(self.documents[first : last + 1]) ** 2).sum())

    def _documents(self, index: int) -> tuple[int, int]:
        """The first of the documents that sample ``index`` consists of, and the first that is not its own."""
        # Both columns count tokens of the whole split, and no document spans two samples: where a sample starts, a
        # document does. Two binary searches, so that the mapped file is read in a few pages only.
        first, last = np.searchsorted(self.documents, self.samples[index : index + 2])
        return int(first), int(last)

    def sample(self, index: int) -> Sample:
        """Sample ``index``. Raises ``IndexError`` outside 0 … len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = int(self.samples[index]), int(self.samples[index + 1])
        first, last = self._documents(index)
        return Sample(
            tokens=self.tokens[start:end],
            labels=self.labels[start:end],
            positions=self.positions[start:end],
            document_starts=self.documents[first:last] - start,  # from the start of the split to that of the sample
            sources=self.sources[first:last],
        )
