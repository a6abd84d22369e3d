"""Profiles of clusters: one YAML file each, found by name. A user's own win over the shipped ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from galley.errors import UserError
from galley_launch import assets
from galley_launch.arguments import nearest, split
from galley_launch.cluster import Cluster, Container, Patience, Side
from galley_launch.strings import Tree, read_value, read_yaml


def folders() -> list[Path]:
    """Where profiles are, what wins last: shipped, the user's own, beside the recipes."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [assets.folder("slurm") / "clusters", config / "galley" / "clusters", Path("clusters")]


def every() -> dict[str, Path]:
    """Name to file of every profile."""
    found: dict[str, Path] = {}
    for folder in folders():
        found |= {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(found.items()))


def _chosen(name: str | None) -> tuple[str, Path]:
    if name and name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise UserError(
                "cluster", f"no file {name}", "give a path to a .yaml file, or a name (see galley clusters)"
            )
        return Path(name).stem, Path(name)
    known = every()
    if name is None:
        defaults = [each for each, path in known.items() if load(path).default]
        if len(defaults) != 1:
            what = (
                f"{' and '.join(defaults)} both say default: true"
                if defaults
                else "none is named, and none is the default"
            )
            raise UserError(
                "cluster", what, "write cluster=NAME (see galley clusters), or default: true in one profile"
            )
        name = defaults[0]
    if name not in known:
        raise UserError("cluster", f"no cluster {name!r}", f"{nearest(name, known)} (see galley clusters)")
    return name, known[name]


def load(path: Path, settings: Sequence[str] = ()) -> Cluster:
    """The profile in ``path`` with ``cluster.key=value`` words applied. Raises ``UserError``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(path), f"cannot be read: {error}", "give a readable UTF-8 file") from None
    tree = _override(read_yaml(text, str(path)), settings)
    try:
        return Cluster.model_validate(tree)
    except ValidationError as error:
        raise _refused(error, str(path)) from None


def find(name: str | None, settings: Sequence[str]) -> tuple[str, Cluster]:
    """Name and profile of the cluster called ``name``; None: the default one. Raises ``UserError``."""
    chosen, path = _chosen(name)
    return chosen, load(path, settings)


def _override(tree: Tree, settings: Sequence[str]) -> Tree:
    result: dict[str, Any] = dict(tree)
    for setting in settings:
        key, text = split(setting)
        section, _, leaf = key.partition(".")[2].rpartition(".")
        part = result.setdefault(section, {}) if section else result
        if section:
            part = result[section] = dict(part or {})
        part[leaf] = read_value(key, text)
    return result


def _refused(error: ValidationError, where: str) -> UserError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    message = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    what, _, todo = message.rpartition("; ")
    if first["type"] == "extra_forbidden":
        parts = [str(part) for part in first["loc"]]
        sections: dict[str, type[BaseModel]] = {"container": Container, "side": Side, "patience": Patience}
        known = sections.get(parts[0], Cluster).model_fields
        return UserError(where, f"no such key: {place!r}", nearest(parts[-1], known))
    if first["type"] == "missing":
        return UserError(f"{where}: {place}", "is missing", "write it, or leave the section out")
    shown = "" if first["loc"] == () else f"{first['input']!r} "
    return UserError(f"{where}: {place}".removesuffix(": "), shown + (what or message), todo if what else "change it")
