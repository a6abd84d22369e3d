"""Geometry of the report's charts: scales, ticks, and paths in a square of 1000 by 1000 that the page stretches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Literal

from galley_launch.base.numbers import SI, unit_of

Point = tuple[float, float]
"""A step and a value."""

_step, _value = itemgetter(0), itemgetter(1)

SIDE = 1000
"""Width and height of the square; y grows downwards, as in SVG."""
_MOST = 400
_STRIPS = 100
"""Stretches that a pointer can ask about, and that a mean is taken over."""
_SPREAD = 50
"""How far a maximum must stand above the median for a logarithmic scale."""
_ALL_DOTS = 30


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in per cent of it, and what stands there."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series as an SVG path."""

    look: Literal["faint", "main", "held", "dots", "best"]
    path: str


@dataclass(frozen=True)
class Strip:
    """A vertical stretch of a chart, and what it says under a pointer."""

    left: float
    width: float
    text: str


@dataclass(frozen=True)
class Chart:
    """One chart, ready to be drawn."""

    title: str
    note: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Line, ...]
    strips: tuple[Strip, ...]
    marks: tuple[Strip, ...]
    """Where an attempt began."""
    averaged: int = 0
    """Steps that each point of the main line is a mean of; 0: the main line is every step."""
    logarithmic: bool = False

    @property
    def margin(self) -> int:
        """Characters of the longest label on the left."""
        return max((len(tick.label) for tick in self.y), default=1)


@dataclass(frozen=True)
class Scale:
    """From values to places between 0 and :data:`SIDE`, and the ticks between them."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where ``value`` lies; outside of the square where it is outside of the scale."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = (math.log10(max(each, 1e-300)) for each in (value, low, high))
        return SIDE / 2 if high == low else (value - low) / (high - low) * SIDE


def thin(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """At most ``most`` of ``points``: the lowest and highest of each stretch, so that every spike stays."""
    if len(points) <= most:
        return list(points)
    kept = {points[0], points[-1]}
    for chunk in _chunks(points, (most - 2) // 2):
        kept |= {min(chunk, key=_value), max(chunk, key=_value)}
    return sorted(kept)


def means(points: Sequence[Point], stretches: int = _STRIPS) -> list[Point]:
    """The mean of each stretch, at its middle."""
    chunks = _chunks(points, stretches)
    return [(sum(map(_step, each)) / len(each), sum(map(_value, each)) / len(each)) for each in chunks]


def _chunks(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    """``points`` in ``count`` stretches of about the same length; fewer where there are fewer points."""
    count = min(count, len(points))
    edges = [len(points) * number // count for number in range(count + 1)]
    return [points[start:end] for start, end in pairwise(edges)]


def linear(low: float, high: float, count: int = 4, whole: bool = False) -> Scale:
    """A scale from a tick at or below ``low`` to one at or above ``high``, with about ``count`` steps of 1, 2 or 5."""
    size = max(abs(low), abs(high))
    span = high - low
    if span < max(1e-9 * size, 1e-290):  # all the same, as far as a double can tell
        span = size if size > 1e-290 else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * by for by in (1, 2, 5, 10) if power * by >= span / count * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple(number * step for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, step)


def logarithmic(low: float, high: float) -> Scale:
    """A scale over whole powers of ten; both ends must be above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    ticks = tuple(10.0**power for power in range(first, last + 1, every))
    return Scale(10.0**first, 10.0 ** max(last, first + 1), ticks, 1.0, logarithmic=True)


def over_steps(first: float, last: float) -> Scale:
    """The scale below a chart: from the first step to the last, with ticks at round steps between them."""
    found = linear(first, last, 8, whole=True)
    return Scale(first, last, tuple(tick for tick in found.ticks if first <= tick <= last), found.step)


def short(value: float, step: float) -> str:
    """A label of a tick: ``0.25``, ``12k``, ``5e-5``; ``step``: between two ticks."""
    largest = max(abs(value), step)
    if value == 0:
        return "0"
    if largest < 1e-2 or largest >= 1e12:
        mantissa, _, power = f"{value:.3e}".partition("e")
        return f"{float(mantissa):g}e{int(power)}"
    unit, size = unit_of(largest, SI)
    if unit:
        return f"{value / size:g}{unit}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def exact(value: float, digits: int = 5) -> str:
    """A value as it is read from a chart: ``5.8163``, ``10,280``, ``2e-4``."""
    if value and not 1e-3 <= abs(value) < 1e12:
        return short(float(f"{value:.4g}"), 1e-9) if abs(value) < 1 else f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def path(points: Sequence[Point], x: Scale, y: Scale, dots: bool = False) -> str:
    """The ``d`` of an SVG path through ``points``, or of a dot at each."""
    places = [f"{x.place(at):.1f} {SIDE - y.place(value):.1f}" for at, value in points]
    if dots or len(places) == 1:
        return "".join(f"M{place}h0" for place in places)
    return "M" + "L".join(places)


