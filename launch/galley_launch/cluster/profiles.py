"""Profiles of clusters: one YAML file each, found by name. A user's own win over the shipped ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from galley.contract.errors import UserError
from galley_launch.base.options import Setting
from galley_launch.base.yaml_text import Tree, read_source, read_value, read_yaml
from galley_launch.cluster import guard, shell_variables
from galley_launch.cluster.profile import Cluster
from galley_launch.cluster.profile_files import every, folders, path_of
from galley_launch.cluster.profile_words import normal, refused

__all__ = ["every", "find", "folders", "load"]


def _chosen(name: str | None) -> tuple[str, Path]:
    """Name and file of the cluster called ``name``, or of the default one. Raises ``UserError``."""
    if name and name.endswith((".yaml", ".yml")):
        # The name is kept in the run, which may be continued from another directory: so it is the absolute path.
        return str(path_of(name).absolute()), Path(name)
    known = every()
    if name is None:
        defaults = [cluster for cluster, path in known.items() if load(path).default]
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
    # Normal form twice: settings such as cluster.container.image=… need a section where the file has a plain value, and
    # may bring plain values themselves.
    tree = shell_variables.add_to(normal(_override(normal(read_yaml(text, str(path))), settings)))
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
    """``tree`` with ``settings`` applied in order; ``tree`` and its sections are not changed, but copied."""
    result: dict[str, Any] = dict(tree)
    for setting in settings:
        section, _, leaf = _key(setting).rpartition(".")
        part = result.get(section) if section else result
        if part is not None and not isinstance(part, dict):
            raise UserError(setting.key, f"{section} has no keys of its own", f"write cluster.{section}=VALUE")
        part = dict(part or {}) | {leaf: read_value(*setting)}
        result = result | {section: part} if section else part
    return result
