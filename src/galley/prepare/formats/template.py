"""A chat template, and what :func:`study` finds out about it by rendering small conversations.

- *overhang*: the end of the generation prompt that a finished answer lacks (``<think>\\n`` of DeepSeek-R1);
- *tail*: what only the end of a whole conversation gets (Phi-3 writes ``<|endoftext|>`` there);
- *closing*: what follows an answer; trained on through its first special tokens, without the line break after them;
- *arguments*: whether tool calls want their ``arguments`` as an object or as a JSON string.
"""

from __future__ import annotations

import itertools
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jinja2

from galley.contract.errors import UserError
from galley.prepare.formats.calls import Message
from galley.storage.limits import ends

Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
Arguments = Literal["object", "string"]

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
QUESTION = "Galley's probe asks."
ANSWER = "\ue000Galley's probe answers."  # begins with a character that no template writes by itself
KEY, VALUE = "galleykey", "galleyvalue"
# What a template may raise on messages that it was not written for: its own refusals, and Python's on its expressions.
PATIENCE = 5
"""Seconds that a template may take for a question and an answer: they take thousandths."""
REFUSALS = (
    jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError,
)  # fmt: skip
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
    overhang: str = ""
    """The end of the generation prompt that a finished answer lacks."""
    tail: str = ""
    """What only the end of a whole conversation gets."""
    closing: str = ""
    """What follows an assistant's answer, ``tail`` included."""
    trained: int = 0
    """Characters of ``closing`` that are trained on."""
    end_of_turn: str | None = None
    """The special token that ends a turn; None where there is none, so that the model cannot learn to stop."""
    end_is_marked: bool = True
    """Whether a marked answer holds ``end_of_turn``."""
    parts: bool = False
    """It writes content only as a list of parts, as templates for pictures do (SmolVLM, LLaVA-NeXT)."""
    arguments: Arguments | None = None
    """How it wants a tool call's arguments; None: it writes neither form as it should."""


