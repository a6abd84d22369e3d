"""Remove runs: never one that is live or queued, never without being told to."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.base import locks
from galley_launch.base.numbers import size_text
from galley_launch.runs import runs
from galley_launch.submit import queue


def forget(names: Sequence[str], base: Path, yes: bool) -> int:
    """Remove the runs ``names``, after asking unless ``yes``. Returns the exit status. Raises ``UserError``."""
    found = list({run.root.resolve(): run for run in (runs.find(name, base) for name in names)}.values())
    asked = queue.look(found)
    for run in found:
        _refuse_if_in_use(run, asked.get(run.root))
    for run in found:
        print(_sentence(run, asked.get(run.root)))
    if not yes and not _confirmed(len(found)):
        print("nothing was removed")
        return 1
    for run in found:
        _remove(run)
        print(f"removed {run.root}")
    return 0


def _refuse_if_in_use(run: RunDir, jobs: queue.Queue | None) -> None:
    if run.root.is_symlink():
        raise UserError(str(run.root), "is a link to a run", f"forget the run itself: {run.root.resolve()}")
    if jobs and jobs.problem:
        raise UserError(str(run.root), f"may have jobs in a queue ({jobs.problem})", "try again where Slurm answers")
    if jobs and jobs.jobs:
        raise UserError(str(run.root), "has jobs that wait or run", f"end them first: galley cancel {run.root}")
    if locks.is_live(run):
        raise UserError(str(run.root), "is live", f"end it first: galley stop {run.root}")


def _sentence(run: RunDir, jobs: queue.Queue | None) -> str:
    """What would be lost."""
    state = runs.state(run, jobs)
    files = [Path(folder) / name for folder, _, names in os.walk(run.root) for name in names]
    size = sum(file.lstat().st_size for file in files if not file.is_symlink())
    parts = [state.state, _count(len(run.checkpoints()), "checkpoint")]
    exported = [place / part for place in (run.export, run.unverified) for part in ("model", "adapter")]
    parts += ["an exported model"] if any(path.is_dir() for path in exported) else []
    return f"{run.root}: {', '.join(parts)}, {size_text(size)}"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _confirmed(number: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("forget", "asks before it removes anything, and nobody can answer here", "add yes=true")
    print(f"Remove {'it' if number == 1 else f'these {number} runs'} for good? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(run: RunDir) -> None:
    """Remove the directory: first renamed, so that what is half removed is no run any more."""
    with locks.held(run):
        hidden = run.root.with_name(f".{run.root.name}.forgotten.{os.getpid()}")
        try:
            if run.submitted.is_file():
                from galley_launch.submit import scripts as jobs

                jobs.secrets_file(run).unlink(missing_ok=True)
            run.root.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            left = hidden if hidden.exists() else run.root
            raise UserError(str(left), f"cannot be removed ({error.strerror})", "remove the rest by hand") from None
