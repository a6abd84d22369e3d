"""A node has the name that Slurm gave it and the one that it calls itself, often with its domain: n1, n1.local."""

from __future__ import annotations

import socket
from collections.abc import Sequence


def known_as(name: str, nodes: Sequence[str]) -> str:
    """The one of Slurm's ``nodes`` that ``name`` is, with or without a suffix; "" where none is, or several are."""
    if name in nodes:
        return name
    short = name.partition(".")[0].lower()
    found = [node for node in nodes if short and node.partition(".")[0].lower() == short]
    return found[0] if len(found) == 1 else ""


def reachable(name: str) -> str:
    """``name`` of this very node, or with its domain where only that resolves; any other name as it is."""
    if not known_as(socket.gethostname(), [name]):
        return name
    for tried in (name, socket.getfqdn(), socket.gethostname()):
        try:
            socket.getaddrinfo(tried, None)
        except (OSError, UnicodeError):
            continue
        return tried if known_as(tried, [name]) else name
    return name
