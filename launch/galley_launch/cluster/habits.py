"""What a user's shell says to every ``sbatch``: kept where a profile has a key for it and leaves it out, else told."""

from __future__ import annotations

import os
import re
from typing import Any

from galley_launch.base.yaml_text import Tree
from galley_launch.cluster.profile import Cluster

_KEYS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CLUSTERS": "clusters",
    "SLURM_CLUSTERS": "clusters",
}
"""sbatch(1), INPUT ENVIRONMENT VARIABLES."""


def _value(name: str) -> str:
    value = os.environ.get(name, "")
    # "all", or several clusters: which of them would be known only afterwards.
    return "" if _KEYS[name] == "clusters" and (not re.fullmatch(r"[\w.-]+", value) or value == "all") else value


def added(tree: Tree) -> Tree:
    """A profile with what the shell says of keys that it leaves out."""
    found: dict[str, Any] = {key: _value(name) for name, key in reversed(_KEYS.items()) if _value(name)}
    return {**found, **{key: value for key, value in tree.items() if value is not None or key not in found}}


def notes(cluster: Cluster) -> list[str]:
    """What of the shell's variables jobs get, and what they do not."""
    told = []
    for name, key in _KEYS.items():
        value, used = os.environ.get(name), getattr(cluster, key)
        if value and used == value:
            told.append(f"jobs take cluster.{key}={value}, as {name} says")
        elif value:
            told.append(f"{name}={value} is not used: jobs take cluster.{key}={used if used is not None else 'none'}")
    other = sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in _KEYS)
    if other:
        told.append(
            f"{', '.join(other)} {'is' if len(other) == 1 else 'are'} not used: jobs take what the profile says"
        )
    return told
