"""Where messages of others than the assistant stand in a rendered conversation (``data.learn=[user, tool]``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from galley.prepare.formats.calls import Message
from galley.prepare.formats.template import ANSWER, REFUSALS, Span, Template, shared

# Two texts without a character in common at either end: whatever a message says, one of them differs from it there.
PROBES = (f"{ANSWER}\ue001", "Galley\ue002probes")
# What may stand between a message's text and its end-of-turn token: </tool_response>, a quote. Not the tools.
CLOSING = r"(?:[\s\"]|<[^<>\s]*>)*"


def message_span(
    template: Template, write: Callable[[Sequence[Message]], str], messages: Sequence[Message], text: str, index: int
) -> Span | None:
    """Characters of ``text`` that hold what message ``index`` says, through its end-of-turn token where one follows.

    None where that cannot be told: the template leaves it out, or writes it twice. ``write`` renders messages;
    ``text`` is all of them.
    """
    before, message, after = messages[:index], messages[index], messages[index + 1 :]
    span = between(write, [[*before, {**message, "content": probe}, *after] for probe in PROBES], text)
    if span is None:
        return None
    start, stop = span
    if template.end_of_turn and (end := re.compile(CLOSING + re.escape(template.end_of_turn)).match(text, stop)):
        stop = end.end()
    return start, stop


def between(write: Callable[[Sequence[Message]], str], probed: Sequence[Sequence[Message]], text: str) -> Span | None:
    """Where ``text`` differs from what ``write`` makes of ``probed``: messages with :data:`PROBES` in one place.

    None where a probe is left out, or written twice.
    """
    try:
        others = [write(messages) for messages in probed]
    except REFUSALS:
        return None
    if not all(other.count(probe) == 1 for probe, other in zip(PROBES, others, strict=True)):
        return None
    # What all three have at their beginning and at their end is the template's or others'; between is the place.
    start = min(shared(text, other) for other in others)
    stop = len(text) - min(_shared_end(text, other) for other in others)
    return (start, stop) if start < stop else None


def _shared_end(one: str, two: str) -> int:
    """Characters that both end with."""
    return shared(one[::-1], two[::-1])
