"""What a run shows while it goes: a live line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from galley.contract import stages
from galley.contract.files import open_regular
from galley.contract.metrics import Follower, MetricsRow, newest
from galley.contract.rundir import Attempt, RunDir
from galley_launch.base.numbers import duration

_GOES_ON = " so far"
"""How a line of the log ends that says what has been going on for a while (``galley.ranks.progress``)."""
_DOING = 60
"""Letters of such a line that the live line shows."""


def say(text: str) -> None:
    """One line to the terminal. A terminal that is gone never ends a run: from then on nothing is shown."""
    try:
        print(text, flush=True)
    except OSError:
        _silence()


def _silence() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    os.close(null)


MOST = 64 << 20
"""Bytes of a log that are shown at once: of a longer one, its end."""


@dataclass
class Tail:
    """Reads a growing file line by line; a file that does not exist yet has no lines."""

    path: Path
    position: int = 0
    rest: bytes = b""

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
        # Of a progress bar, what it drew last.
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
    """Plain lines, copied from logs; but not why a stage failed, which the launcher says itself at the end."""

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
        """Draw the newest row; a start without rows is drawn too, for loading a model takes a while."""
        self._last = newest(self.metrics.rows()[0], self._last)
        try:
            if self._progress is None:
                self._open()
            for line in self.log.lines():
                if line.startswith("warning: "):
                    self._progress.console.print(line, markup=False, highlight=False)
                else:
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
    """The numbers of a metrics row that a person watches."""
    parts = [
        "" if row.loss is None else f"loss {row.loss:.4f}",
        "" if row.held_out_loss is None else f"held-out {row.held_out_loss:.4f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f} tokens/s",
        "" if row.left_s is None else f"{duration(row.left_s)} left",
    ]
    return " · ".join(filter(None, parts))


def screen(stage: str, run: RunDir, attempt: Attempt) -> Screen:
    """How ``stage`` is shown here: call before it starts."""
    known = stages.named(stage)
    log = Tail(attempt.log(known.log)).skip()
    return Bar(Follower(run.metrics).skip(), log) if known.on_ranks and sys.stdout.isatty() else Lines([log])
