"""From conversation to tokens and labels: what the model's chat template writes, and which of it is learnt.

Learnt is each assistant turn as rendered, through its end-of-turn token, and nothing else. Where a template marks its
turns with ``{% generation %}`` the marks are used. Otherwise a turn is found by rendering prefixes of the
conversation: it begins where ``messages[:i]`` with the generation prompt ends, and ends where ``messages[:i + 1]``
ends. Both must be prefixes of the whole rendering, or the template writes the turn otherwise once the conversation
goes on (Qwen3 drops earlier thinking): such a turn is masked and counted. Three things that templates do are allowed
for, each found once by rendering a small conversation:

- *overhang*: characters of the generation prompt that the finished turn lacks (DeepSeek-R1's ends in ``<think>\\n``,
  which its history does not show); the turn then begins where the two part;
- *tail*: what only the end of a whole conversation gets (Phi-3 writes ``<|endoftext|>`` there);
- *closing*: what follows an answer; learnt up to its first special token, without the line break after it.
"""

from __future__ import annotations

import bisect
import itertools
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
import numpy as np

from galley.data import I32, IGNORED, U32
from galley.errors import UserError
from galley.rows import Message, Row

Tools = list[dict[str, Any]] | None
Span = tuple[int, int]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ANSWER = "Galley's probe answers."
# What a template may raise on messages that it was not written for: its own refusals, and Python's on its expressions.
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError)
# Templates that print today's date (Llama 3.1) would make the same task give other data tomorrow.
FROZEN_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{- format|replace('%d', '26')|replace('%b', 'Jul')|replace('%B', 'July')|replace('%m', '07')"
    "|replace('%Y', '2024')|replace('%y', '24')|replace('%A', 'Friday')|replace('%a', 'Fri') -}}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class Template:
    """A chat template and what :func:`study` found out about it."""

    text: str
    variables: dict[str, Any]
    """``bos_token``, ``eos_token`` and so on, as the tokenizer gives them to templates."""
    marked: bool = False
    """It marks assistant turns itself."""
    overhang: int = 0
    """Characters at the end of the generation prompt that a finished turn lacks."""
    tail: str = ""
    """What only the end of a whole conversation gets."""
    closing: str = ""
    """What follows an assistant's answer, ``tail`` included."""
    learnt: int = 0
    """Characters of ``closing`` that are learnt."""
    end_of_turn: str | None = None
    """The special token that ends a turn; None where there is none, so that the model cannot learn to stop."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the character ranges that are learnt."""

    text: str
    spans: list[Span]
    masked: int
    """Assistant turns that are not learnt."""


@dataclass(frozen=True)
class Document:
    """A conversation as tokens, both [tokens]; labels are not shifted."""

    tokens: U32
    labels: I32


def render(template: Template, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> str:
    """What the template writes; with ``prompt`` also the beginning of the next answer. Raises any of ``REFUSALS``."""
    return _render(template, messages, tools, prompt)[0]


def _render(template: Template, messages: Sequence[Message], tools: Tools, prompt: bool) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [list(messages)],
        tools=tools,
        chat_template=template.text,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=template.marked,
        **template.variables,
    )
    return texts[0], [(start, end) for start, end in spans[0]] if template.marked else []


def study(tokenizer: Any, text: str) -> Template:
    """Find out how the template writes an assistant turn, by rendering a conversation of one answer, and of two.

    Raises :class:`UserError` where it cannot render a question and an answer.
    """
    text = FROZEN_DATE + text if "strftime_now" in text else text
    template = Template(text, dict(tokenizer.special_tokens_map), bool(GENERATION.search(text)))
    question: Message = {"role": "user", "content": "Galley's probe asks."}
    answer: Message = {"role": "assistant", "content": ANSWER}
    try:
        asked = render(template, [question], prompt=True)
        one = render(template, [question, answer])
        two = render(template, [question, answer, question, answer])
    except REFUSALS as error:
        raise UserError("model.chat_template", f"fails on a question and an answer ({error})", "mend it") from None
    if ANSWER not in one:
        raise UserError("model.chat_template", "leaves out what the assistant says", "use one that writes it")
    end = one.index(ANSWER) + len(ANSWER)
    specials = _specials(tokenizer, one, end)
    first = specials[0] if specials else (end, len(one[end:].rstrip()) + end)
    overhang = len(asked) - shared(asked, one[: end - len(ANSWER)])
    return replace(
        template,
        overhang=overhang,
        tail=_tail(one, two, end, [start for start, _ in specials]),
        closing=one[end:],
        learnt=first[1] - end,
        end_of_turn=one[slice(*first)] if specials else None,
    )


def shared(one: str, two: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, one, two)))


