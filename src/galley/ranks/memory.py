"""How much memory this process could still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_KIND = {
    "": ("memory.max", "memory.current", "inactive_file "),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
}
"""Files of a control group, versions 2 and 1 (kernel: admin-guide/cgroup-v2, cgroup-v1/memory): limit, use, and the
line of ``memory.stat`` that says how much of the use is files, which make room when memory is wanted."""


def free_bytes(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory that are free on this host, and within the control groups (a job's, a container's)."""
    lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min([free, *_left(proc, groups)])


def _left(proc: Path, groups: Path) -> Iterator[int]:
    for line in (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        kind = "memory" if "memory" in controllers.split(",") else ""
        if controllers and not kind:
            continue
        top = groups / kind
        here = top / path.lstrip("/")
        for folder in (here, *here.parents):
            *names, files = _KIND[kind]
            limit, used = (_number(folder / name) for name in names)
            if limit is not None and used is not None:
                yield max(0, limit - used + _line(folder / "memory.stat", files))
            if folder == top:
                break


def _line(path: Path, begins: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(begins)), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there, or "max"
        return None
