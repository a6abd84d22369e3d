"""Conversations, trained on the assistant's tokens as the model's chat template renders them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from galley.contract.errors import UserError
from galley.contract.row_formats import SAMPLE, is_of
from galley.prepare.formats.base import NOTHING, Encoded, Format, Limits, keys_of
from galley.prepare.formats.calls import kind
from galley.prepare.formats.conversations import Conversation, dropped, nothing, parse
from galley.prepare.formats.merging import DROPPED, merged

if TYPE_CHECKING:
    from galley.prepare.formats.coverage import Coverage
    from galley.prepare.formats.rendering import Rendered
    from galley.prepare.formats.template import Template


def _encode(tokenizer: Any, template: Template, limits: Limits, rows: Sequence[Conversation]) -> Encoded:
    from galley.prepare.formats.coverage import Coverage  # jinja2: only where a template is rendered
    from galley.prepare.formats.rendering import tokenize

    # What is known of shapes is of these rows alone: it must not depend on which rows a process had before them.
    coverage = Coverage(template)
    # A conversation is one document, whatever its length, but for turns that are split off.
    rendered = [_render(coverage, limits, row) if row.messages else [] for row in rows]
    documents = iter(tokenize(tokenizer, [part for parts in rendered for part in parts]))
    return Encoded([[next(documents) for _ in parts] or [NOTHING] for parts in rendered], coverage.counts)


def _render(coverage: Coverage, limits: Limits, row: Conversation) -> list[Rendered]:
    """The texts of one row; none where it is dropped, which is counted."""
    from galley.prepare.formats.rendering import Refusal

    try:
        return _taken(coverage, limits, row)
    except Refusal:
        if limits.turns.refused == "refuse":
            raise
        if limits.turns.refused == "merge":
            return _merged(coverage, limits, row)
        coverage.counts[DROPPED] += 1
        return []


def _merged(coverage: Coverage, limits: Limits, row: Conversation) -> list[Rendered]:
    """The texts of a row that the template refuses as it is. Raises :class:`UserError` where nothing helps."""
    from galley.prepare.formats.rendering import Refusal

    for changed, notes in merged(row):
        try:
            rendered = _taken(coverage, limits, changed)
        except Refusal:
            continue
        coverage.counts.update(notes)
        return rendered
    return _taken(coverage, limits, row)


def _taken(coverage: Coverage, limits: Limits, row: Conversation) -> list[Rendered]:
    """The texts of a row that the template takes. Raises :class:`UserError` where it does not."""
    from galley.prepare.formats.coverage import check_coverage
    from galley.prepare.formats.rendering import render_conversation, render_split, render_whole
    from galley.prepare.formats.thinking import without_thinking

    thinking = limits.turns.thinking
    row = without_thinking(row) if thinking == "drop" else row
    check_coverage(coverage, row)
    if limits.learn == "all" and thinking == "mask":
        what = "mask leaves out what answers think, and with data.learn=all everything is trained on"
        raise UserError("data.thinking", what, "use data.thinking=drop, or data.learn=assistant")
    if limits.learn == "all":
        return [render_whole(coverage.template, replace(row, muted=row.muted - row.given))]
    if limits.learn == "last":
        row = replace(row, muted=row.muted | frozenset(row.answers[:-1]))
    roles = limits.learn if isinstance(limits.learn, tuple) else ("assistant",)
    if limits.turns.rewritten == "split":
        return render_split(coverage.template, row, roles, thinking == "mask")
    return [render_conversation(coverage.template, row, roles, thinking == "mask")]


CHAT = Format(
    name="chat",
    tag=None,
    rows="conversations",
    sample=SAMPLE,
    columns=("messages", "tools", "system"),
    matches=partial(is_of, "chat"),
    parse=parse,
    encode=_encode,
    templated=True,
    nothing=nothing,
)


def conversation_format(
    name: str,
    sample: str,
    columns: tuple[str, ...],
    to_messages: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
) -> Format[Conversation]:
    """A format whose rows ``to_messages`` turns into records of ``messages``; the rest is as with those.

    What ``to_messages`` returns as ``prompt`` is how many of the messages were given as a prompt.
    ``columns``: all that are read; which of them a row must have is in :data:`galley.contract.row_formats.COLUMNS`.
    """
    matches = partial(is_of, name)

    def read(record: object, where: str) -> Conversation:
        if isinstance(record, Mapping) and (reason := dropped(name, record, where)):
            return nothing(where, reason)
        if not isinstance(record, Mapping) or not matches(record):
            shown = f"an object of {keys_of(record)}" if isinstance(record, Mapping) else kind(record)
            raise UserError(where, f"not a row of the format {name}: {shown}", f"write rows such as {sample}")
        messages = {**to_messages(record, where)}
        prompt = messages.pop("prompt", 0)
        conversation = parse(messages, where, prompt)
        unread = [key for key in record if key not in columns and record[key] is not None]
        if not unread:
            return conversation
        notes = {f"rows have a column `{key!s:.60}`, which is not read": 1 for key in unread}
        return replace(conversation, notes={**conversation.notes, **notes})

    return replace(CHAT, name=name, tag=name, sample=sample, columns=columns, matches=matches, parse=read)
