"""YAML and ``key=value`` text as trees of strings: nothing is guessed here, the schema decides types later.

YAML's own guesses make ``1e-4`` a string, ``12:00:00`` a number and ``no`` a bool (YAML 1.1 as PyYAML reads it).
Only null keeps its meaning: an unquoted ``null`` or ``~``, or nothing after the colon.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from galley.contract.errors import UserError
from galley.contract.files import read_text, reason

Tree = dict[str, Any]
"""Keys to strings, None, lists or further trees."""

ONE_OF = {"data": ("path", "sources"), "batch": ("samples", "tokens"), "duration": ("epochs", "steps", "tokens")}
"""Keys of a section of which only one may be set: setting one removes the others."""

_NULL = "tag:yaml.org,2002:null"


# Far above any recipe or profile. Aliases of aliases can expand a few lines to gigabytes (the "billion laughs" attack),
# and deep nesting overflows Python's stack, for PyYAML reads recursively.
_DEPTH, _ALIASES, _BYTES = 32, 20, 1 << 20


class _Loader(yaml.BaseLoader):
    """Every scalar a string; repeated keys, deep nesting and many aliases refused."""

    depth = 0
    aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML's own, which has no limits on aliases and nesting."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.aliases += isinstance(event, yaml.AliasEvent)
        if self.aliases > _ALIASES:
            raise yaml.composer.ComposerError(None, None, f"more than {_ALIASES} aliases (*name)", event.start_mark)
        if self.depth == _DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nests deeper than {_DEPTH} levels", event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Tree:
    tree: Tree = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is not a word", key_node.start_mark)
        if key in tree:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
        tree[key] = loader.construct_object(value_node, deep=True)
    return tree


# BaseLoader resolves no scalar, so that null is the only one with a type. PyYAML looks resolvers up by a scalar's first
# character, and under "" for an empty one: hence the list. Quoted scalars are never resolved: "null" stays a string.
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|)$"), ["~", "n", ""])
_Loader.add_constructor(_NULL, lambda _loader, _node: None)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_source(path: Path) -> str:
    """The text of a user's recipe or profile. Raises ``UserError`` where it cannot be read."""
    try:
        return read_text(path, _BYTES)
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read: {reason(error)}", "give a readable UTF-8 file") from None


def read_yaml(text: str, where: str) -> Tree:
    """The mapping in ``text``, its scalars as strings. Raises ``UserError`` with file and line."""
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}" if mark else where
        raise UserError(place, f"not readable as YAML: {error.problem}", "fix that line") from None
    except yaml.YAMLError as error:
        raise UserError(where, f"not readable as YAML: {str(error).splitlines()[0]}", "save it as UTF-8 text") from None
    if not isinstance(tree, dict):
        raise UserError(where, "holds no settings", "write lines such as 'key: value'")
    return tree


def merged(base: Tree, over: Tree, one_of: tuple[str, ...] = ()) -> Tree:
    """``base`` with every key of ``over`` put in its place, sections key by key. ``one_of``: as in :data:`ONE_OF`."""
    # Where `over` sets one of `one_of`, `base` loses them all: a recipe that sets steps must not inherit epochs too.
    result = {key: value for key, value in base.items() if key not in one_of or not set(one_of) & set(over)}
    for key, value in over.items():
        inherited = result.get(key)
        if isinstance(value, dict) and isinstance(inherited, dict):
            value = merged(inherited, value, ONE_OF.get(key, ()))
        result[key] = value
    return result


def read_value(key: str, text: str) -> Any:
    """What ``key=text`` means: ``[a,b]`` is a list, ``null`` is null, everything else is the string as typed."""
    if text == "null":
        return None
    if not text.startswith("["):
        return text
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, list):
        raise UserError(key, f"{text!r} is not a list", "write [a,b] without spaces, or quote it: 'key=[a, b]'")
    return value


def read_names(text: str) -> list[str]:
    """Device names: ``0,1`` and ``[0,1]`` are the same list."""
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]
