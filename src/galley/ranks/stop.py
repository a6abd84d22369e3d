"""A stop that somebody asked for: rank 0 sees it, and the others learn of it in a sum that they make anyway."""

from __future__ import annotations

from dataclasses import dataclass

from galley.contract.rundir import Attempt, read_json
from galley.ranks.stage import Superseded

GO_ON, STOP, SUPERSEDED = 0.0, 1.0, 2.0
"""What rank 0 sees at a boundary, as a number."""


@dataclass(frozen=True)
class Stop:
    """The stop file of an attempt, and whether this rank is the one that looks."""

    attempt: Attempt
    looks: bool

    def look(self) -> float:
        """What this rank adds to the sum."""
        if not self.looks:
            return GO_ON
        if self.attempt.is_superseded():
            return SUPERSEDED
        return STOP if self.attempt.stop.exists() else GO_ON

    def is_due(self, sight: float) -> bool:
        """Whether the sum says so. Raises ``Superseded`` where it says that a later attempt has begun."""
        if sight == SUPERSEDED:
            raise Superseded(self.attempt)
        return sight == STOP

    def reason(self) -> str:
        """Who asked, in a word: ``user``, ``walltime``, ``preemption``, …"""
        return str((read_json(self.attempt.stop) or {}).get("reason", "user"))
