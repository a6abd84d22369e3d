"""Work of others' making, tried in a process of its own first: one that never ends, or takes all memory, ends there."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

MEMORY = 4 << 30
"""Bytes that the work may take beyond what the process has."""


def ends(work: Callable[[], object], seconds: int) -> bool:
    """Whether ``work`` ends, however it does, within ``seconds`` (of processor time) and :data:`MEMORY`.

    It must let ``MemoryError`` through.
    A forked child tries it: not even an alarm interrupts Python while it computes the power of a power.
    """
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGXCPU, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, -1))  # a child's own time begins at nothing
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, -1))
            status = _status(work)
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _status(work: Callable[[], object]) -> int:
    try:
        work()
    except MemoryError:
        return 1
    except BaseException:
        return 0
    return 0


@contextlib.contextmanager
def within(seconds: float, error: Exception) -> Iterator[None]:
    """Raise ``error`` where what is done inside takes more than ``seconds`` of processor time.

    Only in a process's main thread, and only between two steps of Python: :func:`ends` has no such limits, but forks.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
