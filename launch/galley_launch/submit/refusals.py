"""What to change in a profile when Slurm refuses a job.

Slurm names neither the option that it refuses nor, of course, the key of the profile behind it. So its message is
matched against :data:`_RULES`, and the request compared with what ``sinfo`` lists.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from galley.contract.errors import UserError
from galley_launch.cluster.profile import Cluster, megabytes, seconds
from galley_launch.job import slurm
from galley_launch.submit.job_requests import JobRequest

# The options that are shown with a refusal where none of them in particular is to blame.
_ASKED = re.compile(
    r"--(nodes|gpus-per-node|gres|cpus-per-task|mem|mem-per-cpu|partition|constraint|reservation|exclude|clusters)=\S+"
)
_MEMORY = ("memory_per_rank", "mem", "less, or cluster.memory_request=mem-per-cpu or none")

# A pattern of messages of Slurm (slurm_errno.c of 22.05 to 25.05) and of sites' plug-ins, the key of the profile to
# change, its sbatch option, and what to write. The first match counts, so the special stands before the general: "Job
# violates accounting/QOS policy" is about a limit, but has the word QOS in it as well.
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
# Keys that jobs beside training have under the same name in side, then those that are called otherwise there.
_SIDE_KEYS = ("partition", "account", "qos", "constraint", "reservation", "time")
_SIDE_NAMES = {"memory_per_rank": "side.memory", "cores_per_rank": "side.cores", "gpus_per_node": "side.gpus"}


def _key(name: str, stage: str) -> str:
    """How a user sets the key ``name`` for a job of ``stage``: ``cluster.time``, ``cluster.side.time``, ``nodes``."""
    if name == "nodes":
        return name  # a launch option, not a key of the profile
    own = f"side.{name}" if name in _SIDE_KEYS else _SIDE_NAMES.get(name, name)
    return f"cluster.{name if stage == 'train' else own}"


def describe(partition: slurm.Partition) -> str:
    """``3 nodes of 8 cores, 62 GB, 4 h100 GPUs``."""
    gpus = f"{partition.gpus} {partition.gpu_type} GPUs".replace("  ", " ") if partition.gpus else "no GPUs"
    return f"{partition.nodes} nodes of {partition.cores} cores, {partition.memory_mb // 1024} GB, {gpus}"


def _number(words: Sequence[str], *names: str) -> int:
    """The count in ``--gres=gpu:h100:8`` or ``--nodes=4``; 0 without."""
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name in names and (match := re.search(r"\d+$", value)):
            return int(match[0])
    return 0


def _too_much(words: Sequence[str], partition: slurm.Partition) -> str:
    """The first part of a request that no node of the partition can give, as a key of the profile."""
    memory = next((word.partition("=")[2] for word in words if word.startswith("--mem=")), "")
    # Each with what there is of it. --mem=0 asks for all of a node (sbatch(1)), which no node can lack.
    wants = [
        ("nodes", _number(words, "nodes"), partition.nodes - partition.away),
        ("gpus_per_node", _number(words, "gpus-per-node", "gres"), partition.gpus),
        ("cores_per_rank", _number(words, "cpus-per-task"), partition.cores),
        ("memory_per_rank", megabytes(memory) if memory not in ("", "0") else 0, partition.memory_mb),
    ]
    return next((key for key, wanted, available in wants if wanted > available), "")


def _cause(error: str, asked: Sequence[str], partition: slurm.Partition | None) -> tuple[str, str, str]:
    """Key to change, its option of sbatch and what to write; empty where that is not known."""
    # These messages are the same for every part of a request: which one is too much has to be found by comparing.
    if re.search(r"node configuration is not available|can not be satisfied|permanently", error) and partition:
        key = _too_much(asked, partition)
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
        partitions = slurm.partitions(cluster)
    except slurm.SlurmError as sinfo_error:
        # Where Slurm is away, the job was not refused at all. Where only sinfo got no answer, the message has to do.
        if error.is_transient or "no such command" in str(error) or not sinfo_error.is_transient:
            return UserError("slurm", str(error), "see that Slurm answers here: sinfo")
        partitions = []
    known = {partition.name: partition for partition in partitions}
    name = next((word.partition("=")[2] for word in words if word.startswith("--partition=")), "")
    name = name or next((partition.name for partition in partitions if partition.is_default), "")
    unknown = next((one for one in name.split(",") if one not in known), None) if known else None
    # Only where the message may be about the partition: any other refusal has a cause of its own.
    if unknown is not None and re.search("partition|policy|account", str(error), re.IGNORECASE):
        what = f"no partition {unknown!r}" if unknown else "none is named, and Slurm has no default"
        key = _key("partition", job.stage if side_partition else "train")
        return UserError(key, f"{what} ({error})", f"there are {', '.join(known)}")
    return _explained(job, words, error, name, known.get(name.partition(",")[0]))


def _explained(
    job: JobRequest, words: Sequence[str], error: slurm.SlurmError, name: str, partition: slurm.Partition | None
) -> UserError:
    """``words``: all options of the job; ``name``: its partition or partitions; ``partition``: the first of them."""
    asked = [word for word in words if _ASKED.fullmatch(word)]
    key, option, advice = _cause(str(error), asked, partition)
    have = ""
    if partition:
        have = f"partition {name} is {partition.state.lower()} and has {describe(partition)}"
        have += f", {partition.away} of them drained or down (sinfo -R)" if partition.away else ""
    shown = [word for word in words if option and word.startswith(f"--{option}=")] or ([] if option else asked)
    given = " ".join(shown) or f"no --{option} is given"
    what = f"Slurm refuses the {job.stage} job ({given}): {error}"
    if not key:
        return UserError("slurm", what, f"{have or 'see sinfo'}; ask for what there is (galley clusters)")
    where = _key(key, job.stage)
    if not advice:
        return UserError(where, what, f"{have or 'see sinfo'}; ask for what there is (galley clusters)")
    return UserError(where, what, f"write {where}=…: {advice}")


@dataclass(frozen=True)
class TooLong:
    """A time limit that no partition asked for allows."""

    key: str
    """The key that sets it: ``cluster.time``."""
    time: str
    partition: str
    allowed: str
    """The longest limit of those partitions, as Slurm writes it: ``1-00:00:00``."""


def too_long(cluster: Cluster, stages: Sequence[str], partitions: Sequence[slurm.Partition]) -> list[TooLong]:
    """Each time limit of the jobs of ``stages`` that exceeds those of all partitions asked for.

    Slurm accepts such a job and leaves it pending for ever (reason ``PartitionTimeLimit``), unless the site has set
    ``EnforcePartLimits`` (slurm.conf(5)).
    """
    known = {partition.name: partition for partition in partitions}
    default = next((partition.name for partition in partitions if partition.is_default), "")
    asked = {"cluster.time": (cluster.partition, cluster.time)} if "train" in stages else {}
    if any(stage != "train" for stage in stages):
        asked["cluster.side.time"] = (cluster.side.partition or cluster.partition, cluster.side.time)
    exceeding = []
    for key, (names, time) in asked.items():
        wanted = [known.get(name) for name in (names or default).split(",")]
        limits = [partition.limit_s if partition else None for partition in wanted]
        # A partition without a limit, or one that is not listed, may allow any time: then nothing can be said.
        finite = [limit for limit in limits if limit is not None]
        if limits and len(finite) == len(limits) and seconds(time) > max(finite):
            exceeding.append(TooLong(key, time, names or default, _time_text(max(finite))))
    return exceeding


def _time_text(whole: int) -> str:
    """``whole`` seconds as ``[D-]HH:MM:SS`` (sbatch(1), --time)."""
    days, rest = divmod(whole, 86400)
    return f"{f'{days}-' if days else ''}{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
