"""The work of every verb, done once the whole command line has been read. Every function returns the exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import galley
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.contract.text import one_line
from galley_launch.base.options import LaunchOptions, Settings
from galley_launch.plan import cautions, compose, plan, request, resume, screen
from galley_launch.recipe.schema import header
from galley_launch.recipe.schema import schema as recipe_schema

if TYPE_CHECKING:
    from galley_launch.submit.job_requests import Submission


def show(name: str, settings: Settings) -> int:
    """Print a recipe's manual, what it extends, and the recipe with every default and a comment for every key."""
    from galley_launch.recipe import explained

    requested = request.resolve(name, settings)
    source = requested.source
    extends = f"Extends  {', which extends '.join(source.extends)}" if source.extends else ""
    manual = "\n".join(part for part in (header(source.text), extends) if part)
    if manual:
        print(manual, end="\n\n")
    print(explained.text(requested.recipe), end="")
    return 0


def schema() -> int:
    """Print the JSON schema of a recipe."""
    print(schema_text(), end="")
    return 0


def schema_text() -> str:
    """The bytes of ``recipes/schema.json``."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _make_plan(spec: RunSpec, run: RunDir, attempt: int) -> plan.Plan:
    return plan.make(spec, run, attempt, _python_path())


def _python_path() -> str | None:
    # Stages must import the same galley as this process, whatever is installed elsewhere.
    package = Path(str(galley.__file__)).resolve().parent
    return plan.python_path(package, os.environ.get("PYTHONPATH", ""), Path.cwd())


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"galley: note: {one_line(note)}", file=sys.stderr)


def show_plan(name: str, settings: Settings) -> int:
    """Print what ``run`` or, with ``cluster=``, ``submit`` would write and start, and a summary."""
    if settings.submits:
        return _show_submission(name, settings)
    composed = compose.compose(name, settings, imagine=True)
    action = resume.next_action(composed.run, composed.earlier, composed.spec)
    todo = plan.left(_make_plan(composed.spec, composed.run, action.attempt), action.what)
    screen.show(composed, todo, _notes(composed, action.what, "run"), composed.run.root, settings.options.files)
    return 0


def _notes(composed: compose.Composed, what: resume.What, verb: str) -> list[str]:
    """What the user is told before a run starts. ``what``: what is left to do."""
    spec = composed.spec
    return [*composed.notes, *cautions.of_length(spec, composed.run), *_already(what, spec.name, verb)]


def _submission(name: str, settings: Settings) -> tuple[compose.Composed, Submission, resume.NextAction]:
    """The submission of a run, complete but not written. GPUs are on the cluster, so none is looked for here."""
    from galley_launch.submit import submission

    composed = compose.compose(name, settings, imagine=True)
    assert composed.cluster is not None
    action = resume.next_action(composed.run, composed.earlier, composed.spec)
    todo = submission.make(
        composed.spec, composed.run, composed.earlier, composed.cluster_name, composed.cluster, action
    )
    return composed, todo, action


def _show_submission(name: str, settings: Settings) -> int:
    """The files of a submission, and its ``sbatch`` commands: what ``submit`` writes and runs, byte for byte."""
    from galley_launch.submit import submission

    composed, todo, action = _submission(name, settings)
    notes = _notes(composed, action.what, "submit")
    copies = list(submission.code()) if todo.jobs else []  # the run keeps a copy of the code
    screen.show(composed, todo.plan(), notes, composed.run.root.absolute(), settings.options.files, copies)
    return 0


def submit(name: str, settings: Settings) -> int:
    """Submit a run to a cluster."""
    from galley_launch.submit import submission

    composed, todo, action = _submission(name, settings)
    if not todo.jobs:
        print(f"run {composed.spec.name} is finished: {composed.run.root}")
        return 0
    _note(_notes(composed, action.what, "submit"))
    assert composed.cluster is not None
    return submission.start(composed.spec, composed.run, composed.cluster, todo)


def _already(what: resume.What, name: str, verb: str) -> list[str]:
    if what == "nothing":
        return [f"run {name} is finished: galley {verb} would write and start nothing"]
    return [f"run {name} is trained: galley {verb} only exports it"] if what == "export" else []


def run(name: str, settings: Settings) -> int:
    """Train: prepare, train and export, or whatever of it is left."""
    from galley_launch.local import runner

    # Before the check of what is installed, so that mistakes on the command line are reported first.
    composed = compose.compose(name, settings, imagine=False)
    runner.check_installed()
    _note(composed.notes)
    return runner.start(composed.spec, composed.run, partial(_make_plan, composed.spec, composed.run))


def prepare(name: str, settings: Settings) -> int:
    """Prepare a run, and stop. No GPU is looked for: it may be on another machine."""
    from galley_launch.local import runner

    composed = compose.compose(name, settings, imagine=True)
    runner.check_installed()
    _note(composed.notes)
    whole = _make_plan(composed.spec, composed.run, 0)
    return runner.prepare(composed.spec, composed.run, plan.preparing(whole, settings.options.examples))


def status(name: str, settings: Settings) -> int:
    """Print the table of runs, or the state of one run."""
    from galley_launch.runs import runs, table
    from galley_launch.submit import queue

    base = settings.options.base
    if name:
        run = runs.find(name, base)
        jobs = queue.query([run]).get(run.root)
        lines = table.details(runs.state(run, jobs), request.read_spec(run), run.root)
        print("\n".join([*lines, *(queue.details(jobs) if jobs else [])]))
        return 0
    all_runs = runs.every(base)
    if all_runs:
        table.states(runs.states(all_runs))
    else:
        print(f"no runs in {base}/ yet; start one with galley run (see galley recipes)")
    return 0


def logs(name: str, settings: Settings) -> int:
    """Print a run's logs, and follow them while it is live."""
    from galley_launch.runs import runs

    run = runs.find(name, settings.options.base)
    rank, number = settings.options.rank, settings.options.attempt
    first = runs.first_logs(run, rank, number)
    try:
        runs.follow(run, lambda: runs.log_paths(run, rank, number, first), lambda line: print(line, flush=True))
    except (KeyboardInterrupt, BrokenPipeError):  # only following ends: the run goes on
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - so that Python's own last flush is quiet too
    return 0