def _specials(tokenizer: Any, text: str, start: int) -> list[Span]:
    """Character ranges of the added tokens in ``text`` from ``start`` on."""
    added = set(tokenizer.added_tokens_decoder)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    return [span for token, span in pairs if token in added and span[0] >= start and text[slice(*span)].strip()]


def _tail(one: str, two: str, end: int, starts: list[int]) -> str:
    """What ``one`` has at its end and ``two``, which goes on, has only at its own end; cut between special tokens."""
    parted = shared(one, two)
    if parted == len(one) or parted < end:
        return ""
    cut = max((start for start in starts if start <= parted), default=parted)
    return one[cut:] if two.endswith(one[cut:]) else ""


def mark(template: Template, row: Row) -> Rendered:
    """Render a conversation and find what is learnt. Raises :class:`UserError` where the template refuses it."""
    try:
        text, spans = _render(template, row.messages, row.tools, prompt=False)
    except REFUSALS as error:
        what = f"the chat template refuses this conversation: {error}"
        raise UserError(row.where, what, "change the row, or say another model.chat_template") from None
    turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
    if template.marked:
        return Rendered(text, spans, max(0, len(turns) - len(spans)))
    found = [_turn(template, row, text, index) for index in turns]
    spans = [span for span in found if span is not None]
    return Rendered(text, spans, len(turns) - len(spans))


def _turn(template: Template, row: Row, text: str, index: int) -> Span | None:
    """Where turn ``index`` stands in ``text``; None where the template writes it otherwise when it comes last."""
    last = index == len(row.messages) - 1
    try:
        before = render(template, row.messages[:index], row.tools, prompt=True)
        through = text if last else render(template, row.messages[: index + 1], row.tools)
    except REFUSALS:
        return None
    before = before[: len(before) - template.overhang]
    closing = template.closing
    if not text.startswith(through):
        through, closing = through.removesuffix(template.tail), closing.removesuffix(template.tail)
    if not (text.startswith(through) and through.startswith(before)):
        return None
    if closing and through.endswith(closing):
        end = len(through) - len(closing) + min(template.learnt, len(closing))
    else:  # a turn that ends otherwise, such as a tool call
        end = len(through.rstrip())
    return (len(before), end) if end > len(before) else None


def tokenize(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Document]:
    """Tokens and labels of conversations, each text taken whole and once; no special token beside the template's."""
    encodings = tokenizer.backend_tokenizer.encode_batch([each.text for each in rendered], add_special_tokens=False)
    return [_label(encoding, each.spans) for encoding, each in zip(encodings, rendered, strict=True)]


def _label(encoding: Any, spans: list[Span]) -> Document:
    tokens = np.array(encoding.ids, np.uint32)
    labels = np.full(len(tokens), IGNORED, np.int32)
    for span in spans:
        first, last = token_range(encoding, span)
        labels[first:last] = tokens[first:last]
    labels[:1] = IGNORED  # nothing predicts the first token
    return Document(tokens, labels)


def token_range(encoding: Any, span: Span) -> tuple[int, int]:
    """First and one past the last token that lie wholly in the character range ``span``.

    A tokenizer may report offsets without the white space that a token begins with, and gives every piece of one
    character that character's range. So a token is taken to begin no later than where the one before it ends.
    """

    def start(token: int) -> int:
        before = encoding.token_to_chars(token - 1)[1] if token else 0
        return int(min(encoding.token_to_chars(token)[0], before))

    def end(token: int) -> int:
        return int(encoding.token_to_chars(token)[1])

    everything = range(len(encoding.ids))
    first = bisect.bisect_left(everything, span[0], key=start)
    return first, max(first, bisect.bisect_right(everything, span[1], key=end))
