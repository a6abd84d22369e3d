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
from galley.contract.files import follow_umask, fsync_path, of_the_disk, open_lock, read_json

FILES = ".galley-files.json"
"""In an entry: the size of each of its files."""


def digest(value: object) -> str:
    """Sixteen hex digits over a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(cache: Path, kind: str, key: str, build: Callable[[Path], None], notice: str) -> Path:
    """The folder ``cache/kind/key``, made by ``build(folder)`` where it is not there yet, or has lost files.

    ``notice`` is printed before building. Raises :class:`UserError` where the cache cannot be written.
    """
    final = cache / kind / key
    if _is_whole(final):
        mark_used(final)
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(f".{key}.lock")) as alone:
            if not _is_whole(final):
                print(notice, flush=True)
                if alone:
                    _sweep(final)
                _remove_rest(final)
                _build(final, build)
    except OSError as error:
        refusal = of_the_disk(error)
        if refusal is None:
            raise
        what = f"{error.strerror} while making {kind}/{key}"
        at = "" if error.filename is None or str(error.filename).startswith(str(final)) else f" ({error.filename})"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise UserError(str(cache), f"{what}{at}", "free some space, or set another cache folder") from None
        raise UserError(str(cache), f"cannot be written: {what}{at}", "set another cache folder") from None
    return final


def mark_used(path: Path) -> None:
    """Note that something in the cache is used now, by its modification time: ``galley cache prune`` goes by that."""
    with contextlib.suppress(OSError):  # a cache that is read-only, or somebody else's
        os.utime(path)


def _is_whole(final: Path) -> bool:
    """Whether an entry is there with every file that it was made with: file systems for scratch remove old ones.

    One that an earlier version made has no list of them: it is whole unless it is empty.
    """
    if not final.is_dir():
        return False
    files = read_json(final / FILES)
    if files is None:
        return any(final.iterdir())
    try:
        return all((final / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _list_files(folder: Path) -> None:
    """Write down the size in bytes of every file below ``folder``, by its path there."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / FILES).write_text(json.dumps(sizes), encoding="utf-8")


def _remove_rest(final: Path) -> None:
    """Remove an entry that has lost files. It is renamed first, so that nobody takes it meanwhile."""
    if final.is_dir():
        print(f"{final} has lost files (were they removed as old?): it is made again", flush=True)
        rest = final.with_name(f".{final.name}.{os.getpid()}.tmp")
        final.rename(rest)
        shutil.rmtree(rest, ignore_errors=True)


def _sweep(final: Path) -> None:
    """Remove what killed processes left; only while no live one can be at it."""
    for stale in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _build(final: Path, build: Callable[[Path], None]) -> None:
    beside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".tmp", dir=final.parent))
    try:
        # On the disk before it gets its name: after a power cut an entry that is there must be whole.
        build(beside)
        _list_files(beside)
        follow_umask(beside)
        fsync_tree(beside)
        with contextlib.suppress(OSError):  # another machine without locks was first: its entry is as good
            beside.rename(final)
        fsync_path(final.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if not final.is_dir():
        raise OSError(errno.ENOTDIR, "Not a directory", str(final))


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
