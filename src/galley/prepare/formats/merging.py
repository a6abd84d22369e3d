"""Conversations that a chat template refuses, brought into a shape that it may take (``data.refused_rows=merge``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from galley.prepare.formats.calls import Message
from galley.prepare.formats.conversations import Conversation

SYSTEM = ("system", "developer")
MOVED = "rows have their system message moved into the user's next one, for the chat template refuses them otherwise"
JOINED = "rows have consecutive messages of one role joined, for the chat template refuses them otherwise"
DROPPED = "rows dropped, for the chat template refuses them (data.refused_rows=drop)"
SEPARATOR = "\n\n"
"""Between two texts that become one."""


@dataclass(frozen=True)
class _Turn:
    """A message, and whether it is trained on."""

    message: Message
    muted: bool
    given: bool


def merged(row: Conversation) -> Iterator[tuple[Conversation, list[str]]]:
    """``row`` changed as little as may help, and what was done to it: the system message moved, turns joined, or both.

    A message with anything but a text (tool calls, reasoning, a name) is never joined, nor two of which one only is
    trained on.
    """
    turns = [_Turn(message, index in row.muted, index in row.given) for index, message in enumerate(row.messages)]
    moved, joined = _moved(turns), _joined(turns)
    both = _joined(moved)
    if moved != turns:
        yield _rebuilt(row, moved), [MOVED]
    if joined != turns:
        yield _rebuilt(row, joined), [JOINED]
    if both not in (moved, joined):
        yield _rebuilt(row, both), [MOVED, JOINED]


def _moved(turns: list[_Turn]) -> list[_Turn]:
    """System messages before the text of the user's next message; as they are where none follows."""
    result: list[_Turn] = []
    waiting: list[_Turn] = []
    for turn in turns:
        if turn.message["role"] in SYSTEM:
            waiting.append(turn)
        elif turn.message["role"] == "user":
            texts = [other.message["content"] for other in [*waiting, turn]]
            result.append(replace(turn, message={**turn.message, "content": SEPARATOR.join(filter(None, texts))}))
            waiting = []
        else:
            result.append(turn)
    return turns if waiting else result


def _joined(turns: list[_Turn]) -> list[_Turn]:
    """Messages of one role that follow one another as one, where they hold nothing but texts."""
    result: list[_Turn] = []
    for turn in turns:
        before = result[-1] if result else None
        if before is None or not _alike(before, turn):
            result.append(turn)
            continue
        texts = [before.message["content"], turn.message["content"]]
        result[-1] = replace(turn, message={**turn.message, "content": SEPARATOR.join(filter(None, texts))})
    return result


def _alike(one: _Turn, other: _Turn) -> bool:
    same = one.message["role"] == other.message["role"] != "tool"
    plain = one.message.keys() == other.message.keys() == {"role", "content"}
    return same and plain and (one.muted, one.given) == (other.muted, other.given)


def _rebuilt(row: Conversation, turns: list[_Turn]) -> Conversation:
    return replace(
        row,
        messages=[turn.message for turn in turns],
        muted=frozenset(index for index, turn in enumerate(turns) if turn.muted),
        given=frozenset(index for index, turn in enumerate(turns) if turn.given),
    )
