"""What a format of data is: how its rows are recognised and read, and which documents they become.

To add one, write a module beside ``chat.py`` and ``text.py`` that ends in a :class:`Format`, and name it in
``table.py`` and in :data:`galley.contract.task_data.RowFormat`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from galley.contract.errors import UserError
from galley.contract.task_data import Gates
from galley.data.columns import I32, IGNORED, U32

if TYPE_CHECKING:
    from galley.prepare.formats.template import Template


class Example(Protocol):
    """A row's content as its format has read and checked it; each format adds fields of its own."""

    @property
    def where(self) -> str:
        """For an error line: ``file:line`` counted from 1, or ``data set, row N`` counted from 0."""

    @property
    def notes(self) -> Mapping[str, int]:
        """What was passed over in this row, and how often."""


@dataclass(frozen=True)
class Document:
    """Tokens that are trained on together, and never apart: what a row, or a piece of one, becomes."""

    tokens: U32
    """[tokens]"""
    labels: I32
    """[tokens], not shifted: the token itself where it is trained on, else -100; the first is -100."""
    masked: int = 0
    """Answers in it that cannot be trained on."""
    muted: int = 0
    """Answers in it that the row wants not trained on."""


NOTHING = Document(np.empty(0, np.uint32), np.empty(0, np.int32))
"""Of a row that is dropped."""


DEFAULT_GATES = Gates()


@dataclass(frozen=True)
class Turns:
    """What becomes of turns and rows that a chat template does not write as they stand."""

    rewritten: Literal["mask", "split"] = "mask"
    """As ``data.rewritten_turns``."""
    refused: Literal["refuse", "merge", "drop"] = "refuse"
    """As ``data.refused_rows``."""
    thinking: Literal["keep", "drop", "mask"] = "keep"
    """As ``data.thinking``."""


USUAL = Turns()


@dataclass(frozen=True)
class Limits:
    """What happens to long rows, and which messages of a conversation are trained on."""

    max_length: int
    overlong: Literal["drop", "truncate", "truncate_left", "split", "refuse"]
    learn: str | tuple[str, ...] = "assistant"
    """As ``data.learn``; a tuple names roles."""
    gates: Gates = DEFAULT_GATES
    """What becomes of doubtful rows."""
    turns: Turns = USUAL

    def apply(self, where: str, document: Document) -> Document | None:
        """The document, cut where it is too long; None where it is dropped. Raises :class:`UserError` on ``refuse``."""
        length = len(document.tokens)
        if length <= self.max_length:
            return document
        if self.overlong == "drop":
            return None
        if self.overlong == "refuse":
            what = f"has {length:,} tokens, more than data.max_length={self.max_length}"
            raise UserError(where, what, f"use data.max_length={length}, or data.overlong=drop or truncate")
        left = self.overlong == "truncate_left"
        part = slice(length - self.max_length, None) if left else slice(self.max_length)
        labels = document.labels[part].copy()
        labels[:1] = IGNORED  # nothing predicts the first token
        return replace(document, tokens=document.tokens[part], labels=labels)


E = TypeVar("E", bound=Example)


@dataclass(frozen=True)
class Encoded:
    """What several rows became."""

    documents: list[list[Document]]
    """Of each row, in the rows' order."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """What of these rows did not reach the documents, and how often."""


@dataclass(frozen=True)
class Format(Generic[E]):
    """One way in which a row of data is written."""

    name: str
    """As ``data.format`` has it."""
    tag: str | None
    """Stands in the hashes that name prepared data. None for chats only, which had none when they were the only
    format: so what older versions prepared is found."""
    rows: str
    """What its rows are called in messages: ``conversations``."""
    sample: str
    """A row, for error messages."""
    columns: tuple[str, ...]
    """The columns that are read; a hub data set's others are not loaded where it :attr:`matches`."""
    matches: Callable[[Collection[str]], bool]
    """Whether a data set with these columns is of this format."""
    parse: Callable[[object, str], E]
    """A record and its place to an example. Raises :class:`UserError` where the record is of another format."""
    encode: Callable[[Any, Template, Limits, Sequence[E]], Encoded]
    """From a fast tokenizer, the chat template (an empty one where not templated), limits and rows to documents: a
    function of these alone, for several processes share the rows. Raises :class:`UserError` for a row that cannot be
    trained on."""
    templated: bool
    """Whether a chat template goes around its rows."""
    nothing: Callable[[str, str], E] | None = None
    """The place of a row that is dropped and the reason to an example without a document; None: no row is."""


def encode_batch(tokenizer: Any, texts: Sequence[tuple[str, str]], add_special_tokens: bool) -> list[Any]:
    """Encodings of pairs of place and text. Raises :class:`UserError` for a text with half a surrogate pair."""
    backend = tokenizer.backend_tokenizer
    try:
        encodings: list[Any] = backend.encode_batch([text for _, text in texts], add_special_tokens=add_special_tokens)
    except (UnicodeEncodeError, TypeError):  # TypeError: what tokenizers makes of the former
        for where, text in texts:
            check_characters(where, text)
        raise
    return encodings


def check_characters(where: str, text: str) -> None:
    """Raise :class:`UserError` for a text with half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        what = f"holds {half}, half of a surrogate pair, which is not a character"
        raise UserError(where, what, "remove it, or write the whole character") from None


def keys_of(record: Mapping[str, Any]) -> str:
    """The record's keys, for an error line."""
    return " ".join(", ".join(map(str, record)).split())[:200] or "nothing"
