"""What of a row reaches the text, and where: found out by planting words in everything that its messages hold.

A template may leave out a key without a word (tool calls, reasoning, names), and the model is then taught an answer
without it; or it may write a tool's result where the answer is looked for. So one row of every shape is rendered with
planted words. A shape is what templates decide by: the role and keys of a message, the roles beside it, and whether a
user speaks after it. Rows whose shapes are known cost a dictionary look-up a message.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from galley.contract.errors import UserError
from galley.prepare.formats.calls import Message
from galley.prepare.formats.conversations import Conversation
from galley.prepare.formats.rendering import Refusal, Rendered, render_conversation
from galley.prepare.formats.template import Template
from galley.prepare.formats.thinking import REASONING

Shape = tuple[Any, ...]

WORD = re.compile(r"plant(\d{5})x", re.IGNORECASE)
LEFT_OUT = "left out by the chat template"
UNCHECKED = "rows of a shape that could not be checked for what the chat template leaves out"
# Keys that tie messages together, and are not meant to be read.
LINKS = frozenset({"role", "id", "tool_call_id", "type", "index"})


# Keys of a tool's description that get words planted; the rest stays as it is, for templates read it.
TOOL = frozenset({"name", "description"})
THOUGHT = "</think>"


@dataclass
class Coverage:
    """What is known of the shapes that came by; one for each file or data set."""

    template: Template
    lost: dict[Shape, tuple[str, ...]] = field(default_factory=dict)
    """Of each shape, the names of what the template leaves out."""
    counts: Counter[str] = field(default_factory=Counter)
    """How often something was left out, by name."""


@dataclass(frozen=True)
class Plant:
    """A planted word: whose it is, and what it stands for."""

    message: int
    """Index of the message; -1: the row's tools."""
    name: str
    """The key, with the role of its message."""
    key: str


def check_coverage(coverage: Coverage, row: Conversation) -> None:
    """Count what of ``row`` the template leaves out.

    Raises :class:`UserError` where it leaves out what the assistant says or calls, or writes something of others inside
    an answer.
    """
    shapes = _shapes(row)
    if any(shape not in coverage.lost for shape in shapes):
        lost = _probe(coverage.template, row)
        for index, shape in enumerate(shapes, -1):
            coverage.lost.setdefault(shape, lost.get(index, ()))
    for shape in shapes:
        if lost_here := coverage.lost[shape]:
            coverage.counts.update(lost_here)


def _shapes(row: Conversation) -> list[Shape]:
    """The shape of the row's tools, then of each message."""
    roles = ["", *[message["role"] for message in row.messages], ""]
    late = len(roles) - 1 - roles[::-1].index("user") if "user" in roles else 0  # of the last user, in `roles`
    shapes: list[Shape] = [(roles[1], *(tuple(tool.get("function", tool)) for tool in (row.tools or [])[:1]))]
    tooled = bool(row.tools)
    for index, message in enumerate(row.messages, 1):
        content, more = message["content"], None
        if len(message) > 2:
            more = (tuple(message), min(len(message.get("tool_calls", ())), 2))
        thought = roles[index] == "assistant" and THOUGHT in content
        beside = (roles[index - 1], roles[index], roles[index + 1])
        shapes.append((beside, content != "", thought, more, tooled, index > late))
    return shapes


def _probe(template: Template, row: Conversation) -> dict[int, tuple[str, ...]]:
    """Index of each message (-1: tools) to the names of what is left out of it."""
    plants: list[Plant] = []
    messages = [_planted(index, message, plants) for index, message in enumerate(row.messages)]
    tools = [_plant(-1, f"`tools` of rows {LEFT_OUT}", "tools", tool, plants, TOOL) for tool in row.tools or []]
    try:
        rendered = render_conversation(
            template, replace(row, messages=messages, tools=tools or None, muted=frozenset())
        )
    except UserError:  # the words themselves are refused: at least the row is not
        render_conversation(template, row)
        return {-1: (UNCHECKED,)}
    offsets: dict[int, list[int]] = {}  # number of the plant to where its word stands in the text
    for match in WORD.finditer(rendered.text):
        offsets.setdefault(int(match[1]), []).append(match.start())
    _check_answers(template, row, plants, offsets)
    _check_spans(row, plants, offsets, rendered)
    lost: dict[int, tuple[str, ...]] = {}
    for name, group in _grouped(plants).items():
        if not any(number in offsets for number, _ in group):
            message = group[0][1].message
            lost[message] = (*lost.get(message, ()), name[1])
    for index, key in _wordless(row.messages, messages):
        less = [*messages]
        less[index] = {other: value for other, value in messages[index].items() if other != key}
        if _writes_the_same(template, replace(row, messages=less, tools=tools or None), rendered.text):
            lost[index] = (*lost.get(index, ()), f"`{key}` of {messages[index]['role']} messages {LEFT_OUT}")
    return lost


