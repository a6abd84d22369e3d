"""Where a run will happen: its directory, its devices, its model and data, and the cluster, if there is one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from galley.contract.errors import UserError
from galley.contract.rundir import RunDir, read_json
from galley.contract.spec import Paths, Placement, RunSpec
from galley_launch.base import devices
from galley_launch.base.devices import Devices
from galley_launch.base.grammar import is_text
from galley_launch.base.options import LaunchOptions
from galley_launch.plan.request import Request, earlier
from galley_launch.recipe import paths as recipe_paths
from galley_launch.recipe.catalogue import Source

if TYPE_CHECKING:
    from galley_launch.cluster.profile import Cluster

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # the same as of RunSpec.name; it is a folder's name too


@dataclass(frozen=True)
class Target:
    """Where a run happens."""

    run: RunDir
    earlier: RunSpec | None
    """The ``run.json`` that ``run`` has already."""
    devices: Devices
    paths: Paths
    cluster: Cluster | None = None
    """Where it is submitted to; None: it runs on this box."""
    cluster_name: str = ""


def on_this_box(request: Request, imagine: bool) -> Target:
    """A run on this box. ``imagine``: plan for the GPUs that are asked for, even if there are none here."""
    options = request.options
    _refuse_cluster(options)
    run = _run_dir(request.source, options, Path("runs"))
    old = earlier(run)  # read even if a recipe is given, because a run.json that cannot be read is never replaced
    box = _devices(options, old.placement if old and request.source.run else None, imagine)
    return Target(run, old, box, _paths(request, run, None))


def on_cluster(request: Request) -> Target:
    """A run on nodes of a cluster. Raises ``UserError``.

    The cluster is the one that is asked for, else the one that a continued run was submitted to, else the default.
    """
    from galley_launch.cluster import profiles  # imported here, because its schema takes a while

    options, continued = request.options, request.source.run
    known = (read_json(continued.cluster) or {}).get("name") if continued else None
    name, cluster = profiles.find(options.cluster or known, options.cluster_overrides)
    run = _run_dir(request.source, options, Path(cluster.runs or "runs"))
    old = earlier(run)
    if options.gpus is not None:
        raise UserError("gpus", "Slurm chooses the devices", f"set how many a node: ranks={cluster.ranks}")
    nodes, threads = options.nodes or 1, cluster.cores_per_rank
    box = Devices(cluster.device, cluster.ranks, None, nodes=nodes, threads=threads)
    return Target(run, old, box, _paths(request, run, cluster.cache), cluster, name)


def _refuse_cluster(options: LaunchOptions) -> None:
    if options.cluster is not None:
        raise UserError("cluster", "galley run trains on this box", f"galley submit RECIPE cluster={options.cluster}")
    if options.nodes not in (None, 1):
        todo = "galley submit RECIPE cluster=NAME nodes=N"
        raise UserError("nodes", f"{options.nodes} nodes are not one box", todo)
    if options.cluster_overrides:
        todo = "write cluster=NAME too (see galley clusters)"
        raise UserError(options.cluster_overrides[0].key, "there is no cluster to change", todo)


def _devices(options: LaunchOptions, before: Placement | None, imagine: bool) -> Devices:
    """This box's devices. ``before``: the placement of a run that is continued; one on the CPU stays there."""
    gpus, was_on_cpu = list(options.gpus or ()), before is not None and before.device == "cpu"
    stays_on_cpu = was_on_cpu and options.gpus is None
    kind = options.device or ("cpu" if stays_on_cpu else "cuda")
    if kind == "cpu":
        kept = before.ranks_per_node if before and was_on_cpu else None
        return devices.on_cpu(options.ranks or kept, gpus)
    return devices.imagined(options.ranks, gpus) if imagine else devices.on_gpus(options.ranks, gpus)


def _run_dir(source: Source, options: LaunchOptions, base: Path) -> RunDir:
    """The directory of the run. ``base``: the directory of runs if the command line gives none."""
    if source.run is not None:
        parent = source.run.root.parent
        if options.name is not None or (options.runs or parent) != parent:
            raise UserError("name", f"{source.label} is a run that exists", "leave name and runs out to continue it")
        return source.run
    name = source.stem if options.name is None else options.name
    if not _NAME.fullmatch(name):
        raise UserError("name", f"{name!r} is not a run's name", "use letters, digits, '.', '_' and '-'")
    return RunDir((options.runs or base) / name)


def _paths(request: Request, run: RunDir, cache: str | None) -> Paths:
    paths = recipe_paths.paths(request.recipe, run, request.source.beside, cache)
    # run.json is UTF-8, but names of folders may be any bytes.
    invalid = next((path for path in paths.model_dump().values() if path and not is_text(path)), None)
    if invalid:
        raise UserError("paths", f"{invalid!r} is not UTF-8", "work in a directory of another name")
    return paths
