"""``galley clusters``: the profiles, each compared with the partitions that Slurm has here."""

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
"""Beginnings of the two lines that :func:`details` adds to a profile's header."""


@dataclass(frozen=True)
class _Request:
    """What a job asks of each of its nodes."""

    partition: str
    """Empty: the default one. Several, with commas between them: whichever is free first."""
    gpus: int
    gpu_type: str | None
    cores: int
    memory_mb: int
    time: str


def _requests(cluster: Cluster) -> tuple[_Request, _Request]:
    """Those of training, and of the jobs beside it."""
    ranks, side = cluster.ranks, cluster.side
    # With gpu_request "none" GPUs come with the nodes; then sinfo lists none, and nothing can be compared.
    gpus = (ranks, side.gpus) if cluster.device == "cuda" and cluster.gpu_request != "none" else (0, 0)
    memory = megabytes(cluster.memory_per_rank) * ranks if cluster.memory_per_rank else 0
    partition, kind = cluster.partition or "", cluster.gpu_type
    return (
        _Request(partition, gpus[0], kind, cluster.cores_per_rank * ranks, memory, cluster.time),
        _Request(side.partition or partition, gpus[1], kind, side.cores, megabytes(side.memory), side.time),
    )


def _lacks(request: _Request, partition: slurm.Partition) -> list[str]:
    """What ``partition`` does not have of ``request``, a line each. Memory is compared in MiB, and shown in GiB."""
    name = partition.name
    lines = [] if partition.state.lower() == "up" else [f"{name} is {partition.state.lower()}"]
    if request.gpus > partition.gpus:
        lines.append(f"{request.gpus} GPUs a node, but {name} has {partition.gpus}")
    if request.cores > partition.cores:
        lines.append(f"{request.cores} cores a node, but {name} has {partition.cores}")
    if request.memory_mb > partition.memory_mb:
        lines.append(f"{request.memory_mb // 1024} GB a node, but {name} has {partition.memory_mb // 1024}")
    if partition.limit_s is not None and seconds(request.time) > partition.limit_s:
        lines.append(f"time {request.time}, but {name} allows {round(partition.limit_s / 60)} minutes")
    if request.gpu_type and request.gpus and partition.gpu_type and request.gpu_type != partition.gpu_type:
        lines.append(f"GPUs of type {request.gpu_type}, but {name} has {partition.gpu_type}")
    return lines


def _compare(request: _Request, partitions: Sequence[slurm.Partition]) -> list[str]:
    """What the partition, or the best of several, does not have of ``request``."""
    known = {partition.name: partition for partition in partitions}
    default = next((partition.name for partition in partitions if partition.is_default), "")
    names = (request.partition or default).split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        what = f"no partition {unknown[0]!r}" if unknown[0] else "no default partition: set partition"
        return [f"{what} (there are {', '.join(known)})"]
    # Slurm starts a job in any of the partitions that it names: one that has everything is enough.
    return min((_lacks(request, known[name]) for name in names), key=len)


def check(cluster: Cluster, partitions: Sequence[slurm.Partition]) -> list[str]:
    """What of ``cluster`` the site does not have, a line each. What training lacks is not repeated for side jobs."""
    train, side = _requests(cluster)
    lines = _compare(train, partitions)
    side_lines = [line for line in _compare(side, partitions) if line not in lines]
    return [*lines, *(f"side: {line}" for line in side_lines)]


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
    # The default partition is marked as sinfo marks it.
    names = [f"{partition.name}{'*' if partition.is_default else ''}" for partition in partitions]
    states = [partition.state.lower() for partition in partitions]
    cells = zip(names, states, map(describe, partitions), strict=True)
    table(("partition", "state", "has"), list(cells))


def _row(name: str, path: Path, partitions: Sequence[slurm.Partition]) -> tuple[str, ...]:
    """The line of one profile. ``partitions``: empty where Slurm does not answer; then nothing is compared."""
    try:
        cluster = profiles.load(path)
    except UserError as error:  # Shown in its line, so that one damaged profile does not hide the others.
        return name, "", _origin(path), " ".join(str(error).removeprefix(f"{path}: ").split())
    problems = check(cluster, partitions) if partitions else []
    mark = " (default)" if cluster.default else ""
    return name + mark, cluster.about, _origin(path), "; ".join(problems) or ("fits" if partitions else "")


def _origin(path: Path) -> str:
    return "shipped" if path.parent == profiles.folders()[0] else str(path)


def details(name: str, settings: Sequence[Setting]) -> tuple[str, list[str]]:
    """The profile ``name`` as YAML (its header, its file, every key with its value), and what the site lacks of it."""
    _, cluster = profiles.find(name, settings)
    path = profile_files.path_of(name)
    header = profile_files.header(path.read_text(encoding="utf-8")).splitlines()
    # A profile that was saved from this output has these two lines in its header: they are replaced.
    kept = [line for line in header if not line.startswith((_FILE, _COPY))]
    comment = [*kept, *([""] if kept and kept[-1] else []), f"{_FILE} {path.absolute()}", f"{_COPY} {name} NEW"]
    text = "".join(f"# {line}".rstrip() + "\n" for line in comment) + f"\n{explained.text(cluster)}"
    try:
        return text, check(cluster, slurm.partitions(cluster.clusters or ""))
    except slurm.SlurmError as error:
        return text, [f"not checked: {error}"]
