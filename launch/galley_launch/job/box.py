"""Why a stage failed on one box, in a line with what to do: there is no Slurm to ask, and a person reads it at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

from galley.contract.rundir import UNVERIFIED, Attempt
from galley_launch.job.diagnose.evidence import tail
from galley_launch.job.diagnose.torchrun import rank_exits

_LOG = 16 << 20
"""Bytes of torchrun's log that are looked through, from its end."""
_SIGTERM = -15
# What a rank says when another is gone.
_GONE = re.compile(
    r"(?i)connection|reset by peer|broken pipe|closed|gloo|nccl|DistBackendError|could not reach each other"
)


def failure(attempt: Attempt, stage: str, code: int) -> tuple[int, str]:
    """What ``exit.json`` says of a stage that ended with ``code`` (negative: a signal): its status and message."""
    errors = attempt.errors()
    told = [error for error in errors if error.get("status") in (2, UNVERIFIED)]
    if told:
        return 2 if told[0]["status"] == 2 else UNVERIFIED, str(told[0].get("message"))
    killed = _killed_rank(attempt.log(stage), errors)
    if killed is None and code < 0:
        killed = f"{stage} was killed by signal {-code} ({Signals(-code).name})"
    if killed:
        return 1, f"{killed}; run the same command again to resume"
    return 1, _message(attempt, stage, errors)


def _killed_rank(log: Path, errors: Sequence[dict[str, Any]]) -> str | None:
    """``rank 1 was killed by signal 9`` where torchrun's log says so.

    It ends the others with 15 itself: that is the cause only where it is the first failure, and what other ranks
    recorded is no more than that this one was gone.
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
    """The first error that was recorded, or else the last line of the stage's log; and where to read on."""
    if not errors:
        return f"{stage} failed: {_last_line(attempt.log(stage))}; see {attempt.log(stage)}"
    who = str(errors[0].get("who"))
    log = attempt.log(who) if attempt.log(who).exists() else attempt.log(stage)
    place = f" in {who}" if who != stage else ""
    return f"{stage} failed{place}: {errors[0].get('message')}; see {log}"


def _last_line(log: Path) -> str:
    return next((line.strip() for line in reversed(tail(log).split("\n")) if line.strip()), "it left no record")
