"""From the settings of a command line to a complete ``RunSpec``: where recipe, DeepSpeed and devices meet."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import Origin, Placement, RunSpec
from galley_launch.base import assets
from galley_launch.base.options import Settings
from galley_launch.cluster import guard
from galley_launch.deepspeed import complete, settle
from galley_launch.plan import cautions, request, target
from galley_launch.plan.request import Request, read_spec
from galley_launch.plan.target import Target
from galley_launch.recipe import changes, model_facts
from galley_launch.recipe.schema import Recipe

if TYPE_CHECKING:
    from galley_launch.cluster.profile import Cluster


@dataclass(frozen=True)
class Composed:
    """A complete run and what the user should be told about it."""

    spec: RunSpec
    run: RunDir
    earlier: RunSpec | None
    """What ``run`` holds already."""
    notes: tuple[str, ...]
    cluster: Cluster | None = None
    """Where it is submitted to; None: it runs on this box."""
    cluster_name: str = ""
    changes: tuple[str, ...] = ()
    """What the command line changed of the recipe, a line for each key."""


def compose(name: str, settings: Settings, imagine: bool) -> Composed:
    """The complete run that ``galley plan NAME SETTINGS`` shows and ``galley run`` or ``submit`` starts.

    ``imagine``: plan for GPUs that are not here. Raises ``UserError``; writes nothing.
    """
    wanted = request.resolve(name, settings)
    where = target.on_cluster(wanted) if settings.submits else target.on_this_box(wanted, imagine)
    facts = model_facts.of_model(where.paths.model)
    recipe = _as_begun(wanted, where)
    settled = settle.settle(_deepspeed(wanted, where), recipe, where.devices, facts)
    spec = _spec(settled, where, _origin(wanted, where, settings.words))
    guard.check_spec(spec)
    from_json = changes.changes(recipe.model_dump(), settled.recipe.model_dump())
    fixed = wanted.typed | {line.partition(" ")[0] for line in from_json}
    rate = cautions.of_rate(settled.recipe, wanted.source, set(fixed), facts)
    notes = (*where.devices.notes, *settled.notes, *_habits(where.cluster), *rate)
    changed = (*wanted.source.changes, *from_json)
    return Composed(spec, where.run, where.earlier, notes, where.cluster, where.cluster_name, changed)


def _as_begun(wanted: Request, where: Target) -> Recipe:
    """The recipe; where its run has begun, order and dropout follow from the seed as they did, unless set otherwise."""
    if where.earlier is None or "seeding" in wanted.typed:
        return wanted.recipe
    return wanted.recipe.model_copy(update={"seeding": where.earlier.task.seeding})


def _deepspeed(wanted: Request, where: Target) -> settle.Source:
    """The DeepSpeed configuration as it was given; a run that is continued keeps its own, as far as it may."""
    source, options = wanted.source, wanted.options
    if source.run is None or options.deepspeed is not None:
        config, label = complete.find(wanted.recipe.deepspeed, source.beside("deepspeed"))
    else:
        before = read_spec(source.run).placement
        config = complete.reopen(before.deepspeed, before.device != where.devices.kind)
        label = f"of {source.run.root}"
    return settle.Source(config, label, options.take, wanted.typed)


def _origin(wanted: Request, where: Target, words: Sequence[str]) -> Origin:
    """Where the run comes from; one that is continued keeps the name of its recipe."""
    continued = where.earlier if wanted.source.run else None
    recipe = continued.origin.recipe if continued else wanted.source.label
    return Origin(recipe=recipe, overrides=list(words), version=version(), commit=_commit())


def _spec(settled: settle.Settled, where: Target, origin: Origin) -> RunSpec:
    """All of it together. Raises ``UserError`` where the contract refuses it."""
    recipe = settled.recipe
    placement = _placement(recipe, settled.config, where)
    try:
        return RunSpec(
            schema=1,
            name=where.run.root.absolute().name,
            task=recipe.task(),
            placement=placement,
            cadence=recipe.cadence,
            tracking=recipe.tracking,
            origin=origin,
        )
    except ValidationError as error:
        raise _refused(error) from None


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _placement(recipe: Recipe, config: dict[str, Any], where: Target) -> Placement:
    box = where.devices
    return Placement.model_validate(
        {
            "device": box.kind,
            "nodes": box.nodes,
            "ranks_per_node": box.ranks,
            "gpus": box.gpus and list(box.gpus),
            "micro_batch": recipe.micro_batch,
            "accumulation": config["gradient_accumulation_steps"],
            "threads": recipe.threads or box.threads or _threads(box.ranks),
            "activation_checkpointing": recipe.activation_checkpointing,
            "compile": recipe.compile,
            "liger": recipe.liger,
            "profile": recipe.profile,
            "deepspeed": config,
            "paths": where.paths,
        }
    )


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


def _habits(cluster: Cluster | None) -> list[str]:
    if cluster is None:
        return []
    from galley_launch.cluster import habits

    return habits.notes(cluster)
