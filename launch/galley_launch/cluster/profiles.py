"""Profiles of clusters: one YAML file each, found by name. A user's own win over the shipped ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from galley.contract.errors import UserError
from galley_launch.base.options import Setting
from galley_launch.base.yaml_text import Tree, read_source, read_value, read_yaml
from galley_launch.cluster import guard, habits
from galley_launch.cluster.profile import Cluster
from galley_launch.cluster.profile_files import every, folders, path_of
from galley_launch.cluster.profile_words import plain, refused

__all__ = ["every", "find", "folders", "load"]


def _chosen(name: str | None) -> tuple[str, Path]:
    if name and name.endswith((".yaml", ".yml")):
        return str(path_of(name).absolute()), Path(name)  # So that the run finds it again when it goes on.
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
    return name, path_of(name)


def load(path: Path, settings: Sequence[Setting] = ()) -> Cluster:
    """The profile in ``path`` with ``cluster.key=value`` settings applied. Raises ``UserError``."""
    text = read_source(path)
    tree = habits.added(plain(_override(plain(read_yaml(text, str(path))), settings)))
    try:
        cluster = Cluster.model_validate(tree)
    except ValidationError as error:
        raise refused(error, str(path), {_key(setting) for setting in settings}) from None
    guard.check_profile(cluster, str(path))
    return cluster


def find(name: str | None, settings: Sequence[Setting]) -> tuple[str, Cluster]:
    """Name and profile of the cluster called ``name``; None: the default one. Raises ``UserError``."""
    chosen, path = _chosen(name)
    return chosen, load(path, settings)


def _key(setting: Setting) -> str:
    """The dotted path in a profile that ``cluster.key=value`` sets."""
    return setting.key.partition(".")[2]


def _override(tree: Tree, settings: Sequence[Setting]) -> Tree:
    result: dict[str, Any] = dict(tree)
    for setting in settings:
        section, _, leaf = _key(setting).rpartition(".")
        part = result.get(section) if section else result
        if part is not None and not isinstance(part, dict):
            raise UserError(setting.key, f"{section} has no keys of its own", f"write cluster.{section}=VALUE")
        part = dict(part or {}) | {leaf: read_value(*setting)}
        result = result | {section: part} if section else part
    return result
