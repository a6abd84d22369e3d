"""The tables of ``galley status``: every run in a line each, or one run in full."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from galley.contract.text import one_line
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
_LONGEST = 2000
"""Characters of a line about one run."""
_WORD = 20
"""Characters of a state that are shown. Galley's own have at most ten; ``exit.json`` of a damaged run may hold any."""


def states(states: Sequence[State]) -> None:
    """Print the table of ``galley status``: a line for each run."""
    columns = ("run", "state", "step", "loss", "tokens/s", "left", "attempt", "checkpoint", "reason")
    rows = [[*_state_row(state), " ".join(state.reason.split())] for state in states]
    room = screen_width()
    hidden = {"tokens/s", "attempt"} if room < _NARROW else set()
    # zip turns the rows into columns: name, then a cell of each run.
    by_column = list(zip(columns, *rows, strict=True))
    hidden |= {name for name, *cells in by_column if name in ("left", "reason") and not any(cells)}
    shown = [number for number, name in enumerate(columns) if name not in hidden]
    lines = [[row[number] for number in shown] for row in (columns, *rows)]
    if "reason" not in hidden:
        # The reason stands last and gets what the other columns leave: each its widest cell and two blanks.
        taken = sum(max(map(width, cells)) + 2 for cells in list(zip(*lines, strict=True))[:-1])
        lines = [[*line[:-1], cut(line[-1], max(room - taken, _LEAST_REASON))] for line in lines]
    table(lines[0], lines[1:])


def _state_row(state: State) -> list[str]:
    """The cells of all columns but the reason; empty where a number is not known."""
    row = state.row
    # Time left is only shown while the run trains: of another it would be what was left when it ended.
    live = state.state in ("live", "stopping")
    return [
        state.name,
        state.state[:_WORD],
        f"{row.step}/{row.steps}" if row.step is not None and row.steps is not None else "",
        f"{row.loss:.4f}" if row.loss is not None else "",
        f"{row.tokens_per_s:,.0f}" if row.tokens_per_s is not None else "",
        duration(row.left_s) if live and row.left_s is not None else "",
        str(state.attempt or ""),
        f"step {state.checkpoint}" if state.checkpoint is not None else "",
    ]


def details(state: State, spec: RunSpec, root: Path) -> list[str]:
    """The lines of ``galley status RUN``."""
    lines = [f"{'state':<11}{state.state}" + (f": {state.message}" if state.message else "")]
    names = ("step", "loss", "tokens/s", "left", "attempt", "checkpoint")
    lines += [f"{name:<11}{value}" for name, value in zip(names, _state_row(state)[2:], strict=True) if value]
    if state.row.held_out_loss is not None:
        lines.append(f"{'held-out':<11}{state.row.held_out_loss:.4f}")
    if (root / "export" / "export.json").is_file():
        lines.append(f"{'export':<11}{root / 'export'}")
    if state.state == "unverified":
        lines.append(f"{'unverified':<11}{root / 'export.unverified'}")
    from galley_launch.recipe.summary import summary  # imports pydantic, which the table of all runs does without

    lines = [*(f"{key:<11}{text}" for key, text in summary(spec, Facts())), *lines]
    # A line for each fact, whatever a record or a path holds; the columns of its key stay.
    return [f"{line[:11]}{one_line(line[11:], _LONGEST)}" for line in lines]
