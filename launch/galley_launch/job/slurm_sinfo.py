"""Reads what ``sinfo`` prints about partitions and nodes. Pure functions of text, as in ``slurm_parse.py``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from galley_launch.job.slurm_parse import integer, known, named, parse_limit

SINFO_FIELDS = ("%P", "%a", "%l", "%D", "%T", "%c", "%m", "%G", "%f")
"""Columns of ``sinfo -o``: partition, state, limit, nodes, their state, CPUs, memory, devices, features."""


@dataclass(frozen=True)
class Partition:
    """A partition. Where its nodes differ, ``cores``, ``memory_mb`` and GPUs are those of the most frequent kind."""

    name: str
    is_default: bool
    state: str
    """``up``, ``down``, ``drain`` or ``inact``."""
    limit_s: int | None
    nodes: int
    idle: int
    away: int
    """Nodes that are drained, draining, down or do not answer."""
    cores: int
    """CPUs of a node, as Slurm counts them (hardware threads on many sites)."""
    memory_mb: int
    gpus: int
    gpu_type: str
    """As in ``--gres=gpu:TYPE:N``; "" where the site names none."""
    features: tuple[str, ...]


def _gpus(gres: str) -> tuple[int, str]:
    """Number and type in ``gpu:h100:4(S:0-1),nvme:1``; of several types the most frequent, with all of them counted."""
    # Commas also stand inside of parentheses (the sockets), so that the text is not split at them.
    kinds = re.findall(r"(?:^|,)gpu(?::([^:,()]+))??(?::no_consume)?:(\d+)(?=[(,]|$)", gres)
    if not kinds:
        return 0, ""
    most = max(kinds, key=lambda kind: int(kind[1]))
    return sum(int(count) for _, count in kinds), str(most[0])


def _kind(rows: Sequence[dict[str, str]]) -> tuple[int, str, int, int]:
    """(GPUs, their type, CPUs, MB) of the most frequent kind of node; CPUs and memory the least among that kind."""
    kinds: dict[tuple[int, str], int] = {}
    for row in rows:
        kinds[_gpus(row["%G"])] = kinds.get(_gpus(row["%G"]), 0) + integer(row["%D"])
    most = max(kinds, key=lambda kind: (kinds[kind], kind[0]))  # of equally frequent ones, that with more GPUs
    alike = [row for row in rows if _gpus(row["%G"]) == most]
    return (*most, min(integer(row["%c"]) for row in alike), min(integer(row["%m"]) for row in alike))


# States of nodes that take no job now, by part of the name; but powered_down and powering_down nodes are woken for one.
_AWAY = re.compile(r"drain|down(?!_)|fail|error|unknown|\*$")


def _partition(name: str, rows: Sequence[dict[str, str]]) -> Partition:
    gpus, gpu_type, cores, memory_mb = _kind(rows)
    features = (feature for row in rows for feature in known(row["%f"]).split(",") if feature)
    return Partition(
        name=name.rstrip("*"),
        is_default=name.endswith("*"),
        state=rows[0]["%a"],
        limit_s=parse_limit(rows[0]["%l"]),
        nodes=sum(integer(row["%D"]) for row in rows),
        # "idle~" is switched off and comes when it is needed; "idle*" does not answer
        idle=sum(integer(row["%D"]) for row in rows if row["%T"].rstrip("~#") == "idle"),
        away=sum(integer(row["%D"]) for row in rows if _AWAY.search(row["%T"])),
        cores=cores,
        memory_mb=memory_mb,
        gpus=gpus,
        gpu_type=gpu_type,
        features=tuple(dict.fromkeys(features)),
    )


def partitions_from_sinfo(text: str) -> list[Partition]:
    """Partitions in Slurm's order from ``sinfo -o`` with :data:`SINFO_FIELDS`: a line for each kind of node."""
    groups: dict[str, list[dict[str, str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == len(SINFO_FIELDS) and cells[3].isdecimal():
            groups.setdefault(cells[0], []).append(named(SINFO_FIELDS, cells))
    return [_partition(name, rows) for name, rows in groups.items()]


def states_from_sinfo(text: str) -> dict[str, str]:
    """Upper-case states by node from ``sinfo -N -o '%N|%T'``."""
    pairs = (line.split("|") for line in text.splitlines())
    return {pair[0].strip(): pair[1].strip().upper() for pair in pairs if len(pair) == 2 and pair[0].strip()}
