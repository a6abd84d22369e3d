"""Work on batches in several processes, with results in the batches' order: preparing uses every core it is given.

The processes are forked, so that a tokenizer and a compiled chat template need not be sent; what is sent are batches
and results. Results do not depend on how many processes there are.
"""

from __future__ import annotations

import ctypes
import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from galley.contract.errors import UserError

FIRST = 2
"""Batches that are worked on in this process: small data need no other, and what is wrong with all rows shows here."""
AHEAD = 2
"""Batches that wait for each process. Bounds what is held in memory, for reading is quicker than the work."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

T = TypeVar("T")
R = TypeVar("R")
_work: Callable[[Any], Any]


def processes() -> int:
    """How many may work at once: the cores that this process may use, or ``OMP_NUM_THREADS`` where that is fewer."""
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def in_order(work: Callable[[T], R], batches: Iterable[T], count: int) -> Iterator[tuple[T, R]]:
    """Each of ``batches`` with ``work(batch)``, which ``count`` processes do from the third batch on.

    What ``work`` raises is raised when its batch's turn comes. Raises :class:`UserError` where a process was killed.
    """
    stream = iter(batches)
    for batch in itertools.islice(stream, FIRST) if count > 1 else stream:
        yield batch, work(batch)
    following = next(stream, None)
    if following is not None:
        yield from _shared(work, itertools.chain([following], stream), count)


def _shared(work: Callable[[T], R], batches: Iterable[T], count: int) -> Iterator[tuple[T, R]]:
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(work, os.getpid()))
    waiting: deque[tuple[T, Future[R]]] = deque()
    refusals: list[UserError] = []
    try:
        for batch in _until_refused(batches, refusals):
            waiting.append((batch, pool.submit(_run, batch)))
            if len(waiting) > AHEAD * count:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
        if refusals:
            raise refusals[0]
    except BrokenProcessPool:
        what = f"one of {count} processes that prepare the data was killed, probably for want of memory"
        raise UserError("prepare", what, "give the job more memory, or set OMP_NUM_THREADS=1 for fewer") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _until_refused(batches: Iterable[T], refusals: list[UserError]) -> Iterator[T]:
    """``batches`` up to one that cannot be read, whose error goes to ``refusals``: what is before it comes first."""
    try:
        yield from batches
    except UserError as error:
        refusals.append(error)


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """What each process does first: it ends with its parent, however that ends, and leaves signals to it."""
    global _work  # a process has one task, and gets it before its first batch
    _work = work
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before that was set
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads of the tokenizer's own do not survive a fork


def _run(batch: Any) -> Any:
    return _work(batch)
