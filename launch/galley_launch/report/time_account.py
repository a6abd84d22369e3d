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
_TICKS_S = (1, 2, 5, 10, 15, 30, 60, 120, 180, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
_NARROW = 2.0
"""Width (of :data:`SIDE`) below which a segment is drawn as part of its neighbour, or at least so wide."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a lane, of one kind."""

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


def timeline(found: Sequence[AttemptHistory]) -> Timeline | None:
    """The newest attempts over their own time; None where their times are not known."""
    timed = [each for each in found if each.started and each.ended and each.seconds > 0]
    shown = timed[-_LANES:]
    if not shown:
        return None
    first, last = shown[0].started or 0.0, max(each.ended or 0.0 for each in shown)
    lanes = tuple(Lane(each.number, tuple(_segments(each, first, last))) for each in shown)
    return Timeline(lanes, tuple(_ticks(last - first)), len(timed) - len(shown))


def _ticks(span: float) -> list[Tick]:
    days = 86400 * max(1, round(span / 6 / 86400))
    step = next((each for each in _TICKS_S if each >= span / 6), days)
    return [Tick(round(100 * at / span, 2), _after(at)) for at in range(0, int(span) + 1, step)]


def _after(seconds: int) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            rest = round(seconds % size * (24 if unit == "d" else 60) / size)
            return f"{seconds // size} {unit} {rest:02d}" if rest else f"{seconds // size} {unit}"
    return f"{seconds} s" if seconds else "0"


def _segments(each: AttemptHistory, first: float, last: float) -> list[Segment]:
    """The whole attempt as a ground, and on it what is known: narrow stretches join the steps around them."""
    begin, end = each.started or 0.0, each.ended or 0.0
    scale = SIDE / (last - first)
    parts: list[tuple[Kind, float, float]] = [("other", begin, end)]
    opened = each.first_step_began()
    if opened or not each.events:
        parts.append(("start", begin, opened or end))
    for event in each.events:
        if event.ended is None:
            continue
        kind, since = each.kind(event), event.ended - event.seconds
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


def rows(found: Sequence[AttemptHistory], known: bool) -> list[tuple[str, ...]]:
    """The table of attempts: number, ending, steps, length, beginning, where; ``known``: whether Slurm answered."""
    return [
        (
            str(each.number),
            ending(each) if known or each != found[-1] else "Slurm does not say",
            _steps(each),
            duration(each.seconds) if each.seconds else "",
            clock(each.started)[:-3] if each.started else "",
            _where(each),
        )
        for each in found
    ]


def _where(each: AttemptHistory) -> str:
    place = each.placement
    stage = section(section(place, "deepspeed"), "zero_optimization").get("stage", 0)
    kind = "CPU rank" if place.get("device") == "cpu" else "GPU"
    ranks = f"{each.ranks} {kind}{'s' if each.ranks > 1 else ''}, ZeRO-{stage}" if place else ""
    nodes = ", ".join(each.job.nodes or ())
    job = f"job {each.job.job}" if each.job.job else ""
    return "; ".join(filter(None, (ranks, nodes, job)))


def _steps(each: AttemptHistory) -> str:
    steps = each.steps
    if not steps:
        return "none"
    lost = sum(step > each.horizon for step in steps)
    span = f"{min(steps):,} to {max(steps):,}" if min(steps) < max(steps) else f"{steps[0]:,}"
    return f"{span}, {lost:,} lost" if lost else span


def ending(each: AttemptHistory) -> str:
    """How an attempt ended, in words."""
    if each.live:
        return "running"
    end = each.end
    verdict, reason, message = end.verdict or "", end.reason or "", end.message or ""
    if verdict == "done":
        return "done" if reason in ("", "finished") else f"done: {reason}"
    why = WORDS.get(end.kind or "", "") or _REASONS.get(reason, reason)
    word = {"": "ended without a word", "lost": "ended before it could save"}.get(verdict, verdict)
    told = f"{word}: {why}" if why and why not in ("failure", stages.TRAIN.name) else word
    return f"{told} ({message})" if message and message not in told else told
