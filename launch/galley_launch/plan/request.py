"""What a command line asks for: a recipe, or a run to be continued, with the overrides applied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from galley.contract.errors import UserError
from galley.contract.files import reason
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley_launch.base.options import LaunchOptions, Settings
from galley_launch.base.yaml_text import Tree
from galley_launch.recipe import catalogue, changes, paths
from galley_launch.recipe.catalogue import Source
from galley_launch.recipe.schema import Recipe, build, override, resolve_key


@dataclass(frozen=True)
class Request:
    """A recipe with the overrides of the command line, its source and the launch options."""

    source: Source
    """Where the recipe came from, with ``changes`` by the command line."""
    recipe: Recipe
    options: LaunchOptions
    typed: frozenset[str]
    """Dotted keys of the recipe that the command line gives, ``deepspeed`` among them."""


def find(name: str, base: Path = Path("runs")) -> Source:
    """The recipe that ``name`` means: a run directory, a recipe (``catalogue.find``), or else a run in ``base``."""
    if (Path(name) / "run.json").is_file():
        return _from_run(RunDir(Path(name)))
    # A recipe wins over a run of the same name, so that `galley run NAME` means the same before and after its first
    # run; a directory (runs/NAME) always means the run.
    run = RunDir(base / name)
    if not catalogue.is_path(name) and name not in catalogue.recipes() and run.spec.is_file():
        return _from_run(run)
    return catalogue.find(name)


def _from_run(run: RunDir) -> Source:
    """A run that exists, as a recipe: its own task, and the placement of its last attempt."""
    spec = read_spec(run)
    placement, dump = spec.placement, spec.model_dump(mode="json")
    tree: Tree = dict(dump["task"]) | {"cadence": dump["cadence"], "tracking": dump["tracking"]}
    # Of the placement only what a recipe can set: devices and ranks are chosen anew on the machine at hand.
    tree |= {name: getattr(placement, name) for name in ("micro_batch", "activation_checkpointing", "compile", "liger")}
    folder = Path(spec.origin.recipe).parent  # relative paths of its task are still looked for beside that recipe
    return Source(str(run.root), tree, folder, run.root.absolute().name, run=run)


def read_spec(run: RunDir) -> RunSpec:
    """The ``run.json`` of a run that exists. Raises ``UserError`` where it cannot be read."""
    try:
        return RunSpec.read(run.spec)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unreadable(run, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(run, reason(error)) from None


def _unreadable(run: RunDir, why: str) -> UserError:
    todo = "it was written by another version, changed by hand or damaged; start a new run"
    return UserError(str(run.spec), f"cannot be read: {why.removeprefix(': ')}", todo)


def earlier(run: RunDir) -> RunSpec | None:
    """The ``run.json`` that ``run`` already has, if any. Raises ``UserError`` where it cannot be read."""
    return read_spec(run) if run.spec.is_file() else None


def resolve(name: str, settings: Settings) -> Request:
    """The recipe that ``name`` means with the overrides of ``settings``. Raises ``UserError``."""
    options = settings.options
    source = find(name, options.base)
    typed = frozenset(resolve_key(key) for key, _ in settings.overrides)
    tree = override(source.tree, settings.overrides)
    if options.init_from is not None:
        if any(key == "model.path" for key, _ in settings.overrides):
            raise UserError("init_from", "and model.path both say where the weights come from", "keep one of them")
        tree = _initialised(tree, options.init_from, options.base)
    if options.deepspeed is not None:
        tree = tree | {"deepspeed": options.deepspeed}
        typed |= {"deepspeed"}
    # Messages about a key name where its value came from: the command line, the recipe, or a file that it extends.
    set_by = {key: file for key, file in source.set_by.items() if key not in typed}
    source = replace(source, set_by=set_by, changes=changes.changes(source.tree, tree))
    recipe = build(tree, source.label, {**set_by, **dict.fromkeys(typed, "command line")})
    return Request(source, recipe, options, typed)


def _initialised(tree: Tree, run: str, base: Path) -> Tree:
    """``tree`` with the exported model of ``run`` as its model: a local folder, which has no revision."""
    model = {key: value for key, value in tree.get("model", {}).items() if key != "revision"}
    return tree | {"model": model | {"path": paths.exported_model(run, base)}}
