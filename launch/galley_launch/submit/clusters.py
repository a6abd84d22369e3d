"""``galley clusters``: the profiles, and whether the Slurm that answers here has what they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from galley.contract.errors import UserError
from galley_launch.base.options import Setting
from galley_launch.base.table import table
from galley_launch.cluster import profile_files, profiles
from galley_launch.cluster.profile import Cluster, megabytes, seconds
from galley_launch.job import slurm
from galley_launch.recipe import explained
from galley_launch.submit.refusals import describe

_FILE, _COPY = "file:", "your own copy of it: galley copy cluster"


@dataclass(frozen=True)
class _Wish:
    """What a job takes of each of its nodes."""

    partition: str
    """Empty: the default one. Several, with commas between them: whichever is free first."""
    gpus: int
    gpu_type: str | None
    cores: int
    memory_mb: int
    time: str


def _wishes(cluster: Cluster) -> tuple[_Wish, _Wish]:
    """Of training, and of the jobs beside it."""
    ranks, side = cluster.ranks, cluster.side
    gpus = (ranks, side.gpus) if cluster.device == "cuda" and cluster.gpu_request != "none" else (0, 0)
    memory = megabytes(cluster.memory_per_rank) * ranks if cluster.memory_per_rank else 0
    partition, kind = cluster.partition or "", cluster.gpu_type
    return (
        _Wish(partition, gpus[0], kind, cluster.cores_per_rank * ranks, memory, cluster.time),
        _Wish(side.partition or partition, gpus[1], kind, side.cores, megabytes(side.memory), side.time),
    )


def _lacks(wish: _Wish, each: slurm.Partition) -> list[str]:
    found = [] if each.state.lower() == "up" else [f"{each.name} is {each.state.lower()}"]
    if wish.gpus > each.gpus:
        found.append(f"{wish.gpus} GPUs a node, but {each.name} has {each.gpus}")
    if wish.cores > each.cores:
        found.append(f"{wish.cores} cores a node, but {each.name} has {each.cores}")
    if wish.memory_mb > each.memory_mb:
        found.append(f"{wish.memory_mb // 1024} GB a node, but {each.name} has {each.memory_mb // 1024}")
    if each.limit_s is not None and seconds(wish.time) > each.limit_s:
        found.append(f"time {wish.time}, but {each.name} allows {round(each.limit_s / 60)} minutes")
    if wish.gpu_type and wish.gpus and each.gpu_type and wish.gpu_type != each.gpu_type:
        found.append(f"GPUs of type {wish.gpu_type}, but {each.name} has {each.gpu_type}")
    return found


def _compare(wish: _Wish, partitions: Sequence[slurm.Partition]) -> list[str]:
    known = {each.name: each for each in partitions}
    default = next((each.name for each in partitions if each.is_default), "")
    names = (wish.partition or default).split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        what = f"no partition {unknown[0]!r}" if unknown[0] else "no default partition: set partition"
        return [f"{what} (there are {', '.join(known)})"]
    return min((_lacks(wish, known[name]) for name in names), key=len)


def check(cluster: Cluster, partitions: Sequence[slurm.Partition]) -> list[str]:
    """What of ``cluster`` the site does not have, a line each."""
    train, side = _wishes(cluster)
    found = _compare(train, partitions)
    beside = [each for each in _compare(side, partitions) if each not in found]
    return [*found, *(f"side: {each}" for each in beside)]


def listing() -> None:
    """Print the table of profiles, and that of the partitions that Slurm has here."""
    partitions, problem = [], ""
    try:
        partitions = slurm.partitions()
    except slurm.SlurmError as error:
        problem = f"Slurm does not answer here, so nothing was checked ({error})"
    rows = [_row(name, path, partitions) for name, path in profiles.every().items()]
    table(("cluster", "about", "where", "against sinfo"), rows)
    print()
    if problem:
        print(problem)
        return
    here = [(f"{each.name}{'*' if each.is_default else ''}", each.state.lower(), describe(each)) for each in partitions]
    table(("partition", "state", "has"), here)


def _row(name: str, path: Path, partitions: Sequence[slurm.Partition]) -> tuple[str, ...]:
    try:
        cluster = profiles.load(path)
    except UserError as error:  # The others are of use all the same.
        return name, "", _whose(path), " ".join(str(error).removeprefix(f"{path}: ").split())
    problems = check(cluster, partitions) if partitions else []
    mark = " (default)" if cluster.default else ""
    return name + mark, cluster.about, _whose(path), "; ".join(problems) or ("fits" if partitions else "")


def _whose(path: Path) -> str:
    return "shipped" if path.parent == profiles.folders()[0] else str(path)


def details(name: str, settings: Sequence[Setting]) -> tuple[str, list[str]]:
    """A profile: its header and file, then every key with its default, as YAML; and what the site lacks of it."""
    _, cluster = profiles.find(name, settings)
    path = profile_files.path_of(name)
    header = profile_files.header(path.read_text(encoding="utf-8")).splitlines()
    said = [line for line in header if not line.startswith((_FILE, _COPY))]  # as this verb printed it, once
    above = [*said, *([""] if said and said[-1] else []), f"{_FILE} {path.absolute()}", f"{_COPY} {name} NEW"]
    text = "".join(f"# {line}".rstrip() + "\n" for line in above) + f"\n{explained.text(cluster)}"
    try:
        return text, check(cluster, slurm.partitions(cluster.clusters or ""))
    except slurm.SlurmError as error:
        return text, [f"not checked: {error}"]
