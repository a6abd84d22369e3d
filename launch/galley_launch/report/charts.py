"""Geometry of the report's charts: scales, ticks, and paths in a square of 1000 by 1000 that the page stretches.

The SVG has ``preserveAspectRatio="none"``, so that the square takes the shape of its box. Text would be stretched with
it: ticks are in per cent, and are HTML beside the SVG. Lines keep their width by ``non-scaling-stroke``.
"""

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
"""Points of a line: more cannot be told apart on a screen."""
_STRIPS = 100
"""Stretches of a chart: every one has a text under the pointer, and the main line has the mean of every one."""
_SPIKE = 50
"""How many times the median the maximum must be for a logarithmic scale."""
_ALL_DOTS = 30
"""Points up to which all are also drawn as dots."""


@dataclass(frozen=True)
class Tick:
    """A label on an axis, and where it is, in per cent of the axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """One series as an SVG path."""

    style: Literal["faint", "main", "held", "dots", "best"]
    """The class of the SVG path, whose colour and width are in the page's style sheet."""
    path: str
    """The ``d`` of the SVG path."""


@dataclass(frozen=True)
class Strip:
    """A vertical stretch of a chart, and the text that is shown where a pointer is over it."""

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
    """Where later attempts began."""
    averaged: int = 0
    """Steps over which each point of the main line is a mean; 0: the main line has every step."""
    logarithmic: bool = False

    @property
    def margin(self) -> int:
        """Characters of the longest label on the left."""
        return max((len(tick.label) for tick in self.y), default=1)


@dataclass(frozen=True)
class Scale:
    """Maps values to positions between 0 and :data:`SIDE`; and the values of its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float
    """Between two ticks."""
    logarithmic: bool = False

    def position(self, value: float) -> float:
        """Where ``value`` is drawn. Values outside of the scale get positions outside of the square."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = (math.log10(max(number, 1e-300)) for number in (value, low, high))
        return SIDE / 2 if high == low else (value - low) / (high - low) * SIDE


