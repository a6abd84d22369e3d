"""All recipes: find one by name, merge it with those that it extends, list them, copy one.

It needs the standard library and yaml only, so that listing takes little longer than reading the files.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.text import one_line
from galley_launch.base import assets, words
from galley_launch.base.grammar import nearest
from galley_launch.base.yaml_text import Tree, merged, read_source, read_yaml
from galley_launch.recipe import needs

_SUFFIXES = (".yaml", ".yml")
# Keys whose values may be paths of files beside the recipe.
_FILES = ("extends", "model.path", "model.chat_template", "data.path", "data.held_out_path", "deepspeed")
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])")  # 0.6b, 135m: parameters in a recipe's name
_MILLIONS = {"m": 1.0, "b": 1000.0}
_MODEL = 22  # Columns of the model's name.
_NARROW = 110
"""Columns of a terminal below which the table leaves out model and ZeRO, which are mostly part of the name."""
COLUMNS = ("recipe", "model", "method", "zero", "GPUs", "memory", "about")
"""Columns of the table. ``memory``: what the recipe takes of each GPU."""


@dataclass(frozen=True)
class Source:
    """Where a recipe came from."""

    label: str
    """File or run directory, as messages name it."""
    tree: Tree
    """Its keys, merged over those of the recipes that it extends."""
    folder: Path
    """Where its relative paths are looked for after the current directory."""
    stem: str
    """The run's name, unless the user gives one."""
    text: str = ""
    """The YAML itself."""
    run: RunDir | None = None
    """The run that is continued, where the source is one."""
    extends: tuple[str, ...] = ()
    """Files that it extends, the nearest first."""
    set_by: Mapping[str, str] = field(default_factory=dict)
    """Dotted key to the extended file that set it, for keys that this recipe does not set itself."""
    changes: tuple[str, ...] = ()
    """What the command line changed, a line for each key."""

    def beside(self, key: str) -> Path:
        """Where a relative path under ``key`` is looked for: beside the file that wrote it."""
        return Path(self.set_by[key]).parent if key in self.set_by else self.folder


def is_path(name: str) -> bool:
    """Whether ``name`` is written as a recipe's file, not as its name."""
    return name.endswith(_SUFFIXES) or "/" in name


def _folders() -> tuple[Path, Path]:
    return Path("recipes"), assets.folder("recipes")


def recipes() -> dict[str, Path]:
    """Name to file of every recipe: the user's own ``./recipes`` win over the shipped ones."""
    files: dict[str, Path] = {}
    for folder in reversed(_folders()):  # the user's own folder last: it replaces what came before
        files |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(files.items()))


def find(name: str) -> Source:
    """The recipe that ``name`` means: a path, a name in ``./recipes``, a shipped name. Raises ``UserError``."""
    if key := words.file_key(name):
        todo = f"write {key}={name} after the name of a recipe (see galley recipes)"
        raise UserError("recipe", f"{name} is not a recipe, which is a .yaml file", todo)
    if is_path(name):
        if not Path(name).is_file():
            raise UserError("recipe", f"no file {name}", f"{_instead(name)} (see galley recipes)")
        return read(Path(name))
    known = recipes()
    if name not in known:
        raise UserError("recipe", f"no recipe {name!r}", f"{nearest(name, known)} (see galley recipes)")
    return read(known[name])


def _instead(name: str) -> str:
    """What to give instead of ``name``, which is written as a file that does not exist."""
    if Path(name).stem in recipes() and "/" not in name:
        return f"write {Path(name).stem} for the recipe of that name"
    if name.count("/") == 1 and name[0] not in "/.~" and not name.endswith(_SUFFIXES):
        return f"give a recipe; where {name} is a model, write model.path={name} after it"
    return "give a path to a .yaml file, or a name"


