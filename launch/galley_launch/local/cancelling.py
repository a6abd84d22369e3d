"""End a run on this box at once: its launcher is signalled, and processes that hold the run after that are killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.base import locks
from galley_launch.local import supervise

_GAP_S = 0.5
"""Seconds between two signals: a signal that is pending already is not queued again (signal(7))."""
# A launcher gives its stage GRACE_S seconds before it kills it; only then is there reason to kill the launcher.
_PATIENCE_S = supervise.GRACE_S + 5.0


def cancel(run: RunDir) -> str:
    """End ``run`` now, without saving; returns a line for the user. Raises ``UserError`` where it is not live here."""
    attempts = run.attempts()
    if not attempts or not locks.is_live(run):
        raise UserError(str(run.root), "is not running", "see galley status")
    host = locks.holder(run).partition("host ")[2]
    holders = _holders(run)
    if not holders:
        # The lock is held, but not by a process that /proc shows here: on another host, or of another user.
        where = f"on {host}" if host and host != socket.gethostname() else "by a process that is not yours"
        raise UserError(str(run.root), f"is held {where}", "cancel it there")
    attempts[-1].request_stop("user")
    # The same as Ctrl-C twice: the first makes the launcher save and stop, the second ends the stage at once.
    for _ in range(2):
        _signal(_launchers(run, holders), signal.SIGTERM)
        time.sleep(_GAP_S)
    _wait(run, _PATIENCE_S)
    if locks.is_live(run):  # no launcher, or one that does not answer
        _signal([pid for holder in _holders(run) for pid in supervise.descendants(holder)], signal.SIGKILL)
        _wait(run, _PATIENCE_S)
    if locks.is_live(run):
        raise UserError(str(run.root), "does not end", f"look at its processes: {locks.holder(run)}")
    checkpoints = run.checkpoints()
    saved = f"step {checkpoints[-1].step} was saved before" if checkpoints else "nothing was saved"
    return f"ended {run.root.name}; {saved}, and the same command goes on from there"


def _wait(run: RunDir, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while locks.is_live(run) and time.monotonic() < deadline:
        time.sleep(0.1)


def _holders(run: RunDir) -> list[int]:
    """Processes of this user that have a lock file of the run open.

    The number in the lock file is not trusted: it may be another process's by now.
    """
    locks_of_run = {run.lock.resolve(), run.ranks_lock.resolve()}
    holders = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # /proc/PID/fd may only be read by the process's user (proc(5)); others' processes are left out.
        with contextlib.suppress(OSError):
            if any(file.readlink() in locks_of_run for file in (entry / "fd").iterdir()):
                holders.append(int(entry.name))
    return holders


def _launchers(run: RunDir, holders: list[int]) -> list[int]:
    """The holder that wrote its number into the lock, or none. Stages and ranks are not signalled: that ends them."""
    return [pid for pid in holders if locks.holder(run).startswith(f"pid {pid},")]


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
