"""A conversation read from a record: messages, tools and weights, checked and brought into one shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from galley.contract.errors import UserError
from galley.contract.row_formats import SAMPLE, advice, filled, is_of, null_column, other_format, recognised
from galley.prepare.formats.base import keys_of
from galley.prepare.formats.calls import Message, kind, parsed, read_calls, read_tools, without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")
NOT_TRAINED = (
    "messages of others than the assistant have a weight, and are trained on only where data.learn names their role"
)
WEIGHTS = frozenset({"weight", "train", "loss"})
EMPTY = "answers hold nothing, so the model is trained to end its turn at once"
BLANK = "messages of the user hold nothing"
UNASKED = "conversations begin with an answer that nobody asked for, which is trained on like the others"
UNANSWERED = "conversations end with a message that is not answered, of which nothing is trained on"
READ = frozenset({"messages", "tools", "system"})
NULLS = "nulls in tools and tool calls left out, for Arrow pads with them (give a JSON string to keep a null)"


@dataclass(frozen=True)
class Conversation:
    """One row."""

    where: str
    messages: list[Message]
    """At least one of them the assistant's; none where the row is dropped, for which ``notes`` has the reason."""
    tools: list[dict[str, Any]] | None
    """Tools the assistant could call, as the template takes them."""
    muted: frozenset[int] = frozenset()
    """Messages of the assistant's and others' that are not to be trained on: they have a weight of 0, or are given as
    part of a prompt."""
    given: frozenset[int] = frozenset()
    """Of ``muted`` those that are part of a prompt, and are trained on where everything is."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What was passed over, and how often."""

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]


def nothing(where: str, reason: str) -> Conversation:
    """A row that is dropped, for a reason."""
    return Conversation(where, [], None, notes={reason: 1})


def parse(record: object, where: str, prompt: int = 0) -> Conversation:
    """The conversation of a record. Raises :class:`UserError` where it is none.

    ``prompt``: how many of the first messages are a prompt, whose answers were given and are not trained on.
    """
    if not isinstance(record, dict | Mapping):
        raise _not_a_conversation(where, f"{kind(record)}, not an object")
    messages = record.get("messages")
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # as a table's cell has it
        messages = parsed(where, "`messages`", messages)
    if messages is None:
        if reason := dropped("chat", record, where):
            return nothing(where, reason)
        raise _not_a_conversation(where, f"no `messages`, only {keys_of(record)}", advice(record))
    if not isinstance(messages, list) or not messages:
        raise _not_a_conversation(where, f"`messages` is {kind(messages)}")
    before, messages = len(messages), with_system(messages, record.get("system"), where)
    prompt += len(messages) - before if prompt else 0
    read = [_message(where, number, message) for number, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message, _, _ in read):
        raise _not_a_conversation(where, "no message has the role assistant, so there is nothing to train on")
    tools, nulls = read_tools(where, record.get("tools"))
    nulls += sum(count for _, _, count in read)
    muted = frozenset(number for number, (_, weight, _) in enumerate(read) if weight == 0)
    given = frozenset(number for number in range(prompt) if read[number][0]["role"] == "assistant") - muted
    others = sum(1 for message, weight, _ in read if weight and message["role"] != "assistant")
    empty = sum(1 for message, weight, _ in read[prompt:] if weight != 0 and _is_empty(message))
    blank = sum(1 for message, _, _ in read if message["role"] == "user" and not message["content"].strip())
    roles = [message["role"] for message, _, _ in read if message["role"] not in ("system", "developer")]
    first, last = roles[0] == "assistant", roles[-1] != "assistant"
    counts = {NULLS: nulls, NOT_TRAINED: others, EMPTY: empty, BLANK: blank, UNASKED: int(first), UNANSWERED: int(last)}
    notes = {what: count for what, count in counts.items() if count}
    if len(record) > 1 and (unread := [key for key in record if key not in READ and record[key] is not None]):
        notes |= {f"rows have a key `{key!s:.60}` beside `messages`, which is not read": 1 for key in unread}
    return Conversation(where, [message for message, _, _ in read], tools, muted | given, given, notes)


def dropped(form: str, record: Mapping[str, Any], where: str) -> str | None:
    """Why a row that lacks what the format ``form`` needs is dropped: it is null. None where it is not.

    Raises :class:`UserError` where what it has is of another format.
    """
    null = null_column(form, record)
    other = other_format(form, record) if null else recognised(filled(record))
    if other not in (None, form) and (null or not is_of(form, record)):
        todo = f"put rows of each format into a file of their own, or use data.format={other} where all are such"
        raise UserError(where, f"is a row of the format {other}, not of {form}", todo)
    return f"rows dropped, for their `{null}` is null" if null else None


def _is_empty(message: Message) -> bool:
    """Whether it is an answer without a text, a tool call or anything else."""
    return message["role"] == "assistant" and len(message) == 2 and not message["content"].strip()


