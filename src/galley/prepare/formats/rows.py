"""The rows of a source, one at a time, from a file or a hub data set; the first bad row ends the reading."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from galley.contract.data_files import check_file, rename
from galley.prepare.files import read_records
from galley.prepare.formats.base import E, Format


@dataclass(frozen=True)
class Reading:
    """What is done to a record before its format reads it."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """The file's names for the format's columns."""
    system: str | None = None
    """A system prompt for rows without one."""

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
    check_file(path, form.name, reading.columns)
    for record in read_records(path, form.sample, reading.columns):
        example = form.parse(reading.of(record.value), record.where)
        yield record.number, with_notes(example, record.note) if record.note else example


def with_notes(example: E, *notes: str) -> E:
    """``example`` with one of each of ``notes`` more; examples are dataclasses."""
    more = {**example.notes, **dict.fromkeys(notes, 1)}
    changed: Any = replace(cast(Any, example), notes=more)
    return cast(E, changed)


def rows_of(
    records: Iterable[Mapping[str, Any]], name: str, form: Format[E], reading: Reading = AS_IT_IS
) -> Iterator[tuple[int, E]]:
    """Row numbers from 0 and examples of a hub data set that was loaded; errors name the data set and the row."""
    for index, record in enumerate(records):
        yield index, form.parse(reading.of(record), f"{name}, row {index}")
