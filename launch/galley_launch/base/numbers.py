"""Numbers as people read them: counts, bytes, durations."""

from __future__ import annotations

from collections.abc import Sequence

Units = Sequence[tuple[str, float]]
"""Units and their sizes, the largest first."""
SI: Units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
_COUNTS: Units = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
_BYTES: Units = ((" GB", 1e9), (" MB", 1e6), (" kB", 1e3))


def unit_of(value: float, units: Units) -> tuple[str, float]:
    """The largest of ``units`` that is not larger than ``value``, and its size; ``("", 1.0)`` where all are larger."""
    return next(((unit, size) for unit, size in units if value >= size), ("", 1.0))


def count(value: float) -> str:
    """``1.35B``, ``269M``, ``12k``, ``512``: parameters, tokens."""
    unit, size = unit_of(value, _COUNTS)
    return f"{value / size:.3g}{unit}" if unit else f"{value:g}"


def size_text(value: float) -> str:
    """``1.35 GB``, ``269 MB``, ``12 kB``, ``512 bytes``: powers of ten, as disks are sold."""
    unit, size = unit_of(value, _BYTES)
    return f"{value / size:.3g}{unit}" if unit else f"{value:.0f} bytes"


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s``, ``12 s``."""
    whole = round(seconds)  # before it is divided: 119.7 s is "2 min 00 s", not "1 min 60 s"
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
