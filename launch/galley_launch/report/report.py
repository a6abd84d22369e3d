"""``galley report RUN``: one page about a run that needs nothing but a browser. Written to ``RUN/report.html``."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from galley.contract.errors import UserError
from galley.contract.records import read_exit
from galley.contract.rundir import RunDir, write_atomic
from galley.contract.sensitive import masked_page
from galley.contract.spec import RunSpec
from galley_launch.base.numbers import duration
from galley_launch.plan import request
from galley_launch.report import history, time_account
from galley_launch.report import page as report_page
from galley_launch.report.history import AttemptHistory
from galley_launch.report.rows import Curves, read_curves
from galley_launch.runs import runs
from galley_launch.submit import queue

NAME = "report.html"
_LIVE = ("live", "stopping")
_TRAINED = ("done", "unverified", "unexported")
# Colours of a state, as classes of the page's style sheet; a state that is not here is grey.
_TONES = {
    "done": "good", "failed": "bad", "lost": "bad", "stopped": "warn", "stopping": "warn", "live": "live",
    "exporting": "live", "preparing": "live", "unverified": "bad", "unexported": "bad",
}  # fmt: skip

_HIDDEN = "(hidden)"
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors (errno(3)) of a directory that cannot be written to, whatever room there is."""


@dataclass(frozen=True)
class Progress:
    """How far the run has come."""

    step: int
    steps: int
    left: str

    @property
    def percent(self) -> float:
        """Steps that are done, in per cent of all."""
        return min(100.0, 100 * self.step / self.steps)


def write(run: RunDir) -> Path:
    """Write the report of ``run`` and return its path: in the run, or where that cannot be written to (somebody
    else's, or on a read-only disk) in the current directory. Raises ``UserError`` where neither can be done.
    """
    path = run.root / NAME
    text = render(run, queue.query([run]).get(run.root), time.time())
    try:
        write_atomic(path, text)
    except OSError as error:
        here = Path(f"{run.root.absolute().name}.{NAME}")
        if error.errno in _CLOSED:
            with contextlib.suppress(OSError):
                write_atomic(here, text)
                return here
        todo = "make room, or write it of a copy of the run"
        raise UserError(str(path), f"cannot be written ({error.strerror})", todo) from None
    return path


def render(run: RunDir, jobs: queue.Queue | None, now: float) -> str:
    """The page. ``jobs``: what Slurm says, where the run was submitted; ``now``: seconds since the epoch."""
    spec, curves = request.read_spec(run), read_curves(run.metrics)
    state = _state(run, jobs)
    histories = history.attempt_histories(run, curves, state.state in _LIVE, state.state in (*_TRAINED, "unknown"), now)
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    # autoescape: names, logs and messages stay text, whatever is in them. StrictUndefined: a misspelt name in the
    # template is an error, not a gap in the page.
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = _content(run, spec, curves, histories, state)
    page = environment.get_template("report.html.j2").render(written=time_account.clock(now), **content)
    # Records may hold half a character (a lone surrogate), which no file can.
    return masked_page(page.encode("utf-8", "replace").decode(), os.environ, _HIDDEN)


def _content(
    run: RunDir, spec: RunSpec, curves: Curves, histories: list[AttemptHistory], state: runs.State
) -> dict[str, Any]:
    spent = history.account(histories)
    sources, counts = report_page.data(run)
    exported, checks = report_page.export(run, histories)
    return {
        "state": state,
        "tone": _TONES.get(state.state, "calm"),
        "progress": _progress(state),
        "why": _why(run, state),
        "summary": report_page.summary(spec, run),
        "tiles": report_page.tiles(curves, spent, spec.placement.device),
        "charts": report_page.draw(curves, histories),
        "spent": spent,
        "shares": time_account.shares(spent) if spent and spent.wall else [],
        "timeline": time_account.timeline(histories),
        "attempts": report_page.Table(
            ("#attempt", "ended", "steps", "lasted", "began", "where"),
            tuple(time_account.rows(histories, state.state != "unknown")),
        ),
        "sources": sources,
        "counts": counts,
        "checkpoints": report_page.checkpoints(run),
        "keep": spec.cadence.keep,
        "exported": exported,
        "checks": checks,
        "configuration": report_page.configuration(spec),
    }


def _state(run: RunDir, jobs: queue.Queue | None) -> runs.State:
    """The state that ``galley status`` shows; where Slurm does not answer, a verdict that is final is used instead."""
    state = runs.state(run, jobs)
    if state.state != "unknown":
        return state
    settled = runs.state(run, None)
    final = settled.state in (*_TRAINED, "failed", "stopped") and not _goes_on(run)
    return settled if final else state


def _goes_on(run: RunDir) -> bool:
    """Whether another job may follow the last attempt: unless its verdict rules that out."""
    attempts = run.attempts()
    end = read_exit(attempts[-1].exit) if attempts else None
    return end is None or end.again is not False


def _progress(state: runs.State) -> Progress | None:
    row = state.row
    if row.step is None or not row.steps:
        return None
    left = f"{duration(row.left_s)} left" if state.state in _LIVE and row.left_s is not None else ""
    return Progress(row.step, row.steps, left)


def _why(run: RunDir, state: runs.State) -> tuple[str, list[tuple[str, str]]] | None:
    """What ``galley why`` prints about the newest failure, if the run ended with one."""
    if state.state not in ("failed", "lost", "unverified", "unexported"):
        return None
    from galley_launch.runs import why

    explanation = why.explain(run)
    return f"{explanation.summary[:1].upper()}{explanation.summary[1:]}", [
        (key, "\n".join(values)) for key, values in explanation.rows
    ]
