"""Watch a training command from outside, the same way whoever wrote it: when steps end, and what its ranks hold.

A step ends when its line appears in a file; a rank is a descendant process with ``RANK`` in its environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

POLL_S, MEMORY_EVERY_S = 0.05, 1.0
GONE_S = 30.0
"""Seconds in which killed processes give back their memory."""


@dataclass
class Memory:
    """The most that one rank held, in bytes."""

    rss: int = 0
    """Resident, as the kernel keeps its high-water mark; pages shared with other ranks count in each."""
    pss: int = 0
    """Proportional: shared pages divided by their sharers. Sampled, so a short peak can be missed."""
    anonymous: int = 0
    """Resident and not backed by a file. Sampled."""


@dataclass
class Watched:
    """What was seen of one command."""

    status: int = 0
    seconds: float = 0.0
    ends: list[tuple[float, float]] = field(default_factory=list)
    """(seconds since the start, useful tokens) of each step."""
    ranks: dict[int, Memory] = field(default_factory=dict)

    @property
    def first_step_s(self) -> float:
        """Seconds from the command's start to the end of its first step."""
        return self.ends[0][0]

    def tokens_per_s(self, warmup: int) -> float:
        """Useful tokens a second over all steps after the first ``warmup``, whatever lies between steps included."""
        return sum(tokens for _, tokens in self.ends[warmup:]) / (self.ends[-1][0] - self.ends[warmup - 1][0])


def watch(
    command: list[str], env: dict[str, str], steps: Path, log: Path, limit_s: float, enough: int | None = None
) -> Watched:
    """Run ``command``; ``steps`` gets one JSON line a step with ``step`` and ``tokens``.

    With ``enough``, the command and all that it started are killed after so many steps, or after ``limit_s``: a large
    model's last checkpoint and its export take longer than what is measured.
    """
    seen, started, looked = Watched(), time.monotonic(), 0.0
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            now = time.monotonic() - started
            _read_steps(steps, seen, now)
            if enough and (now > limit_s or len(seen.ends) >= enough):
                _kill(process.pid)
                break
            if now > limit_s:
                process.terminate()
            if now - looked >= MEMORY_EVERY_S:
                looked = now
                _look_at_ranks(process.pid, seen.ranks)
            time.sleep(POLL_S)
    seen.seconds, seen.status = time.monotonic() - started, process.wait()
    _read_steps(steps, seen, seen.seconds)
    del seen.ends[enough or len(seen.ends) :]  # a quick one took more before it was killed
    return seen


def _read_steps(steps: Path, seen: Watched, now: float) -> None:
    if not steps.exists():
        return
    text = steps.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    done = [row for row in rows if "tokens" in row]
    seen.ends += [(now, float(row["tokens"])) for row in done[len(seen.ends) :]]


def _kill(root: int) -> None:
    """Kill a process and its descendants, the oldest first so that none is replaced, and wait for their memory."""
    doomed = [root, *_descendants(root)]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + GONE_S
    while any(_is_alive(pid) for pid in doomed) and time.monotonic() < until:
        time.sleep(POLL_S)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _look_at_ranks(root: int, ranks: dict[int, Memory]) -> None:
    for pid in _descendants(root):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((int(each[5:]) for each in environment if each.startswith(b"RANK=")), None)
            if rank is not None:
                _keep_most(ranks.setdefault(rank, Memory()), pid)
        except (OSError, ValueError):
            continue  # ended in between


def _keep_most(memory: Memory, pid: int) -> None:
    rollup, status = _fields(Path(f"/proc/{pid}/smaps_rollup")), _fields(Path(f"/proc/{pid}/status"))
    memory.pss = max(memory.pss, rollup.get("Pss", 0))
    memory.anonymous = max(memory.anonymous, rollup.get("Anonymous", 0))
    memory.rss = max(memory.rss, status.get("VmHWM", 0))


def _fields(path: Path) -> dict[str, int]:
    """``Name:   123 kB`` lines, in bytes."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {each[0].rstrip(":"): int(each[1]) * 1024 for each in words if len(each) == 3 and each[2] == "kB"}


def _descendants(root: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        parents.setdefault(parent, []).append(int(path.parent.name))
    found, todo = [], [root]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def summary(seen: Watched, warmup: int) -> dict[str, Any]:
    """What goes into the results of one contestant."""
    most = {name: max(getattr(each, name) for each in seen.ranks.values()) for name in ("rss", "pss", "anonymous")}
    times = [0.0, *(end for end, _ in seen.ends)]
    return {
        "tokens_per_s": round(seen.tokens_per_s(warmup), 1),
        "steady_steps": len(seen.ends) - warmup,
        "first_step_s": round(seen.first_step_s, 1),
        "warmup_s": round(seen.ends[warmup - 1][0], 1),
        "peak_gb_a_rank": {name: round(size / 1e9, 2) for name, size in most.items()},
        "step_s": [round(b - a, 2) for a, b in pairwise(times)],
        "step_tokens": [int(tokens) for _, tokens in seen.ends],
        "total_s": round(seen.seconds, 1),
    }