def read(path: Path, above: tuple[Path, ...] = ()) -> Source:
    """The recipe in ``path``, merged over the one that it extends. ``above``: files that extend it, the nearest last.

    Raises ``UserError`` for a file that cannot be read, is not there, or extends itself.
    """
    text = read_source(path)
    own = read_yaml(text, str(path))
    if "extends" not in own:
        return Source(str(path), own, path.parent, path.stem, text)
    base = read(_extended(path, own.pop("extends"), (*above, path)), (*above, path))
    tree, own_keys = merged(base.tree, own), set(_leaves(own))
    # A key comes from the nearest file that sets it: this one, else the extended one or what that one extends.
    set_by = {key: base.set_by.get(key, base.label) for key in _leaves(tree) if key not in own_keys}
    return Source(str(path), tree, path.parent, path.stem, text, None, (base.label, *base.extends), set_by)


def _leaves(tree: Tree, section: str = "") -> Iterator[str]:
    """The dotted path of every value in ``tree``."""
    for key, value in tree.items():
        yield from _leaves(value, f"{section}{key}.") if isinstance(value, dict) else [section + key]


def _extended(path: Path, name: Any, chain: tuple[Path, ...]) -> Path:
    """The file that ``extends: name`` in ``path`` means.

    A name never means a file of ``chain``: so ``./recipes/x.yaml`` can extend the shipped ``x``.
    """
    where = f"{path}: extends"
    if not isinstance(name, str) or not name:
        raise UserError(
            where, f"{name!r} is not a recipe", "write a name (see galley recipes) or a path to a .yaml file"
        )
    if is_path(name):
        candidates = [path.parent / os.path.expanduser(name)]  # noqa: PTH111 - Path.expanduser raises for unknown users
    else:
        candidates = [folder / f"{name}.yaml" for folder in _folders()]
    files = [file for file in candidates if file.is_file()]
    if not files:
        missing = f"no file {candidates[0]}" if is_path(name) else f"no recipe {name!r}"
        raise UserError(where, missing, nearest(name, recipes()) if not is_path(name) else "correct the path")
    visited = [file.resolve() for file in chain]
    unvisited = next((file for file in files if file.resolve() not in visited), None)
    if unvisited is None:
        circle = ", which extends ".join(map(str, [*chain[visited.index(files[0].resolve()) :], files[0]]))
        raise UserError(where, f"goes round in a circle: {circle}", "remove one extends")
    return unvisited


def _leaf(tree: Tree, path: str, default: str) -> str:
    value: Any = tree
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) else default


def _row(name: str, source: Source) -> tuple[str, ...]:
    """A row of the table, from the file as it is: nothing is checked here, which would need pydantic."""
    tree, needed = source.tree, needs.of_header(source.text)
    model = _leaf(tree, "model.path", "").rstrip("/")
    method, zero = _leaf(tree, "method.kind", "lora"), _leaf(tree, "deepspeed", "zero2")
    return name, model, method, zero, needed.gpus, needed.memory, _leaf(tree, "about", "")


def order(name: str) -> tuple[str, float, str]:
    """A sort key, by family and then by size: ``qwen3-4b-qlora`` after ``qwen3-0.6b-full``."""
    family, size = re.match(r"[a-z]*", name.lower()), _SIZE.search(name.lower())
    return family[0] if family else "", float(size[1]) * _MILLIONS[size[2]] if size else 0.0, name


