"""Conversations, trained on the assistant's tokens as the model's chat template renders them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from galley.contract.data_files import SAMPLE
from galley.prepare.formats.base import Document, Encoder, Format, Limits
from galley.prepare.formats.conversations import Conversation, parse

if TYPE_CHECKING:
    from galley.prepare.formats.coverage import Coverage
    from galley.prepare.formats.template import Template


def _matches(columns: Collection[str]) -> bool:
    return "messages" in columns


def _encoder(tokenizer: Any, template: Template, limits: Limits) -> Encoder[Conversation]:
    from galley.prepare.formats.coverage import Coverage  # jinja2: only where a template is rendered

    del limits  # a conversation is one document, whatever its length
    coverage = Coverage(template)
    return Encoder(partial(_encode, tokenizer, coverage), coverage.counts)


def _encode(tokenizer: Any, coverage: Coverage, rows: Sequence[Conversation]) -> list[list[Document]]:
    from galley.prepare.formats.coverage import check_coverage
    from galley.prepare.formats.rendering import render_conversation, tokenize

    for row in rows:
        check_coverage(coverage, row)
    rendered = [render_conversation(coverage.template, row) for row in rows]
    return [[document] for document in tokenize(tokenizer, rendered)]


CHAT = Format(
    name="chat",
    tag=None,
    rows="conversations",
    sample=SAMPLE,
    columns=("messages", "tools"),
    matches=_matches,
    parse=parse,
    encoder=_encoder,
    templated=True,
)
