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

from galley.errors import UserError
from galley.rundir import RunDir


def _is_held(path: Path, how: int) -> bool:
    """Whether ``path`` cannot be locked ``how``. Tried three times: somebody else may be looking at this moment."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        for _ in range(3):
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                return False
            time.sleep(0.02)
        return True
    finally:
        os.close(descriptor)


def _ranks_live(run: RunDir) -> bool:
    return _is_held(run.ranks_lock, fcntl.LOCK_EX)  # Ranks share theirs, so only an exclusive one tells.


def is_live(run: RunDir) -> bool:
    """Whether a launcher, one of its stages, or a rank holds ``run``."""
    try:
        return _is_held(run.lock, fcntl.LOCK_SH) or _ranks_live(run)
    except PermissionError:  # Somebody else's run: it cannot be told, and this user could not start it anyway.
        return False


def holder(run: RunDir) -> str:
    """Who wrote the lock file last: ``pid 123, host box``."""
    try:
        return run.lock.read_text(encoding="utf-8").strip() or "unknown process"
    except OSError:
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
        descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        todo = "choose a directory that you can write to: runs=DIRECTORY"
        raise UserError(str(run.root), f"cannot be written to ({error.strerror})", todo) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _ranks_live(run):
            raise in_use(run)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"pid {os.getpid()}, host {socket.gethostname()}\n".encode())
        yield descriptor
    except BlockingIOError:
        raise in_use(run) from None
    finally:
        os.close(descriptor)
