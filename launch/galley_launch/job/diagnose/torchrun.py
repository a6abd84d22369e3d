"""The table in which torchrun says how the ranks of a node ended (``torch.distributed.elastic``).

It lists every failure, and last the one that it saw first::

    Root Cause (first observed failure):
    [0]:
      time      : 2026-11-23_12:15:08
      host      : node1
      rank      : 3 (local_rank: 3)
      exitcode  : -9 (pid: 4242)
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

ROOT = "Root Cause (first observed failure):"
UNKNOWN = float("inf")
"""The time of an entry without one: it sorts after every known time."""

# The first two lines are optional: a log that is read from its middle may begin after them.
_ENTRY = re.compile(
    r"(?:^ *time +: (\S+)\n *host +: .*\n)?^ *rank +: (\d+) \(local_rank: \d+\)\n *exitcode +: (-?\d+)\b", re.MULTILINE
)


@dataclass(frozen=True)
class RankExit:
    """How one rank ended, as torchrun on its node saw it."""

    rank: int
    code: int
    """Its exit code; negative: the signal that ended it."""
    time: float
    """In seconds since the epoch, by the clock of its host; whole seconds."""
    first: bool
    """Whether torchrun saw it fail before the others of its node, which torchrun then ended with SIGTERM."""


def rank_exits(text: str) -> list[RankExit]:
    """Every entry of the tables in a log, in the log's order; the first failure is listed twice."""
    # Entries after the last heading "Root Cause" are first failures; one log may hold the tables of several attempts.
    root = text.rfind(ROOT)
    return [
        # Nine digits are enough for a rank; a damaged log may hold numbers that int() refuses (over 4300 digits).
        RankExit(int(rank[:9]), int(code[:9]), moment(when or "", "%Y-%m-%d_%H:%M:%S"), 0 <= root < entry.start())
        for entry in _ENTRY.finditer(text)
        for when, rank, code in [entry.groups()]  # a loop of one, which names the groups
    ]


def moment(text: str, form: str) -> float:
    """``text``, a local time in the ``form`` of ``time.strptime``, in seconds since the epoch; else :data:`UNKNOWN`."""
    try:
        return time.mktime(time.strptime(text, form))
    except (ValueError, OverflowError):
        return UNKNOWN
