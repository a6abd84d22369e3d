"""Locks on a run directory: one launcher at a time, and ranks that outlive their launcher still hold the run.

Both locks are flock(2): the kernel releases them when the last process that has the file open is gone, however it
ended, so that no lock is ever stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.files import open_lock, read_text
from galley.contract.rundir import RunDir

# The only way to ask whether a lock is held is to take it for a moment (as status does, and logs every 0.3 s). So one
# that is not free is tried again for a while: briefly by who only asks, longer by who needs it.
_PROBE_S = 0.05
_TAKE_S = 1.0


def _lock(descriptor: int, mode: int, seconds: float) -> bool:
    """Lock ``descriptor``; False where that cannot be done within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _is_held(path: Path, mode: int, seconds: float = _PROBE_S) -> bool:
    """Whether another process has ``path`` locked. ``mode``: ``LOCK_SH`` or ``LOCK_EX``, which is tried."""
    try:
        # A shared lock needs no permission to write, so that another user's run can be asked about. An exclusive one
        # does on NFS, where flock is emulated by fcntl's locks, which want a file that is open for writing (flock(2)).
        descriptor = open_lock(path, flags=os.O_RDONLY if mode == fcntl.LOCK_SH else os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, mode, seconds)
    finally:
        os.close(descriptor)


def _ranks_live(run: RunDir, seconds: float = _PROBE_S) -> bool:
    # All ranks share one lock (LOCK_SH): another shared lock would succeed beside them, so an exclusive one is tried.
    return _is_held(run.ranks_lock, fcntl.LOCK_EX, seconds)


def is_live(run: RunDir) -> bool:
    """Whether a launcher, one of its stages, or a rank holds ``run``."""
    try:
        return _is_held(run.lock, fcntl.LOCK_SH) or _ranks_live(run)
    except OSError:  # Another user's run, or no lock file: unknown, and this user could not start it anyway.
        return False


def holder(run: RunDir) -> str:
    """The process that wrote the lock file last: ``pid 123, host box``."""
    try:
        return read_text(run.lock, 1000).strip() or "unknown process"
    except (OSError, ValueError):
        return "ranks that outlived their launcher"


def in_use(run: RunDir) -> UserError:
    """The error for a run that another process holds."""
    name = run.root
    return UserError(str(name), f"in use by a live run ({holder(run)})", f"galley stop {name} ends it, then try again")


@contextmanager
def held(run: RunDir) -> Iterator[int]:
    """Hold ``run``; yields the lock's descriptor. Raises ``UserError`` where another process holds it.

    Stages inherit the descriptor: a stage that outlives a killed launcher keeps the run locked.
    """
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(run.lock)
    except OSError as error:
        todo = "choose a directory that you can write to: runs=DIRECTORY"
        raise UserError(str(run.root), f"cannot be written to ({error.strerror})", todo) from None
    try:
        if not _lock(descriptor, fcntl.LOCK_EX, _TAKE_S) or _ranks_live(run, _TAKE_S):
            raise in_use(run)
        # The file is only emptied once the lock is held: until then its text names the process that has it.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()}, host {socket.gethostname()}\n".encode())
        yield descriptor
    finally:
        os.close(descriptor)
