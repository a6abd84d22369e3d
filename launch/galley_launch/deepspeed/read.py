"""Read a DeepSpeed JSON as DeepSpeed does: JSON, or hjson (comments, trailing commas), without repeated keys."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError
from galley_launch.base.grammar import is_text
from galley_launch.base.problems import clip

Config = dict[str, Any]

_DEEPEST = 16  # Levels; DeepSpeed's own configuration has five.
_LARGEST = 1 << 20  # Bytes.
_FIX = "fix that, or start from a preset (zero2, zero3)"


def read(path: Path) -> Config:
    """The object in a file. Raises ``UserError`` where it cannot be read, or holds text that is not Unicode."""
    name = clip(str(path))
    try:
        if path.stat().st_size > _LARGEST:
            raise UserError(name, f"is larger than {_LARGEST} bytes", "give a DeepSpeed configuration")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(name, f"not readable as JSON: {error}", "save it as UTF-8 text") from None
    try:
        config = _parse(text)
    except RecursionError:
        raise UserError(name, f"nests more than {_DEEPEST} levels deep", _FIX) from None
    except ValueError as error:
        if "integer string conversion" in str(error):  # Python's own words are about a setting of Python's
            raise UserError(
                name, f"holds a number of more than {sys.get_int_max_str_digits():,} digits", _FIX
            ) from None
        raise UserError(name, f"not readable as JSON: {' '.join(str(error).split())[:200]}", _FIX) from None
    if not isinstance(config, dict):
        raise UserError(name, "holds no JSON object", 'write {"zero_optimization": {"stage": 2}} or the like')
    _check_texts(config, name)
    return config


class _Repeated(ValueError):
    """A key that is given twice."""


def _no_repeats(pairs: list[tuple[str, Any]]) -> Config:
    # json keeps the last of two equal keys in silence; DeepSpeed itself refuses them, with a hook like this one.
    keys = [key for key, _ in pairs]
    repeated = [key for key in keys if keys.count(key) > 1]
    if repeated:
        raise _Repeated(f"{clip(repeated[0])!r} is given twice")
    return dict(pairs)


def _parse(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_repeats)
    except _Repeated:
        raise
    except ValueError as error:
        first = error
    import hjson  # Only where the file is not plain JSON: most are.

    try:
        return hjson.loads(text, object_pairs_hook=_no_repeats) if "{" in text else None
    except _Repeated:
        raise
    except (ValueError, IndexError):  # hjson fails in both ways; the message of json names the place better
        raise first from None


def _check_texts(config: Config, name: str) -> None:
    for path, value, depth in _walk(config):
        if depth > _DEEPEST:
            raise UserError(name, f"nests more than {_DEEPEST} levels deep", _FIX)
        if not all(is_text(text) for text in (path, value) if isinstance(text, str)):
            raise UserError(name, f"{clip(path)} {clip(str(value))} is not Unicode (a lone surrogate)", "change it")


def _walk(tree: Any) -> Iterator[tuple[str, Any, int]]:
    """Every value with its key and level. Not recursive, because the file may nest as deep as the parser can read."""
    stack: list[tuple[str, Any, int]] = [("", tree, 0)]
    while stack:
        key, value, depth = stack.pop()
        yield key, value, depth
        if depth > _DEEPEST:
            continue
        if isinstance(value, dict):
            stack += [(str(name), part, depth + 1) for name, part in value.items()]
        elif isinstance(value, list):
            stack += [(key, part, depth + 1) for part in value]