def _wordless(messages: list[Message], planted: list[Message]) -> list[tuple[int, str]]:
    """Index and key of what holds no text to plant words in, such as numbers and truth values."""
    return [
        (index, key)
        for index, message in enumerate(messages)
        for key, value in message.items()
        if key not in LINKS and key not in ("content", "tool_calls") and value != "" and planted[index][key] == value
    ]


def _writes_the_same(template: Template, row: Conversation, text: str) -> bool:
    try:
        return render_conversation(template, replace(row, muted=frozenset())).text == text
    except UserError:
        return False


def _planted(index: int, message: Message, plants: list[Plant]) -> Message:
    """The message with words for what it says."""
    role = message["role"]
    planted = {}
    for key, value in message.items():
        name = f"`{key}` of {role} messages {LEFT_OUT}"
        if key in LINKS or not value:
            planted[key] = value
        elif key == "tool_calls":
            planted[key] = [_planted_call(index, call, plants) for call in value]
        elif key == "content" and role == "assistant" and THOUGHT in value:
            thought = _word(Plant(index, f"thinking in {name}", THOUGHT), plants)
            planted[key] = f"<think>\n{thought}\n{THOUGHT}\n\n{_word(Plant(index, name, key), plants)}"
        else:
            planted[key] = _plant(index, name, key, value, plants, None)
    return planted


def _planted_call(index: int, call: dict[str, Any], plants: list[Plant]) -> dict[str, Any]:
    function = dict(call.get("function", call))
    if "name" in function:
        function["name"] = _word(Plant(index, "`tool_calls`", "name"), plants)
    if "arguments" in function:
        key, value = (_word(Plant(index, "`tool_calls`", "arguments"), plants) for _ in range(2))
        function["arguments"] = {key: value}
    return {**call, "function": function} if "function" in call else function


def _plant(index: int, name: str, key: str, value: Any, plants: list[Plant], only: frozenset[str] | None) -> Any:
    """``value`` with a word for each string in it; of objects, where ``only`` is given, for those under such keys."""
    if isinstance(value, str):
        return _word(Plant(index, name, key), plants)
    if isinstance(value, Mapping):
        return {
            inner: item
            if isinstance(item, str) and (inner in LINKS or (only and inner not in only))
            else _plant(index, name, key, item, plants, only)
            for inner, item in value.items()
        }
    if isinstance(value, list):
        return [_plant(index, name, key, item, plants, only) if not isinstance(item, str) else item for item in value]
    return value


def _word(plant: Plant, plants: list[Plant]) -> str:
    plants.append(plant)
    return f"plant{len(plants) - 1:05d}x"


def _grouped(plants: list[Plant]) -> dict[tuple[int, str], list[tuple[int, Plant]]]:
    """Numbered plants by message and name; the names of one reasoning are one group."""
    groups: dict[tuple[int, str], list[tuple[int, Plant]]] = {}
    first: dict[int, str] = {}
    for number, plant in enumerate(plants):
        name = first.setdefault(plant.message, plant.name) if plant.key in REASONING else plant.name
        groups.setdefault((plant.message, name), []).append((number, plant))
    return groups


def _check_answers(
    template: Template, row: Conversation, plants: list[Plant], offsets: Mapping[int, list[int]]
) -> None:
    """Refuse an answer that is written without a tool call of it, or without anything of it."""
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        of_it = [(number, plant) for number, plant in enumerate(plants) if plant.message == index]
        calls = [number for number, plant in of_it if plant.name == "`tool_calls`"]
        if any(number not in offsets for number in calls):
            raise _left_out(row, "`tool_calls`", f"messages[{index}]")
        if of_it and not any(number in offsets for number, _ in of_it):
            names = ", ".join(dict.fromkeys(f"`{plant.key}`" for _, plant in of_it))
            raise _left_out(row, names, f"messages[{index}]")
        if calls and template.arguments is None:
            what = "the chat template writes tool calls' arguments neither from an object nor from a string as JSON"
            raise Refusal(row.where, what, "use another model.chat_template")


def _left_out(row: Conversation, names: str, message: str) -> Refusal:
    what = f"the chat template leaves out {names} of {message}, so the answer would be taught without"
    return Refusal(row.where, what, "use a model.chat_template that writes them, or leave such rows out")


def _check_spans(row: Conversation, plants: list[Plant], offsets: Mapping[int, list[int]], rendered: Rendered) -> None:
    """Refuse a template that writes what others say inside what is trained on."""
    for number, plant in enumerate(plants):
        if plant.message >= 0 and row.messages[plant.message]["role"] == "assistant":
            continue
        if plant.key not in ("content", "tools"):
            continue
        if any(start <= offset < end for offset in offsets.get(number, ()) for start, end in rendered.spans):
            what = f"the chat template writes {plant.name.removesuffix(LEFT_OUT)}inside an answer, which is trained on"
            raise Refusal(row.where, what, "use another model.chat_template")