def with_system(messages: list[Any], system: object, where: str) -> list[Any]:
    """``messages`` after the system prompt of a column of its own, unless they begin with one; an empty one is none."""
    first = messages[0] if messages else None
    begun = isinstance(first, Mapping) and first.get("role") in ("system", "developer")
    if system is None or system == "" or begun:
        return messages
    if not isinstance(system, str):
        raise _not_a_conversation(where, f"`system` is {kind(system)}, not a string")
    return [{"role": "system", "content": system}, *messages]


def only_column(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> str | None:
    """Which of the columns ``names``, that all could mean the same, the record has; None for none.

    Raises :class:`UserError` where several are filled, and not alike.
    """
    there = [name for name in names if record.get(name) is not None]
    filled = [name for name in there if record[name] not in ("", [])]
    if any(record[name] != record[filled[0]] for name in filled[1:]):
        shown = " and ".join(f"`{name}`" for name in filled)
        todo = f"name the one: data.columns.{names[0]}={filled[0]}"
        raise UserError(where, f"has {shown}, of which only one can be read", todo)
    return next(iter([*filled, *there]), None)


def system_of(record: Mapping[str, Any]) -> object:
    """The system prompt in a column of its own; OpenOrca calls it ``system_prompt``."""
    return record.get("system") or record.get("system_prompt")


def text_of(record: Mapping[str, Any], names: tuple[str, ...], where: str, sample: str) -> str:
    """The text in the first of the columns ``names`` that the record has. Raises :class:`UserError` for none."""
    name = only_column(record, names, where) or names[0]
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(where, f"`{name}` is {kind(value)}, not a string", f"write rows such as {sample}")
    return value


def _message(where: str, number: int, value: object) -> tuple[Message, int | None, int]:
    """A checked message without its weight, the weight (0 or 1; None: not given), and the nulls left out.

    Absent and null are the same, as transformers has it for chat templates.
    """
    name = f"messages[{number}]"
    if not isinstance(value, dict | Mapping):
        raise _not_a_conversation(where, f"{name} is {kind(value)}, not an object")
    message = {key: item for key, item in value.items() if item is not None and key not in WEIGHTS}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise _not_a_conversation(where, f"{name} has role {repr(role)[:60]}, not one of {', '.join(ROLES)}")
    if isinstance(content, list) and content:
        content = message["content"] = _joined(where, name, content)
    if not isinstance(content, str | None):
        raise _not_a_conversation(where, f"{name} has content that is {kind(content)}, not a string")
    nulls = _clean(where, name, message)
    if content is None and not message.get("tool_calls"):
        raise _not_a_conversation(where, f"{name} has no content")
    return {**message, "content": content or ""}, _weight(where, name, value), nulls


def _joined(where: str, name: str, parts: list[Any]) -> str:
    """Content in parts, as OpenAI's API has it, as one string."""
    for part in parts:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            shown = part.get("type") if isinstance(part, Mapping) else kind(part)
            what = f"{name} has content with a part that is not text: {repr(shown)[:60]}"
            raise _not_a_conversation(where, what, "give text only, such as " + SAMPLE)
    return "".join(part["text"] for part in parts)


def _clean(where: str, name: str, message: Message) -> int:
    """Bring tool calls and other nested values of ``message`` into shape, in place; the nulls left out."""
    total = 0
    for key in [key for key, value in message.items() if type(value) is not str or key == "tool_calls"]:
        value = message[key]
        if key == "tool_calls":
            message[key], nulls = read_calls(where, name, value)
        elif isinstance(value, Mapping | list):
            message[key], nulls = without_nulls(where, f"{name}.{key}", value)
        else:
            continue
        total += nulls
        if not message[key]:
            del message[key]
    return total


def _weight(where: str, name: str, value: Mapping[str, Any]) -> int | None:
    """What ``weight``, ``train`` or ``loss`` say: 0 or 1; None where there is none."""
    if WEIGHTS.isdisjoint(value):
        return None
    given = {key: value[key] for key in ("weight", "train", "loss") if value.get(key) is not None}
    for key, weight in given.items():
        if not isinstance(weight, bool | int | float) or weight not in (0, 1):
            what = f"{name} has {key} {repr(weight)[:60]}, which is not understood"
            raise UserError(where, what, "use 1 or true to train on the message, 0 or false not to")
    if len({int(weight) for weight in given.values()}) > 1:
        shown = ", ".join(f"{key} {weight!r}" for key, weight in given.items())
        raise UserError(where, f"{name} has {shown}, which contradict each other", "give one of them")
    return next((int(weight) for weight in given.values()), None)


def _not_a_conversation(where: str, what: str, todo: str | None = None) -> UserError:
    return UserError(where, f"not a conversation: {what}", todo or f"write rows such as {SAMPLE}")
