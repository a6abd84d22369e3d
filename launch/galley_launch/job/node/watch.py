"""Notice ranks that hang: ``python3 -m galley_launch.job.node.watch``, beside torchrun on each node of a job.

Each rank rewrites ``rank-N.json`` in a folder of the node's own disk at every step. A rank that stays silent for longer
than its phase may last hangs, and the others wait for it: all are made to dump their Python stacks, and killed, so that
torchrun ends and the job can try again. Exit status 0: the parent (torchrun) has ended; 3: a rank hung.
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
"""Seconds that ranks have to write their stacks."""
_WRITE_S = 4.0
"""Seconds that a write to the shared disk may take: that disk may be what hangs."""


class Process(NamedTuple):
    """A process that is not a zombie."""

    pid: int
    parent: int
    started: int
    """In clock ticks since the host's start. Numbers are used again; the number and this together are unique."""

    def age(self) -> float:
        """Seconds since it began."""
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return uptime - self.started / os.sysconf("SC_CLK_TCK")


def process(pid: int) -> Process | None:
    """The process with that number; None where it has ended, a zombie included."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The command's name is in parentheses and may hold anything, so count from the last one. What follows it is the
    # state, the parent, … and as the 20th of these the start time (proc(5), fields 3, 4 and 22).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else Process(pid, int(fields[1]), int(fields[19]))


def descendants(top: int) -> dict[int, Process]:
    """Every process below ``top`` by its number, parents before their children."""
    present = [process(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    below: dict[int, Process] = {}
    parents = [top]
    for parent in parents:  # the list grows while it is walked: children are parents, too
        children = {child.pid: child for child in present if child is not None and child.parent == parent}
        below.update(children)
        parents += children
    return below


@dataclass(frozen=True)
class Beat:
    """A rank's newest heartbeat."""

    stamp: int
    """The file's modification time, in nanoseconds: where it differs, the heartbeat is a new one."""
    since: float
    """When this program first saw it, in seconds of its own clock (see :func:`run`), not of the rank's."""
    body: dict[str, Any]
    """The file's content, as it could last be read."""

    @property
    def phase(self) -> str:
        """One of start, join, load, step, evaluate, save, end."""
        return str(self.body.get("phase", "start"))


@dataclass(frozen=True)
class Watch:
    """What is watched, and how long it may be silent."""

    parent: Process
    folder: Path
    attempt: Attempt
    limits: dict[str, float]
    """Seconds for each phase."""
    ranks: int
    """How many ranks this node has."""
    every: float
    """Seconds between two readings of the heartbeats."""
    node: str


def newest_beats(folder: Path, before: dict[int, Beat], clock: float) -> dict[int, Beat]:
    """The newest heartbeat of each rank that has written one. ``before``: those of the last reading."""
    beats = dict(before)
    for path in folder.glob("rank-*.json"):
        with contextlib.suppress(OSError, ValueError):
            rank, stamp = int(path.stem[5:]), path.stat().st_mtime_ns
            old = before.get(rank, Beat(0, clock, {}))
            # The time is read before the content: a rank that writes in between is then seen anew at the next reading.
            body = read_json(path) or old.body
            beats[rank] = Beat(stamp, old.since if stamp == old.stamp else clock, body)
    return beats


def absent(watch: Watch, beats: dict[int, Beat]) -> dict[int, Beat]:
    """Ranks of this node that never wrote a heartbeat, each as if it had written one when the watch began."""
    # torchrun numbers a node's ranks in a row, but may order the nodes otherwise than Slurm does: a rank that has
    # written shows where this node's row is, and only without one is it taken from SLURM_NODEID.
    first = min(beats, default=watch.ranks * int(os.environ.get("SLURM_NODEID") or 0)) // watch.ranks * watch.ranks
    return {rank: Beat(0, 0.0, {}) for rank in range(first, first + watch.ranks) if rank not in beats}


