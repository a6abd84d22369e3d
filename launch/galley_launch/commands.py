"""What each verb does, once the whole command line has been understood. Each returns the exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import galley
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley.contract.text import one_line
from galley_launch.base.grammar import split, whole
from galley_launch.plan import cautions, compose, plan, resume, screen
from galley_launch.recipe.schema import header
from galley_launch.recipe.schema import schema as recipe_schema
from galley_launch.runs import runs, table
from galley_launch.submit import queue


def show(name: str, settings: Sequence[str]) -> int:
    """Print a recipe's manual, what it extends, then the whole recipe with every default, explained."""
    from galley_launch.recipe import explained

    source, recipe, _ = compose.resolve(name, settings)
    extends = f"Extends  {', which extends '.join(source.extends)}" if source.extends else ""
    manual = "\n".join(part for part in (header(source.text), extends) if part)
    if manual:
        print(manual, end="\n\n")
    print(explained.text(recipe), end="")
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
    package = Path(str(galley.__file__)).resolve().parent
    return plan.python_path(package, os.environ.get("PYTHONPATH", ""), Path.cwd())


def _note(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"galley: note: {one_line(note)}", file=sys.stderr)


def show_plan(name: str, settings: Sequence[str]) -> int:
    """Print what ``run`` or, with ``cluster=``, ``submit`` would write and start, and a summary."""
    all_files, settings = screen.wants_files(settings)
    if any(split(setting)[0] == "cluster" for setting in settings):
        return _show_submission(name, settings, all_files)
    made = compose.compose(name, settings, imagine=True)
    outlook = resume.outlook(made.run, compose.earlier(made.run), made.spec)
    todo = plan.left(_make_plan(made.spec, made.run, outlook.attempt), outlook.what)
    notes = [*made.notes, *cautions.of_length(made.spec, made.run), *_said_of(outlook.what, made.spec.name)]
    screen.show(made, todo, notes, made.run.root, all_files)
    return 0


def _submission(name: str, settings: Sequence[str]) -> tuple[compose.Composed, plan.Plan, resume.Outlook]:
    from galley_launch.submit import submission

    made = compose.compose(name, settings, imagine=True, submits=True)
    assert made.cluster is not None
    old = compose.earlier(made.run)
    outlook = resume.outlook(made.run, old, made.spec)
    todo = submission.make(made.spec, made.run, old, made.cluster_name, made.cluster, outlook)
    return made, todo, outlook


def _show_submission(name: str, settings: Sequence[str], all_files: bool) -> int:
    """The files of a submission, and its ``sbatch`` commands: what ``submit`` writes and runs, byte for byte."""
    from galley_launch.submit import submission

    made, todo, outlook = _submission(name, settings)
    notes = [*made.notes, *cautions.of_length(made.spec, made.run), *_said_of(outlook.what, made.spec.name, "submit")]
    copies = list(submission.code()) if todo.stages else []
    screen.show(made, todo, notes, made.run.root.absolute(), all_files, copies)
    return 0


def submit(name: str, settings: Sequence[str]) -> int:
    """Submit a run to a cluster."""
    from galley_launch.submit import submission

    made, todo, outlook = _submission(name, settings)
    if not todo.stages:
        print(f"run {made.spec.name} is finished: {made.run.root}")
        return 0
    _note([*made.notes, *cautions.of_length(made.spec, made.run), *_said_of(outlook.what, made.spec.name, "submit")])
    assert made.cluster is not None
    return submission.start(made.spec, made.run, made.cluster, todo)


def _said_of(what: resume.What, name: str, verb: str = "run") -> list[str]:
    if what == "nothing":
        return [f"run {name} is finished: galley {verb} would write and start nothing"]
    return [f"run {name} is trained: galley {verb} only exports it"] if what == "export" else []


def run(name: str, settings: Sequence[str]) -> int:
    """Train: prepare, train and export, or whatever of it is left."""
    from galley_launch.local import runner

    made = compose.compose(name, settings, imagine=False)
    runner.check_installed()
    _note(made.notes)
    return runner.start(made.spec, made.run, partial(_make_plan, made.spec, made.run))


def _runs(settings: Sequence[str]) -> tuple[Path, dict[str, str]]:
    ours = dict(split(setting) for setting in settings)
    return Path(ours.get("runs", "runs")), ours