def render(template: Template, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> str:
    """What the template writes; with ``prompt`` also the beginning of the next answer. Raises any of ``REFUSALS``."""
    return render_marked(template, messages, tools, prompt)[0]


def render_marked(
    template: Template, messages: Sequence[Message], tools: Tools = None, prompt: bool = False
) -> tuple[str, list[Span]]:
    """The text, and the character ranges that the template marks as the assistant's. Raises any of ``REFUSALS``."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [_in_parts(messages) if template.parts else list(messages)],
        tools=tools,
        chat_template=template.text,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=template.marked,
        **template.variables,
    )
    return texts[0], [(start, end) for start, end in spans[0]] if template.marked else []


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def study(tokenizer: Any, text: str) -> Template:
    """Find out how the template writes an assistant turn, by rendering a conversation of one answer, and of two.

    Raises :class:`UserError` where it cannot render a question and an answer.
    """
    text = FROZEN_DATE + text if "strftime_now" in text else text
    template = Template(text, dict(tokenizer.special_tokens_map), bool(GENERATION.search(text)))
    question: Message = {"role": "user", "content": QUESTION}
    answer: Message = {"role": "assistant", "content": ANSWER}
    if not ends(lambda: _tried(template, [question, answer]), PATIENCE):
        what = f"takes more than {PATIENCE} s, or all memory, for a question and an answer"
        raise UserError("model.chat_template", what, "use one that ends")
    in_parts = replace(template, parts=True)
    if not _writes(template, [question, answer]) and _writes(in_parts, [question, answer]):
        template = in_parts
    try:
        asked = render(template, [question], prompt=True)
        one, spans = render_marked(template, [question, answer])
        two = render(template, [question, answer, question, answer])
    except REFUSALS as error:
        what = f"fails on a question and an answer ({first_line(error)})"
        raise UserError("model.chat_template", what, "fix it") from None
    if ANSWER not in one:
        raise UserError("model.chat_template", "leaves out what the assistant says", "use one that writes it")
    end = one.index(ANSWER) + len(ANSWER)
    specials = _specials(tokenizer, one, end)
    tail = _tail(one, two, end, [start for start, _ in specials])
    run = _run(specials, len(one) - len(tail))
    trained = run[-1][1] if run else len(one[end:].rstrip()) + end
    return replace(
        template,
        overhang=asked[shared(asked, one) :],
        tail=tail,
        closing=one[end:],
        trained=trained - end,
        end_of_turn=one[slice(*run[-1])] if run else None,
        end_is_marked=not (template.marked and run) or any(start < trained <= stop for start, stop in spans),
        arguments=wanted_arguments(template),
    )


def _writes(template: Template, messages: list[Message]) -> bool:
    """Whether the answer among ``messages`` reaches the text."""
    try:
        return ANSWER in render(template, messages)
    except REFUSALS:
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to what fits into an error line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def shared(one: str, two: str) -> int:
    """Characters that both begin with."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, one, two)))


def _specials(tokenizer: Any, text: str, start: int) -> list[Span]:
    """Character ranges of the added tokens in ``text`` from ``start`` on."""
    added = set(tokenizer.added_tokens_decoder)
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    return [span for token, span in pairs if token in added and span[0] >= start and text[slice(*span)].strip()]


def _run(specials: list[Span], limit: int) -> list[Span]:
    """The first special token, and those that follow it at once and end by ``limit`` (Cohere 2 ends turns with two)."""
    run = specials[:1]
    for span in specials[1:]:
        if span[0] != run[-1][1] or span[1] > limit:
            break
        run.append(span)
    return run


def _tail(one: str, two: str, end: int, starts: list[int]) -> str:
    """What ``one`` has at its end and ``two``, which goes on, has only at its own end; cut between special tokens."""
    parted = shared(one, two)
    if parted == len(one) or parted < end:
        return ""
    cut = max((start for start in starts if start <= parted), default=parted)
    return one[cut:] if two.endswith(one[cut:]) else ""


def wanted_arguments(template: Template) -> Arguments | None:
    """The form of ``arguments`` that the template writes as data, once: found out by rendering a call in both.

    OpenAI's API gives them as a JSON string, which templates that write JSON themselves encode a second time; others
    put the string into the text as it is, and write an object as Python does, or fail on it.
    """
    arguments = {KEY: VALUE}
    forms: dict[Arguments, Any] = {"object": arguments, "string": json.dumps(arguments)}
    for form, value in forms.items():
        text = _called(template, value)
        if KEY in text and VALUE in text and f'\\"{KEY}' not in text and f"'{KEY}'" not in text:
            return form
    return None


def _tried(template: Template, messages: list[Message]) -> None:
    """Render what :func:`study` will, in a process that may be ended."""
    conversations = ((messages, None), *_conversations({}), *_conversations("{}"))
    for (conversation, tools), prompt, parts in itertools.product(conversations, (False, True), (False, True)):
        try:
            render(replace(template, parts=parts), conversation, tools, prompt)
        except MemoryError:
            raise
        except REFUSALS:
            continue


def _called(template: Template, arguments: Any) -> str:
    """A conversation with a tool call, in the first shape that the template takes; empty where it takes none."""
    for messages, tools in _conversations(arguments):
        try:
            return render(template, messages, tools)
        except REFUSALS:
            continue
    return ""


def _conversations(arguments: Any) -> list[tuple[list[Message], Tools]]:
    """Conversations with a tool call, and the tools beside them, in the shapes that templates take."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "probe", "arguments": arguments}}
    schema = {"type": "object", "properties": {"city": {"type": "string", "description": "d"}}}
    tool = {"type": "function", "function": {"name": "probe", "description": "d", "parameters": schema}}
    asked: Message = {"role": "user", "content": QUESTION}
    calls: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
    result: Message = {"role": "tool", "name": "probe", "tool_call_id": "abcdefghi", "content": "12"}
    whole = [asked, calls, result, {"role": "assistant", "content": ANSWER}]
    return list(itertools.product((whole, whole[:2]), ([tool], None)))
