"""Tables and summaries for people."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from galley_launch.display import duration
from galley_launch.facts import Facts

if TYPE_CHECKING:  # Not imported for a table: pydantic takes long.
    from galley.spec import RunSpec
    from galley_launch.runs import State

_WIDEST, _NARROW = 120, 110
_LEAST_REASON = 30
"""Columns that a reason gets, however narrow the terminal is."""


def screen_width() -> int:
    """Columns to write in: those of the terminal, where there is one, and at most 120."""
    terminal = any(os.isatty(stream) for stream in (1, 2))
    return min(shutil.get_terminal_size((_WIDEST, 24)).columns, _WIDEST) if terminal else _WIDEST


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` under ``columns``. (Not by rich: importing it would be a quarter of what ``recipes`` takes.)"""
    widths = [max(map(_width, cells)) for cells in zip(columns, *rows, strict=True)]
    _print_bold(_line(columns, widths))
    for row in rows:
        print(_line(row, widths))


def _print_bold(line: str) -> None:
    if sys.stdout.isatty():
        getattr(sys.stdout, "stream", sys.stdout).write(f"\033[1m{line}\033[0m\n")  # past the guard of `galley.text`
    else:
        print(line)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def cut(text: str, room: int) -> str:
    """``text`` in at most ``room`` columns, with a mark where something is missing."""
    return text if len(text) <= room else f"{text[: max(room - 1, 0)].rstrip()}…"


def _width(text: str) -> int:
    """Columns of a terminal that ``text`` takes: some letters take two, accents none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.category(each) in ("Mn", "Me", "Cf") for each in text)


def _number(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:g}"


def _duration_of(spec: RunSpec) -> str:
    asked = spec.task.duration
    for unit in ("epochs", "steps", "tokens"):
        value = getattr(asked, unit)
        if value is not None:
            return f"{value:g} {unit.removesuffix('s') if value == 1 else unit}"
    return ""


def _method_of(spec: RunSpec) -> str:
    method = spec.task.method
    return "full" if method.kind == "full" else f"{method.kind} rank {method.rank} alpha {method.alpha:g}"


def summary(spec: RunSpec, facts: Facts, width: int = 7) -> list[str]:
    """What a run will do, in aligned lines; the batch with the whole product that gives it."""
    task, place = spec.task, spec.placement
    size = f", {_number(facts.parameters)} parameters" if facts.parameters else ""
    product = f"micro_batch {place.micro_batch} x accumulation {place.accumulation} x ranks {place.data_parallel}"
    samples = task.samples_per_step
    where = "CPU" if place.device == "cpu" else f"GPU {','.join(place.gpus)}" if place.gpus else "GPU"
    nodes = f"{place.nodes} nodes of " if place.nodes > 1 else ""
    held = f", {task.data.held_out:.3g} of it held out" if task.data.held_out else ""
    rows = {
        "run": f"{spec.name} in {place.paths.run}",
        "model": f"{task.model.path}{size}, {task.model.dtype}",
        "data": f"{task.data.path}{held}",
        "method": f"{_method_of(spec)}, {task.optimizer.name} lr {task.optimizer.lr:g}, {task.schedule.kind}",
        "batch": f"{samples} samples a step = {product}; up to {_number(samples * task.data.max_length)} tokens",
        "for": _duration_of(spec),
        "on": f"{where}, {nodes}{place.ranks_per_node} rank{'s'[: place.ranks_per_node > 1]}, ZeRO-{place.zero_stage}",
    }
    return [f"{key:<{width}}{value}" for key, value in rows.items()]


_WORD = 20
"""Letters of a state that are shown; the longest of ours has nine."""


def states(found: Sequence[State]) -> None:
    """The table of ``galley status``."""
    columns = ("run", "state", "step", "loss", "tokens/s", "left", "attempt", "checkpoint", "reason")
    rows = [[*_state_row(each), " ".join(each.reason.split())] for each in found]
    width = screen_width()
    hidden = {"tokens/s", "attempt"} if width < _NARROW else set()
    hidden |= {
        name for name, *cells in zip(columns, *rows, strict=True) if name in ("left", "reason") and not any(cells)
    }
    shown = [number for number, name in enumerate(columns) if name not in hidden]
    lines = [[row[number] for number in shown] for row in (columns, *rows)]
    if "reason" not in hidden:
        taken = sum(max(map(_width, cells)) + 2 for cells in list(zip(*lines, strict=True))[:-1])
        lines = [[*line[:-1], cut(line[-1], max(width - taken, _LEAST_REASON))] for line in lines]
    table(lines[0], lines[1:])


def _state_row(each: State) -> list[str]:
    row = each.row
    live = each.state in ("live", "stopping")
    return [
        each.name,
        each.state[:_WORD],
        f"{row['step']:.0f}/{row['steps']:.0f}" if "step" in row and "steps" in row else "",
        f"{row['loss']:.4f}" if row.get("loss") is not None else "",
        f"{row['tokens_per_s']:,.0f}" if row.get("tokens_per_s") is not None else "",
        duration(row["left_s"]) if live and row.get("left_s") is not None else "",
        str(each.attempt or ""),
        f"step {each.checkpoint}" if each.checkpoint is not None else "",
    ]


def details(each: State, spec: RunSpec, root: Path) -> list[str]:
    """The lines of ``galley status RUN``."""
    lines = [f"{'state':<11}{each.state}" + (f": {each.message}" if each.message else "")]
    names = ("step", "loss", "tokens/s", "left", "attempt", "checkpoint")
    lines += [f"{name:<11}{value}" for name, value in zip(names, _state_row(each)[2:], strict=True) if value]
    if "held_out_loss" in each.row:
        lines.append(f"{'held-out':<11}{each.row['held_out_loss']:.4f}")
    if (root / "export" / "export.json").is_file():
        lines.append(f"{'export':<11}{root / 'export'}")
    if each.state == "unverified":
        lines.append(f"{'unverified':<11}{root / 'export.unverified'}")
    return [*summary(spec, Facts(), 11), *lines]
