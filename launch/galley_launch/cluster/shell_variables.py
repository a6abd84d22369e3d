"""``SBATCH_ACCOUNT`` and other variables by which a user's shell sets options of every ``sbatch``.

Galley runs sbatch without them. So their values are put into the profile, where it has a key for one and does
not set it; for all others, :func:`notes` tells that jobs do not get them.
"""

from __future__ import annotations

import os
import re
from typing import Any

from galley.contract.sensitive import masked
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
"""Variable (sbatch(1), INPUT ENVIRONMENT VARIABLES) to key of the profile. Of two for one key the first counts."""


def _value(name: str) -> str:
    """The value of the variable ``name``; empty where it is unset, or cannot be a profile's value."""
    value = os.environ.get(name, "")
    # Slurm also takes "all" and lists, and picks the cluster where the job starts first: known only after submission.
    return "" if _KEYS[name] == "clusters" and (not re.fullmatch(r"[\w.-]+", value) or value == "all") else value


def add_to(tree: Tree) -> Tree:
    """The profile ``tree`` with the shell's values for keys that it leaves out, or leaves empty."""
    # Reversed, so that of two variables for one key the first in the table is written last, and stays.
    shell: dict[str, Any] = {key: _value(name) for name, key in reversed(_KEYS.items()) if _value(name)}
    return {**shell, **{key: value for key, value in tree.items() if value is not None or key not in shell}}


def notes(cluster: Cluster) -> list[str]:
    """A line for each variable of the shell that is set: whether jobs get its value."""
    lines = []
    for name, key in _KEYS.items():
        value, used = os.environ.get(name), getattr(cluster, key)
        if value and used == value:
            lines.append(f"jobs take cluster.{key}={value}, as {name} says")
        elif value:
            taken = used if used is not None else "none"
            lines.append(f"{name}={masked(value, '(hidden)')} is not used: jobs take cluster.{key}={taken}")
    other = sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in _KEYS)
    if other:
        lines.append(
            f"{', '.join(other)} {'is' if len(other) == 1 else 'are'} not used: jobs take what the profile says"
        )
    return lines
