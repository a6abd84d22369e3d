"""Prints what the first rank is doing while it prints nothing else: loading a model, a long step, an evaluation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

FIRST_S, EVERY_S = 10.0, 30.0


def _print(text: str) -> None:
    print(text, flush=True)


@dataclass
class Progress:
    """A clock beside the training loop, in a thread of its own, for the loop may be deep in one operation."""

    shows: bool = False
    """Whether anything is printed: on the first rank only."""
    write: Callable[[str], None] = _print
    first_s: float = FIRST_S
    """Seconds of silence before the first line about what is going on, then ``every_s`` between lines."""
    every_s: float = EVERY_S
    _what: str = ""
    _part: str = ""
    _since: float = 0.0
    _next: float = 0.0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _thread: threading.Thread | None = None

    def at(self, what: str) -> None:
        """``what`` begins now; an empty string: nothing does, or it prints by itself."""
        if not self.shows:
            return
        with self._changed:
            self._what, self._part, self._since = what, "", time.monotonic()
            self._next = self._since + self.first_s
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()

    def part(self, text: str) -> None:
        """How far it is: ``micro-batch 2 of 8``."""
        self._part = text

    def _watch(self) -> None:
        with self._changed:
            while True:
                # Woken by whatever begins next, or when a line is due.
                wait = self._next - time.monotonic() if self._what else None
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                    continue
                seconds = round(time.monotonic() - self._since)
                part = f"{self._part}, " if self._part else ""
                self.write(f"{self._what}: {part}{seconds} s so far")
                self._next = time.monotonic() + self.every_s
