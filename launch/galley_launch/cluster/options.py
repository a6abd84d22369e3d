"""Checks of values that become options of sbatch and srun.

Each returns the value, or raises ``ValueError`` with a message to be read after the value: ``is not UTF-8``.
"""

from __future__ import annotations

import re

from galley_launch.base.grammar import is_text

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")
# Options that the script sets itself, or that contradict those: one of the two would be ignored without a warning.
_SET_BY_SCRIPT_TEXT = """
account array batch begin chdir clusters constraint cores-per-socket cpus-per-gpu cpus-per-task dependency error exclude
exclusive export export-file get-user-env gid gpu-bind gpus gpus-per-node gpus-per-socket gpus-per-task gres hold input
job-name kill-on-invalid-dep mem mem-per-cpu mem-per-gpu no-kill no-requeue nodefile nodelist nodes ntasks
ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable
partition qos quiet requeue reservation share signal test-only time tres-bind tres-per-task uid wait wrap
"""
_SET_BY_SCRIPT = frozenset(_SET_BY_SCRIPT_TEXT.split())
# Of srun also these: the script sets them for its steps, or they would change what a step runs and prints.
_OF_STEPS_TEXT = """
container-env container-image container-mounts cpu-bind het-group jobid kill-on-bad-exit label multi-prog preserve-env
pty
"""
_SET_FOR_STEPS = _SET_BY_SCRIPT | frozenset(_OF_STEPS_TEXT.split())
# AMD's names for its data-centre GPUs (Instinct MI250X) and for their instruction sets (gfx90a).
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


def sbatch_value(value: str) -> str:
    """The value of an ``#SBATCH`` option."""
    # sbatch reads such a line with quotes like a shell's, but removes backslashes inside of single quotes too.
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
    """Refuses names of AMD's platform; all else is left to the type of the field (``cuda`` or ``cpu``)."""
    if isinstance(value, str) and value.lower() in ("rocm", "hip", "amd"):
        raise ValueError(_NO_AMD)
    return value


def _check_option(value: str, example: str, reserved: frozenset[str], by: str) -> None:
    """Raise ``ValueError`` unless ``value`` is ``--name`` or ``--name=…`` with a name that is not ``reserved``."""
    match = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=.*)?", value)
    if not match:
        raise ValueError(f"is not an option such as {example}")
    # Slurm's commands use getopt_long(3), which takes an unambiguous beginning of a name for the option: --part=x.
    matches = sorted(name for name in reserved if name.startswith(match[1]))
    if matches:
        raise ValueError(f"sets {match[1] if match[1] in matches else matches[0]}, which the job script sets {by}")


def directive(value: str) -> str:
    """A further ``#SBATCH`` option."""
    _check_option(sbatch_value(value), "--mail-type=END", _SET_BY_SCRIPT, "itself")
    return value


def srun_option(value: str) -> str:
    """A further option of ``srun``."""
    _check_option(line(value), "--mpi=none", _SET_FOR_STEPS, "itself, or the whole job")
    return value
