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


@dataclass(frozen=True)
class AttemptHistory:
    """One attempt to train."""

    number: int
    job: JobRecord
    """Empty on one box."""
    placement: Row
    end: ExitRecord
    """Empty while it runs, and where it ended without a word."""
    started: float | None
    """None where that cannot be known: the files of the run were copied without their times."""
    ended: float | None
    live: bool
    events: tuple[Event, ...] = ()
    resumed: int | None = None
    """The step that it went on from."""
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
        """How long it held its ranks; 0 where that cannot be known."""
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
        """Seconds by kind; they add up to :attr:`seconds` where that is known."""
        spent: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        for event in self.events:
            spent[self.kind(event)] += event.seconds
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
    """Every attempt of ``run`` to train. ``final``: each step that is written down counts."""
    attempts = [each for each in run.attempts() if each.number > 0]
    read = [read_events(path) for path in run.tensorboard.glob("events.*")]
    files = sorted((events for events in read if events), key=_first)
    copied = bool(files and attempts) and _began(attempts[0]) > _first(files[0]) + _SLACK_S
    found = [_history(each, live and each == attempts[-1], copied) for each in attempts]
    found = _with_rows(_resumed(_with_events(found, files)), curves)
    standing = run.checkpoints()
    horizon = math.inf if live or final else float(standing[-1].step if standing else 0)
    return [_closed(each, now) for each in _with_horizons(found, horizon)]


def _first(events: Sequence[Event]) -> float:
    return (events[0].ended or 0.0) - events[0].seconds


def _began(attempt: Attempt) -> float:
    return read_job(attempt.job).started or _written(attempt.placement) or math.inf


def _written(path: Path) -> float | None:
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
        # On one box it is when the verdict was written; an export writes that file again, long after perhaps.
        ended = None if copied or end.verdict == "done" else _written(attempt.exit) or _last_word(attempt)
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


def _last_word(attempt: Attempt) -> float | None:
    return max(filter(None, map(_written, attempt.logs.glob("*.log"))), default=None)


def _with_events(found: list[AttemptHistory], files: Sequence[list[Event]]) -> list[AttemptHistory]:
    """Give each attempt the events of its ranks: it writes one file, after it began."""
    owned: dict[int, list[Event]] = {}
    for place, events in enumerate(files):
        fits = [each for each in found if each.started and each.started <= _first(events) + 1.0]
        owner = fits[-1] if fits else found[min(place, len(found) - 1)] if found else None
        if owner:
            owned.setdefault(owner.number, []).extend(events)
    return [replace(each, events=tuple(owned.get(each.number, ()))) for each in found]


def _resumed(found: list[AttemptHistory]) -> list[AttemptHistory]:
    """An attempt whose job did not write down where it went on from did so before its first step."""
    known = []
    for place, each in enumerate(found):
        steps = each.steps
        guess = each.resumed if each.resumed is not None else steps[0] - 1 if steps else 0 if place == 0 else None
        known.append(replace(each, resumed=guess))
    return known


def _with_rows(found: list[AttemptHistory], curves: Curves) -> list[AttemptHistory]:
    """Add what only the metrics have: TensorBoard writes two minutes late, and a kill loses them."""
    known = [each for each in found if each.resumed is not None]
    starts = [each.resumed or 0 for each in known]
    owned = {each.number: {(event.what, event.step): event for event in each.events} for each in found}
    for what, key in (("step", "step_s"), ("save", "stall_s")):
        for step, seconds in curves[key]:
            place = bisect_right(starts, step - 1) - 1
            if place >= 0 and (what, step) not in owned[known[place].number]:
                owned[known[place].number][what, int(step)] = Event(what, int(step), seconds, None)
    return [replace(each, events=_in_time(tuple(owned[each.number].values()))) for each in found]


def _in_time(events: Sequence[Event]) -> tuple[Event, ...]:
    """``events`` in order; what has no time of its own follows what came before it."""
    ordered, last = [], None
    for event in events:
        if event.ended is None and last is not None:
            event = event._replace(ended=last + event.seconds)
        last = event.ended
        ordered.append(event)
    return tuple(ordered)


def _with_horizons(found: list[AttemptHistory], last: float) -> list[AttemptHistory]:
    after, known = last, []
    for each in reversed(found):
        known.append(replace(each, horizon=after))
        after = min(after, math.inf if each.resumed is None else each.resumed)
    return known[::-1]


def _closed(each: AttemptHistory, now: float) -> AttemptHistory:
    """Settle when ``each`` began and ended by what it did, where nothing better is known."""
    times = [event.ended for event in each.events if event.ended is not None]
    first = each.first_step_began()
    started = min(filter(None, (each.started, first)), default=None)
    if each.live:
        ended: float | None = now
    else:
        ended = each.ended if each.ended and not (times and each.ended < times[-1]) else times[-1] if times else None
    return replace(each, started=started, ended=ended)


@dataclass(frozen=True)
class Account:
    """Where the time of a run went, in seconds."""

    wall: float
    """From the first attempt's beginning to the last one's end."""
    spent: dict[str, float]
    """By kind, ``between`` (attempts) included."""
    hours: float
    """Hours of all ranks together."""

    @property
    def goodput(self) -> float:
        """Share of the wall time spent in steps that counted."""
        return self.spent["counted"] / self.wall if self.wall else 0.0

    @property
    def held(self) -> float:
        """The same share of the time in which ranks were held."""
        held = self.wall - self.spent["between"]
        return min(1.0, self.spent["counted"] / held) if held > 0 else 0.0


def account(found: Sequence[AttemptHistory]) -> Account | None:
    """Where the time of all attempts went; None where their times are not known."""
    timed = [each for each in found if each.started and each.ended]
    if not timed:
        return None
    spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for each in timed:
        for kind, seconds in each.account().items():
            spent[kind] += seconds
    gaps = [max(0.0, (after.started or 0.0) - (before.ended or 0.0)) for before, after in pairwise(timed)]
    spent["between"] = sum(gaps)
    wall = (timed[-1].ended or 0.0) - (timed[0].started or 0.0)
    return Account(max(wall, 0.0), spent, sum(each.seconds * each.ranks for each in timed) / 3600)
