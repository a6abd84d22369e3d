"""Notice ranks that hang: ``python3 -m galley_launch.job.node.watch``, beside torchrun on each node of a job.

Each rank rewrites ``rank-N.json`` in a folder of the node's own disk at every step. One that stays silent for longer
than its phase may last hangs, and the others with it: they are made to dump their Python stacks, and killed, so that
torchrun ends and the job can try again. Exit status 0: the parent is gone; 3: a rank hung.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from galley.contract.rundir import Attempt, read_json, write_atomic

HUNG = 3
"""Exit status after a hang."""
_DUMP_S = 2.0
# The shared disk may be what hangs.
_WRITE_S = 4.0


class Process(NamedTuple):
    """A process that is not a zombie."""

    pid: int
    parent: int
    started: int
    """In clock ticks since the host's start: with the number, who it is."""

    def age(self) -> float:
        """Seconds since it began."""
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - self.started / os.sysconf("SC_CLK_TCK")


def process(pid: int) -> Process | None:
    """The process of that number; None where it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command's name is in parentheses and may hold anything, so count from the last one.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Process(pid, int(fields[1]), int(fields[19]))


def descendants(top: int) -> dict[int, Process]:
    """Everything below ``top``, parents before their children."""
    present = [process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found: dict[int, Process] = {}
    parents = [top]
    for parent in parents:
        children = {each.pid: each for each in present if each is not None and each.parent == parent}
        found.update(children)
        parents += children
    return found


@dataclass(frozen=True)
class Beat:
    """A rank's newest heartbeat."""

    stamp: int
    """The file's time, in nanoseconds: another one is a new heartbeat."""
    since: float
    """When this program first saw it, by its own clock."""
    body: dict[str, Any]
    """As it could last be read."""

    @property
    def phase(self) -> str:
        """One of start, join, load, step, evaluate, save, end."""
        return str(self.body.get("phase", "start"))


@dataclass(frozen=True)
class Watch:
    """What is watched, and with how much patience."""

    parent: Process
    folder: Path
    attempt: Attempt
    limits: dict[str, float]
    """Seconds for each phase."""
    ranks: int
    """How many ranks this node has."""
    every: float
    node: str


def look(folder: Path, before: dict[int, Beat], clock: float) -> dict[int, Beat]:
    """The newest heartbeat of each rank."""
    found = dict(before)
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            rank, stamp = int(path.stem[5:]), path.stat().st_mtime_ns
            old = before.get(rank, Beat(0, clock, {}))
            body = read_json(path) or old.body
            found[rank] = Beat(stamp, old.since if stamp == old.stamp else clock, body)
    return found


def absent(watch: Watch, beats: dict[int, Beat]) -> dict[int, Beat]:
    """Ranks that never wrote, as if they had done so when the watch began. torchrun numbers a node's ranks in a row."""
    first = min(beats, default=watch.ranks * int(os.environ.get("SLURM_NODEID") or 0)) // watch.ranks * watch.ranks
    return {rank: Beat(0, 0.0, {}) for rank in range(first, first + watch.ranks) if rank not in beats}


