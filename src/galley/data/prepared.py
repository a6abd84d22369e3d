"""Prepared data: what ``galley.prepare`` writes and every rank maps. numpy and pydantic only.

``data/manifest.json`` is written last: prepared data exists when it does. The arrays are in :mod:`galley.data.columns`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from galley.contract.files import read_text
from galley.contract.rundir import RunDir
from galley.contract.spec import Part
from galley.data.columns import COLUMNS, Split
from galley.storage import sums

FORMAT: Literal[1] = 1
TRAIN, HELD_OUT, TOKENIZER = "train", "held_out", "tokenizer"


class SourceFacts(Part):
    """A file or hub data set that the data came from, and how to tell that it has changed."""

    what: Literal["data", "held_out", "chat_template"]
    """What it was read for."""
    number: int = 0
    """Of several sources of data: which, in the task's order."""
    path: str
    """As found when it was prepared: an absolute path (of a file, a folder or a pattern), or a hub id."""
    split: str | None = None
    """Of a folder: which of its files were read."""
    revision: str | None = None
    """Commit of a hub data set."""
    size: int = 0
    """Bytes, of all files; 0 for a hub data set."""
    mtime_ns: int = 0
    """Modification time when it was read, of several files the latest: with the same size and time it is the same."""
    sha256: str
    """Of the whole file; of several, over their checksums in order; for a hub data set, its id, commit and split."""

    @property
    def name(self) -> str:
        """Tells it from the others: ``data``, ``data1``, ``held_out`` …"""
        return f"{self.what}{self.number or ''}"


class SourceShare(Part):
    """What one of several sources gave to the training split."""

    path: str
    """As found when it was prepared."""
    first: int
    """Number of its first row, from 0: rows are numbered on from one source to the next."""
    rows: int
    """Rows to train on, before any was drawn."""
    documents: int
    """Documents in an epoch, those that come twice counted twice."""
    supervised: int
    """Tokens of theirs that the loss is taken over."""


class SplitFacts(Part):
    """Counts over one split."""

    rows: int
    """Rows chosen for this split, before any was dropped."""
    samples: int
    """What training draws from: packed sequences, or single documents."""
    documents: int
    """Conversations, or texts and pieces of texts, kept."""
    tokens: int
    """Tokens of all samples; there is no padding."""
    supervised: int
    """Tokens that the loss is taken over."""
    longest: int
    """Tokens of the longest sample."""
    dropped_overlong: int = 0
    """Conversations left out for being longer than ``max_length``."""
    truncated: int = 0
    """Conversations cut to ``max_length``."""
    pieces: int = 0
    """Further documents, from texts longer than ``max_length`` that were split."""
    dropped_unsupervised: int = 0
    """Conversations left out because no token of theirs is supervised."""
    turns_masked: int = 0
    """Assistant turns not trained on: the template renders them otherwise once the conversation goes on."""
    turns_muted: int = 0
    """Assistant turns not trained on: their ``weight``, ``train`` or ``loss`` is 0, or ``data.learn`` is ``last``."""
    overlap: int = 0
    """Held-out documents that are training documents too, token for token."""
    shares: list[SourceShare] = Field(default_factory=list)
    """What each of several sources gave, in the task's order."""


def row_names(shares: Sequence[SourceShare], rows: Iterable[int]) -> list[str]:
    """Rows (numbers from 0) as people count them: from 1, and with the source's path where there are ``shares``."""
    names = []
    for row in rows:
        share = next((share for share in reversed(shares) if share.first <= row), None)
        names.append(f"{share.path}:{row - share.first + 1}" if share else str(row + 1))
    return names


class ModelFacts(Part):
    """The model that training starts from, as it lies on this machine."""

    path: str
    """Local folder for ``from_pretrained``: config and safetensors, with rows for every token."""
    source: str
    """As the user wrote it."""
    revision: str | None = None
    """Commit of a hub model."""
    fingerprint: str
    """Over the configuration and samples of the weights of what was fetched (before tokens were added)."""
    parameters: int
    """Elements of all stored tensors."""
    vocab: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    layers: int
    """Decoder layers."""
    added_tokens: list[str] = Field(default_factory=list)
    """Tokens that the template needs and the tokenizer lacked: their embedding rows must be trained."""
    added_token_ids: list[int] = Field(default_factory=list)
    """Ids of ``added_tokens``, in the same order."""
    eos_ids: list[int] = Field(default_factory=list)
    """Tokens that end an answer, the template's end of turn first."""
    attends_by_document: bool = False
    """Whether attention over each packed document by itself computes what a mask over all of them does."""
    quantised_share: float | None = None
    """Share of the weights that the method quantises; None where it quantises nothing."""


class Manifest(Part):
    """``data/manifest.json``."""

    schema_version: Literal[1] = Field(FORMAT, alias="schema")
    key: str
    """Hash of what the task asks of prepare: model, data, seed."""
    content: str
    """Hash of everything that the arrays depend on; names the cache entry."""
    sources: list[SourceFacts]
    packed: bool
    """Whether a sample holds several documents."""
    packing_reason: str | None = None
    """Why not, where the task asked for packing."""
    max_length: int
    """No sample is longer, in tokens."""
    train: SplitFacts
    held_out: SplitFacts | None = None
    model: ModelFacts
    tokenizer: str = TOKENIZER
    """Folder of the tokenizer with its final template, inside ``data/``."""
    template_hash: str
    """SHA-256 of the chat template."""
    versions: dict[str, str]
    """Of the libraries that rendered and tokenised."""
    checksums: dict[str, str] = Field(default_factory=dict)
    """CRC-32 of each file in ``data/``, by its path there; none where an earlier version prepared them."""
    crc32: str | None = None
    """Of all the rest of this manifest."""
    warnings: list[str] = Field(default_factory=list)
    """What the user should know about these data, one line each."""


def read_manifest(run: RunDir) -> Manifest:
    """What prepare made for ``run``. Raises ``OSError`` where it has not, ``ValueError`` for another format and for a
    manifest that is not as it was written.
    """
    text = read_text(run.data_manifest)
    manifest = Manifest.model_validate_json(text)
    if not sums.is_intact(json.loads(text)):
        raise ValueError(f"{run.data_manifest} is not as it was written (CRC-32)")
    return manifest


def damage(run: RunDir, manifest: Manifest, share: slice = slice(None)) -> str | None:
    """What is wrong with the prepared files, if something is; those in ``share`` are read."""
    files = [(name, checksum, None) for name, checksum in sorted(manifest.checksums.items())]
    return sums.damage(run.data, files[share])


def is_complete(run: RunDir, manifest: Manifest) -> bool:
    """Whether every file of the run's prepared data is there; none is opened."""
    splits = [TRAIN] if manifest.held_out is None else [TRAIN, HELD_OUT]
    files = [column.path(run.data / split) for split in splits for column in COLUMNS.values()]
    return all(file.is_file() for file in files) and (run.data / manifest.tokenizer).is_dir()


def open_split(run: RunDir, name: str = TRAIN) -> Split:
    """The ``train`` or ``held_out`` split of ``run``."""
    return Split.open(run.data / name)


def tokenizer_folder(run: RunDir) -> Path:
    """The run's own tokenizer, for ``AutoTokenizer.from_pretrained``."""
    return run.data / TOKENIZER
