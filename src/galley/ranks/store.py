"""The file in which ranks find each other."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from torch._C._distributed_c10d import Store

STORE = "GALLEY_STORE"
"""The environment variable that names the file to the ranks."""
LAUNCHER = "GALLEY_LAUNCHER"
"""The environment variable that tells ranks the process id of torchrun."""


def private(folder: Path) -> Path:
    """Make ``folder`` for its owner alone. Raises ``PermissionError`` where others could write to it or read it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise PermissionError(f"{folder} must be a directory that only you can open (mode 700): ranks meet in it")
    return folder


def await_keys(store: Store, keys: list[str], seconds: float) -> None:
    """Wait until ``keys`` are in ``store``, or ``seconds`` are over.

    ``Store.wait`` asks a shared disk a hundred times a second; this asks less and less often.
    """
    await_all([lambda: store.check(keys)], seconds)


def await_all(conditions: list[Callable[[], bool]], seconds: float) -> list[int]:
    """Wait until all hold; returns the numbers of those that do not after ``seconds``."""
    until, pause, missing = time.monotonic() + seconds, 0.01, list(range(len(conditions)))
    while missing := [number for number in missing if not conditions[number]()]:
        if time.monotonic() > until:
            break
        time.sleep(pause)
        pause = min(1.0, 1.2 * pause)
    return missing


def meet_nodes(folder: Path, rank: int, nodes: int, seconds: float) -> tuple[list[int], bool]:
    """Wait in ``folder`` for the other nodes of a job, and see whether file locks hold between them.

    Returns the nodes that did not come within ``seconds``, and whether locks hold: while node 0 has one, no other node
    may get it. (Without, FileStore's writers would overwrite each other.)
    """
    if rank > 0:
        if await_all([lambda: _read(folder / "node-0") != ""], seconds):
            return [0], True
        with _locked(folder) as got_it:
            _write(folder / f"node-{rank}", "open" if got_it else "shut")
            return [], not got_it
    with _locked(folder) as got_it:
        _write(folder / "node-0", "here")
        others = [folder / f"node-{other}" for other in range(1, nodes)]
        missing = await_all([lambda path=path: _read(path) != "" for path in others], seconds)  # type: ignore[misc]
        return [number + 1 for number in missing], got_it and "open" not in [_read(path) for path in others]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Take the lock in ``folder`` if nobody has it; yields whether it was taken."""
    descriptor = _open(folder / "lock")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    # Creating also looks past what NFS remembers of a name that was not there, for up to a minute.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def create(path: Path) -> None:
    """Make an empty file for its owner alone, if it is not there."""
    os.close(_open(path))


def _read(path: Path) -> str:
    descriptor = _open(path)
    try:
        return os.read(descriptor, 16).decode()
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    descriptor = _open(path)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
