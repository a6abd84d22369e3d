"""A refusal of Slurm's, with the key of the profile that answers it: Slurm itself names neither."""

from __future__ import annotations

import re
from collections.abc import Sequence

from galley.contract.errors import UserError
from galley_launch.cluster.profile import Cluster, megabytes, seconds
from galley_launch.job import slurm
from galley_launch.submit.requests import JobRequest

_ASKED = re.compile(
    r"--(nodes|gpus-per-node|gres|cpus-per-task|mem|mem-per-cpu|partition|constraint|reservation|exclude|clusters)=\S+"
)
_MEMORY = ("memory_per_rank", "mem", "less, or cluster.memory_request=mem-per-cpu or none")

# What Slurm and sites' plug-ins say (slurm_errno.c of 22.05 to 25.05), the key that answers it, its option, what to do.
# The special stands before the general.
_RULES = (
    (r"MaxSubmit|SubmitJobsPer", "attempts", "", "the site limits how many jobs wait"),
    (
        r"QOS policy|\b(?:QOS|Assoc)\w*Limit|\bMax\w+Per\w+",
        "qos",
        "qos",
        "another one, or a shorter cluster.time, or fewer nodes",
    ),
    (r"reservation", "reservation", "reservation", "one that is active and yours (scontrol show reservation)"),
    (r"\bqos\b|quality of service", "qos", "qos", "one that is yours (sacctmgr show assoc user=$USER)"),
    (
        r"partition name|(?:use|in) this partition|partition.*(?:denied|not perm|not available)",
        "partition",
        "partition",
        "see sinfo",
    ),
    (r"--mem\b", *_MEMORY),
    (r"(?:cores?|CPUs?)[ -]per[ -]GPU", "cores_per_rank", "cpus-per-task", "what the site gives with each GPU"),
    (r"account|project|allocation group", "account", "account", "one that is yours (sacctmgr show assoc user=$USER)"),
    (r"feature|constraint|architecture", "constraint", "constraint", "one that nodes have (sinfo -o '%P %f')"),
    (r"time ?limit|wall ?time", "time", "time", "what the partition and the account allow (sinfo -o '%P %l')"),
    (
        r"generic resource|\bgres\b|GPUs?\b|\bTRES\b",
        "gpu_request",
        "gres",
        "gres or none; cluster.gpu_type names the site's type",
    ),
    (r"\bmemory\b", *_MEMORY),
    (r"--ntasks|number of tasks", "ntasks", "ntasks", "true"),
    (r"CPU count|processors|--cpus-per-task|\bcores?\b", "cores_per_rank", "cpus-per-task", "what nodes have"),
    (r"node count|--nodes|number of nodes", "nodes", "nodes", "what there is (sinfo)"),
    (r"no cluster|cluster name|--clusters", "clusters", "clusters", "a name that sacctmgr show cluster knows"),
    (r"unrecognized option|invalid option", "directives", "", "only what this Slurm knows"),
)
_ASIDE = ("partition", "account", "qos", "constraint", "reservation", "time")
_AS_SIDE = {"memory_per_rank": "side.memory", "cores_per_rank": "side.cores", "gpus_per_node": "side.gpus"}


def _key(name: str, stage: str) -> str:
    if name == "nodes":
        return name
    own = f"side.{name}" if name in _ASIDE else _AS_SIDE.get(name, name)
    return f"cluster.{name if stage == 'train' else own}"


def describe(each: slurm.Partition) -> str:
    """``3 nodes of 8 cores, 62 GB, 4 h100 GPUs``."""
    gpus = f"{each.gpus} {each.gpu_type} GPUs".replace("  ", " ") if each.gpus else "no GPUs"
    return f"{each.nodes} nodes of {each.cores} cores, {each.memory_mb // 1024} GB, {gpus}"


def _number(words: Sequence[str], *names: str) -> int:
    """The count in ``--gres=gpu:h100:8`` or ``--nodes=4``; 0 without."""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name in names and (found := re.search(r"\d+$", value)):
            return int(found[0])
    return 0


