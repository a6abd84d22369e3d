"""``galley forget``: remove runs, but none that is live or queued, and only after a confirmation."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley_launch.base import locks, terminal
from galley_launch.base.numbers import size_text
from galley_launch.runs import runs
from galley_launch.submit import queue


def forget(names: Sequence[str], base: Path, yes: bool) -> int:
    """Remove the runs ``names``, after asking unless ``yes``. Returns the exit status. Raises ``UserError``."""
    # By resolved path, so that a run that is named twice, or in two ways, is removed once.
    chosen = list({run.root.resolve(): run for run in (runs.find(name, base) for name in names)}.values())
    queues = queue.query(chosen)
    # All of them are checked before any is shown or removed: one that is in use stops the whole command.
    for run in chosen:
        _refuse_if_in_use(run, queues.get(run.root))
    for run in chosen:
        print(_sentence(run, queues.get(run.root)))
    these = "it" if len(chosen) == 1 else f"these {len(chosen)} runs"
    if not yes and not terminal.confirmed("forget", f"Remove {these} for good?"):
        print("nothing was removed")
        return 1
    for run in chosen:
        _remove(run)
        print(f"removed {run.root}")
    return 0


def _refuse_if_in_use(run: RunDir, jobs: queue.Queue | None) -> None:
    """Raise ``UserError`` where ``run`` is a link, or is live, or may have jobs in the queue."""
    # Renaming a link and removing what is "in" it would leave the run, or remove it under another name than was shown.
    if run.root.is_symlink():
        raise UserError(str(run.root), "is a link to a run", f"forget the run itself: {run.root.resolve()}")
    if jobs and jobs.problem:
        raise UserError(str(run.root), f"may have jobs in a queue ({jobs.problem})", "try again where Slurm answers")
    if jobs and jobs.jobs:
        raise UserError(str(run.root), "has jobs that wait or run", f"end them first: galley cancel {run.root}")
    if locks.is_live(run):
        raise UserError(str(run.root), "is live", f"end it first: galley stop {run.root}")


def _sentence(run: RunDir, jobs: queue.Queue | None) -> str:
    """What would be lost, with the size of its files in bytes (links are not followed)."""
    state = runs.state(run, jobs)
    files = [Path(folder) / name for folder, _, names in os.walk(run.root) for name in names]
    size = sum(file.lstat().st_size for file in files if not file.is_symlink())
    parts = [state.state, _count(len(run.checkpoints()), "checkpoint")]
    exported = [folder / part for folder in (run.export, run.unverified) for part in ("model", "adapter")]
    parts += ["an exported model"] if any(path.is_dir() for path in exported) else []
    return f"{run.root}: {', '.join(parts)}, {size_text(size)}"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _remove(run: RunDir) -> None:
    """Remove the run directory.

    It is renamed first: a rename is one step, so that a removal that is interrupted leaves no damaged run in the list.
    """
    with locks.held(run):
        hidden = run.root.with_name(f".{run.root.name}.forgotten.{os.getpid()}")
        try:
            if run.submitted.is_file():
                from galley_launch.submit import scripts

                # Outside the run directory, and named after its path: once that is gone, nobody would find it.
                scripts.secrets_file(run).unlink(missing_ok=True)
            run.root.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            left = hidden if hidden.exists() else run.root
            raise UserError(str(left), f"cannot be removed ({error.strerror})", "remove the rest by hand") from None
