"""From the words of the command line to a complete ``RunSpec``: the only place where recipe, ZeRO and devices meet."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from galley.contract.errors import UserError
from galley.contract.files import reason
from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import Origin, Paths, Placement, RunSpec
from galley_launch.base import assets, devices
from galley_launch.base.grammar import is_ours, is_text, of_cluster, split, whole
from galley_launch.base.yaml_text import Tree, read_names
from galley_launch.cluster import guard
from galley_launch.deepspeed import complete, settle
from galley_launch.plan import cautions
from galley_launch.recipe import catalogue, changes, model_facts
from galley_launch.recipe import paths as places
from galley_launch.recipe.catalogue import Source
from galley_launch.recipe.schema import Recipe, build, override, resolve_key

if TYPE_CHECKING:
    from galley_launch.cluster.profile import Cluster

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # As RunSpec.name; it is a folder's name too.


@dataclass(frozen=True)
class Composed:
    """A complete run and what the user should be told about it."""

    spec: RunSpec
    run: RunDir
    notes: tuple[str, ...]
    cluster: Cluster | None = None
    """Where it is submitted to; None: it runs on this box."""
    cluster_name: str = ""
    changes: tuple[str, ...] = ()
    """What the command line changed of the recipe, a line for each key."""


def find(name: str, base: str = "runs") -> Source:
    """The recipe that ``name`` means: a run directory, whatever ``catalogue.find`` finds, or else a run in ``base``."""
    if (Path(name) / "run.json").is_file():
        return _from_run(RunDir(Path(name)))
    run = RunDir(Path(base) / name)
    if not catalogue.is_path(name) and name not in catalogue.recipes() and run.spec.is_file():
        return _from_run(run)
    return catalogue.find(name)


def _from_run(run: RunDir) -> Source:
    """A run that exists, as a recipe: its own task, and the placement of its last attempt."""
    spec = read_spec(run)
    placement, dump = spec.placement, spec.model_dump(mode="json")
    tree: Tree = dict(dump["task"]) | {"cadence": dump["cadence"], "tracking": dump["tracking"]}
    tree |= {name: getattr(placement, name) for name in ("micro_batch", "activation_checkpointing", "compile", "liger")}
    folder = Path(spec.origin.recipe).parent
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
    """The ``run.json`` that ``run`` already holds, if any. Raises ``UserError`` where it cannot be read."""
    return read_spec(run) if run.spec.is_file() else None


def resolve(name: str, settings: Sequence[str]) -> tuple[Source, Recipe, dict[str, str]]:
    """The source, the typed recipe with overrides, and the launcher's own settings."""
    ours = dict(split(setting) for setting in settings if is_ours(setting))
    source = find(name, ours.get("runs", "runs"))
    theirs = [setting for setting in settings if not is_ours(setting)]
    tree = override(source.tree, theirs)
    if "init_from" in ours:
        tree = _initialised(tree, ours, theirs)
    if "deepspeed" in ours:
        tree = tree | {"deepspeed": ours["deepspeed"]}
    typed = _typed(settings) | {"deepspeed"} & set(ours)
    wrote = {key: file for key, file in source.wrote.items() if key not in typed}
    source = replace(source, wrote=wrote, changes=changes.changes(source.tree, tree))
    return source, build(tree, source.label, {**source.wrote, **dict.fromkeys(typed, "command line")}), ours


def _typed(settings: Sequence[str]) -> set[str]:
    """Dotted keys of the recipe that the command line gives."""
    return {resolve_key(split(setting)[0]) for setting in settings if not is_ours(setting)}


def _initialised(tree: Tree, ours: dict[str, str], theirs: Sequence[str]) -> Tree:
    if any(split(setting)[0] == "model.path" for setting in theirs):
        raise UserError("init_from", "and model.path both say where the weights come from", "keep one of them")
    path = places.exported_model(ours["init_from"], Path(ours.get("runs", "runs")))
    model = {key: value for key, value in tree.get("model", {}).items() if key != "revision"}
    return tree | {"model": model | {"path": path}}


