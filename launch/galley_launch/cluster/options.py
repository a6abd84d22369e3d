"""Values that become options of sbatch and srun: what they may say, each refused in words that follow the value."""

from __future__ import annotations

import re

from galley_launch.base.grammar import is_text

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
# What the script says itself, or what would contradict it: a second word would win or be lost without notice.
_OURS_TEXT = """
account array batch begin chdir clusters constraint cores-per-socket cpus-per-gpu cpus-per-task dependency error exclude
exclusive export export-file get-user-env gid gpu-bind gpus gpus-per-node gpus-per-socket gpus-per-task gres hold input
job-name kill-on-invalid-dep mem mem-per-cpu mem-per-gpu no-kill no-requeue nodefile nodelist nodes ntasks
ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable
partition qos quiet requeue reservation share signal test-only time tres-bind tres-per-task uid wait wrap
"""
_OURS = frozenset(_OURS_TEXT.split())
_OF_STEPS = _OURS | {
    "container-env",
    "container-image",
    "container-mounts",
    "cpu-bind",
    "het-group",
    "kill-on-bad-exit",
}
_OF_STEPS |= {"jobid", "label", "multi-prog", "preserve-env", "pty"}
_AMD = re.compile(r"(amd[-_])?(instinct[-_])?mi\d{2,3}[a-z]*([-_].*)?|gfx\d+\w*", re.IGNORECASE)
_NO_AMD = (
    "means AMD's GPUs, which are not supported: Galley trains on NVIDIA's and on CPUs; name such nodes, or device: cpu"
)
MIG = re.compile(r"(?:.*[_.:-])?\d+g\.\d+gb(?:[.+_-].*)?", re.IGNORECASE)
"""A slice of a GPU, as sites name it: ``1g.10gb``, ``a100_3g.20gb``, ``h100-1g.12gb+me``."""


def line(value: str) -> str:
    """A line of text."""
    if _CONTROL.search(value):
        raise ValueError("holds a newline or another control character")
    if not is_text(value):
        raise ValueError("is not UTF-8")
    return value


def option(value: str) -> str:
    """A value that stands in an ``#SBATCH`` line: there a backslash takes the next character away, quoted or not."""
    if "\\" in value:
        raise ValueError("holds a backslash, which sbatch would remove")
    return line(value)


def cluster_name(value: str) -> str:
    """One cluster's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError("is not the name of one cluster, such as alpha")
    return value


def gpu_type(value: str) -> str:
    """``h100``, as a site calls it."""
    if not re.fullmatch(r"[A-Za-z0-9_.+-]*", value):
        raise ValueError("is not a type such as h100")
    if _AMD.fullmatch(value):
        raise ValueError(_NO_AMD)
    return value


def device(value: object) -> object:
    """``cuda`` or ``cpu``; AMD's are refused by name."""
    if isinstance(value, str) and value.lower() in ("rocm", "hip", "amd"):
        raise ValueError(_NO_AMD)
    return value


def _name(value: str, example: str, taken: frozenset[str], whose: str) -> None:
    found = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=.*)?", value)
    if not found:
        raise ValueError(f"is not an option such as {example}")
    # Slurm's commands take the beginning of an option's name for the option.
    ours = sorted(name for name in taken if name.startswith(found[1]))
    if ours:
        raise ValueError(f"sets {found[1] if found[1] in ours else ours[0]}, which the job script sets {whose}")


def directive(value: str) -> str:
    """A further ``#SBATCH`` option."""
    _name(option(value), "--mail-type=END", _OURS, "itself")
    return value


def step(value: str) -> str:
    """A further option of ``srun``."""
    _name(line(value), "--mpi=none", _OF_STEPS, "itself, or the whole job")
    return value
