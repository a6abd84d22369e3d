"""Words that are not Galley's own: what other trainers, their users and Slurm call things, from ``words.toml``.

Where such a word can mean one thing only, it is replaced by Galley's own and a note tells the user; any other is
refused with the key to use. The standard library only, because every command line passes through here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "none", "null")

Cell = str | dict[str, str]
"""What a value is replaced by. A string: Galley's own words, in which ``{}`` stands for the value and ``{names}`` for a
list without brackets. A table: ``instead`` (the value is refused, with this answer) or ``because`` (it has no effect,
for this reason)."""


@dataclass(frozen=True)
class Meaning:
    """How a foreign ``key=value`` is understood."""

    settings: tuple[str, ...] = ()
    """Galley's own ``key=value`` words; none where nothing has to be set."""
    note: str = ""
    """What the user is told about it."""
    refusal: str = ""
    """What to use instead, where the word could mean several things, or something that is not there."""


@dataclass(frozen=True)
class _Table:
    """``words.toml``, by foreign word."""

    verbs: dict[str, str]
    verb_answers: dict[str, str]
    same: dict[str, str]
    """Foreign key to Galley's own."""
    cluster: dict[str, str]
    answers: dict[str, str]
    own: dict[str, dict[str, Cell]]
    """Galley's own key to its foreign values: ``optimizer.name`` to ``adamw_torch``."""
    values: dict[str, dict[str, Cell]]
    """Foreign key to its values, where the key alone does not decide."""


def _by_name(section: dict[str, str]) -> dict[str, str]:
    """``{"own": "foreign names"}`` turned round: each foreign name to Galley's own."""
    return {name: text for text, names in section.items() for name in names.split()}


def _by_value_of(section: dict[str, dict[str, Cell]]) -> dict[str, dict[str, Cell]]:
    """Key to value to cell, where the file names several keys, and several values, at once."""
    tables: dict[str, dict[str, Cell]] = {}
    for keys, table in section.items():
        cells = {value: cell for names, cell in table.items() for value in names.split()}
        tables |= dict.fromkeys(keys.split(), cells)
    return tables


@cache
def _table() -> _Table:
    import tomllib  # takes five milliseconds, and is only needed where a word is not Galley's own

    raw = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
    return _Table(
        verbs=raw["verbs"],
        verb_answers=_by_name(raw["verb_answers"]),
        same=_by_name(raw["same"]),
        cluster=_by_name(raw["cluster"]),
        answers=_by_name(raw["answers"]),
        own=_by_value_of(raw["own"]),
        values=_by_value_of(raw["values"]),
    )


def known() -> set[str]:
    """Every key that is understood or answered, and is not Galley's own."""
    table = _table()
    return {*table.same, *table.cluster, *table.answers, *table.values}


def is_switch(key: str) -> bool:
    """Whether ``--key`` is complete without a value."""
    return "true" in _table().values.get(key, {})


def is_true(value: str) -> bool:
    """Whether ``value`` is true in one of the ways in which people write that."""
    return value.lower() in _TRUE


def is_boolean(value: str) -> bool:
    """Whether ``value`` is true or false in one of the ways in which people write that."""
    return value.lower() in (*_TRUE, *_FALSE)


def meaning(key: str, value: str, on_cluster: bool = False) -> Meaning | None:
    """What ``key=value`` means; None where it is Galley's own, or nothing that is known.

    ``on_cluster``: whether the verb submits, so that Slurm's words are keys of the cluster's profile.
    """
    table = _table()
    # On a cluster, Slurm's meaning of a word comes before what trainers mean by it.
    if key in table.cluster and on_cluster:
        return _renamed(key, value, table.cluster[key])
    if key in table.same:
        return _renamed(key, value, table.same[key])
    if key in table.own or key in table.values:
        return _by_value(key, value, table.own.get(key) or table.values[key])
    text = answer(key)
    return Meaning(refusal=text) if text else None


def _renamed(key: str, value: str, own: str) -> Meaning:
    meaning_of_value = _by_value(key, value, _table().own.get(own, {}))
    return meaning_of_value or _read(key, value, [f"{own}={value}"])


def _read(key: str, value: str, settings: list[str]) -> Meaning:
    return Meaning(tuple(settings), f"{key}={value} is read as {' '.join(settings)}")


def _by_value(key: str, value: str, cells: dict[str, Cell]) -> Meaning | None:
    """What ``cells`` make of ``value``; None: it passes unchanged."""
    word = value.lower()  # a cell under "*" is for every value that has none of its own
    if word in _TRUE and "true" in cells:
        word = "true"
    elif word in _FALSE and "false" in cells:
        word = "false"
    cell = cells.get(word, cells.get("*"))
    if cell is None:
        return None
    if isinstance(cell, str):
        items = value.strip("[] ").replace(" ", "")
        return _read(key, value, [word.replace("{}", value).replace("{names}", items) for word in cell.split()])
    # A table: refused with the answer, or without effect here for a reason.
    if "instead" in cell:
        return Meaning(refusal=cell["instead"])
    return Meaning(note=f"{key}={value} has no effect: {cell['because']}")


def answer(key: str) -> str:
    """How to write in Galley what ``key`` is elsewhere, or why it is not needed; empty where ``key`` is not known."""
    table = _table()
    if key in table.answers:
        return table.answers[key]
    if key in table.cluster:
        return f"it is a cluster's: galley submit RECIPE cluster=NAME {table.cluster[key]}=VALUE"
    if key in table.same:
        return f"here it is called {table.same[key]}"
    # A key whose value decides: every word that some value of it is replaced by, else the reason why it has no effect.
    cells = [cell for cell in table.values.get(key, {}).values() if isinstance(cell, str)]
    words = dict.fromkeys(cell.replace("{}", "VALUE").replace("{names}", "a,b") for cell in cells)
    reasons = [
        cell["because"]
        for cell in table.values.get(key, {}).values()
        if "because" in cell and not isinstance(cell, str)
    ]
    return f"write {' or '.join(words)}" if words else f"leave it out: {reasons[0]}" if reasons else ""


def cluster_key(key: str) -> str:
    """The key of a profile (``cluster.partition``) that Slurm's ``key`` is; empty where there is none."""
    return _table().cluster.get(key, "")


def verb(word: str) -> str:
    """Galley's own verb for ``word``; empty where there is none, or several."""
    return _table().verbs.get(word, "")


def verb_answer(word: str) -> str:
    """What to use instead of the verb ``word``; empty where ``word`` is not known."""
    return _table().verb_answers.get(word, "")


def file_key(word: str) -> str:
    """The key whose value the file name ``word`` probably is, by its suffix; empty where the suffix is another."""
    if word.endswith((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")):
        return "data.path"
    return "model.path" if word.endswith((".gguf", ".safetensors")) else ""
