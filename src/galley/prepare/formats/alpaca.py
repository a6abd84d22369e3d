"""Alpaca's instructions: ``instruction``, ``input`` and ``output``, with ``history`` and ``system`` where there are.

Dolly's names for the same (``context`` and ``response``) are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from galley.contract.errors import UserError
from galley.contract.row_formats import COLUMNS
from galley.prepare.formats.calls import kind, parsed
from galley.prepare.formats.chat import conversation_format
from galley.prepare.formats.conversations import only_column, system_of, text_of

SAMPLE = '{"instruction": "…", "input": "", "output": "…"}'
INPUTS = ("input", "context")
_, OUTPUTS = COLUMNS["alpaca"]


def to_messages(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The record with ``messages``: earlier turns, then the instruction with its input below it, and the output."""
    asked = text_of(record, ("instruction",), where, SAMPLE)
    name = only_column(record, INPUTS, where)
    given = record[name] if name else ""
    if not isinstance(given, str):
        raise UserError(where, f"`input` is {kind(given)}, not a string", f"write rows such as {SAMPLE}")
    question = f"{asked}\n{given}" if given.strip() else asked
    turns = [*_history(where, record.get("history")), (question, text_of(record, OUTPUTS, where, SAMPLE))]
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return {"messages": messages, "system": system_of(record), "tools": record.get("tools")}


def _history(where: str, value: object) -> list[tuple[str, str]]:
    """Earlier questions and answers, oldest first: ``[["…", "…"], …]``."""
    pairs = parsed(where, "`history`", value)
    if pairs is None:
        return []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        what = "`history` is not a list of pairs of strings"
        raise UserError(where, what, 'write [["question", "answer"], …], oldest first')
    return [(pair[0], pair[1]) for pair in pairs]


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


ALPACA = conversation_format(
    name="alpaca",
    sample=SAMPLE,
    columns=("instruction", *INPUTS, *OUTPUTS, "history", "system", "system_prompt", "tools"),
    to_messages=to_messages,
)