def _strips(points: Sequence[Point], held: Sequence[Point], x: Scale, percent: bool) -> list[Strip]:
    if not points:
        return []
    chunks = _chunks(points, _STRIPS)
    starts = [x.place(chunk[0][0]) for chunk in chunks]
    edges = [0.0, *((before + after) / 2 for before, after in pairwise(starts)), float(SIDE)]
    found = []
    for number, chunk in enumerate(chunks):
        inside = [each for each in held if chunk[0][0] <= each[0] <= chunk[-1][0]]
        lines = [_told(chunk, percent), *(f"held out at step {at:,.0f}: {exact(value)}" for at, value in inside[:3])]
        left = edges[number]
        found.append(Strip(round(left, 1), round(edges[number + 1] - left, 1), "\n".join(lines)))
    return found


def _told(chunk: Sequence[Point], percent: bool) -> str:
    show = share if percent else exact
    low, high = min(map(_value, chunk)), max(map(_value, chunk))
    if len(chunk) == 1:
        return f"step {chunk[0][0]:,.0f}: {show(low)}"
    return f"steps {chunk[0][0]:,.0f} to {chunk[-1][0]:,.0f}: {show(low)} to {show(high)}"


def share(value: float) -> str:
    """``12.5%``."""
    return f"{value:.1%}"


def _scale(values: Sequence[float], from_zero: bool, may_leap: bool) -> Scale:
    low, high = min(values), max(values)
    if may_leap and low > 0 and high > _SPREAD * sorted(values)[len(values) // 2]:
        return logarithmic(low, high)
    return linear(min(low, 0.0) if from_zero else low, high)


def _lines(points: list[Point], held: list[Point], x: Scale, y: Scale, smooth: bool) -> list[Line]:
    thinned = thin(points)
    found = [Line("faint" if smooth else "main", path(thinned, x, y))] if points else []
    if smooth:
        found.append(Line("main", path(means(points), x, y)))
    elif 0 < len(points) <= _ALL_DOTS:
        found.append(Line("dots", path(points, x, y, dots=True)))
    if held:
        best = min(held, key=_value)
        found.append(Line("held", path(thin(held), x, y)))
        found.append(Line("best", path([best], x, y, dots=True)))
    return found


def chart(
    title: str,
    points: list[Point],
    x: Scale,
    note: str = "",
    *,
    held: Sequence[Point] = (),
    began: Sequence[tuple[int, str]] = (),
    from_zero: bool = True,
    may_leap: bool = False,
    averages: bool = True,
    percent: bool = False,
) -> Chart:
    """A chart of ``points`` over ``x``, with held-out losses and the steps at which attempts ``began``.

    ``may_leap``: take a logarithmic scale where single values stand far above the others.
    """
    smooth = averages and len(points) > 2 * _STRIPS
    y = _scale([value for _, value in (*points, *held)], from_zero, may_leap)
    marks = [Strip(round(x.place(at + 0.5), 1), 0.0, text) for at, text in began if x.low < at < x.high]
    return Chart(
        title,
        note,
        tuple(Tick(round(x.place(tick) * 100 / SIDE, 2), short(tick, x.step)) for tick in x.ticks),
        tuple(Tick(round(y.place(tick) * 100 / SIDE, 2), _label(tick, y, percent)) for tick in y.ticks),
        tuple(_lines(points, list(held), x, y, smooth)),
        tuple(_strips(points, held, x, percent)),
        tuple(marks),
        averaged=max(1, round(len(points) / _STRIPS)) if smooth else 0,
        logarithmic=y.logarithmic,
    )


def _label(value: float, scale: Scale, percent: bool) -> str:
    if percent:
        return f"{value:.{max(0, -math.floor(math.log10(scale.step) + 2 + 1e-9))}%}"
    return short(value, value if scale.logarithmic else scale.step)
