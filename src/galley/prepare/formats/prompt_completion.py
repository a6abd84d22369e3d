"""A question and its answer in two columns: ``prompt`` and ``completion``, ``question`` and ``answer``, and the like.

Both may be text, or lists of messages, as TRL has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from galley.contract.errors import UserError
from galley.contract.row_formats import ANSWERS, PROMPTS, advice, is_judged
from galley.prepare.formats.calls import kind
from galley.prepare.formats.chat import conversation_format
from galley.prepare.formats.conversations import only_column, system_of, text_of

SAMPLE = '{"prompt": "…", "completion": "…"}'


def to_messages(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record with ``messages``, and how many of them are the prompt's: answers among those are not trained on.

    Raises :class:`UserError` for a column of another kind, and for an answer that comes with a verdict on it.
    """
    if is_judged(record):
        raise UserError(where, f"an answer with `label` {record['label']!r}", advice(record))
    prompt, answer = (_value(record, names, where) for names in (PROMPTS, ANSWERS))
    more = {"system": system_of(record), "tools": record.get("tools")}
    if isinstance(prompt, list) or isinstance(answer, list):
        given = _messages(where, "the prompt", prompt, "user")
        messages = [*given, *_messages(where, "the answer", answer, "assistant")]
        return {**more, "messages": messages, "prompt": len(given)}
    asked, answered = (text_of(record, names, where, SAMPLE) for names in (PROMPTS, ANSWERS))
    return {**more, "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}


def _value(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> Any:
    name = only_column(record, names, where)
    return record[name] if name else None


def _messages(where: str, name: str, value: object, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        what = f"{name} is {kind(value)}, neither a string nor a list of messages"
        raise UserError(where, what, f"write rows such as {SAMPLE}")
    return [dict(message) for message in value]


PROMPT_COMPLETION = conversation_format(
    name="prompt_completion",
    sample=SAMPLE,
    columns=(*PROMPTS, *ANSWERS, "system", "system_prompt", "tools", "label"),
    to_messages=to_messages,
)