def _rank_of(pid: int) -> int | None:
    """The rank that torchrun started as this process, or that this process descends from."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    found = dict(word.decode(errors="replace").partition("=")[::2] for word in words)
    return int(found["RANK"]) if "TORCHELASTIC_RUN_ID" in found and found.get("RANK", "").isdigit() else None


def rank_processes(watch: Watch, beats: dict[int, Beat], clock: float) -> dict[int, Process]:
    """The living process of each rank: as its heartbeat names it, or else as torchrun started it."""
    family = descendants(watch.parent.pid)
    found: dict[int, Process] = {}
    for rank, beat in beats.items():
        named = family.get(beat.body.get("pid", 0))
        # Younger than its own heartbeat: another process has the number now.
        if named is not None and named.age() >= clock - beat.since - 1:
            found[rank] = named
    for pid, each in family.items():
        started_as = _rank_of(pid)
        if started_as is not None:
            found.setdefault(started_as, each)
    return found


def silent(watch: Watch, beats: dict[int, Beat], clock: float) -> list[int]:
    """Ranks that hang, the longest silent first. One whose process has ended in its last phase does not."""
    every = {**beats, **absent(watch, beats)}
    limits = {rank: watch.limits.get(beat.phase, watch.limits["start"]) for rank, beat in every.items()}
    late = [rank for rank, beat in every.items() if clock - beat.since > limits[rank]]
    if any(every[rank].phase == "end" for rank in late):
        living = rank_processes(watch, beats, clock)
        late = [rank for rank in late if every[rank].phase != "end" or rank in living]
    return sorted(late, key=lambda rank: (every[rank].since, float(every[rank].body.get("time", 0))))


def _can_write(folder: Path) -> bool:
    """Whether the disk is there and not full."""
    try:
        (folder / ".watch").write_text("here")
    except OSError:
        return False
    return True


def _send(processes: list[Process], number: signal.Signals) -> None:
    for each in processes:
        now = process(each.pid)
        if now is not None and now.started == each.started:
            with contextlib.suppress(OSError):
                os.kill(each.pid, number)


def _in_time(write: Callable[[], None]) -> None:
    """Write to the shared disk, but wait no longer than a while for it."""

    def work() -> None:
        with contextlib.suppress(OSError):
            write()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_WRITE_S)


def _keep(watch: Watch, beats: dict[int, Beat]) -> None:
    """Copy the heartbeats to where other hosts see them."""
    watch.attempt.heartbeats.mkdir(exist_ok=True)
    for rank, beat in beats.items():
        if beat.body:
            write_atomic(watch.attempt.heartbeats / f"rank-{rank}.json", json.dumps(beat.body))


def end_hang(watch: Watch, beats: dict[int, Beat], clock: float, rank: int) -> str:
    """Keep what is known about a hang, have every rank of this node dump its stack, and kill it. Says so in a line."""
    every = {**absent(watch, beats), **beats}
    seconds = {each: round(clock - beat.since, 1) for each, beat in sorted(every.items())}
    step, phase = every[rank].body.get("step"), every[rank].phase
    ranks = [{**every[each].body, "rank": each, "silent_s": silence} for each, silence in seconds.items()]
    hang = {"node": watch.node, "rank": rank, "phase": phase, "step": step, "silent_s": seconds[rank], "ranks": ranks}
    path = watch.attempt.root / f"hang-{watch.node}.json"
    found = list(rank_processes(watch, beats, clock).values())
    _in_time(lambda: write_atomic(path, json.dumps(hang)))
    _send(found, signal.SIGUSR2)
    time.sleep(_DUMP_S)
    _send(found, signal.SIGKILL)
    where = f"step {step}" if phase == "step" else f"phase {phase}" + (f", step {step}" if step else "")
    silence = f"rank {rank} has been silent for {seconds[rank]:.0f} s in {where}"
    return f"galley: hang: {watch.node}: {silence}; its stack is in logs/rank-{rank}.log"


def run(watch: Watch) -> int:
    """Watch until the parent is gone or a rank hangs; returns the exit status."""
    beats: dict[int, Beat] = {}
    clock, before, status = 0.0, time.monotonic(), 0
    while status == 0 and (now := process(watch.parent.pid)) and now.started == watch.parent.started:
        time.sleep(watch.every)
        # Time in which this program did not run (a suspended job, a sleeping host) is nobody's silence; nor is time in
        # which ranks could not write if they wanted.
        if _can_write(watch.folder):
            clock += min(time.monotonic() - before, 2 * watch.every)
        before = time.monotonic()
        beats = look(watch.folder, beats, clock)
        late = silent(watch, beats, clock)
        if late:
            line, status = end_hang(watch, beats, clock, late[0]), HUNG
            with contextlib.suppress(OSError):
                print(line, flush=True)
    _in_time(lambda: _keep(watch, look(watch.folder, beats, clock)))
    return status


def _limits(text: str) -> dict[str, float]:
    pairs = [item.partition("=") for item in text.split(",")]
    found = {phase: float(seconds) for phase, _, seconds in pairs}
    if "start" not in found:
        raise argparse.ArgumentTypeError("start=SECONDS is missing: phases without a limit of their own take it")
    return found


def main() -> int:
    """The command line."""
    # Slurm signals the whole tree; this ends with its parent.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="galley_launch.job.node.watch", description="Notice ranks that hang.")
    parser.add_argument("--parent", type=int, required=True, help="torchrun's process")
    parser.add_argument("--heartbeats", type=Path, required=True, help="where ranks write, on the node's own disk")
    parser.add_argument("--attempt", type=Path, required=True, help="attempts/0001 of a run")
    parser.add_argument("--limits", type=_limits, required=True, help="seconds a phase: start=900,step=600,...")
    parser.add_argument("--ranks", type=int, required=True, help="how many ranks this node has")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between looks")
    given = parser.parse_args()
    parent = process(given.parent)
    if parent is None:
        return 0
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    attempt = Attempt(given.attempt)
    return run(Watch(parent, given.heartbeats, attempt, given.limits, given.ranks, given.every, node))


if __name__ == "__main__":
    os._exit(main())  # a thread may hang in a system call
