"""A stop that somebody asked for: rank 0 reads the file, and the others are told in a sum that they make anyway."""

from __future__ import annotations

from dataclasses import dataclass

from galley.contract.rundir import Attempt, read_json
from galley.ranks.stage import Superseded

GO_ON, STOP, SUPERSEDED = 0.0, 1.0, 2.0
"""What rank 0 knows at a step boundary, as a number: the other ranks add 0, so that the sum is rank 0's."""


@dataclass(frozen=True)
class Stop:
    """The stop file of an attempt, and whether this rank is the one that reads it."""

    attempt: Attempt
    reads: bool

    def flag(self) -> float:
        """What this rank adds to the sum."""
        if not self.reads:
            return GO_ON
        if self.attempt.is_superseded():
            return SUPERSEDED
        return STOP if self.attempt.stop.exists() else GO_ON

    def is_due(self, flags: float) -> bool:
        """Whether to stop, by the sum of all ranks' flags. Raises ``Superseded`` where a later attempt has begun."""
        if flags == SUPERSEDED:
            raise Superseded(self.attempt)
        return flags == STOP

    def reason(self) -> str:
        """Who asked, in a word: ``user``, ``walltime``, ``preemption``, …"""
        return str((read_json(self.attempt.stop) or {}).get("reason", "user"))
