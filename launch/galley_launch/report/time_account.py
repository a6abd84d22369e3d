"""The report's timeline: a lane for each attempt, where the run's time went, and how each attempt ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from galley.contract import stages
from galley_launch.base.numbers import duration
from galley_launch.job.diagnose.advice import WORDS
from galley_launch.report.charts import SIDE, Tick
from galley_launch.report.history import Account, AttemptHistory, Kind
from galley_launch.report.rows import section

NAMES = {
    "counted": "steps that count",
    "lost": "steps lost, done again",
    "evaluate": "evaluation",
    "save": "saving",
    "start": "preparing, loading",
    "other": "waiting, ending",
    "between": "between attempts",
}
"""Kinds of time, in the order in which they are shown."""
_REASONS = {
    "walltime": "its time limit",
    "preemption": "pre-emption",
    "user": "as asked",
    "cancel": "cancelled",
    "signal": "a signal",
    "budget": "its budget is used up",
    "no progress": "no progress within its time limit",
    stages.PREFLIGHT: "a node failed its checks",
}
_LANES = 40
"""Attempts that are drawn."""
_TICKS_S = (1, 2, 5, 10, 15, 30, 60, 120, 180, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
_NARROW = 2.0
"""Least width of a segment (of :data:`SIDE`); a save or evaluation narrower than half of it joins the steps."""


@dataclass(frozen=True)
class Segment:
    """A stretch of time in a lane, of one kind."""

    kind: str
    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Lane:
    """One attempt."""

    number: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Share:
    """How much of the run's time went to one kind."""

    kind: str
    name: str
    percent: float
    time: str


@dataclass(frozen=True)
class Timeline:
    """All lanes over one axis."""

    lanes: tuple[Lane, ...]
    ticks: tuple[Tick, ...]
    left_out: int
    """Earlier attempts that are not drawn."""


def shares(account: Account) -> list[Share]:
    """What each kind took of the wall time, without kinds that took nothing."""
    wall = account.wall or 1.0
    parts = [(kind, account.spent.get(kind, 0.0)) for kind in NAMES]
    return [
        Share(kind, NAMES[kind], round(100 * spent / wall, 2), duration(spent)) for kind, spent in parts if spent > 0
    ]


def timeline(histories: Sequence[AttemptHistory]) -> Timeline | None:
    """The newest attempts over the time from the first of them to the last; None where their times are not known."""
    timed = [attempt for attempt in histories if attempt.started and attempt.ended and attempt.seconds > 0]
    shown = timed[-_LANES:]
    if not shown:
        return None
    first, last = shown[0].started or 0.0, max(attempt.ended or 0.0 for attempt in shown)
    lanes = tuple(Lane(attempt.number, tuple(_segments(attempt, first, last))) for attempt in shown)
    return Timeline(lanes, tuple(_ticks(last - first)), len(timed) - len(shown))


def _ticks(span: float) -> list[Tick]:
    """About six ticks over ``span`` seconds, at round times; whole days where it lasts longer than the table."""
    # Of the round times the first that needs no more than six steps for the span.
    days = 86400 * max(1, round(span / 6 / 86400))
    step = next((seconds for seconds in _TICKS_S if seconds >= span / 6), days)
    return [Tick(round(100 * at / span, 2), _offset(at)) for at in range(0, int(span) + 1, step)]


def _offset(seconds: int) -> str:
    """``0``, ``30 s``, ``5 min``, ``1 h 30``, ``2 d 06``: the label of a tick."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            # The rest in the next smaller unit: of a day in hours, of an hour in minutes, of a minute in seconds.
            rest = round(seconds % size * (24 if unit == "d" else 60) / size)
            return f"{seconds // size} {unit} {rest:02d}" if rest else f"{seconds // size} {unit}"
    return f"{seconds} s" if seconds else "0"


def _segments(attempt: AttemptHistory, first: float, last: float) -> list[Segment]:
    """Segments in the order of painting: the whole attempt as "other", and over it the events that are known.

    An attempt may have a million steps, so that steps of one kind are joined, and what is too narrow joins them too.
    """
    begin, end = attempt.started or 0.0, attempt.ended or 0.0
    scale = SIDE / (last - first)  # width of a second
    parts: list[tuple[Kind, float, float]] = [("other", begin, end)]
    first_step = attempt.first_step_began()
    if first_step or not attempt.events:
        parts.append(("start", begin, first_step or end))
    for event in attempt.events:
        if event.ended is None:
            continue
        # An event's time is that of its end; one that directly follows steps of its own kind makes their segment
        # longer.
        kind, since = attempt.kind(event), event.ended - event.seconds
        before, start, stop = parts[-1]
        if before in ("counted", "lost") and (kind == before or event.seconds * scale < _NARROW / 2):
            parts[-1] = (before, start, max(stop, event.ended))
        else:
            parts.append((kind, since, event.ended))
    return [_segment(kind, max(start, begin), stop, first, scale) for kind, start, stop in parts if stop > start]


def _segment(kind: Kind, start: float, stop: float, first: float, scale: float) -> Segment:
    text = f"{NAMES[kind]}: {duration(stop - start)}, from {clock(start)}"
    return Segment(kind, round((start - first) * scale, 1), round(max((stop - start) * scale, _NARROW), 1), text)


def clock(moment: float) -> str:
    """``2026-11-23 11:12:03``, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def rows(histories: Sequence[AttemptHistory], known: bool) -> list[tuple[str, ...]]:
    """The table of attempts: number, ending, steps, length, beginning, place. ``known``: whether Slurm answered."""
    return [
        (
            str(attempt.number),
            ending(attempt) if known or attempt != histories[-1] else "Slurm does not say",
            _steps(attempt),
            duration(attempt.seconds) if attempt.seconds else "",
            clock(attempt.started)[:-3] if attempt.started else "",
            _where(attempt),
        )
        for attempt in histories
    ]


def _where(attempt: AttemptHistory) -> str:
    place = attempt.placement
    stage = section(section(place, "deepspeed"), "zero_optimization").get("stage", 0)
    kind = "CPU rank" if place.get("device") == "cpu" else "GPU"
    ranks = f"{attempt.ranks} {kind}{'s' if attempt.ranks > 1 else ''}, ZeRO-{stage}" if place else ""
    nodes = ", ".join(attempt.job.nodes or ())
    job = f"job {attempt.job.job}" if attempt.job.job else ""
    return "; ".join(filter(None, (ranks, nodes, job)))


def _steps(attempt: AttemptHistory) -> str:
    steps = attempt.steps
    if not steps:
        return "none"
    lost = sum(step > attempt.horizon for step in steps)
    span = f"{min(steps):,} to {max(steps):,}" if min(steps) < max(steps) else f"{steps[0]:,}"
    return f"{span}, {lost:,} lost" if lost else span


def ending(attempt: AttemptHistory) -> str:
    """How an attempt ended, in words."""
    if attempt.live:
        return "running"
    end = attempt.end
    verdict, reason, message = end.verdict or "", end.reason or "", end.message or ""
    if verdict == "done":
        return "done" if reason in ("", "finished") else f"done: {reason}"
    why = WORDS.get(end.kind or "", "") or _REASONS.get(reason, reason)
    word = {"": "ended without a word", "lost": "ended before it could save"}.get(verdict, verdict)
    text = f"{word}: {why}" if why and why not in ("failure", stages.TRAIN.name) else word
    return f"{text} ({message})" if message and message not in text else text