def _on_cluster(ours: dict[str, str], cluster: Cluster) -> devices.Devices:
    if "gpus" in ours:
        raise UserError("gpus", "Slurm chooses the devices", f"set how many a node: ranks={cluster.ranks}")
    nodes = whole(ours, "nodes", 1) or 1
    return devices.Devices(cluster.device, cluster.ranks, None, nodes=nodes, threads=cluster.cores_per_rank)


def _devices(ours: dict[str, str], before: Placement | None, imagine: bool) -> devices.Devices:
    ranks, gpus = whole(ours, "ranks", 1), _gpus(ours)
    if ours.get("gpus") == "all":
        ours = {"device": "cuda"} | ours
    kind = ours.get("device") or ("cpu" if before and before.device == "cpu" and not gpus else "cuda")
    if kind not in ("cuda", "cpu"):
        raise UserError("device", f"{kind!r} is neither cuda nor cpu", "write device=cuda or device=cpu")
    if kind == "cpu":
        if ranks is None and before and before.device == "cpu":
            ranks = before.ranks_per_node
        return devices.on_cpu(ranks, gpus)
    return devices.imagined(ranks, gpus) if imagine else devices.on_gpus(ranks, gpus)


def _gpus(ours: dict[str, str]) -> list[str]:
    """The GPUs that are asked for by name; none: all that are visible. Raises ``UserError``."""
    names = read_names(ours.get("gpus", "all"))
    if not names:
        raise UserError("gpus", "names no GPU", "write gpus=0,1 or gpus=all; device=cpu ranks=N for the CPU")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError("gpus", f"GPU {twice} is given twice", "one rank takes one GPU; write gpus=0,1 or gpus=all")
    if "all" in names and len(names) > 1:
        raise UserError("gpus", f"{ours['gpus']!r} names all and some", "write gpus=all alone")
    return [] if names == ["all"] else names


def _refuse_on_one_box(ours: dict[str, str]) -> None:
    if "cluster" in ours:
        raise UserError("cluster", "galley run trains on this box", f"galley submit RECIPE cluster={ours['cluster']}")
    if ours.get("nodes", "1") != "1":
        todo = "galley submit RECIPE cluster=NAME nodes=N"
        raise UserError("nodes", f"{ours['nodes']} nodes are not one box", todo)
    odd = next((key for key in ours if key.startswith("cluster.")), None)
    if odd:
        raise UserError(odd, "there is no cluster to change", "write cluster=NAME too (see galley clusters)")


def _deepspeed(source: Source, ours: dict[str, str], recipe: Recipe, device: str) -> tuple[dict[str, Any], str]:
    """The configuration to complete; a run that is continued keeps its own, as far as it may."""
    if source.run is None or "deepspeed" in ours:
        return complete.find(recipe.deepspeed, source.beside("deepspeed"))
    before = read_spec(source.run).placement
    return complete.reopen(before.deepspeed, before.device != device), f"of {source.run.root}"


def _given(
    source: Source, recipe: Recipe, ours: dict[str, str], typed: set[str], where: devices.Devices
) -> settle.Source:
    """The DeepSpeed configuration as it was given, to be settled with the recipe."""
    config, label = _deepspeed(source, ours, recipe, where.kind)
    return settle.Source(config, label, ours.get("take", ""), typed)


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _place(settled: settle.Settled, where: devices.Devices, paths: Paths) -> Placement:
    recipe, finished = settled.recipe, settled.config
    return Placement.model_validate(
        {
            "device": where.kind,
            "nodes": where.nodes,
            "ranks_per_node": where.ranks,
            "gpus": where.gpus and list(where.gpus),
            "micro_batch": recipe.micro_batch,
            "accumulation": finished["gradient_accumulation_steps"],
            "threads": recipe.threads or where.threads or _threads(where.ranks),
            "activation_checkpointing": recipe.activation_checkpointing,
            "compile": recipe.compile,
            "liger": recipe.liger,
            "profile": recipe.profile,
            "deepspeed": finished,
            "paths": paths,
        }
    )


