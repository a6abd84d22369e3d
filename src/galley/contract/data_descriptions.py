"""Which JSON files beside files of rows only describe them: ``metadata.json`` and the like. Standard library only."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from galley.contract.data_files import HEAD, UNPACKING, inner_suffix, opened, rename, table_in
from galley.contract.errors import UserError
from galley.contract.row_formats import is_judged, is_of, recognised

LARGEST = 1 << 24
"""Bytes that a description may have; a larger file is taken for rows."""
NAME = re.compile(
    r"(?i)(?:^|[._-])(?:meta|metadata|infos?|config|schema|manifest|stats|statistics|state|croissant)\.json"
)
"""Names of files that describe others; one with a list of objects is such only under one of these."""


def is_description(path: Path, form: str, columns: Mapping[str, str]) -> bool:
    """Whether ``path`` is a JSON file that holds no rows: one object that is none, or a list of other things.

    ``form``: the format of the rows beside it; ``columns``: the files' names for its columns. Not where rows could be
    in it, of whatever format.
    """
    if inner_suffix(path) != ".json":
        return False
    try:
        with opened(path) as file:
            head = file.read(HEAD)
            if _begins_rows(head):
                return False
            content = head + file.read(LARGEST)
    except (*UNPACKING, OSError, ValueError, UserError):
        return False
    return len(content) <= LARGEST and _describes(path, content, form, columns)


def _begins_rows(head: bytes) -> bool:
    """Whether an array of objects begins, or an object a line; a large file need not be read further."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"["):
        return text[1:].lstrip().startswith(b"{")
    first, _, rest = text.partition(b"\n")
    return rest.lstrip().startswith(b"{") and _value(first) is not None


def _describes(path: Path, content: bytes, form: str, columns: Mapping[str, str]) -> bool:
    value = _value(content.removeprefix(b"\xef\xbb\xbf"))
    if isinstance(value, list):
        return bool(value) and not any(isinstance(item, Mapping) for item in value)
    if not isinstance(value, Mapping) or _is_row(value, form, columns):
        return False
    key = table_in(value, columns)
    return key is None or (bool(NAME.search(path.name)) and not _is_row(value[key][0], form, columns))


def _is_row(value: Mapping[str, Any], form: str, columns: Mapping[str, str]) -> bool:
    named = rename(value, columns)
    known = recognised(named) is not None or is_of("text", named) or (form != "auto" and is_of(form, named))
    return known or is_judged(named) or {"chosen", "rejected"} <= set(named)


def _value(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None
