"""ShareGPT's conversations: ``conversations`` of ``from`` and ``value``.

Also what data sets and LLaMA-Factory made of it: turns of ``role`` and ``content``, ``conversation`` in the singular, a
system prompt in a column of its own, tool calls as JSON in a turn of ``function_call``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from galley.contract.errors import UserError
from galley.prepare.formats.calls import kind, parsed
from galley.prepare.formats.chat import conversation_format

SAMPLE = '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}'
ROLES = {
    **dict.fromkeys(("human", "user", "User", "Human"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "Assistant", "GPT"), "assistant"),
    **dict.fromkeys(("system", "System"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "function-response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "function-call", "tool_call"), "call"),
}
"""Who speaks, by the names that data sets have for them; ``call``: the assistant, who calls a tool."""


def to_messages(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record with ``messages``. Raises :class:`UserError` for a turn that is not understood."""
    name = _name(record)
    turns = parsed(where, f"`{name}`", record[name])
    if not isinstance(turns, list):
        raise _refusal(where, f"`{name}` is {kind(turns)}, not a list")
    messages = [_message(where, f"{name}[{index}]", turn) for index, turn in enumerate(turns)]
    return {"messages": messages, "system": record.get("system"), "tools": record.get("tools")}


def _name(columns: Collection[str]) -> str:
    return "conversations" if "conversations" in columns else "conversation"


def _message(where: str, name: str, turn: object) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise _refusal(where, f"{name} is {kind(turn)}, not an object")
    if turn.get("from") is None:
        return dict(turn)  # with role and content: checked like any other message
    role = ROLES.get(str(turn["from"]))
    if role is None:
        raise _refusal(where, f"{name} is from {str(turn['from'])[:60]!r}, not one of {', '.join(ROLES)}")
    value = turn.get("value")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if role == "call":
        return {**rest, "role": "assistant", "content": "", "tool_calls": _calls(where, f"{name}.value", value)}
    return {**rest, "role": role, "content": value}


def _calls(where: str, name: str, value: object) -> list[dict[str, Any]]:
    """The calls in a turn of ``function_call``: one object of ``name`` and ``arguments``, or a list of them."""
    calls = parsed(where, name, value)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        raise _refusal(where, f"{name} is no tool call", 'write {"name": "…", "arguments": {…}}')
    return [{"type": "function", "function": dict(call)} for call in calls]


def _refusal(where: str, what: str, todo: str | None = None) -> UserError:
    return UserError(where, f"not a ShareGPT conversation: {what}", todo or f"write rows such as {SAMPLE}")


SHAREGPT = conversation_format(
    name="sharegpt",
    sample=SAMPLE,
    columns=("conversations", "conversation", "system", "tools"),
    to_messages=to_messages,
)
