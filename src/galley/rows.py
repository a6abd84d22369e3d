"""Conversations or plain texts, one at a time, from JSONL or a hub data set; the first bad row ends the reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galley.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
TEXT_EXAMPLE = '{"text": "…"}'
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One conversation, and where it stands."""

    index: int
    """Counted from 0: the line of a file, the row of a data set."""
    where: str
    """For an error line: ``file:line`` counted from 1, or ``data set, row N`` counted from 0."""
    messages: list[Message]
    """At least one of them the assistant's; none in plain text."""
    tools: list[dict[str, Any]] | None
    """Tools the assistant could call, as the template takes them."""
    text: str | None = None
    """Plain text; None: a conversation."""


def read_jsonl(path: Path, plain: bool = False) -> Iterator[Row]:
    """Rows of a file of one JSON object a line; blank lines count as lines and are passed over. ``plain``: of texts.

    Raises :class:`UserError` naming file and line for a line that is not UTF-8, not JSON or not such a row.
    """
    with path.open("rb") as file:
        for index, line in enumerate(file):
            where = f"{path}:{index + 1}"
            if line.strip():
                record = _parse(where, line, TEXT_EXAMPLE if plain else EXAMPLE)
                yield (_text if plain else _row)(index, where, record)


def rows_of(records: Iterator[Mapping[str, Any]], name: str, plain: bool = False) -> Iterator[Row]:
    """Rows of a hub data set that was loaded; errors name the data set and the row, counted from 0."""
    for index, record in enumerate(records):
        yield (_text if plain else _row)(index, f"{name}, row {index}", record)


def _text(index: int, where: str, record: object) -> Row:
    text = record.get("text") if isinstance(record, Mapping) else None
    if isinstance(text, str):
        return Row(index, where, [], None, text)
    what = f"`text` is {_kind(text)}" if isinstance(record, Mapping) else f"{_kind(record)}, not an object"
    if isinstance(record, Mapping) and "text" not in record:
        what = f"no `text`, only {', '.join(map(str, record))[:200] or 'nothing'}"
    todo = f"write rows such as {TEXT_EXAMPLE}, or say data.format=chat"
    raise UserError(where, f"not a plain text: {what}", todo)


def _parse(where: str, line: bytes, example: str) -> object:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(where, f"not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", f"write one object a line, such as {example}") from None
    return value


def _row(index: int, where: str, record: object) -> Row:
    if not isinstance(record, Mapping):
        raise _not_a_conversation(where, f"{_kind(record)}, not an object")
    messages = record.get("messages")
    if messages is None:
        found = ", ".join(map(str, record)) or "nothing"
        raise _not_a_conversation(where, f"no `messages`, only {found[:200]}")
    if not isinstance(messages, list) or not messages:
        raise _not_a_conversation(where, f"`messages` is {_kind(messages)}")
    turns = [_message(where, number, each) for number, each in enumerate(messages)]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _not_a_conversation(where, "no message has the role assistant, so there is nothing to learn")
    return Row(index, where, turns, _tools(where, record.get("tools")))


def _message(where: str, number: int, value: object) -> Message:
    """A checked message; absent and null are the same, as transformers has it for chat templates."""
    name = f"messages[{number}]"
    if not isinstance(value, Mapping):
        raise _not_a_conversation(where, f"{name} is {_kind(value)}, not an object")
    message = {key: each for key, each in value.items() if each is not None}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _not_a_conversation(where, f"{name} has role {role!r}, not one of {', '.join(ROLES)}")
    if content is None and not message.get("tool_calls"):
        raise _not_a_conversation(where, f"{name} has no content")
    if not isinstance(content, str | None):
        raise _not_a_conversation(where, f"{name} has content that is {_kind(content)}, not a string")
    return {**message, "content": content or ""}


def _tools(where: str, value: object) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise _not_a_conversation(where, f"`tools` is {_kind(value)}, not a list of objects")
    return value or None


def _not_a_conversation(where: str, what: str) -> UserError:
    return UserError(where, f"not a conversation: {what}", f"write rows such as {EXAMPLE}")


def _kind(value: object) -> str:
    names = {dict: "an object", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "null" if value is None else type(value).__name__)
