"""Plain text to documents: every token is trained on, each text ends with the end-of-sequence token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from galley.contract.errors import UserError
from galley.data.prepared import IGNORED
from galley.prepare.formats.chat import Document, encode_batch
from galley.prepare.formats.rows import Row


def tokenize_text(tokenizer: Any, rows: Sequence[Row], cut: int | None) -> list[list[Document]]:
    """The documents of each row: one, or where ``cut`` is given as many as it takes with at most ``cut`` tokens each.

    A beginning-of-sequence token stands where the tokenizer puts one. Raises ``UserError`` where it has no
    end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        what = "the tokenizer has no end-of-sequence token, with which texts end"
        raise UserError("model.path", what, "give its tokenizer_config.json an eos_token")
    texts = [(row.where, row.text or "") for row in rows]
    encodings = encode_batch(tokenizer, texts, add_special_tokens=True)
    whole = [each.ids if each.ids[-1:] == [end] else [*each.ids, end] for each in encodings]
    return [[_document(piece) for piece in pieces(ids, cut)] for ids in whole]


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