def _too_much(words: Sequence[str], each: slurm.Partition) -> str:
    """The first part of a request that no node of the partition can give, as a key of the profile."""
    memory = next((word.partition("=")[2] for word in words if word.startswith("--mem=")), "")
    wants = [
        ("nodes", _number(words, "nodes"), each.nodes - each.away),
        ("gpus_per_node", _number(words, "gpus-per-node", "gres"), each.gpus),
        ("cores_per_rank", _number(words, "cpus-per-task"), each.cores),
        ("memory_per_rank", megabytes(memory) if memory not in ("", "0") else 0, each.memory_mb),
    ]
    return next((key for key, wanted, there in wants if wanted > there), "")


def _which(error: str, asked: Sequence[str], each: slurm.Partition | None) -> tuple[str, str, str]:
    """Key, option and advice."""
    if re.search(r"node configuration is not available|can not be satisfied|permanently", error) and each:
        key = _too_much(asked, each)
        if key:
            return key, "", ""
    rule = next((rule for rule in _RULES if re.search(rule[0], error, re.IGNORECASE)), None)
    return (rule[1], rule[2], rule[3]) if rule else ("", "", "")


def refusal(
    job: JobRequest, script: str, error: slurm.SlurmError, cluster: str = "", side_partition: str | None = None
) -> UserError:
    """``error``, which ended the test or the submission of ``job``, as a line that names the key.

    ``side_partition``: the profile's ``side.partition``; without it, prepare and export go where training goes.
    """
    head = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [*head, *job.options]
    try:
        found = slurm.partitions(cluster)
    except slurm.SlurmError as silent:
        if error.passes or "no such command" in str(error) or not silent.passes:
            return UserError("slurm", str(error), "see that Slurm answers here: sinfo")
        found = []
    known = {each.name: each for each in found}
    name = next((word.partition("=")[2] for word in words if word.startswith("--partition=")), "")
    name = name or next((each.name for each in found if each.is_default), "")
    unknown = next((each for each in name.split(",") if each not in known), None) if known else None
    if unknown is not None and re.search("partition|policy|account", str(error), re.IGNORECASE):
        what = f"no partition {unknown!r}" if unknown else "none is named, and Slurm has no default"
        key = _key("partition", job.stage if side_partition else "train")
        return UserError(key, f"{what} ({error})", f"there are {', '.join(known)}")
    return _explained(job, words, error, name, known.get(name.partition(",")[0]))


def _explained(
    job: JobRequest, words: Sequence[str], error: slurm.SlurmError, name: str, each: slurm.Partition | None
) -> UserError:
    asked = [word for word in words if _ASKED.fullmatch(word)]
    key, option, advice = _which(str(error), asked, each)
    have = ""
    if each:
        have = f"partition {name} is {each.state.lower()} and has {describe(each)}"
        have += f", {each.away} of them drained or down (sinfo -R)" if each.away else ""
    shown = [word for word in words if option and word.startswith(f"--{option}=")] or ([] if option else asked)
    given = " ".join(shown) or f"no --{option} is given"
    what = f"Slurm refuses the {job.stage} job ({given}): {error}"
    if not key:
        return UserError("slurm", what, f"{have or 'see sinfo'}; ask for what there is (galley clusters)")
    where = _key(key, job.stage)
    if not advice:
        return UserError(where, what, f"{have or 'see sinfo'}; ask for what there is (galley clusters)")
    return UserError(where, what, f"write {where}=…: {advice}")


def too_long(cluster: Cluster, stages: Sequence[str], partitions: Sequence[slurm.Partition]) -> list[tuple[str, str]]:
    """(key, what) of each time that no partition asked for allows: Slurm takes such a job and lets it wait for ever."""
    known, found = {each.name: each for each in partitions}, []
    default = next((each.name for each in partitions if each.is_default), "")
    asked = {"cluster.time": (cluster.partition, cluster.time)} if "train" in stages else {}
    if any(stage != "train" for stage in stages):
        asked["cluster.side.time"] = (cluster.side.partition or cluster.partition, cluster.side.time)
    for key, (names, time) in asked.items():
        there = [known.get(name) for name in (names or default).split(",")]
        limits = [each.limit_s if each else None for each in there]
        most = [limit for limit in limits if limit is not None]
        if limits and len(most) == len(limits) and seconds(time) > max(most):
            found.append((key, f"{time} is more than partition {names or default} allows, {_clock(max(most))}"))
    return found


def _clock(whole: int) -> str:
    days, rest = divmod(whole, 86400)
    return f"{f'{days}-' if days else ''}{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
