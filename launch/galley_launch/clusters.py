"""``galley clusters``: the profiles, and whether the Slurm that answers here has what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from galley_launch import profiles, view
from galley_launch.cluster import Cluster, megabytes, seconds
from galley_launch.job import slurm
from galley_launch.submission import describe


def check(cluster: Cluster, partitions: Sequence[slurm.Partition]) -> list[str]:
    """What of ``cluster`` the site does not have, a line each."""
    known = {each.name: each for each in partitions}
    name = cluster.partition or next((each.name for each in partitions if each.is_default), None)
    if name is None or name not in known:
        what = f"no partition {name!r}" if name else "no default partition: set partition"
        return [f"{what} (there are {', '.join(known)})"]
    each, found = known[name], []
    gpus = min(cluster.ranks, cluster.gpus_per_node) if cluster.device == "cuda" else 0
    cores = cluster.cores_per_rank * cluster.ranks
    if gpus > each.gpus:
        found.append(f"{gpus} GPUs a node, but {name} has {each.gpus}")
    if cores > each.cores:
        found.append(f"{cores} cores a node (cores_per_rank x ranks), but {name} has {each.cores}")
    if each.limit_s is not None and seconds(cluster.time) > each.limit_s:
        found.append(f"time {cluster.time}, but {name} allows {round(each.limit_s / 60)} minutes")
    if cluster.memory_per_rank and megabytes(cluster.memory_per_rank) * cluster.ranks > each.memory_mb:
        found.append(
            f"{cluster.memory_per_rank} x {cluster.ranks} ranks, but {name} has {each.memory_mb // 1024} GB a node"
        )
    if cluster.gpu_type and gpus and each.gpu_type and cluster.gpu_type != each.gpu_type:
        found.append(f"GPUs of type {cluster.gpu_type}, but {name} has {each.gpu_type}")
    if cluster.side.partition and cluster.side.partition not in known:
        found.append(f"no partition {cluster.side.partition!r} (side.partition)")
    return found


def listing() -> None:
    """Print the table of profiles, and that of the partitions that Slurm has here."""
    rows, partitions, problem = [], [], ""
    try:
        partitions = slurm.partitions()
    except slurm.SlurmError as error:
        problem = f"Slurm does not answer here, so nothing was checked ({error})"
    for name, path in profiles.every().items():
        cluster = profiles.load(path)
        problems = check(cluster, partitions) if partitions else []
        verdict = "; ".join(problems) or ("fits" if partitions else "")
        mark = " (default)" if cluster.default else ""
        rows.append((name + mark, cluster.about, _whose(path), verdict))
    view.table(("cluster", "about", "where", "against sinfo"), rows)
    print()
    if problem:
        print(problem)
        return
    here = [(f"{each.name}{'*' if each.is_default else ''}", each.state.lower(), describe(each)) for each in partitions]
    view.table(("partition", "state", "has"), here)


def _whose(path: Path) -> str:
    return "shipped" if path.parent == profiles.folders()[0] else str(path)


def details(name: str, settings: Sequence[str]) -> tuple[str, list[str]]:
    """A profile with every default, as YAML; and what the site does not have of it."""
    import yaml

    _, cluster = profiles.find(name, settings)
    text = yaml.safe_dump(cluster.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    try:
        return text, check(cluster, slurm.partitions())
    except slurm.SlurmError as error:
        return text, [f"not checked: {error}"]
