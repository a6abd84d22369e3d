"""From conversation to tokens and labels: what the model's chat template writes, and which of it is trained on.

Trained on is each assistant turn as rendered, through its end-of-turn token, and nothing else (with ``data.learn`` only
the last, or every token of the text). Where a template marks
its turns with ``{% generation %}`` the marks are used. Otherwise a turn is found by rendering prefixes of the
conversation: it begins where ``messages[:i]`` with the generation prompt ends, and ends where ``messages[:i + 1]``
ends. Both must be prefixes of the whole rendering, or the template writes the turn otherwise once the conversation
goes on (Qwen3 drops earlier thinking): such a turn is masked and counted. A generation prompt may end in what the
finished turn lacks (DeepSeek-R1's ends in ``<think>\\n``, which its history does not show): the turn then begins where
the two part, but never before what the messages before it wrote.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jinja2 import TemplateRuntimeError

from galley.contract.errors import UserError
from galley.data.columns import IGNORED
from galley.prepare.formats.base import Document, encode_batch
from galley.prepare.formats.calls import Message, fit
from galley.prepare.formats.conversations import Conversation
from galley.prepare.formats.roles import message_span
from galley.prepare.formats.template import (
    ANSWER,
    PATIENCE,
    QUESTION,
    REFUSALS,
    Span,
    Template,
    first_line,
    render,
    render_marked,
    shared,
)
from galley.prepare.formats.thinking import cut, thinking_spans
from galley.storage.limits import within

_SLOW = TemplateRuntimeError(f"it takes more than {PATIENCE} s")
ASSISTANT = ("assistant",)
WRAPPED = '{"type": "function", "function": {"name": …}}'


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character ranges that are trained on."""

    text: str
    spans: list[Span]
    masked: int
    """Assistant turns that cannot be trained on, for the template writes them otherwise when they come last."""
    where: str = ""
    """The row's, for an error line."""
    muted: int = 0
    """Assistant turns that have a weight of 0."""
    rewritten: tuple[int, ...] = ()
    """Of ``masked``, indices of those that are known."""


class Refusal(UserError):
    """The chat template refuses a conversation, or leaves out what is to be trained on."""


def render_whole(template: Template, row: Conversation) -> Rendered:
    """Render a conversation of which every token is trained on. Raises :class:`UserError` as the next does, and where
    the row has a message that it does not want trained on.
    """
    if row.muted:
        what = "has a message of weight 0, and with data.learn=all everything is trained on"
        raise UserError(row.where, what, "remove the weight, or use data.learn=assistant")
    text = _rendered(template, row)[1]
    return Rendered(text, [(0, len(text))], 0, row.where)


def _rendered(template: Template, row: Conversation) -> tuple[Conversation, str, list[Span]]:
    """The row with tool calls as the template takes them, its text, and the ranges that the template marks."""
    fitted = fit(row.messages, template.arguments, row.where)
    row = row if fitted is row.messages else replace(row, messages=fitted)
    try:
        with within(PATIENCE, _SLOW):
            return row, *render_marked(template, row.messages, row.tools)
    except REFUSALS as error:
        raise _refusal(template, row, error) from None


def render_conversation(
    template: Template, row: Conversation, roles: Collection[str] = ASSISTANT, mask_thinking: bool = False
) -> Rendered:
    """Render a conversation and find what is trained on: what messages of ``roles`` say, each through its end;
    with ``mask_thinking`` without what answers think.

    Raises :class:`UserError` where the template refuses it.
    """
    row, text, marks = _rendered(template, row)
    turns = [index for index, message in enumerate(row.messages) if message["role"] in roles and _says(message)]
    wanted = [index for index in turns if index not in row.muted]
    muted, answers = len(turns) - len(wanted), row.answers if "assistant" in roles else []
    write = partial(render, template, tools=row.tools)
    spans: dict[int, Span | None] = {}
    for index in wanted:
        if index not in answers:
            spans[index] = message_span(template, write, row.messages, text, index)
        elif not template.marked:
            spans[index] = _turn(template, row, text, index)
    ranges = [span for span in spans.values() if span is not None]
    rewritten = tuple(index for index, span in spans.items() if span is None)
    masked = len(rewritten)
    if template.marked and answers:
        ranges = sorted([*ranges, *_weighted(marks, answers, row)])
        masked += max(0, len(answers) - len(marks))
    if mask_thinking:
        thoughts = thinking_spans(write, row.messages, text)
        if thoughts is None:
            what = "the chat template writes thinking so that it cannot be told from the rest"
            raise Refusal(row.where, what, "use data.thinking=drop or keep, or another model.chat_template")
        ranges = cut(ranges, thoughts)
    return Rendered(text, ranges, masked, row.where, muted, rewritten)


