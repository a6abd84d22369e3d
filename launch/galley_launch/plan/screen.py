"""What ``galley plan`` prints: files (with ``files=all``), commands, notes, and the summary at the end."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from galley_launch.base.table import screen_width
from galley_launch.plan.compose import Composed
from galley_launch.plan.plan import Plan
from galley_launch.recipe import model_facts
from galley_launch.recipe.summary import summary

_KEY = 9  # Columns of a summary's keys; continued lines are indented by as much.


def show(
    composed: Composed, todo: Plan, notes: Sequence[str], root: Path, all_files: bool, code: Sequence[str] = ()
) -> None:
    """Print ``todo``: files and commands on stdout; ``notes`` and the summary on stderr, after them.

    ``root``: the run directory as it is to be shown. ``code``: files that a submission copies.
    """
    blocks = _files(todo, root, code) if all_files else [_names(todo, root, code)] if todo.files else []
    blocks += [f"# {stage.name}\n{stage.shell()}\n" for stage in todo.stages]
    print("\n".join(blocks), end="\n" if blocks else "", flush=True)
    # stdout is flushed first, so that the two streams appear in this order on a terminal and in a file.
    for note in notes:
        print(f"galley: note: {note}", file=sys.stderr)
    known = model_facts.of_model(composed.spec.placement.paths.model)
    rows = [f"{key:<{_KEY}}{text}" for key, text in summary(composed.spec, known)]
    rows += [f"{'changed' if not number else '':<{_KEY}}{change}" for number, change in enumerate(composed.changes)]
    print("\n".join(line for row in rows for line in _wrapped(row)), file=sys.stderr, flush=True)


def _files(todo: Plan, root: Path, code: Sequence[str]) -> list[str]:
    blocks = [f"# {root / file}\n{text}" for file, text in todo.files.items()]
    copied = f"# {root / 'code'}: {len(code)} files, copied\n" + "".join(f"#   {name}\n" for name in code)
    return [*blocks, *([copied] if code else [])]


def _names(todo: Plan, root: Path, code: Sequence[str]) -> str:
    names = [*todo.files, *([f"code/ ({len(code)} files)"] if code else [])]
    text = f"files in {root}: {', '.join(names)} (files=all prints them)"
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, screen_width() - 2, break_on_hyphens=False))


def _wrapped(row: str) -> list[str]:
    """``row`` in lines of the terminal's width; all but the first are indented to where its value begins."""
    return textwrap.wrap(
        row,
        screen_width(),
        subsequent_indent=" " * _KEY,
        drop_whitespace=True,
        break_on_hyphens=False,
        break_long_words=False,
    )