def status(name: str, settings: Sequence[str]) -> int:
    """Print the table of runs, or how one run is."""
    base, _ = _runs(settings)
    if name:
        found = runs.find(name, base)
        jobs = queue.look([found]).get(found.root)
        lines = table.details(runs.state(found, jobs), compose.read_spec(found), found.root)
        print("\n".join([*lines, *(queue.details(jobs) if jobs else [])]))
        return 0
    every = runs.every(base)
    if every:
        asked = queue.look(every)
        table.states([runs.state(each, asked.get(each.root)) for each in every])
    else:
        print(f"no runs in {base}/ yet; start one with galley run (see galley recipes)")
    return 0


def logs(name: str, settings: Sequence[str]) -> int:
    """Print a run's logs, and follow them while it is live."""
    base, ours = _runs(settings)
    found = runs.find(name, base)
    rank, number = whole(ours, "rank", 0), whole(ours, "attempt", 0)
    first = runs.first_logs(found, rank, number)
    try:
        runs.follow(found, lambda: runs.log_paths(found, rank, number, first), lambda line: print(line, flush=True))
    except (KeyboardInterrupt, BrokenPipeError):  # The reader has seen enough; the run goes on.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - so that Python's own last flush is quiet too
    return 0


def stop(name: str, settings: Sequence[str]) -> int:
    """Ask a live run to save and end."""
    print(runs.stop(runs.find(name, _runs(settings)[0])))
    return 0


def clusters(name: str, settings: Sequence[str]) -> int:
    """Print the profiles, or one in full, and what Slurm says to them."""
    from galley_launch.base.grammar import of_cluster
    from galley_launch.submit import clusters as sites

    if name:
        text, problems = sites.details(name, of_cluster(settings))
        print(text, end="")
        _note(problems)
        return 0
    if settings:
        raise UserError("clusters", f"{settings[0]} changes no profile", "write: galley clusters NAME key=value")
    sites.listing()
    return 0


def cancel(name: str, settings: Sequence[str]) -> int:
    """End a run now: its jobs, or its processes on this box."""
    from galley_launch.local import cancelling

    found = runs.find(name, _runs(settings)[0])
    print(queue.cancel(found) if queue.is_submitted(found) else cancelling.cancel(found))
    return 0


def forget(names: Sequence[str], settings: Sequence[str]) -> int:
    """Remove runs, after asking."""
    from galley_launch.runs import forget as forgetting

    base, ours = _runs(settings)
    answer = ours.get("yes", "false").lower()
    if answer not in ("true", "false"):
        raise UserError("yes", f"{answer!r} is neither true nor false", "use yes=true to remove without being asked")
    return forgetting.forget(names, base, answer == "true")


def why(name: str, settings: Sequence[str]) -> int:
    """Print why a run failed."""
    from galley_launch.runs import why as reasons

    print("\n".join(reasons.lines(runs.find(name, _runs(settings)[0]))))
    return 0


def report(name: str, settings: Sequence[str]) -> int:
    """Write one page about a run, and print where it is."""
    from galley_launch.report import report as page

    print(page.write(runs.find(name, _runs(settings)[0])))
    return 0


def _export_there(spec: RunSpec, run: RunDir, name: str | None, settings: Sequence[str], step: str) -> int:
    from galley_launch.cluster import profiles
    from galley_launch.submit import submission

    if not run.checkpoints():
        raise UserError(str(run.root), "has no checkpoint yet", "train it first: galley submit")
    found, cluster = profiles.find(name, [each for each in settings if not each.startswith("cluster=")])
    return submission.export(spec, run, found, cluster, step)


def export(name: str, settings: Sequence[str]) -> int:
    """Write a run's export from a checkpoint."""
    from galley_launch.local import runner

    base, ours = _runs(settings)
    found = runs.find(name, base)
    step = ours.get("step", "last")
    if step not in ("last", "best") and not step.isdecimal():
        raise UserError("step", f"{step!r} is no step", "write step=last, step=best or step=N")
    if step.isdecimal() and not found.checkpoint(int(step)).verifies():
        steps = ", ".join(str(each.step) for each in found.checkpoints()) or "none yet"
        raise UserError("step", f"{found.root} has no checkpoint of step {step}", f"it has: {steps}")
    spec = compose.read_spec(found)
    at = [setting for setting in settings if split(setting)[0].startswith("cluster")]
    if at:
        return _export_there(spec, found, ours.get("cluster"), at, step)
    runner.check_installed()
    return runner.export(found, lambda attempt: plan.export_stage(spec, found, attempt, step, _python_path()))
