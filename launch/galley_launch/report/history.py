"""When each attempt of a run began and ended, and where its time went."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from galley.contract.records import ExitRecord, JobRecord, read_exit, read_job
from galley.contract.rundir import Attempt, RunDir, read_json
from galley_launch.report.rows import Curves, Event, Row, number, read_events

Kind = Literal["counted", "lost", "save", "evaluate", "start", "other"]
KINDS: tuple[Kind, ...] = ("counted", "lost", "evaluate", "save", "start", "other")

_SLACK_S = 60.0
"""Difference of clocks, and of a file's time from what is in it, that proves nothing."""


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt to train."""

    number: int
    job: JobRecord
    """Empty on one box."""
    placement: Row
    end: ExitRecord
    """Empty while it runs, and where it was killed before it could write its verdict."""
    started: float | None
    """None where that cannot be known: the files of the run were copied without their times."""
    ended: float | None
    live: bool
    events: tuple[Event, ...] = ()
    resumed: int | None = None
    """The step of the checkpoint that it went on from."""
    horizon: float = math.inf
    """The last of its steps that counts: a later attempt went on from there."""

    @property
    def ranks(self) -> int:
        """Processes that trained."""
        place = self.placement
        nodes, ranks = number(place.get("nodes")) or 1, number(place.get("ranks_per_node")) or 1
        return max(1, int(self.job.ranks or nodes * ranks))

    @property
    def seconds(self) -> float:
        """Seconds from its beginning to its end, in which it held its ranks; 0 where that cannot be known."""
        return max(0.0, (self.ended or 0.0) - (self.started or 0.0)) if self.started and self.ended else 0.0

    @property
    def steps(self) -> list[int]:
        """The steps that it took, whether or not they counted."""
        return [event.step for event in self.events if event.what == "step"]

    def kind(self, event: Event) -> Kind:
        """What ``event`` did for the run."""
        if event.what == "step":
            return "counted" if event.step <= self.horizon else "lost"
        return "save" if event.what == "save" else "evaluate"

    def account(self) -> dict[Kind, float]:
        """Seconds by kind. They add up to :attr:`seconds` where that is known."""
        spent: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        for event in self.events:
            spent[self.kind(event)] += event.seconds
        # "start" is the time before the first event, or all of it if there was none; "other" is what no event explains.
        first = self.first_step_began()
        if self.started and first:
            spent["start"] = max(0.0, first - self.started)
        elif not self.events:
            spent["start"] = self.seconds
        spent["other"] = max(0.0, self.seconds - sum(spent.values()))
        return spent

    def first_step_began(self) -> float | None:
        """When preparing and loading were over."""
        first = self.events[0] if self.events else None
        return first.ended - first.seconds if first and first.ended else None


def attempt_histories(run: RunDir, curves: Curves, live: bool, final: bool, now: float) -> list[AttemptHistory]:
    """Every attempt of ``run`` to train. ``live``: a launcher or a job holds it.

    ``final``: no later attempt will repeat steps, so that every step that was recorded counts. ``now``: seconds since
    the epoch, until which a live attempt lasts.
    """
    attempts = [attempt for attempt in run.attempts() if attempt.number > 0]
    read = [read_events(path) for path in run.tensorboard.glob("events.*")]
    files = sorted((events for events in read if events), key=_first)
    # `cp -r` gives files the time of the copy, but TensorBoard's events have theirs inside. If the first attempt seems
    # to have begun after its own first event, the run has been copied, and no file's time is used.
    copied = bool(files and attempts) and _began(attempts[0]) > _first(files[0]) + _SLACK_S
    histories = [_history(attempt, live and attempt == attempts[-1], copied) for attempt in attempts]
    histories = _with_metrics(_with_resumed(_with_events(histories, files)), curves)
    # A run that ended by a failure goes on from its last checkpoint: steps after that will be done again.
    checkpoints = run.checkpoints()
    horizon = math.inf if live or final else float(checkpoints[-1].step if checkpoints else 0)
    return [_with_times(attempt, now) for attempt in _with_horizons(histories, horizon)]


def _first(events: Sequence[Event]) -> float:
    """When the first event began, in seconds since the epoch."""
    return (events[0].ended or 0.0) - events[0].seconds


def _began(attempt: Attempt) -> float:
    """When its job started, or on one box when ``placement.json`` was written; infinity where neither is known."""
    return read_job(attempt.job).started or _modified(attempt.placement) or math.inf


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _history(attempt: Attempt, live: bool, copied: bool) -> AttemptHistory:
    job, end = read_job(attempt.job), read_exit(attempt.exit) or ExitRecord()
    started = _began(attempt)
    known = math.isfinite(started) and not copied
    ended = end.ended
    if ended is None:
        # On one box it ended when its verdict was written. After "done" the export writes that file again, perhaps days
        # later; _with_times takes the last event then.
        ended = None if copied or end.verdict == "done" else _modified(attempt.exit) or _last_log_write(attempt)
    return AttemptHistory(
        attempt.number,
        job,
        read_json(attempt.placement) or {},
        end,
        started if known else None,
        None if live else ended,
        live,
        resumed=job.checkpoint,
    )


def _last_log_write(attempt: Attempt) -> float | None:
    return max(filter(None, map(_modified, attempt.logs.glob("*.log"))), default=None)


def _with_events(histories: list[AttemptHistory], files: Sequence[list[Event]]) -> list[AttemptHistory]:
    """Give every attempt the events of its ranks. An attempt writes one file of events, after it began."""
    # A file belongs to the last attempt that had started when its first event began (with a second of slack); where no
    # times are known, files and attempts are paired in order.
    owned: dict[int, list[Event]] = {}
    for index, events in enumerate(files):
        fits = [attempt for attempt in histories if attempt.started and attempt.started <= _first(events) + 1.0]
        owner = fits[-1] if fits else histories[min(index, len(histories) - 1)] if histories else None
        if owner:
            owned.setdefault(owner.number, []).extend(events)
    return [replace(attempt, events=tuple(owned.get(attempt.number, ()))) for attempt in histories]


def _with_resumed(histories: list[AttemptHistory]) -> list[AttemptHistory]:
    """Fill in where an attempt resumed, if its job did not record that: at the step before its first one."""
    known = []
    for index, attempt in enumerate(histories):
        if attempt.resumed is None and attempt.steps:
            attempt = replace(attempt, resumed=attempt.steps[0] - 1)
        elif attempt.resumed is None and index == 0:
            attempt = replace(attempt, resumed=0)
        known.append(attempt)
    return known


def _with_metrics(histories: list[AttemptHistory], curves: Curves) -> list[AttemptHistory]:
    """Add events that only ``metrics.jsonl`` has: TensorBoard buffers its own for two minutes, and a kill loses those.

    Rows have no time, so that these events have none either (``_in_order`` gives them one).
    """
    known = [attempt for attempt in histories if attempt.resumed is not None]
    # Rows of lost steps are dropped from the metrics as an attempt resumes. So the row of a step belongs to the last
    # attempt that resumed before it. bisect needs steps in order: usually no attempt resumes before an earlier one did.
    starts = [attempt.resumed or 0 for attempt in known]
    owned = {attempt.number: {(event.what, event.step): event for event in attempt.events} for attempt in histories}
    for what, key in (("step", "step_s"), ("save", "stall_s")):
        for step, seconds in curves[key]:
            index = bisect_right(starts, step - 1) - 1
            if index >= 0 and (what, step) not in owned[known[index].number]:
                owned[known[index].number][what, int(step)] = Event(what, int(step), seconds, None)
    return [replace(attempt, events=_in_order(tuple(owned[attempt.number].values()))) for attempt in histories]


def _in_order(events: Sequence[Event]) -> tuple[Event, ...]:
    """``events`` as they are listed; one without a time of its own begins where the one before it ended."""
    ordered, last = [], None
    for event in events:
        if event.ended is None and last is not None:
            event = event._replace(ended=last + event.seconds)
        last = event.ended
        ordered.append(event)
    return tuple(ordered)


def _with_horizons(histories: list[AttemptHistory], last: float) -> list[AttemptHistory]:
    """Set every horizon: the lowest step at which a later attempt resumed, or ``last`` where none did."""
    after, known = last, []
    for attempt in reversed(histories):
        known.append(replace(attempt, horizon=after))
        after = min(after, math.inf if attempt.resumed is None else attempt.resumed)
    return known[::-1]


def _with_times(attempt: AttemptHistory, now: float) -> AttemptHistory:
    """``attempt`` with the beginning and end that its events prove, where its files say less.

    It began before its first event and ended after its last one. A live attempt ends ``now``.
    """
    times = [event.ended for event in attempt.events if event.ended is not None]
    first = attempt.first_step_began()
    started = min(filter(None, (attempt.started, first)), default=None)
    last = times[-1] if times else None
    if attempt.live:
        ended: float | None = now
    elif attempt.ended and (last is None or attempt.ended >= last):
        ended = attempt.ended
    else:
        ended = last
    return replace(attempt, started=started, ended=ended)


@dataclass(frozen=True)
class Account:
    """Where the time of a run went, in seconds."""

    wall: float
    """From the first attempt's beginning to the last one's end."""
    spent: dict[str, float]
    """By kind, with ``between`` for the time between attempts."""
    hours: float
    """Hours that were held, of all ranks together (GPU-hours)."""

    @property
    def goodput(self) -> float:
        """Share of the wall time spent in steps that counted."""
        return self.spent["counted"] / self.wall if self.wall else 0.0

    @property
    def held_goodput(self) -> float:
        """The same, as a share of the time in which ranks were held: waiting between attempts does not count."""
        held = self.wall - self.spent["between"]
        return min(1.0, self.spent["counted"] / held) if held > 0 else 0.0


def account(histories: Sequence[AttemptHistory]) -> Account | None:
    """Where the time of all attempts went; None where their times are not known."""
    timed = [attempt for attempt in histories if attempt.started and attempt.ended]
    if not timed:
        return None
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for attempt in timed:
        for kind, seconds in attempt.account().items():
            spent[kind] += seconds
    gaps = [max(0.0, (after.started or 0.0) - (before.ended or 0.0)) for before, after in pairwise(timed)]
    spent["between"] = sum(gaps)
    wall = (timed[-1].ended or 0.0) - (timed[0].started or 0.0)
    return Account(max(wall, 0.0), spent, sum(attempt.seconds * attempt.ranks for attempt in timed) / 3600)
