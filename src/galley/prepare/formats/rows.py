"""The rows of a source, one at a time, from a file or a hub data set; the first bad row ends the reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from galley.contract.data_files import check_file, rename
from galley.contract.errors import UserError
from galley.contract.row_formats import used_columns
from galley.prepare.files import read_records
from galley.prepare.formats.base import E, Format
from galley.prepare.formats.calls import kind
from galley.prepare.formats.gates import dropped_row
from galley.prepare.record import Record

Used = tuple[tuple[str, str] | None, ...]
"""Columns that a row fills, and what kind of value each has."""


@dataclass(frozen=True)
class Reading:
    """What is done to a record before its format reads it."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The file's names for the format's columns."""
    system: str | None = None
    """A system prompt for rows without one."""
    unreadable: Literal["refuse", "drop"] = field(default="refuse", repr=False, compare=False)
    """What becomes of a row that cannot be read; it has a place of its own among what names prepared data."""

    def of(self, record: object) -> object:
        """The record as the format names its columns; what is no object is left as it is, for the format to refuse."""
        if not isinstance(record, Mapping):
            return record
        named = rename(record, self.columns)
        return {**named, "system": named.get("system") or self.system} if self.system else named


AS_IT_IS = Reading()


def read_file(path: Path, form: Format[E], reading: Reading = AS_IT_IS) -> Iterator[tuple[int, E]]:
    """Numbers from 0 of the rows (or lines, of which blank ones count) of a file, and their examples.

    Raises :class:`UserError` naming file and line (or row) for what cannot be read or is no such row.
    """
    if reading.unreadable == "refuse":
        check_file(path, form.name, reading.columns)
    return _examples(read_records(path, form.sample, reading.columns, errors=True), form, reading)


def _examples(rows: Iterable[Record], form: Format[E], reading: Reading) -> Iterator[tuple[int, E]]:
    """Number and example of each of ``rows``."""
    usual: Used | None = None
    reason = ""
    for number, where, record, note, error in rows:
        named = reading.of(record)
        try:
            if error:
                raise error
            example = form.parse(named, where)
        except UserError as unread:
            if reading.unreadable == "refuse":
                raise
            reason = reason or f"rows dropped, for they cannot be read; the first: {unread}"
            yield number, dropped_row(form, unread, reason)
            continue
        used = _used(form.name, named) if isinstance(named, Mapping) else ()
        usual = used if usual is None and None not in used else usual
        notes = [note] if note else []
        if usual is not None and used != usual:
            notes += _changes(usual, used)
        yield number, with_notes(example, *notes) if notes else example


def _used(form: str, record: Mapping[str, Any]) -> Used:
    return tuple((name, kind(record[name])) if name else None for name in used_columns(form, record))


def _changes(usual: Used, used: Used) -> list[str]:
    """What is otherwise in a row than in the first: which column it fills, or with what."""
    notes = []
    for first, here in zip(usual, used, strict=True):
        if first and here and first[0] != here[0]:
            notes.append(f"rows are read from `{here[0]}`, others from `{first[0]}`")
        elif first and here and first[1] != here[1]:
            notes.append(f"rows have a `{here[0]}` that is {here[1]}, others one that is {first[1]}")
    return notes


def with_notes(example: E, *notes: str) -> E:
    """``example`` with one of each of ``notes`` more; examples are dataclasses."""
    more = {**example.notes, **dict.fromkeys(notes, 1)}
    changed: Any = replace(cast(Any, example), notes=more)
    return cast(E, changed)


def rows_of(
    records: Iterable[Mapping[str, Any]], name: str, form: Format[E], reading: Reading = AS_IT_IS
) -> Iterator[tuple[int, E]]:
    """Row numbers from 0 and examples of a hub data set that was loaded; errors name the data set and the row."""
    numbered = (Record(index, f"{name}, row {index}", record) for index, record in enumerate(records))
    return _examples(numbered, form, reading)
