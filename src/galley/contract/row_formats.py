"""How rows of data are written, told by the names of their columns. Standard library only: ``plan`` asks, too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

PROMPTS = ("prompt", "question", "query", "input", "instruction")
ANSWERS = ("completion", "answer", "response", "output")
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "chat": (("messages",),),
    "sharegpt": (("conversations", "conversation"),),
    "alpaca": (("instruction",), ("output", "response")),
    "prompt_completion": (PROMPTS, ANSWERS),
    "text": (("text",),),
}
"""For each ``data.format``, groups of columns of which a row has one each, in the order in which they are tried."""
OPTIONAL = {"alpaca": ("input", "context", "history")}
"""Columns that a row of a format may have, and that make a row of another format by their names."""
BESIDE = ("system", "system_prompt", "tools", "history", "context", "label", "chosen", "rejected")
"""Columns that rows may have besides."""
SAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
TEXT = "text"
"""Is never taken for granted: on plain text one trains otherwise, and for other reasons."""


def known_columns(keys: Collection[str]) -> dict[str, str]:
    """Keys that are the name of a column but for capitals and blanks around it, each with that name.

    Not where two are the same, or a key is written so itself.
    """
    known = {*BESIDE, *(name for form in COLUMNS.values() for group in form for name in group)}
    plain = {key: key.strip().lower() for key in keys}
    names = [name for name in plain.values() if name in known]
    return {key: name for key, name in plain.items() if key != name and names.count(name) == 1}


def is_of(form: str, columns: Collection[str]) -> bool:
    """Whether a row with these columns is of the format ``form``; of one that is not known here, it may be."""
    return all(any(name in columns for name in group) for group in COLUMNS.get(form, ()))


def recognised(columns: Collection[str]) -> str | None:
    """The format of conversations that a row with these columns is of; None, too, for a better and a worse answer."""
    if {"chosen", "rejected"} <= set(columns) and "messages" not in columns:
        return None
    return next((form for form in COLUMNS if form != TEXT and is_of(form, columns)), None)


def filled(record: Mapping[str, Any]) -> list[str]:
    """The columns that are not null in this row."""
    return [name for name, value in record.items() if value is not None]


def null_column(form: str, record: Mapping[str, Any]) -> str | None:
    """A column that a row of the format ``form`` must have and that is null in this one; None where all are filled."""
    for group in COLUMNS.get(form, ()):
        there = [name for name in group if name in record]
        if there and all(record[name] is None for name in there):
            return there[0]
    return None


def other_format(form: str, record: Mapping[str, Any]) -> str | None:
    """The format of conversations that the filled columns of a row show which are none of ``form``'s own."""
    own = {*OPTIONAL.get(form, ()), *(name for group in COLUMNS.get(form, ()) for name in group)}
    return recognised([name for name in filled(record) if name not in own])


def used_columns(form: str, record: Mapping[str, Any]) -> list[str | None]:
    """Of each group of columns that a row of the format ``form`` must have, the one that this row fills."""
    groups = COLUMNS.get(form, ())
    return [next((name for name in group if record.get(name) not in (None, "", [])), None) for group in groups]


def is_judged(record: Mapping[str, Any]) -> bool:
    """Whether a row holds an answer and a verdict on it, as KTO's data does: one of ``false`` is a bad answer."""
    label = record.get("label")
    if isinstance(label, bool):
        return any(name in record for name in ANSWERS)
    return "completion" in record and str(label).lower() in ("true", "false", "0", "1", "0.0", "1.0")


def advice(record: Mapping[str, Any]) -> str:
    """What to do with a row that is of no known format of conversations."""
    if {"chosen", "rejected"} <= set(record) or is_judged(record):
        return "these are preferences, which Galley does not train on: write the chosen answers as `messages`"
    if isinstance(record.get("text"), str):
        return "for plain text use data.format=text; for conversations write `messages`"
    return (
        "name the columns, such as data.columns.prompt=… and data.columns.completion=…, or write rows such as " + SAMPLE
    )
