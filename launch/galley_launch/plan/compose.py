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
    """A complete run, and what the user is told about it."""

    spec: RunSpec
    run: RunDir
    earlier: RunSpec | None
    """The ``run.json`` that ``run`` has already."""
    notes: tuple[str, ...]
    cluster: Cluster | None = None
    """Where it is submitted to; None: it runs on this box."""
    cluster_name: str = ""
    changes: tuple[str, ...] = ()
    """What the command line changed in the recipe, a line for each key."""


def compose(name: str, settings: Settings, imagine: bool) -> Composed:
    """The complete run that ``galley plan NAME SETTINGS`` shows and ``galley run`` or ``submit`` starts.

    ``imagine``: plan for GPUs that are not here. Raises ``UserError``; writes nothing.
    """
    # The order follows from what each step needs: the recipe gives the name of the run, the target the number of ranks,
    # and only with that can DeepSpeed's batch be compared with the recipe's.
    requested = request.resolve(name, settings)
    where = target.on_cluster(requested) if settings.submits else target.on_this_box(requested, imagine)
    facts = model_facts.of_model(where.paths.model)
    recipe = _as_begun(requested, where)
    settled = settle.settle(_deepspeed(requested, where), recipe, where.devices, facts)
    spec = _spec(settled, where, _origin(requested, where, settings.words))
    guard.check_spec(spec)
    # take=deepspeed may have changed the recipe: such values count as typed, so that no caution is about them.
    from_json = changes.changes(recipe.model_dump(), settled.recipe.model_dump())
    typed = requested.typed | {line.partition(" ")[0] for line in from_json}
    rate = cautions.of_rate(settled.recipe, requested.source, set(typed), facts)
    notes = (*where.devices.notes, *settled.notes, *_shell_notes(where.cluster), *rate)
    changed = (*requested.source.changes, *from_json)
    return Composed(spec, where.run, where.earlier, notes, where.cluster, where.cluster_name, changed)


def _as_begun(requested: Request, where: Target) -> Recipe:
    """The recipe with the version of seeding that its run began with (the order of data stays), unless one is typed."""
    if where.earlier is None or "seeding" in requested.typed:
        return requested.recipe
    return requested.recipe.model_copy(update={"seeding": where.earlier.task.seeding})


def _deepspeed(requested: Request, where: Target) -> settle.Source:
    """The DeepSpeed configuration that is given; else a continued run keeps its own, adapted to the new placement."""
    source, options = requested.source, requested.options
    if source.run is None or options.deepspeed is not None:
        config, label = complete.find(requested.recipe.deepspeed, source.beside("deepspeed"))
    else:
        before = read_spec(source.run).placement
        config = complete.reopen(before.deepspeed, before.device != where.devices.kind)
        label = f"of {source.run.root}"
    return settle.Source(config, label, options.take, requested.typed)


def _origin(requested: Request, where: Target, words: Sequence[str]) -> Origin:
    """Where the run comes from; one that is continued keeps the name of its recipe."""
    continued = where.earlier if requested.source.run else None
    recipe = continued.origin.recipe if continued else requested.source.label
    return Origin(recipe=recipe, overrides=list(words), version=version(), commit=_commit())


def _spec(settled: settle.Settled, where: Target, origin: Origin) -> RunSpec:
    """The complete ``RunSpec``. Raises ``UserError`` where the contract refuses it."""
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
    """CPU threads of each rank: the cores that this process may use (a job's, not the machine's) over the ranks."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def _placement(recipe: Recipe, config: dict[str, Any], where: Target) -> Placement:
    box = where.devices
    return Placement.model_validate(
        {
            "device": box.kind,
            "nodes": box.nodes,
            "ranks_per_node": box.ranks,
            "gpus": box.gpus and list(box.gpus),  # None on the CPU, and on a cluster, where Slurm chooses
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
    """Galley's version; in a checkout that is not installed, from its ``pyproject.toml``."""
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
    # --exclude=* leaves no tag to name, so that the answer is always the full hash; +dirty: with changes not committed.
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


def _shell_notes(cluster: Cluster | None) -> list[str]:
    if cluster is None:
        return []
    from galley_launch.cluster import shell_variables

    return shell_variables.notes(cluster)
