"""What Slurm's state of a job means by itself, and the signal that a process died of."""

from __future__ import annotations

from typing import NamedTuple

from galley_launch.job.diagnose.advice import HOST_MEMORY, SHM, SIGKILL


class StateMeaning(NamedTuple):
    """What a state of a job means for its failure."""

    kind: str
    retry: bool | None
    """Whether another attempt may succeed; None: as for every failure of the kind."""
    advice: str


class SignalMeaning(NamedTuple):
    """What a signal means for the failure of the process that died of it."""

    kind: str
    advice: str


STATES = {
    "NODE_FAIL": StateMeaning("node", True, "Slurm lost a node of the job: see its reason (sinfo -R)."),
    "BOOT_FAIL": StateMeaning("node", True, "A node did not boot: see its reason (sinfo -R)."),
    "OUT_OF_MEMORY": StateMeaning("host_oom", None, HOST_MEMORY),
    "TIMEOUT": StateMeaning(
        "killed", True, "Time ran out: it goes on from the last checkpoint; cadence.save_every= loses less."
    ),
    "PREEMPTED": StateMeaning("killed", True, "The job was preempted: it goes on from the last checkpoint."),
    "DEADLINE": StateMeaning(
        "killed", False, "The job's deadline passed: submit it again without one, or with a later one."
    ),
    "CANCELLED": StateMeaning("killed", False, "Someone cancelled the job: start the run again to go on."),
}
"""The states of a job that are themselves the reason of its end (squeue(1), "JOB STATE CODES")."""

# By number (signal(7)). SIGTERM (15) and SIGABRT (6) are missing: torchrun sends the former to the ranks that are left,
# and libraries of ranks that lost a peer raise the latter. SIGBUS (7) comes of a full /dev/shm, whose pages are only
# allotted as they are written.
SIGNALS = {
    4: SignalMeaning("code", "A program ran an instruction that this processor does not have: install builds for it."),
    7: SignalMeaning("host_oom", SHM),
    8: SignalMeaning("code", "A program divided by zero outside Python: look at the rank's log."),
    9: SignalMeaning("killed", SIGKILL),
    11: SignalMeaning("code", "A library crashed: PYTHONFAULTHANDLER: 1 among cluster.variables shows where."),
}
"""Signals that a rank dies of by itself."""