def _run_dir(source: Source, ours: dict[str, str], base: str) -> RunDir:
    if source.run is not None:
        if "name" in ours or Path(ours.get("runs", source.run.root.parent)) != source.run.root.parent:
            raise UserError("name", f"{source.label} is a run that exists", "leave name and runs out to continue it")
        return source.run
    name = ours.get("name", source.stem)
    if not _NAME.fullmatch(name):
        raise UserError("name", f"{name!r} is not a run's name", "use letters, digits, '.', '_' and '-'")
    return RunDir(Path(ours.get("runs", base)) / name)


def version() -> str:
    """Galley's version; a checkout that is not installed has that of its pyproject."""
    from importlib import metadata  # Slow to import, and few verbs need it.

    try:
        return metadata.version("galley-tune")
    except metadata.PackageNotFoundError:
        import tomllib

        root = assets.checkout()
        return str(tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]) if root else "unknown"


def _commit() -> str | None:
    root = assets.checkout()
    if root is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _refused(error: ValidationError) -> UserError:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "recipe"
    if first["loc"] == ("name",):
        return UserError(where, f"{first['input']!r}: {first['msg']}", "use letters, digits, '.', '_' and '-'")
    return UserError(where, str(first["msg"]).removeprefix("Value error, "), "change it")


def _cluster(source: Source, ours: dict[str, str], settings: Sequence[str]) -> tuple[str, Cluster]:
    """The cluster that was asked for, else the one that a run which goes on was submitted to, else the default."""
    from galley_launch.cluster import profiles  # Only where it is needed: its schema takes a while.

    known = (read_json(source.run.cluster) or {}).get("name") if source.run else None
    return profiles.find(ours.get("cluster") or known, of_cluster(settings))


def compose(name: str, settings: Sequence[str], imagine: bool, submits: bool = False) -> Composed:
    """The complete run that ``galley plan NAME SETTINGS`` shows and ``galley run`` or ``submit`` starts.

    ``imagine``: plan for GPUs that are not here. ``submits``: for a cluster. Raises ``UserError``; writes nothing.
    """
    source, recipe, ours = resolve(name, settings)
    at, cluster = _cluster(source, ours, settings) if submits else ("", None)
    if "force" in ours:
        raise UserError("force", "nothing here can be forced", "leave it out")
    if cluster is None:
        _refuse_on_one_box(ours)
    run = _run_dir(source, ours, (cluster.runs if cluster else None) or "runs")
    old = earlier(run)  # Read even where a recipe is given: whatever it is, what cannot be read is not replaced.
    before = old.placement if old and source.run else None
    where = _on_cluster(ours, cluster) if cluster else _devices(ours, before, imagine)
    paths = places.paths(recipe, run, source.beside, cluster.cache if cluster else None)
    typed = _typed(settings)
    given, known = _given(source, recipe, ours, typed, where), model_facts.of_model(paths.model)
    settled = settle.settle(given, recipe, where, known)
    taken = changes.changes(recipe.model_dump(), settled.recipe.model_dump())
    recipe, placement = settled.recipe, _place(settled, where, paths)
    odd = next((path for path in placement.paths.model_dump().values() if path and not is_text(path)), None)
    if odd:
        raise UserError("paths", f"{odd!r} is not UTF-8", "work in a directory of another name")
    origin = Origin(recipe=source.label, overrides=list(settings), version=version(), commit=_commit())
    if old and source.run:
        origin = origin.model_copy(update={"recipe": old.origin.recipe})
    try:
        spec = RunSpec(
            schema=1,
            name=run.root.absolute().name,
            task=recipe.task(),
            placement=placement,
            cadence=recipe.cadence,
            tracking=recipe.tracking,
            origin=origin,
        )
    except ValidationError as error:
        raise _refused(error) from None
    guard.check_spec(spec)
    typed |= {line.partition(" ")[0] for line in taken}
    notes = [*settled.notes, *_habits(cluster), *cautions.of_rate(recipe, source, typed, known)]
    return Composed(spec, run, (*where.notes, *notes), cluster, at, (*source.changes, *taken))


def _habits(cluster: Cluster | None) -> list[str]:
    if cluster is None:
        return []
    from galley_launch.cluster import habits

    return habits.notes(cluster)
