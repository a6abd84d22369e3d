"""A folder of finished things shared between runs, each named by the hash of what it was made from.

An entry exists when its folder has its final name: it is made beside, synced to disk and renamed, so that a process
killed at any moment leaves nothing that another would take for whole. A lock keeps two runs from doing the same work
twice; where the file system has no locks, both do it and the first rename wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.files import fsync_path, open_lock


def digest(value: object) -> str:
    """Sixteen hex digits over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(cache: Path, kind: str, key: str, build: Callable[[Path], None], notice: str) -> Path:
    """The folder ``cache/kind/key``, made by ``build(folder)`` where it is not there yet.

    ``notice`` is printed before building. Raises :class:`UserError` where the cache cannot be written.
    """
    final = cache / kind / key
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(f".{key}.lock")) as alone:
            if not final.is_dir():
                print(notice, flush=True)
                if alone:
                    _sweep(final)
                _build(final, build)
    except PermissionError as error:
        raise UserError(str(cache), f"cannot be written ({error.strerror})", "set another cache folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        what = f"{error.strerror} while making {kind}/{key}"
        raise UserError(str(cache), what, "free some space, or set another cache folder") from None
    return final


def _sweep(final: Path) -> None:
    """Remove what killed processes left; only while no live one can be at it."""
    for stale in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _build(final: Path, build: Callable[[Path], None]) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        # On the disk before it gets its name: after a power cut an entry that is there must be whole.
        build(beside)
        _open_to_all(beside)
        fsync_tree(beside)
        with contextlib.suppress(OSError):  # another machine without locks was first: its entry is as good
            beside.rename(final)
        fsync_path(final.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not final.is_dir():
        raise OSError(f"{final} could not be made")


def _open_to_all(root: Path) -> None:
    """Give files the permissions that the user's umask allows: libraries make some through private temporary files."""
    mask = os.umask(0)
    os.umask(mask)
    for folder, _, names in os.walk(root):
        Path(folder).chmod(0o777 & ~mask)
        for name in names:
            (Path(folder) / name).chmod(0o666 & ~mask)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold ``path`` locked, waiting for whoever has it; the kernel lets go when the process ends.

    Yields whether there is a lock at all: some file systems have none.
    """
    with os.fdopen(open_lock(path), "r") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that is making {path.name.strip('.').removesuffix('.lock')}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def fsync_tree(root: Path) -> None:
    """Put every file and folder below ``root`` on the disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_path(Path(folder))


def link_tree(source: Path, target: Path) -> None:
    """Give every file below ``source`` a second name below ``target``, or a copy where that cannot be.

    Files with several names become read-only: writing to one would write to all. Folders stay writable.
    """
    for folder, _, names in os.walk(source):
        there = target / Path(folder).relative_to(source)
        there.mkdir(parents=True, exist_ok=True)
        for name in names:
            _link(Path(folder) / name, there / name)
    fsync_tree(target)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        source.chmod(source.stat().st_mode & 0o444)
        os.link(source, target)
    except OSError:  # somebody else's, another file system, or one without links
        shutil.copyfile(source, target)
