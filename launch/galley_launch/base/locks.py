"""Who holds a run. One launcher at a time; and ranks that outlive their launcher still hold it."""

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

# Who looks at a lock (status, and logs every 0.3 s) takes it for a moment: one that is not free is tried again.
_LOOK_S = 0.05
_TAKE_S = 1.0


def _lock(descriptor: int, how: int, seconds: float) -> bool:
    """Lock ``descriptor``; False where that cannot be done within ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.02)


def _is_held(path: Path, how: int, seconds: float = _LOOK_S) -> bool:
    """Whether ``path`` cannot be locked ``how``."""
    try:
        # A shared lock wants no right to write, so that another user's run can be looked at. (NFS wants it for others.)
        descriptor = open_lock(path, flags=os.O_RDONLY if how == fcntl.LOCK_SH else os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, how, seconds)
    finally:
        os.close(descriptor)


def _ranks_live(run: RunDir, seconds: float = _LOOK_S) -> bool:
    return _is_held(run.ranks_lock, fcntl.LOCK_EX, seconds)  # Ranks share theirs, so only an exclusive one tells.


def is_live(run: RunDir) -> bool:
    """Whether a launcher, one of its stages, or a rank holds ``run``."""
    try:
        return _is_held(run.lock, fcntl.LOCK_SH) or _ranks_live(run)
    except OSError:  # Somebody else's run, or no lock file: it cannot be told, and this user could not start it anyway.
        return False


def holder(run: RunDir) -> str:
    """Who wrote the lock file last: ``pid 123, host box``."""
    try:
        return read_text(run.lock, 1000).strip() or "unknown process"
    except (OSError, ValueError):
        return "ranks that outlived their launcher"


def in_use(run: RunDir) -> UserError:
    """The error for a run that somebody else holds."""
    name = run.root
    return UserError(str(name), f"in use by a live run ({holder(run)})", f"galley stop {name} ends it, then try again")


@contextmanager
def held(run: RunDir) -> Iterator[int]:
    """Hold ``run``; yields the lock's descriptor. Raises ``UserError`` where somebody else holds it.

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
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()}, host {socket.gethostname()}\n".encode())
        yield descriptor
    finally:
        os.close(descriptor)