def stop(name: str, settings: Settings) -> int:
    """Ask a live run to save and end."""
    from galley_launch.runs import runs

    print(runs.stop(runs.find(name, settings.options.base)))
    return 0


def clusters(name: str, settings: Settings) -> int:
    """Print the profiles, or one in full, and what Slurm reports about them."""
    from galley_launch.submit import clusters as sites

    if name:
        text, problems = sites.details(name, settings.options.cluster_overrides)
        print(text, end="")
        _note(problems)
        return 0
    if settings.words:
        raise UserError("clusters", f"{settings.words[0]} changes no profile", "write: galley clusters NAME key=value")
    sites.listing()
    return 0


def cancel(name: str, settings: Settings) -> int:
    """End a run now: its jobs, or its processes on this box."""
    from galley_launch.local import cancelling
    from galley_launch.runs import runs
    from galley_launch.submit import queue

    run = runs.find(name, settings.options.base)
    print(queue.cancel(run) if queue.is_submitted(run) else cancelling.cancel(run))
    return 0


def forget(names: Sequence[str], settings: Settings) -> int:
    """Remove runs, after asking."""
    from galley_launch.runs import forget as forgetting

    return forgetting.forget(names, settings.options.base, settings.options.yes)


def cache(names: Sequence[str], settings: Settings) -> int:
    """Print what is in the cache, or remove what was not used lately."""
    from galley_launch.recipe import paths
    from galley_launch.runs import cache as shared

    root, options = paths.cache(), settings.options
    if not names and not settings.words:
        return shared.show(root)
    if names[:1] != ["prune"]:
        shown = " ".join([*names, *settings.words])
        raise UserError("cache", f"{shown!r} is not understood", "write: galley cache, or galley cache prune")
    return shared.prune(root, names[1] if names[1:] else "", options.older, options.yes)


def why(name: str, settings: Settings) -> int:
    """Print why a run failed."""
    from galley_launch.runs import runs
    from galley_launch.runs import why as reasons

    print("\n".join(reasons.lines(runs.find(name, settings.options.base))))
    return 0


def report(name: str, settings: Settings) -> int:
    """Write one page about a run, and print where it is."""
    from galley_launch.report import report as page
    from galley_launch.runs import runs

    print(page.write(runs.find(name, settings.options.base)))
    return 0


def _submit_export(spec: RunSpec, run: RunDir, options: LaunchOptions) -> int:
    from galley_launch.cluster import profiles
    from galley_launch.submit import submission

    if not run.checkpoints():
        raise UserError(str(run.root), "has no checkpoint yet", "train it first: galley submit")
    # Not the cluster of the run's own submission by default, but the one asked for, or the default profile.
    name, cluster = profiles.find(options.cluster, options.cluster_overrides)
    return submission.export(spec, run, name, cluster, options.step)


def export(name: str, settings: Settings) -> int:
    """Write a run's export from a checkpoint."""
    from galley_launch.local import runner
    from galley_launch.runs import runs

    options = settings.options
    run, step = runs.find(name, options.base), options.step
    if step.isdecimal() and not run.checkpoint(int(step)).verifies():
        steps = ", ".join(str(checkpoint.step) for checkpoint in run.checkpoints()) or "none yet"
        raise UserError("step", f"{run.root} has no checkpoint of step {step}", f"it has: {steps}")
    spec = request.read_spec(run)
    if options.cluster is not None or options.cluster_overrides:
        return _submit_export(spec, run, options)
    runner.check_installed()
    return runner.export(run, lambda attempt: plan.export_stage(spec, run, attempt, step, _python_path()))
