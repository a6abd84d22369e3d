"""The two names of a node: the one that Slurm has, and its own host name, often with a domain (n1, n1.local)."""

from __future__ import annotations

import socket
from collections.abc import Sequence


def known_as(name: str, nodes: Sequence[str]) -> str:
    """Which of Slurm's ``nodes`` has ``name``, with or without its domain; "" where none or several have it."""
    if name in nodes:
        return name
    short = name.partition(".")[0].lower()
    matches = [node for node in nodes if short and node.partition(".")[0].lower() == short]
    return matches[0] if len(matches) == 1 else ""


def reachable(name: str) -> str:
    """``name``, a node's; where it is this node's own and does not resolve, a longer name of it that does."""
    if not known_as(socket.gethostname(), [name]):
        return name
    for candidate in (name, socket.getfqdn(), socket.gethostname()):
        try:
            socket.getaddrinfo(candidate, None)
        except (OSError, UnicodeError):
            continue
        # What resolves may be a name such as "localhost", which other nodes would take for themselves.
        return candidate if known_as(candidate, [name]) else name
    return name
