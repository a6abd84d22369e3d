"""What the command line changed in a recipe, a line for each key. Reads and writes no files."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from galley_launch.base.yaml_text import Tree
from galley_launch.recipe.schema import Recipe, section_fields


def changes(before: Tree, after: Tree) -> tuple[str, ...]:
    """Lines ``optimizer.lr 5e-4 → 1e-4`` for every key that differs between two trees of strings."""
    old, new = _flat(before), _flat(after)
    paths = dict.fromkeys([*new, *old])
    # A key that one tree lacks has the schema's default there: setting it to that default changes nothing.
    values = [(path, old.get(path, _default(path)), new.get(path, _default(path))) for path in paths]
    return tuple(
        f"{path} {_text(was)} → {_text(now)}" for path, was, now in values if not _is_same(_text(was), _text(now))
    )


def _is_same(was: str, now: str) -> bool:
    try:
        return float(was) == float(now)  # 2e-4 and 0.0002 are the same number
    except ValueError:
        return was == now


def _flat(tree: Tree, section: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{section}{key}.") if isinstance(value, dict) else {section + key: value}
    return flat


def _default(path: str) -> Any:
    section, _, leaf = path.rpartition(".")
    fields = section_fields(section) if section else Recipe.model_fields
    value = fields[leaf].get_default(call_default_factory=True) if leaf in fields else None
    return None if value is PydanticUndefined else value  # pydantic's mark of a field without a default


def _text(value: Any) -> str:
    """``value`` as it is written on a command line: ``[a,b]``, ``true``, ``0.0002``."""
    if value is None:
        return "(not set)"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
