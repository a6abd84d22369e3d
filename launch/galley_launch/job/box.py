"""Why a stage failed on one box, in a line with what to do.

This is shorter than what ``diagnose`` does for jobs: there is no Slurm to ask, and a person reads the line at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from galley.contract.files import is_full
from galley.contract.rundir import UNVERIFIED, Attempt
from galley_launch.job.diagnose.evidence import tail
from galley_launch.job.diagnose.torchrun import rank_exits

_LOG = 16 << 20
"""Bytes of torchrun's log that are searched, from its end."""
_SIGTERM = -15
_SIGNALLED = re.compile(r"SignalException: Process \d+ got signal: (\d{1,2})$")
"""torchrun's last line where it was sent a signal itself."""
# Errors of a rank whose peer is gone.
_GONE = re.compile(
    r"(?i)connection|reset by peer|broken pipe|closed|gloo|nccl|DistBackendError|could not reach each other"
)


def failure(attempt: Attempt, stage: str, code: int) -> tuple[int, str]:
    """(status, message) for ``exit.json`` of a stage that ended with ``code`` (negative: the signal that ended it)."""
    errors = attempt.errors()
    # A user's mistake (2) and an export that is not verified have a message that already says what to do.
    explained = [error for error in errors if error.get("status") in (2, UNVERIFIED)]
    if explained:
        return 2 if explained[0]["status"] == 2 else UNVERIFIED, str(explained[0].get("message"))
    killed = _killed_rank(attempt.log(stage), errors)
    if killed is None and code < 0:
        killed = f"{stage} was killed by signal {-code} ({Signals(-code).name})"
    if killed:
        return 1, f"{killed}; run the same command again to resume"
    return 1, _message(attempt, stage, errors)


def _killed_rank(log: Path, errors: Sequence[dict[str, Any]]) -> str | None:
    """``rank 1 was killed by signal 9`` where torchrun's log says so.

    torchrun itself ends the other ranks with 15 (SIGTERM). So a 15 is the cause only where it is the first failure, and
    where the errors that other ranks recorded are only about a peer that is gone.
    """
    killed = [rank for rank in rank_exits(tail(log, _LOG)) if rank.code < 0]
    for rank in killed:
        if rank.code != _SIGTERM:
            return f"rank {rank.rank} was killed by signal {-rank.code}"
    cause = next((rank for rank in killed if rank.first), None)
    if cause and all(_GONE.search(str(error.get("message"))) for error in errors):
        return f"rank {cause.rank} was ended by signal 15 (SIGTERM), which neither galley nor torchrun sent"
    return None


def _message(attempt: Attempt, stage: str, errors: Sequence[dict[str, Any]]) -> str:
    """The first error that was recorded, or else the last line of the stage's log; and the log with the rest."""
    ended = _SIGNALLED.search(_last_line(attempt.log(stage))) if not errors else None
    if ended:
        return (
            f"{stage} was ended by signal {ended[1]}, which galley did not send; run the same command again to resume"
        )
    if not errors and is_full(attempt.root) and not tail(attempt.log(stage)).strip():
        return f"{stage} failed and could not write why: the disk of {attempt.root} is full; make room there"
    if not errors:
        return f"{stage} failed: {_last_line(attempt.log(stage))}; see {attempt.log(stage)}"
    who = str(errors[0].get("who"))
    log = attempt.log(who) if attempt.log(who).exists() else attempt.log(stage)
    rank = f" in {who}" if who != stage else ""
    return f"{stage} failed{rank}: {errors[0].get('message')}; see {log}"


def _last_line(log: Path) -> str:
    return next((line.strip() for line in reversed(tail(log).split("\n")) if line.strip()), "it left no record")
