"""Files that may be damaged, half copied or somebody else's: read with limits, written whole. Part of the contract.

The standard library only, and the grammar of Python 3.9: it runs on a node's own interpreter too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError

_RECORD = 16 << 10
"""Bytes of room without which a disk is full: four blocks, as one file and its name may take."""
LARGEST = 64 << 20
"""Bytes of the largest record that is read whole: no manifest, setting or verdict is a tenth of it."""
LARGEST_TEMPLATE = 4 << 20
"""Bytes of the largest chat template: a hundred times any known one."""

_ELSEWHERE = "choose a place that you can write to"
_OF_DISKS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room: your quota is used up",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: _ELSEWHERE,
    errno.EACCES: "correct its permissions, or choose another place",
    errno.EPERM: "correct its permissions, or choose another place",
    errno.ENOTDIR: "move the file away that lies where a folder should be",
    errno.EEXIST: "move away what lies there",
    errno.EISDIR: "move the folder away that lies where a file should be",
    errno.ELOOP: "correct the symbolic link",
    errno.ENAMETOOLONG: "no file can have so long a name; choose another",
}
"""What to do about errors (errno(3)) that come from a disk as it is, not from the code."""
_OF_RUST = re.compile(r"\(os error (\d{1,3})\)")
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Of these, what write(2) returns, which knows no path."""


def open_regular(path: Path) -> BufferedReader:
    """Open ``path`` for reading. Raises ``OSError`` where it is not a regular file (a FIFO waits for ever)."""
    if not stat.S_ISREG(path.stat().st_mode):  # before it is opened: that alone can make a device act
        raise OSError(errno.EINVAL, _kind(path), str(path))
    # If it became a FIFO meanwhile, opening it does not wait.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _kind(path), str(path))
    return os.fdopen(descriptor, "rb")


def _kind(path: Path) -> str:
    return "Is a directory" if path.is_dir() else "Is not a regular file"


def read_bytes(path: Path, limit: int = LARGEST) -> bytes:
    """All of a regular file. Raises ``OSError``, also where it has more than ``limit`` bytes."""
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"Has more than {limit >> 20} MB", str(path))
    return data


def read_text(path: Path, limit: int = LARGEST) -> str:
    """All of a regular file as UTF-8. Raises ``OSError``, or ``ValueError`` where it is not UTF-8."""
    return read_bytes(path, limit).decode("utf-8")


def reason(error: Exception) -> str:
    """Why a file cannot be read, without its path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def names_in(folder: Path) -> list[str]:
    """The names in a folder; none where there is no such folder. Raises ``OSError`` where it cannot be read, unlike
    ``Path.glob``.
    """
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a path with a NUL, which no folder has
        return []


def of_the_disk(error: Exception) -> UserError | None:
    """The refusal that an error of files is where the disk is the reason: full, read-only, closed; else None."""
    if not isinstance(error, OSError):
        number = _OF_RUST.search(str(error))  # safetensors and tokenizers have errors of their own
        if not number or int(number[1]) not in _OF_WRITING:
            return None
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    todo = _OF_DISKS.get(error.errno or 0)
    if todo and (error.filename is not None or error.errno in _OF_WRITING):  # else it may be a signal's or a socket's
        return UserError(str(error.filename or "disk")[:200], error.strerror or str(error), todo)
    if error.errno == errno.ENOENT and error.filename is None:  # of getcwd(3), the only call that is given no path
        return UserError("current directory", "does not exist any more", "change to one that does (cd)")
    return None


def is_full(folder: Path) -> bool:
    """Whether the file system of ``folder`` has no room for a record: no blocks or, where it counts them, no names."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < _RECORD or bool(disk.f_files and not disk.f_favail)


def parse_json(text: str | bytes) -> Any:
    """The JSON value in ``text``. Raises ``ValueError``, also where it nests deeper than Python reads."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nests too deep") from None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``, or None where there is no such file or it is not a JSON object."""
    try:
        value = parse_json(read_text(path))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_rows(path: Path, last: int = LARGEST) -> list[dict[str, Any]]:
    """The objects in the ``last`` bytes of a file of one a line; lines that were torn, or hold none, are left out."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - last))
            lines = file.read(last).splitlines()
    except OSError:
        return []
    return [row for line in lines if (row := _object(line)) is not None]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line.decode("utf-8", "replace"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def number(value: object, otherwise: float = 0.0) -> float:
    """``value`` where it is a number that can be counted with, else ``otherwise``: JSON's have no limit."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300
    return float(value) if known else otherwise  # type: ignore[arg-type]


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` beside ``path``, fsync, rename: a reader sees the old file or the new one, never half."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:  # the disk is full: no half of a file is left there
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    fsync_path(path.parent)


def shut_out_others() -> None:
    """Whatever this process makes from now on, its user's umask decides who may read it; no stranger may write to it.

    A umask of 0 would let every user of the machine replace a checkpoint, or stop the run.
    """
    os.umask(_umask() | 0o002)


def follow_umask(root: Path) -> None:
    """Give a file, or all below a folder, the permissions that the umask allows.

    Libraries write through private temporary files (safetensors, tempfile), which nobody else could read.
    """
    mask = _umask()
    for folder, _, names in os.walk(root):
        Path(folder).chmod(0o777 & ~mask)
        for name in names:
            (Path(folder) / name).chmod(0o666 & ~mask)
    if not root.is_dir():
        root.chmod(0o666 & ~mask)


def _umask() -> int:
    # Not by os.umask, which only tells it by changing it, for all threads of the process.
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("\nUmask:")[2].split()[0], 8)
    except (OSError, IndexError, ValueError):
        mask = os.umask(0o077)
        os.umask(mask)
        return mask


def fsync_path(path: Path) -> None:
    """Make a file's content, or a directory's names, survive a power cut (fsync(2): a new name needs its directory
    synced).
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_lock(path: Path, mode: int = 0o644, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open a lock file, by default made where there is none, and leave what is in it; returns the descriptor.

    Raises ``OSError`` where it is anything but a regular file: through a symbolic link another file would be locked,
    and written to.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "Is a symbolic link", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _kind(path), str(path))
    return descriptor
