"""Plain text to documents: every token is trained on, each text ends with the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from galley.contract.errors import UserError
from galley.data.columns import IGNORED
from galley.prepare.formats.base import NOTHING, Document, Encoded, Format, Limits, encode_batch, keys_of
from galley.prepare.formats.calls import kind
from galley.prepare.formats.conversations import dropped

if TYPE_CHECKING:
    from galley.prepare.formats.template import Template

SAMPLE = '{"text": "…"}'


@dataclass(frozen=True)
class Text:
    """One row."""

    where: str
    text: str | None
    """None: the row is dropped, for which ``notes`` has the reason."""
    notes: Mapping[str, int] = field(default_factory=dict)


def parse(record: object, where: str) -> Text:
    """The text of a record. Raises :class:`UserError` where it has none."""
    text = record.get("text") if isinstance(record, Mapping) else None
    if text == "":
        return _nothing(where, "rows dropped, for their `text` is empty")
    if isinstance(text, str):
        return Text(where, text)
    if isinstance(record, Mapping) and (reason := dropped("text", record, where)):
        return _nothing(where, reason)
    what = f"`text` is {kind(text)}" if isinstance(record, Mapping) else f"{kind(record)}, not an object"
    if isinstance(record, Mapping) and "text" not in record:
        what = f"no `text`, only {keys_of(record)}"
    todo = f"write rows such as {SAMPLE}, or use data.format=chat"
    raise UserError(where, f"not a plain text: {what}", todo)


def _nothing(where: str, reason: str) -> Text:
    return Text(where, None, {reason: 1})


def tokenize_text(tokenizer: Any, cut: int | None, rows: Sequence[Text]) -> list[list[Document]]:
    """The documents of each row: one, or where ``cut`` is given as many as it takes with at most ``cut`` tokens each.

    A beginning-of-sequence token stands where the tokenizer puts one. Raises ``UserError`` where it has no
    end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        what = "the tokenizer has no end-of-sequence token, with which texts end"
        raise UserError("model.path", what, "give its tokenizer_config.json an eos_token")
    kept = [(row.where, row.text) for row in rows if row.text is not None]
    texts = iter(encode_batch(tokenizer, kept, add_special_tokens=True))
    return [_documents(next(texts).ids, end, cut) if row.text is not None else [NOTHING] for row in rows]


def _documents(ids: list[int], end: int, cut: int | None) -> list[Document]:
    ids = ids if ids[-1:] == [end] else [*ids, end]
    return [_document(piece) for piece in pieces(ids, cut)]


def pieces(ids: list[int], cut: int | None) -> list[list[int]]:
    """``ids`` in pieces of ``cut``; the last is never one token alone, which nothing would predict."""
    if cut is None or len(ids) <= cut:
        return [ids]
    ends = list(range(cut, len(ids), cut))
    if cut > 2 and len(ids) - ends[-1] == 1:
        ends[-1] -= 1
    return [ids[start:end] for start, end in zip([0, *ends], [*ends, len(ids)], strict=True)]


def _document(ids: list[int]) -> Document:
    tokens = np.array(ids, np.uint32)
    labels = tokens.astype(np.int32)
    labels[:1] = IGNORED  # nothing predicts the first token
    return Document(tokens, labels)


def _matches(columns: Collection[str]) -> bool:
    return "text" in columns


def _encode(tokenizer: Any, template: Template, limits: Limits, rows: Sequence[Text]) -> Encoded:
    del template
    return Encoded(tokenize_text(tokenizer, limits.max_length if limits.overlong == "split" else None, rows))


TEXT = Format(
    name="text",
    tag="text",
    rows="texts",
    sample=SAMPLE,
    columns=("text",),
    matches=_matches,
    parse=parse,
    encode=_encode,
    templated=False,
    nothing=_nothing,
)
