"""Tools and tool calls: from the forms that rows have them in to the one that the chat template renders correctly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from galley.contract.errors import UserError

DEEPEST = 64
SCALARS = (str, int, float, bool)
Message = dict[str, Any]
"""``role``, ``content`` and what else a chat template reads of a message."""


def parsed(where: str, name: str, value: object) -> Any:
    """``value``; of a string, the JSON value in it, None for an empty one. Raises :class:`UserError` for other text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(where, f"{name} is a string, but not of JSON: {value[:60]!r}", "write it as JSON") from None


def without_nulls(where: str, name: str, value: Any) -> tuple[Any, int]:
    """``value`` without the null entries of its objects, at any depth, and how many there were.

    Arrow gives every object of a column the keys of all of them, with nulls for those that one lacks. Raises
    :class:`UserError` where it nests deeper than ``DEEPEST``.
    """
    nulls = [0]
    try:
        return _pruned(value, DEEPEST, nulls), nulls[0]
    except RecursionError:
        raise UserError(where, f"{name} nests more than {DEEPEST} levels deep", "make it flatter") from None


def _pruned(value: Any, levels: int, nulls: list[int]) -> Any:
    if levels < 0:
        raise RecursionError
    if isinstance(value, dict | Mapping):
        nulls[0] += sum(1 for item in value.values() if item is None)
        return {
            key: item if type(item) in SCALARS else _pruned(item, levels - 1, nulls)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, list | tuple):
        return [item if type(item) in SCALARS else _pruned(item, levels - 1, nulls) for item in value]
    return value


def read_tools(where: str, value: object) -> tuple[list[dict[str, Any]] | None, int]:
    """A row's tools as a list of objects (None: it has none), and the nulls left out."""
    tools = parsed(where, "`tools`", value)
    if tools is None or tools == []:
        return None, 0
    if not isinstance(tools, list):
        raise _no_list(where, "`tools`", tools)
    tools = [parsed(where, f"tools[{number}]", tool) for number, tool in enumerate(tools)]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise _no_list(where, "`tools`", tools)
    pruned, nulls = without_nulls(where, "`tools`", tools)
    return (tools, 0) if isinstance(value, str) else (pruned, nulls)  # nobody pads a string: its nulls are meant


def read_calls(where: str, name: str, value: object) -> tuple[list[dict[str, Any]], int]:
    """A message's tool calls as a list of objects, and the nulls left out; arguments stay in the form they have."""
    calls = parsed(where, f"{name}.tool_calls", value)
    if calls is None:
        return [], 0
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise _no_list(where, f"{name}.tool_calls", calls)
    pruned, nulls = without_nulls(where, f"{name}.tool_calls", calls)
    return (calls, 0) if isinstance(value, str) else (pruned, nulls)


def _no_list(where: str, name: str, value: object) -> UserError:
    shape = "a list of other things" if isinstance(value, list) else kind(value)
    return UserError(where, f"{name} is {shape}, not a list of objects", "write a list, as OpenAI's API takes it")


def kind(value: object) -> str:
    """What a JSON value is, for an error line."""
    names = {dict: "an object", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return names.get(type(value), "null" if value is None else type(value).__name__)


def fit(messages: list[dict[str, Any]], form: Literal["object", "string"] | None, where: str) -> list[dict[str, Any]]:
    """The messages, with the arguments of every tool call in ``form``. Raises :class:`UserError` for no JSON object."""
    if form is None or not any("tool_calls" in message for message in messages):
        return messages
    return [
        {**message, "tool_calls": _fitted(where, f"messages[{index}]", message["tool_calls"], form)}
        if "tool_calls" in message
        else message
        for index, message in enumerate(messages)
    ]


def _fitted(where: str, name: str, calls: list[dict[str, Any]], form: str) -> list[dict[str, Any]]:
    fitted = []
    for number, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, Mapping) or "name" not in function:
            fitted.append(call)
            continue
        named = f"{name}.tool_calls[{number}].arguments"
        arguments = _arguments(where, named, function.get("arguments", {}), form)  # OpenAI's API always gives some
        changed = {**function, "arguments": arguments}
        fitted.append({**call, "function": changed} if "function" in call else changed)
    return fitted


def _arguments(where: str, name: str, value: object, form: str) -> object:
    if form == "string":
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    for _ in range(2):  # some files hold a string of JSON in a string of JSON
        value = parsed(where, name, value)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(where, f"{name} is not a JSON object: {str(value)[:60]!r}", "write one, {} for none")
    without_nulls(where, name, value)  # for its depth only
    return value
