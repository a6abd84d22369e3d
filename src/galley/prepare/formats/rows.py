"""The rows of a source, one at a time, from JSONL or a hub data set; the first bad row ends the reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from galley.contract.data_files import check_file
from galley.contract.errors import UserError
from galley.prepare.formats.base import E, Format


def read_jsonl(path: Path, form: Format[E]) -> Iterator[tuple[int, E]]:
    """Line numbers from 0 and examples of a file of one JSON object a line; blank lines count, and are passed over.

    Raises :class:`UserError` naming file and line for a line that is not UTF-8, not JSON or not such a row, and for a
    file of another format.
    """
    check_file(path, form.name)
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if line.strip():
                where = f"{path}:{index + 1}"
                yield index, form.parse(_parse(where, line, form.sample), where)


def rows_of(records: Iterator[Mapping[str, Any]], name: str, form: Format[E]) -> Iterator[tuple[int, E]]:
    """Row numbers from 0 and examples of a hub data set that was loaded; errors name the data set and the row."""
    for index, record in enumerate(records):
        yield index, form.parse(record, f"{name}, row {index}")


def _parse(where: str, line: bytes, sample: str) -> object:
    try:
        value: object = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(where, f"not UTF-8 at byte {error.start}", "save the file as UTF-8") from None
    except ValueError as error:
        raise UserError(where, f"not JSON: {error}", f"write one object a line, such as {sample}") from None
    except RecursionError:
        raise UserError(where, "nests thousands of levels deep", "make it flatter") from None
    return value
