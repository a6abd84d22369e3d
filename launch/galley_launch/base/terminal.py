"""What a run shows while it goes: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.files import open_regular
from galley.contract.metrics import Follower, MetricsRow, newest
from galley.contract.rundir import Attempt, RunDir
from galley.contract.text import plain
from galley_launch.base.numbers import duration

_GOES_ON = " so far"
"""The end of a log line that reports something slow, again and again while it lasts (``galley.ranks.progress``)."""
_DOING = 60
"""Characters of such a line that the live line shows."""


def say(text: str) -> None:
    """Print one line. If the terminal is gone (ssh was cut), nothing more is shown, and the run goes on."""
    try:
        print(text, flush=True)
    except OSError:
        _silence()


def _silence() -> None:
    """Send all further output to ``/dev/null``, that of child processes too, which inherit descriptors 1 and 2."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)


MOST = 64 << 20
"""Bytes of a log that are shown at once; of a longer one, only its end."""


@dataclass
class Tail:
    """Reads a growing file line by line; a file that does not exist yet has no lines."""

    path: Path
    position: int = 0
    """Bytes that have been read."""
    rest: bytes = b""
    """The beginning of a line whose end has not been written yet."""

    def lines(self) -> list[str]:
        """The whole lines that have come since the last call."""
        try:
            with open_regular(self.path) as file:
                if (size := file.seek(0, os.SEEK_END)) < self.position:
                    self.position, self.rest = 0, b""  # Rows after the checkpoint were dropped: read it again.
                if size - self.position > MOST:
                    self.position, self.rest = size - MOST, b""
                file.seek(self.position)
                data = file.read(MOST)
        except OSError:
            return []
        self.position += len(data)
        *whole, self.rest = (self.rest + data).split(b"\n")
        # A progress bar draws over itself with carriage returns: what it drew last is behind the last of them.
        return [line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2] for line in whole]

    def skip(self) -> Tail:
        """Start at the file's present end."""
        self.position = self.path.stat().st_size if self.path.exists() else 0
        return self


class Screen(Protocol):
    """How one stage is shown."""

    def show(self) -> None:
        """Look at the files and show what is new."""

    def close(self) -> None:
        """Show the rest and leave the terminal clean."""


@dataclass
class Lines:
    """Plain lines, copied from logs, without a stage's error (``galley: …``): the launcher prints that at the end."""

    tails: list[Tail]

    def show(self) -> None:
        """Copy what is new."""
        for tail in self.tails:
            for line in tail.lines():
                if not line.startswith("galley: "):
                    say(line)

    def close(self) -> None:
        """Copy the rest."""
        self.show()


@dataclass
class Bar:
    """A live line: steps, loss, tokens a second, time left; above it, warnings from the first rank's log."""

    metrics: Follower
    log: Tail
    _progress: Any = None
    _task: Any = None
    _last: MetricsRow = field(default_factory=MetricsRow)
    _doing: str = ""
    """The newest line of the log that is not about a finished step."""

    def show(self) -> None:
        """Draw the newest row of the metrics; before there is one, the bar without numbers: loading takes a while."""
        self._last = newest(self.metrics.rows()[0], self._last)
        try:
            if self._progress is None:
                self._open()
            for line in map(plain, self.log.lines()):  # rich writes past the guard, and lets sequences through
                if line.startswith("warning: "):
                    self._progress.console.print(line, markup=False, highlight=False)
                else:  # Before the first step any line tells how far the start is; later only what is slow is shown.
                    self._doing = line[:_DOING] if self._last.steps is None or line.endswith(_GOES_ON) else ""
            self._draw()
        except OSError:
            _silence()

    def _draw(self) -> None:
        """The newest numbers, and what has been going on since they came."""
        row = self._last
        if row.steps is not None:
            text = " · ".join(filter(None, (status(row), self._doing)))
            self._progress.update(self._task, completed=row.step, total=row.steps, status=text)
        elif self._doing:
            self._progress.update(self._task, status=self._doing)

    def _open(self) -> None:
        # Imported here, because rich takes longer to import than most verbs take to run.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        terminal = Console(file=getattr(sys.stdout, "stream", sys.stdout))  # past the guard of `galley.contract.text`
        columns = (
            TextColumn(stages.TRAIN.name),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
        )
        self._progress = Progress(*columns, refresh_per_second=4, console=terminal)
        self._progress.start()
        self._task = self._progress.add_task(stages.TRAIN.name, total=None, status="loading")

    def close(self) -> None:
        """Leave the last line on the screen."""
        self.show()
        try:
            self._progress.stop()
        except OSError:
            _silence()


def status(row: MetricsRow) -> str:
    """``loss 1.2345 · held-out 1.3000 · 1,234 tokens/s · 3 min 20 s left``, without what ``row`` lacks."""
    parts = [
        "" if row.loss is None else f"loss {row.loss:.4f}",
        "" if row.held_out_loss is None else f"held-out {row.held_out_loss:.4f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f} tokens/s",
        "" if row.left_s is None else f"{duration(row.left_s)} left",
    ]
    return " · ".join(filter(None, parts))


def screen(stage: str, run: RunDir, attempt: Attempt) -> Screen:
    """How ``stage`` is shown here. Call it before the stage starts: what its log holds already is not shown again."""
    known = stages.named(stage)
    log = Tail(attempt.log(known.log)).skip()
    return Bar(Follower(run.metrics).skip(), log) if known.on_ranks and sys.stdout.isatty() else Lines([log])


def confirmed(verb: str, question: str) -> bool:
    """Whether a person answers ``question`` with yes. Raises ``UserError`` where nobody is there to be asked."""
    if not sys.stdin.isatty():
        raise UserError(verb, "asks before it removes anything, and nobody can answer here", "add yes=true")
    print(f"{question} [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