def _says(message: Message) -> bool:
    """Whether there is anything to train on: an answer always ends, but nothing is said in an empty question."""
    return bool(message["role"] == "assistant" or message["content"].strip())


def render_split(
    template: Template, row: Conversation, roles: Collection[str] = ASSISTANT, mask_thinking: bool = False
) -> list[Rendered]:
    """The same, and each answer that cannot be trained on there in a rendering of its own, which ends with it."""
    whole = render_conversation(template, row, roles, mask_thinking)
    answers = set(row.answers[:-1] if row.answers[-1] == len(row.messages) - 1 else row.answers)
    parts = [_alone(template, row, index, mask_thinking) for index in whole.rewritten if index in answers]
    parts = [part for part in parts if part.spans]
    whole = replace(whole, masked=whole.masked - len(parts))
    return [whole, *parts] if whole.spans or not parts else parts


def _alone(template: Template, row: Conversation, index: int, mask_thinking: bool) -> Rendered:
    """The conversation through turn ``index``, which alone is trained on."""
    earlier = frozenset(row.answers) - {index}
    part = replace(row, messages=row.messages[: index + 1], muted=earlier)
    return replace(render_conversation(template, part, ASSISTANT, mask_thinking), masked=0, muted=0)


def _refusal(template: Template, row: Conversation, error: BaseException) -> Refusal:
    """Why the template does not take the row; names the system message where it takes the row without it."""
    what = f"the chat template refuses this conversation: {first_line(error)}"
    todo = "change the row, use data.refused_rows=merge or drop"
    if template.arguments is None and any(message.get("tool_calls") for message in row.messages):
        return Refusal(row.where, f"{what} (and it writes no tool calls)", "use another model.chat_template")
    calls = [call for message in row.messages for call in message.get("tool_calls", ())]
    if any("function" not in call for call in [*calls, *(row.tools or [])]):
        return Refusal(row.where, what, f"write each tool and tool call as OpenAI's API has them: {WRAPPED}")
    others = [message for message in row.messages if message["role"] not in ("system", "developer")]
    if len(others) < len(row.messages):
        try:
            with within(PATIENCE, _SLOW):
                render(template, others, row.tools)
            todo = "move the system message's text into the first user message (data.refused_rows=merge does)"
        except REFUSALS:
            pass
    return Refusal(row.where, what, f"{todo}, or use another model.chat_template")


def _weighted(marks: list[Span], turns: list[int], row: Conversation) -> list[Span]:
    """The marks of the turns that the row wants trained on."""
    if not row.muted:
        return marks
    if len(marks) != len(turns):
        what = f"gives an answer no weight, but the chat template marks {len(marks)} stretches of {len(turns)} answers"
        raise UserError(row.where, what, "use a model.chat_template with one {% generation %} for an answer")
    return [span for span, index in zip(marks, turns, strict=True) if index not in row.muted]


def _turn(template: Template, row: Conversation, text: str, index: int) -> Span | None:
    """Where turn ``index`` stands in ``text``; None where the template writes it otherwise when it comes last."""
    last = index == len(row.messages) - 1
    try:
        start = _start(template, row, text, index)
        through = text if last else render(template, row.messages[: index + 1], row.tools)
    except REFUSALS:
        return None
    closing = template.closing
    if not text.startswith(through):
        through, closing = through.removesuffix(template.tail), closing.removesuffix(template.tail)
    if start is None or not text.startswith(through):
        return None
    # The text through this turn, less what follows the answer, plus as much of that as is trained on: its end-of-turn
    # token, without the line break that templates put after it.
    if closing and through.endswith(closing):
        end = len(through) - len(closing) + min(template.trained, len(closing))
    else:  # a turn that ends otherwise, such as a tool call
        end = len(through.rstrip()) if closing else len(through)
    return (start, end) if end > start else None


def _start(template: Template, row: Conversation, text: str, index: int) -> int | None:
    """Where turn ``index`` begins in ``text``."""
    if any(message["role"] == "user" for message in row.messages[:index]):
        return _start_asked(template, row, text, index)
    try:
        start = _start_asked(template, row, text, index)
    except REFUSALS:
        start = None
    return _start_unasked(template, row, text, index) if start is None else start


