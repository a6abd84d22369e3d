"""Call Galley as a user would, in this process, and judge what comes of it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from galley.contract.errors import UserError

LIMIT_S = 10
MEMORY = 2 << 30
"""Bytes that a call may take beyond what the process has."""
LONGEST = 500
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class Hang(BaseException):
    """Ten seconds are over; on a machine that has more to do than cores, ten seconds of this process's own time."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time and memory of what is done inside."""

    began, worked = time.monotonic(), time.process_time()

    def over(*_: object) -> None:
        is_crowded = os.getloadavg()[0] > (os.cpu_count() or 1)
        if is_crowded and time.process_time() - worked < LIMIT_S and time.monotonic() - began < 10 * LIMIT_S:
            signal.alarm(LIMIT_S)
            return
        raise Hang

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    handler = signal.signal(signal.SIGALRM, over)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def guarded(call: Callable[[], Any], allowed: tuple[type[BaseException], ...]) -> tuple[Any, str]:
    """What ``call`` returns or raises of what it may, and what is wrong with it: nothing, or its traceback."""
    try:
        with bounded():
            return call(), ""
    except allowed as error:
        return error, ""
    except Hang:
        return None, f"more than {LIMIT_S} s\n{traceback.format_exc(limit=-6)}"
    except BaseException:
        return None, f"traceback\n{traceback.format_exc(limit=-8)[-3000:]}"


def verb(words: list[str]) -> str:
    """What is wrong with ``galley WORDS``; nothing, where it does its work or refuses in one line."""
    from galley_launch import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status, wrong = guarded(lambda: cli.main(words), (SystemExit,))
    if wrong:
        return wrong
    code = status.code if isinstance(status, SystemExit) else status
    if code not in (0, 2):
        return f"exit status {code!r}: {err.getvalue()[-500:]}"
    if odd := _CONTROL.search(out.getvalue() + err.getvalue()):
        return f"raw character {odd[0]!r}: {(out.getvalue() + err.getvalue())[max(0, odd.start() - 80) :][:160]!r}"
    return refusal(err.getvalue()) if code == 2 else notes(err.getvalue())


def refusal(text: str) -> str:
    """What is wrong with the lines of a refusal."""
    lines = [line for line in text.splitlines() if not line.startswith("galley: note: ")]
    if len(lines) != 1 or not lines[0].startswith("galley: "):
        return f"a refusal of {len(lines)} lines: {text[:600]!r}"
    return notes(text)


def notes(text: str) -> str:
    """What is wrong with lines beside the work."""
    long = [line for line in text.splitlines() if line.startswith("galley: ") and len(line) > LONGEST]
    return f"a line of {len(long[0])} characters: {long[0][:200]!r}" if long else ""


def reader(call: Callable[[], Any], *allowed: type[BaseException]) -> str:
    """What is wrong with a function of the data plane that reads the input: it returns, or raises ``UserError``."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        error, wrong = guarded(call, (UserError, *allowed))
    if not wrong and isinstance(error, UserError) and not str(error).strip():
        return "an empty refusal"
    return wrong