def thin(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """At most ``most`` of ``points``: the lowest and highest of each stretch, so that every spike stays."""
    # Two points are kept of every stretch, and two of the budget are the first and the last point of all.
    if len(points) <= most:
        return list(points)
    kept = {points[0], points[-1]}
    for chunk in _chunks(points, (most - 2) // 2):
        kept |= {min(chunk, key=_value), max(chunk, key=_value)}
    return sorted(kept)


def means(points: Sequence[Point], stretches: int = _STRIPS) -> list[Point]:
    """The mean of each stretch, at the mean of its steps."""
    chunks = _chunks(points, stretches)
    return [(sum(map(_step, chunk)) / len(chunk), sum(map(_value, chunk)) / len(chunk)) for chunk in chunks]


def _chunks(points: Sequence[Point], count: int) -> list[Sequence[Point]]:
    """``points`` in ``count`` stretches of about the same length; fewer where there are fewer points."""
    count = min(count, len(points))
    edges = [len(points) * number // count for number in range(count + 1)]
    return [points[start:end] for start, end in pairwise(edges)]


def linear(low: float, high: float, count: int = 4, whole: bool = False) -> Scale:
    """A scale from a tick at or below ``low`` to one at or above ``high``, with about ``count`` steps of 1, 2 or 5."""
    size = max(abs(low), abs(high))
    span = high - low
    # Values that are all equal (but for rounding) have no span of their own: a scale of their size is drawn instead.
    if span < max(1e-9 * size, 1e-290):
        span = size if size > 1e-290 else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    # The smallest round step with which about `count` steps cover the span; 0.999 and 1e-9 forgive rounding errors.
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= span / count * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple(number * step for number in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks, step)


def logarithmic(low: float, high: float) -> Scale:
    """A scale over whole powers of ten; both ends must be above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 5))
    ticks = tuple(10.0**power for power in range(first, last + 1, every))  # six labels at most
    return Scale(10.0**first, 10.0 ** max(last, first + 1), ticks, 1.0, logarithmic=True)


def over_steps(first: float, last: float) -> Scale:
    """The scale below a chart: from the first step to the last, with ticks at round steps between them."""
    rounded = linear(first, last, 8, whole=True)
    return Scale(first, last, tuple(tick for tick in rounded.ticks if first <= tick <= last), rounded.step)


def short(value: float, step: float) -> str:
    """The label of a tick: ``0.25``, ``12k``, ``5e-5``. ``step``: between two ticks, which decides the digits."""
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
    """A value in the text under a pointer: ``5.8163``, ``10,280``, ``2e-4``."""
    if value and not 1e-3 <= abs(value) < 1e12:
        return short(float(f"{value:.4g}"), 1e-9) if abs(value) < 1 else f"{value:.4g}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def path(points: Sequence[Point], x: Scale, y: Scale, dots: bool = False) -> str:
    """The ``d`` of an SVG path through ``points``, or of a dot at each."""
    corners = [f"{x.position(step):.1f} {SIDE - y.position(value):.1f}" for step, value in points]
    # A line of length 0 (h0) with round ends is drawn as a dot, which a circle would not be: it would be stretched.
    if dots or len(corners) == 1:
        return "".join(f"M{corner}h0" for corner in corners)
    return "M" + "L".join(corners)


def _strips(points: Sequence[Point], held_out: Sequence[Point], x: Scale, percent: bool) -> list[Strip]:
    """The texts under a pointer: strips without gaps, whose borders are half-way between neighbouring stretches."""
    if not points:
        return []
    # _chunks is given the same number as means(), so that a strip is about one point of the main line.
    chunks = _chunks(points, _STRIPS)
    starts = [x.position(chunk[0][0]) for chunk in chunks]
    edges = [0.0, *((before + after) / 2 for before, after in pairwise(starts)), float(SIDE)]
    strips = []
    for number, chunk in enumerate(chunks):
        inside = [point for point in held_out if chunk[0][0] <= point[0] <= chunk[-1][0]]
        losses = [f"held out at step {step:,.0f}: {exact(value)}" for step, value in inside[:3]]
        text = "\n".join([_chunk_text(chunk, percent), *losses])
        strips.append(Strip(round(edges[number], 1), round(edges[number + 1] - edges[number], 1), text))
    return strips


def _chunk_text(chunk: Sequence[Point], percent: bool) -> str:
    show = share if percent else exact
    low, high = min(map(_value, chunk)), max(map(_value, chunk))
    if len(chunk) == 1:
        return f"step {chunk[0][0]:,.0f}: {show(low)}"
    return f"steps {chunk[0][0]:,.0f} to {chunk[-1][0]:,.0f}: {show(low)} to {show(high)}"


def share(value: float) -> str:
    """``12.5%``."""
    return f"{value:.1%}"


def _scale(values: Sequence[float], from_zero: bool, spiky: bool) -> Scale:
    low, high = min(values), max(values)
    if spiky and low > 0 and high > _SPIKE * sorted(values)[len(values) // 2]:
        return logarithmic(low, high)
    return linear(min(low, 0.0) if from_zero else low, high)


def _lines(points: list[Point], held_out: list[Point], x: Scale, y: Scale, smooth: bool) -> list[Line]:
    thinned = thin(points)  # in the order of painting: what comes later is drawn over what came before
    lines = [Line("faint" if smooth else "main", path(thinned, x, y))] if points else []
    if smooth:
        lines.append(Line("main", path(means(points), x, y)))
    elif 0 < len(points) <= _ALL_DOTS:
        lines.append(Line("dots", path(points, x, y, dots=True)))
    if held_out:
        best = min(held_out, key=_value)
        lines.append(Line("held", path(thin(held_out), x, y)))
        lines.append(Line("best", path([best], x, y, dots=True)))
    return lines


def chart(
    title: str,
    points: list[Point],
    x: Scale,
    note: str = "",
    *,
    held_out: Sequence[Point] = (),
    began: Sequence[tuple[int, str]] = (),
    from_zero: bool = True,
    spiky: bool = False,
    averages: bool = True,
    percent: bool = False,
) -> Chart:
    """A chart of ``points`` over ``x``, with held-out losses.

    ``began``: the steps after which later attempts went on, with a text for each. ``spiky``: use a logarithmic scale if
    single values are far above the others. ``averages``: draw means over every step's value if there are many steps.
    """
    smooth = averages and len(points) > 2 * _STRIPS
    y = _scale([value for _, value in (*points, *held_out)], from_zero, spiky)
    # Half a step on: between the last step of one attempt and the first of the next.
    marks = [Strip(round(x.position(step + 0.5), 1), 0.0, text) for step, text in began if x.low < step < x.high]
    return Chart(
        title,
        note,
        tuple(Tick(round(x.position(tick) * 100 / SIDE, 2), short(tick, x.step)) for tick in x.ticks),
        tuple(Tick(round(y.position(tick) * 100 / SIDE, 2), _label(tick, y, percent)) for tick in y.ticks),
        tuple(_lines(points, list(held_out), x, y, smooth)),
        tuple(_strips(points, held_out, x, percent)),
        tuple(marks),
        averaged=max(1, round(len(points) / _STRIPS)) if smooth else 0,
        logarithmic=y.logarithmic,
    )


def _label(value: float, scale: Scale, percent: bool) -> str:
    if percent:
        return f"{value:.{max(0, -math.floor(math.log10(scale.step) + 2 + 1e-9))}%}"
    return short(value, value if scale.logarithmic else scale.step)