def _rank_of(pid: int) -> int | None:
    """The rank of this process or of its ancestor that torchrun started; None: neither is a rank."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    variables = dict(word.decode(errors="replace").partition("=")[::2] for word in words)
    # RANK alone may come from elsewhere, such as the user's own environment; torchrun sets both.
    is_rank = "TORCHELASTIC_RUN_ID" in variables and variables.get("RANK", "").isdigit()
    return int(variables["RANK"]) if is_rank else None


def rank_processes(watch: Watch, beats: dict[int, Beat], clock: float) -> dict[int, Process]:
    """The living process of each rank: as its heartbeat names it, or else as torchrun started it."""
    family = descendants(watch.parent.pid)
    processes: dict[int, Process] = {}
    for rank, beat in beats.items():
        named = family.get(beat.body.get("pid", 0))
        # Younger than its own heartbeat: another process has the number now.
        if named is not None and named.age() >= clock - beat.since - 1:
            processes[rank] = named
    for pid, candidate in family.items():
        started_as = _rank_of(pid)
        if started_as is not None:
            # Children inherit the variables, but come after their parents here: the first one is the rank itself.
            processes.setdefault(started_as, candidate)
    return processes


def silent(watch: Watch, beats: dict[int, Beat], clock: float) -> list[int]:
    """Ranks that hang, the longest silent first. A rank whose process has ended in its last phase does not hang."""
    all_beats = {**beats, **absent(watch, beats)}
    limits = {rank: watch.limits.get(beat.phase, watch.limits["start"]) for rank, beat in all_beats.items()}
    late = [rank for rank, beat in all_beats.items() if clock - beat.since > limits[rank]]
    if any(all_beats[rank].phase == "end" for rank in late):
        living = rank_processes(watch, beats, clock)
        late = [rank for rank in late if all_beats[rank].phase != "end" or rank in living]
    # Two that were first seen in one reading are ordered by the time that they wrote themselves.
    return sorted(late, key=lambda rank: (all_beats[rank].since, float(all_beats[rank].body.get("time", 0))))


def _can_write(folder: Path) -> bool:
    """Whether the disk is there and not full."""
    try:
        (folder / ".watch").write_text("here")
    except OSError:
        return False
    return True


def _send(processes: list[Process], number: signal.Signals) -> None:
    for target in processes:
        # It may have ended since it was listed, and its number may be another process's by now.
        now = process(target.pid)
        if now is not None and now.started == target.started:
            with contextlib.suppress(OSError):
                os.kill(target.pid, number)


def _in_time(write: Callable[[], None]) -> None:
    """Write to the shared disk, but wait for it no longer than :data:`_WRITE_S` seconds."""

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
    """Record a hang of ``rank``, have every rank of this node dump its stack, and kill them; returns a line on it."""
    all_beats = {**absent(watch, beats), **beats}
    seconds = {number: round(clock - beat.since, 1) for number, beat in sorted(all_beats.items())}
    step, phase = all_beats[rank].body.get("step"), all_beats[rank].phase
    ranks = [{**all_beats[number].body, "rank": number, "silent_s": silence} for number, silence in seconds.items()]
    hang = {"node": watch.node, "rank": rank, "phase": phase, "step": step, "silent_s": seconds[rank], "ranks": ranks}
    path = watch.attempt.root / f"hang-{watch.node}.json"
    processes = list(rank_processes(watch, beats, clock).values())
    # The record comes first: once ranks are killed, torchrun ends, and the job's end may look for it at once.
    _in_time(lambda: write_atomic(path, json.dumps(hang)))
    _send(processes, signal.SIGUSR2)  # faulthandler's signal in every rank: it writes stacks even in a hung thread
    time.sleep(_DUMP_S)
    _send(processes, signal.SIGKILL)  # a rank that waits inside a kernel or a collective does not handle SIGTERM
    where = f"step {step}" if phase == "step" else f"phase {phase}" + (f", step {step}" if step else "")
    silence = f"rank {rank} has been silent for {seconds[rank]:.0f} s in {where}"
    return f"galley: hang: {watch.node}: {silence}; its stack is in logs/rank-{rank}.log"


def run(watch: Watch) -> int:
    """Watch until the parent is gone or a rank hangs; returns the exit status."""
    beats: dict[int, Beat] = {}
    clock, before, status = 0.0, time.monotonic(), 0
    while status == 0 and (now := process(watch.parent.pid)) and now.started == watch.parent.started:
        time.sleep(watch.every)
        # The clock leaves out time in which this program did not run (a suspended job, a sleeping host), for the ranks
        # did not run either; and time in which the disk took no heartbeat.
        if _can_write(watch.folder):
            clock += min(time.monotonic() - before, 2 * watch.every)
        before = time.monotonic()
        beats = newest_beats(watch.folder, beats, clock)
        late = silent(watch, beats, clock)
        if late:
            line, status = end_hang(watch, beats, clock, late[0]), HUNG
            with contextlib.suppress(OSError):
                print(line, flush=True)
    _in_time(lambda: _keep(watch, newest_beats(watch.folder, beats, clock)))
    return status


def _limits(text: str) -> dict[str, float]:
    pairs = [item.partition("=") for item in text.split(",")]
    limits = {phase: float(seconds) for phase, _, seconds in pairs}
    if "start" not in limits:
        raise argparse.ArgumentTypeError("start=SECONDS is missing: phases without a limit of their own take it")
    return limits


def main() -> int:
    """The command line."""
    # Slurm signals every process of the step: the ranks act on it, and this program ends when torchrun has.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="galley_launch.job.node.watch", description="Notice ranks that hang.")
    parser.add_argument("--parent", type=int, required=True, help="torchrun's process")
    parser.add_argument("--heartbeats", type=Path, required=True, help="where ranks write, on the node's own disk")
    parser.add_argument("--attempt", type=Path, required=True, help="attempts/0001 of a run")
    parser.add_argument("--limits", type=_limits, required=True, help="seconds a phase: start=900,step=600,...")
    parser.add_argument("--ranks", type=int, required=True, help="how many ranks this node has")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two readings")
    arguments = parser.parse_args()
    parent = process(arguments.parent)
    if parent is None:
        return 0
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    attempt, every = Attempt(arguments.attempt), arguments.every
    return run(Watch(parent, arguments.heartbeats, attempt, arguments.limits, arguments.ranks, every, node))


if __name__ == "__main__":
    os._exit(main())  # not sys.exit, whose clean-up may wait for a thread that hangs in a system call
