"""A complete recipe, or a profile, as YAML with a comment above each setting that explains it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

_WIDTH = 80


def text(whole: BaseModel) -> str:
    """The YAML of a recipe or a profile with every default filled in. Reading it gives the same values again."""
    return "\n".join(_section(whole, "")).lstrip("\n") + "\n"


def _section(part: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        # The docstring below a field is its description (use_attribute_docstrings); a section may have its class's.
        described = field.description or (type(value).__doc__ if isinstance(value, BaseModel) else "") or ""
        description = " ".join(described.split()).replace("``", "").replace("None:", "null:")
        width = _WIDTH - len(indent) - 2
        if not indent:
            yield ""
        yield from (f"{indent}# {line}" for line in textwrap.wrap(description, width, break_on_hyphens=False))
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _section(value, f"{indent}  ")
        else:
            yield f"{indent}{_setting(name, value)}"


def _setting(name: str, value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    if isinstance(plain, list):
        plain = [item.model_dump(exclude_unset=True) if isinstance(item, BaseModel) else item for item in plain]
    flow = isinstance(plain, list | dict)  # [a, b] on one line
    # PyYAML ends a document that is a bare scalar with a line "...", and would fold lines longer than its width.
    text = yaml.safe_dump(plain, default_flow_style=flow, allow_unicode=True, width=10_000)
    return f"{name}: {text.removesuffix('...' + chr(10)).strip()}"
