"""What an answer thinks before it says something: taken out, or not trained on (``data.thinking``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from galley.prepare.formats.calls import Message
from galley.prepare.formats.conversations import Conversation
from galley.prepare.formats.roles import PROBES, between
from galley.prepare.formats.template import REFUSALS, Span

# transformers gives a message's reasoning to templates under all of these names, whichever the row used.
REASONING = ("reasoning_content", "reasoning", "thinking")
INLINE = re.compile(r"\A\s*(?:<think>)?((?:(?!<think>).)*?)</think>\s*", re.DOTALL)
# The tag that ends thinking, such as </think>, and the white space around it.
CLOSING = re.compile(r"\s*(?:<[^<>\s]*>\s*)?")


def without_thinking(row: Conversation) -> Conversation:
    """The row with answers that only say something."""
    return replace(row, messages=[_silent(message) for message in row.messages])


def _silent(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING}
    return {**kept, "content": INLINE.sub("", message["content"])}


def thinking_spans(
    write: Callable[[Sequence[Message]], str], messages: Sequence[Message], text: str
) -> list[Span] | None:
    """Characters of ``text`` from where an answer's thinking begins to where what it says begins, of each that thinks.

    ``write`` renders messages; ``text`` is all of them. Thinking that the template leaves out has no such range;
    None where it cannot be told from the rest.
    """
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        others = [[*messages[:index], changed, *messages[index + 1 :]] for changed in _probed(message)]
        if not others or not _is_written(write, others):
            continue
        span = between(write, others, text)
        if span is None:
            return None
        closing = CLOSING.match(text, span[1])
        spans.append((span[0], closing.end() if closing else span[1]))
    return spans


def _is_written(write: Callable[[Sequence[Message]], str], probed: Sequence[Sequence[Message]]) -> bool:
    """Whether thinking reaches the text; it does not where the template fails on it, which is told elsewhere."""
    try:
        return any(probe in write(messages) for probe, messages in zip(PROBES, probed, strict=True))
    except REFUSALS:
        return False


def _probed(message: Message) -> list[Message]:
    """The message with other thinking; none where it does not think."""
    keys = [key for key in REASONING if str(message.get(key) or "").strip()]
    if keys:
        return [{**message, **dict.fromkeys(keys, probe)} for probe in PROBES]
    content, thought = message["content"], INLINE.match(message["content"])
    if thought is None or not thought[1].strip():
        return []
    begin, end = thought.span(1)
    inner = thought[1]
    begin, end = begin + len(inner) - len(inner.lstrip()), end - (len(inner) - len(inner.rstrip()))
    return [{**message, "content": content[:begin] + probe + content[end:]} for probe in PROBES]


def cut(spans: Sequence[Span], thoughts: Sequence[Span]) -> list[Span]:
    """``spans`` without what they have up to the end of a thought in them."""
    result = []
    for start, end in spans:
        begin = max([start, *(stop for first, stop in thoughts if start <= first < end)])
        if begin < end:
            result.append((begin, end))
    return result
