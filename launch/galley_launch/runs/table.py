"""The tables of ``galley status``: every run in a line each, or one run in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from galley_launch.base.numbers import duration
from galley_launch.base.table import cut, screen_width, table, width
from galley_launch.recipe.model_facts import Facts

if TYPE_CHECKING:  # Not imported for a table: pydantic takes long.
    from galley.contract.spec import RunSpec
    from galley_launch.runs.runs import State

_NARROW = 110
"""Columns below which a terminal gets fewer columns of the table."""
_LEAST_REASON = 30
"""Columns that a reason gets, however narrow the terminal is."""
_WORD = 20
"""Letters of a state that are shown; the longest of ours has nine."""


def states(found: Sequence[State]) -> None:
    """The table of ``galley status``."""
    columns = ("run", "state", "step", "loss", "tokens/s", "left", "attempt", "checkpoint", "reason")
    rows = [[*_state_row(each), " ".join(each.reason.split())] for each in found]
    room = screen_width()
    hidden = {"tokens/s", "attempt"} if room < _NARROW else set()
    hidden |= {
        name for name, *cells in zip(columns, *rows, strict=True) if name in ("left", "reason") and not any(cells)
    }
    shown = [number for number, name in enumerate(columns) if name not in hidden]
    lines = [[row[number] for number in shown] for row in (columns, *rows)]
    if "reason" not in hidden:
        taken = sum(max(map(width, cells)) + 2 for cells in list(zip(*lines, strict=True))[:-1])
        lines = [[*line[:-1], cut(line[-1], max(room - taken, _LEAST_REASON))] for line in lines]
    table(lines[0], lines[1:])


def _state_row(each: State) -> list[str]:
    row = each.row
    live = each.state in ("live", "stopping")
    return [
        each.name,
        each.state[:_WORD],
        f"{row.step}/{row.steps}" if row.step is not None and row.steps is not None else "",
        f"{row.loss:.4f}" if row.loss is not None else "",
        f"{row.tokens_per_s:,.0f}" if row.tokens_per_s is not None else "",
        duration(row.left_s) if live and row.left_s is not None else "",
        str(each.attempt or ""),
        f"step {each.checkpoint}" if each.checkpoint is not None else "",
    ]


def details(each: State, spec: RunSpec, root: Path) -> list[str]:
    """The lines of ``galley status RUN``."""
    lines = [f"{'state':<11}{each.state}" + (f": {each.message}" if each.message else "")]
    names = ("step", "loss", "tokens/s", "left", "attempt", "checkpoint")
    lines += [f"{name:<11}{value}" for name, value in zip(names, _state_row(each)[2:], strict=True) if value]
    if each.row.held_out_loss is not None:
        lines.append(f"{'held-out':<11}{each.row.held_out_loss:.4f}")
    if (root / "export" / "export.json").is_file():
        lines.append(f"{'export':<11}{root / 'export'}")
    if each.state == "unverified":
        lines.append(f"{'unverified':<11}{root / 'export.unverified'}")
    from galley_launch.recipe.summary import summary

    return [*(f"{key:<11}{text}" for key, text in summary(spec, Facts())), *lines]
