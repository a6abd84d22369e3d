"""``galley cache``: what runs share on this machine, and the removal of what none has used for a while."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.files import names_in
from galley_launch.base.numbers import duration, size_text
from galley_launch.base.table import table
from galley_launch.base.terminal import confirmed

_DAY = 86_400.0


@dataclass(frozen=True)
class Entry:
    """One thing in the cache: prepared data, a converted model, compiled operators …"""

    kind: str
    path: Path
    size: int
    """Bytes of its files."""
    alone: int
    """Bytes that its removal frees: files that runs have names for, too, stay."""
    idle: float
    """Seconds since it was made or used."""


def entries(root: Path) -> list[Entry]:
    """Everything in the cache ``root``, by kind; what is hidden is half made, or a lock."""
    now = time.time()
    paths = [root / kind / name for kind in sorted(names_in(root)) for name in sorted(names_in(root / kind))]
    present = []
    for path in paths:
        if path.name.startswith(".") or path.parent.name.startswith("."):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process removes it now
            present.append(_entry(path, now))
    return present


def _entry(path: Path, now: float) -> Entry:
    files = [path] if path.is_file() else [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    statuses = [file.lstat() for file in files]
    size = sum(status.st_size for status in statuses)
    alone = sum(status.st_size for status in statuses if status.st_nlink == 1)
    return Entry(path.parent.name, path, size, alone, max(0.0, now - path.stat().st_mtime))


def show(root: Path) -> int:
    """Print how much of each kind there is. Returns the exit status."""
    present = entries(root)
    if not present:
        print(f"nothing in {root} yet: prepared data and converted models will be there")
        return 0
    rows = []
    for kind in sorted({entry.kind for entry in present}):
        of_kind = [entry for entry in present if entry.kind == kind]
        sizes = (sum(entry.size for entry in of_kind), sum(entry.alone for entry in of_kind))
        rows.append([kind, f"{len(of_kind):,}", *map(size_text, sizes), _ago(min(entry.idle for entry in of_kind))])
    table(["kind", "entries", "size", "not in runs", "last used"], rows)
    total, alone = sum(entry.size for entry in present), sum(entry.alone for entry in present)
    print(f"{size_text(total)} in {root}; removing all of it would free {size_text(alone)}, the rest is in runs, too")
    return 0


def _ago(seconds: float) -> str:
    return f"{int(seconds // _DAY):,} days ago" if seconds >= 2 * _DAY else f"{duration(seconds)} ago"


def prune(root: Path, kind: str, days: int, yes: bool) -> int:
    """Remove what was not used for ``days`` days, of one ``kind`` or (empty) of all, after asking unless ``yes``.

    Returns the exit status. Raises ``UserError`` for a kind that is not there.
    """
    present = entries(root)
    kinds = sorted({entry.kind for entry in present})
    if kind and kind not in kinds:
        raise UserError("cache", f"{root} has nothing of the kind {kind!r}", f"kinds: {', '.join(kinds) or 'none yet'}")
    old = [entry for entry in present if kind in ("", entry.kind) and entry.idle >= days * _DAY]
    if not old:
        print(f"nothing was idle for {days} days or longer")
        return 0
    for entry in old:
        print(f"{entry.path}: {size_text(entry.size)}, used {_ago(entry.idle)}")
    these = "it" if len(old) == 1 else f"these {len(old):,} entries"
    if not yes and not confirmed("cache", f"Remove {these}? What needs them makes them again."):
        print("nothing was removed")
        return 1
    for entry in old:
        _remove(entry.path)
    print(f"removed {len(old):,} entries, {size_text(sum(entry.alone for entry in old))} freed")
    return 0


def _remove(path: Path) -> None:
    """Under another name first, so that nobody takes for whole what is half removed."""
    rest = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        path.rename(rest)
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink()
