"""Start one stage, watch it, and stop it at the user's request: the first lets it save, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from galley.contract.rundir import Attempt
from galley_launch.plan.plan import Stage

_POLL_S = 0.1
GRACE_S = 5.0
"""Seconds between SIGTERM and SIGKILL, when a stage is ended at once."""
_STOPS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupts:
    """How often SIGINT (Ctrl-C) or SIGTERM came."""

    count: int = 0

    def note(self, _number: int, _frame: FrameType | None) -> None:
        """A signal handler, which only counts: :func:`watch` acts on it, in the main flow of the program."""
        self.count += 1


@contextmanager
def listening() -> Iterator[Interrupts]:
    """Count interrupts instead of ending at them, and ignore SIGHUP, so that a run outlives its terminal."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.note) for number in _STOPS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parents() -> dict[int, int]:
    """The parent of every process on this host, by process number."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError):
            # The command's name is in parentheses and may hold anything, so count from the last one. The parent is the
            # second field after it (proc(5), field 4).
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1])
    return parents


def descendants(pid: int) -> list[int]:
    """``pid`` and all of its descendants: a process group has not all, as torchrun gives each rank its own session."""
    parents, processes = _parents(), [pid]
    for parent_pid in processes:  # the list grows while it is walked: children are parents, too
        processes += [child for child, parent in parents.items() if parent == parent_pid]
    return processes


def _send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a stage and its ranks: SIGTERM, then SIGKILL to whatever is left after ``GRACE_S`` seconds."""
    # Listed before the signal: once torchrun has ended, init is the parent of its ranks, and they cannot be told apart.
    family = descendants(process.pid)
    _send(family, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and (process.poll() is None or any(_is_alive(pid) for pid in family[1:])):
        time.sleep(_POLL_S)
    _send([pid for pid in family if _is_alive(pid)], signal.SIGKILL)
    process.wait()  # collects it, so that no zombie is left


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # A zombie, which has ended but was not waited for, still has an entry, and would be waited for in vain.
    return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


def start(stage: Stage, log: Path, lock: int | None) -> subprocess.Popen[bytes]:
    """Start ``stage`` in a session of its own, its output in ``log``; it inherits the run's lock (a descriptor)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            stage.argv,
            env=os.environ | stage.env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C goes to the terminal's foreground group: the launcher alone gets it
            pass_fds=() if lock is None else (lock,),
        )


def watch(
    process: subprocess.Popen[bytes],
    attempt: Attempt,
    gentle: bool,
    interrupts: Interrupts,
    show: Callable[[], None],
    say: Callable[[str], None],
) -> int:
    """Wait for a stage; returns its exit status (negative: the signal that ended it).

    ``gentle``: the stage saves and ends by itself when it is asked to stop, as training does; others are ended at once.
    ``show`` is called several times a second, ``say`` with messages for the user.
    """
    seen = 0
    while process.poll() is None:
        show()
        if interrupts.count > seen:
            seen = interrupts.count
            attempt.request_stop("user")
            if gentle and seen == 1:
                say("saving and stopping once this step is done; Ctrl-C again to end now")
        if seen > 1 or (attempt.stop.exists() and not gentle):
            say("ending now")
            end(process)
        time.sleep(_POLL_S)
    show()
    return process.returncode