def _start_asked(template: Template, row: Conversation, text: str, index: int) -> int | None:
    """Where turn ``index`` begins in ``text``: where the generation prompt after the messages before it ends."""
    earlier = row.messages[:index]
    asked = render(template, earlier, row.tools, prompt=True)
    if text.startswith(asked):
        return len(asked)
    bare = render(template, earlier, row.tools)
    bare = bare if asked.startswith(bare) else bare.removesuffix(template.tail)
    answered = render(template, [*earlier, {"role": "assistant", "content": ANSWER}], row.tools)
    if not (asked.startswith(bare) and answered.startswith(bare)):
        return None
    # The prompt and a finished answer agree so far, and no further: what the prompt has beyond it is its overhang.
    start = len(bare) + shared(asked[len(bare) :], answered[len(bare) :])
    known = asked[start:] == template.overhang or answered.startswith(ANSWER, start)
    return start if known and text.startswith(asked[:start]) else None


def _start_unasked(template: Template, row: Conversation, text: str, index: int) -> int | None:
    """Where an answer begins that no user's message comes before, for templates that write it otherwise without one.

    It is where the header of answers ends, as a question and the generation prompt show it. Another answer in its place
    must begin there, too. Raises any of ``REFUSALS``.
    """
    question = [{"role": "user", "content": QUESTION}]
    bare, asked = render(template, question, row.tools), render(template, question, row.tools, prompt=True)
    header = asked.removeprefix(bare)
    start = text.find(header) + len(header)
    answer: Message = {"role": "assistant", "content": ANSWER}
    other = render(template, [*row.messages[:index], answer, *row.messages[index + 1 :]], row.tools)
    known = header.strip() and header in text and other.startswith(text[:start]) and other.startswith(ANSWER, start)
    return start if known else None


def tokenize(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Document]:
    """Tokens and labels of conversations, each text taken whole and once; no special token beside the template's."""
    # A post-processor adds special tokens, which are not wanted here, and it may cut white space off a token's offsets
    # (ByteLevel's trim_offsets, as Llama 3 has it), which would leave an answer's leading blanks to the prompt.
    backend = tokenizer.backend_tokenizer
    processor, backend.post_processor = backend.post_processor, None
    try:
        encodings = encode_batch(tokenizer, [(text.where, text.text) for text in rendered], add_special_tokens=False)
    finally:
        backend.post_processor = processor
    return [_label(encoding, one) for encoding, one in zip(encodings, rendered, strict=True)]


def _label(encoding: Any, rendered: Rendered) -> Document:
    tokens = np.array(encoding.ids, np.uint32)  # [tokens]; labels the same, not shifted
    labels = np.full(len(tokens), IGNORED, np.int32)
    for span in rendered.spans:  # characters to tokens
        first, last = token_range(encoding, span, rendered.text)
        labels[first:last] = tokens[first:last]
    labels[:1] = IGNORED  # nothing predicts the first token
    return Document(tokens, labels, rendered.masked, rendered.muted)


def token_range(encoding: Any, span: Span, text: str) -> tuple[int, int]:
    """First and one past the last token that lie in the character range ``span`` of ``text``.

    A token that straddles an edge counts where what it has outside is white space: a prompt that ends in a space gives
    its space to the answer's first word. A tokenizer gives every piece of one character that character's range. So a
    token is taken to begin no later than where the one before it ends.
    """

    def start(token: int) -> int:
        before = encoding.token_to_chars(token - 1)[1] if token else 0
        return int(min(encoding.token_to_chars(token)[0], before))

    def end(token: int) -> int:
        return int(encoding.token_to_chars(token)[1])

    # Both ends grow with the token's number, so that two binary searches find the range among thousands of tokens.
    everything = range(len(encoding.ids))
    first = bisect.bisect_left(everything, span[0], key=start)
    last = max(first, bisect.bisect_right(everything, span[1], key=end))
    # White space at an edge, and a token that straddles it; it counts where all that it has outside is white space.
    at_start = text[span[0] - 1 : span[0]].isspace() and first > 0 and end(first - 1) > span[0]
    if at_start and text[start(first - 1) : span[0]].isspace():
        first -= 1
    at_end = text[span[1] : span[1] + 1].isspace() and first <= last < len(everything) and start(last) < span[1]
    if at_end and text[span[1] : end(last)].isspace():
        last += 1
    return first, last