def rows(words: Sequence[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """A row for each recipe in which every word occurs, as ``COLUMNS`` has it; and what cannot be read."""
    matches, problems = [], []
    for name, path in sorted(recipes().items(), key=lambda item: order(item[0])):
        try:
            row = _row(name, read(path))
        except UserError as error:
            problems.append(str(error))
            continue
        if needs.matches(tuple(words), row):
            matches.append(row)
    return matches, problems


def listing(words: Sequence[str]) -> int:
    """Print the table of :func:`rows`. Raises ``UserError`` where it would be empty."""
    from galley_launch.base.table import cut, screen_width, table

    matches, problems = rows(words)
    for problem in problems:
        print(f"galley: note: {one_line(problem)}", file=sys.stderr)
    if not matches:
        raise UserError("recipes", f"none matches {' '.join(words)!r}", "list them all: galley recipes")
    width = screen_width()
    shown = [number for number, column in enumerate(COLUMNS) if width >= _NARROW or column not in ("model", "zero")]
    cells = [(name, cut(model.rpartition("/")[2], _MODEL), *rest) for name, model, *rest in matches]
    lines = [tuple(row[number] for number in shown) for row in (COLUMNS, *cells)]
    # The last column (about) gets what the others leave, two blanks behind each of them, and is cut to that.
    room = width - sum(max(map(len, cells_of_column)) + 2 for cells_of_column in list(zip(*lines, strict=True))[:-1])
    columns, *body = [(*line[:-1], cut(line[-1], room)) for line in lines]
    table(columns, body)
    return 0


def copy(name: str, to: str = "") -> int:
    """Write a copy of a recipe that is the user's to change. Raises ``UserError`` where something already exists."""
    source = find(name)
    target = _target(source, to)
    word = target.stem if target.parent == Path("recipes") else str(target)
    text = _moved(source, target.parent)
    text = "".join(_renamed(line, source.stem, word, target.stem) for line in text.splitlines(keepends=True))
    if target.exists():
        raise UserError(str(target), "already exists", f"give another name: galley copy {name} NAME")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:  # "x": fails if another process has made it meanwhile
            file.write(text)
    except OSError as error:
        raise UserError(str(target), f"cannot be written ({error.strerror})", "give another place") from None
    print(f"{target} is yours to change{'; it is used instead of the shipped one' if word == source.stem else ''}")
    print(f"next: galley show {word}; galley plan {word}")
    return 0


def _target(source: Source, to: str) -> Path:
    if to and Path(to).is_dir():
        return Path(to) / f"{source.stem}.yaml"
    if not is_path(to):
        return Path("recipes") / f"{to or source.stem}.yaml"
    if not to.endswith(_SUFFIXES):
        raise UserError("copy", f"{to!r} is not a recipe's file", "write a name, or a path that ends in .yaml")
    return Path(to)


def _moved(source: Source, folder: Path) -> str:
    """The recipe's text for a file in ``folder``: paths that were relative to the old place become absolute."""
    text = source.text  # edited as text, from its end so that earlier positions stay right: comments must survive
    for start, end, path in sorted(_neighbours(source, folder), reverse=True):
        text = text[:start] + json.dumps(str(path), ensure_ascii=False) + text[end:]
    shipped = assets.folder("recipes") / "schema.json"
    return text if (folder / "schema.json").is_file() else text.replace("=./schema.json", f"={shipped}", 1)


def _neighbours(source: Source, folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Every value that is a path beside the recipe's file: its begin and end in the text, and the absolute path."""
    if folder.resolve() == source.folder.resolve():
        return
    # BaseLoader's compose gives nodes with their marks, where each value begins and ends in the text.
    for key, node in _scalars(yaml.compose(source.text, Loader=yaml.BaseLoader)):
        path = source.folder / node.value
        first_here = key != "extends" and Path(node.value).exists()
        if key in _FILES and path.exists() and not first_here and not Path(node.value).is_absolute():
            yield node.start_mark.index, node.end_mark.index, path.resolve()


def _scalars(node: yaml.Node | None, section: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every value that is a scalar and not empty, with its dotted path."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(value, yaml.ScalarNode) and value.value:
            yield f"{section}{key.value}", value
        else:
            yield from _scalars(value, f"{section}{key.value}.")


def _renamed(line: str, old: str, word: str, new: str) -> str:
    """A line of the header with the copy's name in its commands: ``word`` for the recipe, ``new`` for its run."""
    if not line.startswith("#"):
        return line
    line = re.sub(rf"\b(galley (?:run|submit|plan|show|copy)) {re.escape(old)}(?![\w.-])", rf"\1 {word}", line)
    return re.sub(rf"\bruns/{re.escape(old)}(?![\w.-])", f"runs/{new}", line)
