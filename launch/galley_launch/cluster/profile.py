"""A cluster: where a run's jobs go, and what a node there is like."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from galley.contract.sensitive import is_secret_name
from galley_launch.cluster import options

_TIME = re.compile(
    r"(?:(\d{1,9})-)?(\d{1,9}):([0-5]\d):([0-5]\d)|(\d{1,9})-(\d{1,9})(?::([0-5]\d))?|(\d{1,9})", re.ASCII
)
_SIZE = re.compile(r"[1-9]\d{0,9}[MGT]", re.ASCII)
# Variables that bash sets or reads itself, or keeps from being set (bash(1), Shell Variables), then those that the
# job's scripts use (slurm/).
_RESERVED_TEXT = """
BASHOPTS BASH_VERSINFO EUID IFS POSIXLY_CORRECT PPID SHELLOPTS UID
clock facts hang host host_python init local node process ranks run scratch stage status watch
"""
_RESERVED = frozenset(_RESERVED_TEXT.split())


def _time(value: str) -> str:
    if not _TIME.fullmatch(value) or not seconds(value):
        raise ValueError("is not a time such as 12:00:00, 2-00:00:00 or 90 (minutes)")
    return value


def _size(value: str) -> str:
    if not _SIZE.fullmatch(value):
        raise ValueError("is not a size such as 120G")
    return value


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("is not a variable's name")
    if name in _RESERVED or (name.startswith("GALLEY_") and name != "GALLEY_MEETING"):  # node.sh asks for that one
        raise ValueError("is a name that the job's scripts use themselves; choose another")
    return name


def _expanded(value: str) -> str:
    """``value`` with ``~`` and the submitter's own variables put in, so that jobs need not know them."""
    return options.line(os.path.expandvars(os.path.expanduser(options.line(value))))  # noqa: PTH111 - Path would drop a trailing dot


def _absolute(value: str) -> str:
    path = _expanded(value)
    if not path.startswith("/"):
        raise ValueError("is not an absolute path")
    return path


def _path_on_node(value: str) -> str:
    """A path in which variables of the job and the node are left: ``/local/$SLURM_JOB_ID``, ``$TMPDIR/galley``."""
    # The "$" of those variables is hidden as NUL, which no value holds, while all others are replaced.
    kept = re.sub(r"\$(?=\{?(?:SLURM\w*|TMPDIR\b))", "\0", options.line(value))
    path = os.path.expandvars(os.path.expanduser(kept)).replace("\0", "$")  # noqa: PTH111 - as above
    if not path.startswith(("/", "$")):
        raise ValueError("is not an absolute path")
    return options.line(path)


def _name_or_path(value: str) -> str:
    """The name of an environment, or (with a ``/`` in it, or ``~``, ``$`` or ``.`` in front) an absolute path."""
    if not value:
        raise ValueError("is empty")
    return _absolute(value) if value.startswith(("~", "$", ".")) or "/" in value else options.line(value)


def _program(value: str) -> str:
    if "/" in value:
        return _absolute(value)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", value):  # bash reads others as something else: %1, [
        raise ValueError("is neither a program's name nor an absolute path")
    return value


def _image(value: str) -> str:
    """A file, or a name with a scheme or of a registry (``docker://…``, ``nvcr.io#nvidia/pytorch:25.01-py3``)."""
    if not value:
        raise ValueError("is empty")
    return _absolute(value) if value.startswith(("~", "$", ".", "/")) else options.line(value)


def _mount(value: str) -> str:
    """``/here``, ``/here:/there`` or ``/here:/there:ro``; a comma would begin the next."""
    try:
        path = _path_on_node(value)
    except ValueError:
        path = ""
    if not path or "," in path:
        raise ValueError("is not a mount such as /here:/there")
    return path


def seconds(time: str) -> int:
    """Seconds of a Slurm time: ``M``, ``H:M:S``, ``D-H``, ``D-H:M``, ``D-H:M:S`` (sbatch(1), --time)."""
    match = _TIME.fullmatch(time)
    if not match:
        raise ValueError(f"{time!r} is not a time")
    # One group of numbers for each of the three forms, of which two are empty: hence all days, hours … are added.
    days, hours, minutes, secs, days2, hours2, minutes2, only = (int(part or 0) for part in match.groups())
    return ((days + days2) * 24 + hours + hours2) * 3600 + (minutes + minutes2 + only) * 60 + secs


def megabytes(size: str) -> int:
    """MiB of ``120G``."""
    return int(size[:-1]) * {"M": 1, "G": 1024, "T": 1024**2}[size[-1]]


Line = Annotated[str, AfterValidator(options.line)]
Option = Annotated[str, AfterValidator(options.sbatch_value)]
Time = Annotated[str, AfterValidator(_time)]
Size = Annotated[str, AfterValidator(_size)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
Count = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A frozen piece of a profile; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Container(Section):
    """The image that ranks run in."""

    runtime: Literal["apptainer", "pyxis"]
    """``apptainer exec`` below srun, or srun's own ``--container-image`` (Pyxis)."""
    image: Annotated[str, AfterValidator(_image)]
    """A .sif or .sqsh file, or what the runtime takes (``docker://…``)."""
    mounts: list[Annotated[str, AfterValidator(_mount)]] = []
    """``/here:/there`` pairs or paths; the run, its model, data and cache are mounted as they are."""


class SideJobs(Section):
    """What the jobs beside training, each on one node, take: they prepare the data and export the model."""

    prepare: Literal["job", "here"] = "job"
    """``here``: on the host of ``galley submit``, before anything is queued, where nodes do not reach the internet."""

    partition: Option | None = None
    """None: the partition of training."""
    account: Option | None = None
    """None: that of training."""
    qos: Option | None = None
    """None: that of training, in its partition; in another one the site's default."""
    constraint: Option | None = None
    """Never that of training, which names its GPUs."""
    reservation: Option | None = None
    """None: that of training, in its partition."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Some partitions take no job without a GPU."""
    cores: Count = 8
    memory: Size = "32G"
    time: Time = "4:00:00"


class Patience(Section):
    """Seconds without a sign of life, by phase, after which a rank has hung and its attempt is ended."""

    start: Count = 900
    """From the start of a rank to its first sign of life: an import from a cold disk."""
    join: Count = 600
    load: Count = 3600
    step: Count = 1200
    evaluate: Count = 1200
    save: Count = 3600


class Cluster(Section):
    """One cluster, as its users see it."""

    about: Line = ""
    """One line for ``galley clusters``."""
    default: bool = False
    """Whether ``galley submit`` takes this cluster where none is named."""
    partition: Option | None = None
    """None: the cluster's default."""
    account: Option | None = None
    qos: Option | None = None
    constraint: Option | None = None
    """Features that nodes must have: ``h100``."""
    reservation: Option | None = None
    time: Time = "24:00:00"
    """Wall time of one attempt; a run may take several."""
    clusters: Annotated[str, AfterValidator(options.cluster_name)] | None = None
    """The cluster of a federation, or of several that one login node serves, that jobs go to."""
    device: Annotated[Literal["cuda", "cpu"], BeforeValidator(options.device)] = "cuda"
    gpus_per_node: Count = 8
    """GPUs of a whole node; 1 rank each."""
    gpu_type: Annotated[str, AfterValidator(options.gpu_type)] | None = None
    """As the site calls it (``h100``), where it must be named."""
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    """How GPUs are asked for: ``--gpus-per-node=8``, ``--gres=gpu:8``, or not at all, where they are no GRES."""
    ranks_per_node: Count | None = None
    """Ranks on each node; None: one for each GPU, on CPU clusters one. With fewer than its GPUs a node is shared."""
    cores_per_rank: Count = 8
    memory_per_rank: Size | None = None
    """Where a job takes part of a node. Whole nodes are taken with all their memory. None: the site's default."""
    memory_request: Literal["mem", "mem-per-cpu", "none"] = "mem"
    """How memory is asked for; ``none`` where a site takes no such request."""
    ntasks: bool = False
    """Also set ``--ntasks``, where a site demands it."""
    whole_nodes: bool = True
    """Take nodes alone where every GPU of them is used."""
    modules: list[Line] = []
    """Environment modules to load, in order."""
    setup: AbsolutePath | None = None
    """A shell file that jobs source first, for what has no key here: a site's own init file, ``module use``."""
    venv: AbsolutePath | None = None
    """Virtual environment on a shared disk. With no venv, conda or container: that of this galley."""
    conda: Annotated[str, AfterValidator(_name_or_path)] | None = None
    """Name or path of a conda environment; ``conda`` must be there after ``modules`` and ``setup``."""
    container: Container | None = None
    host_python: Annotated[str, AfterValidator(_program)] | None = None
    """Python 3.9 or newer on the nodes themselves, for the job's own few decisions; needs no package. None: that of
    the environment; beside a container ``python3``."""
    variables: dict[Annotated[str, AfterValidator(_variable)], Line] = {}
    """Environment of every stage: ``NCCL_DEBUG: WARN``. Never a secret: see ``secrets``."""
    secrets: list[Annotated[str, AfterValidator(_variable)]] = [
        "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
        "HTTPS_PROXY", "https_proxy",
    ]  # fmt: skip
    """Variables that are taken from the environment of ``galley submit`` to a private file that jobs read."""
    interface: Line | None = None
    """Network interface for NCCL and gloo (``ib0``); None: they choose."""
    scratch: Annotated[str, AfterValidator(_path_on_node)] | None = None
    """Fast directory of each node for caches; None: ``$SLURM_TMPDIR``, ``$TMPDIR`` or ``/tmp`` there. It may hold
    variables that only jobs have: ``/local/$SLURM_JOB_ID``."""
    cache: AbsolutePath | None = None
    """Shared directory for prepared data and converted models; None: ``~/.cache/galley``."""
    runs: AbsolutePath | None = None
    """Shared directory of runs; None: ``./runs``."""
    chain: Literal["nodes", "login"] = "nodes"
    """``nodes``: every job queues its successor. ``login``: ``galley submit`` queues all ``attempts`` and the export
    beforehand, one after the other, where compute nodes may not submit; those with nothing to do end in seconds."""
    attempts: Count = 20
    """Attempts after which a run ends, whatever they died of; with ``chain: login`` 5 unless set."""
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    """GPU-hours (CPU clusters: rank-hours) after which a run is stopped; None: no limit."""
    exclude_hours: Annotated[float, Field(ge=0)] = 24.0
    """How long a node that failed is avoided."""
    requeue: bool = False
    """Let Slurm requeue a pre-empted job under its own number. Off: its successor takes over, two minutes sooner."""
    side: SideJobs = SideJobs()
    patience: Patience = Patience()
    srun: list[Annotated[str, AfterValidator(options.srun_option)]] = []
    """Further options of every ``srun``: ``--mpi=none``."""
    directives: list[Annotated[str, AfterValidator(options.directive)]] = []
    """Further ``#SBATCH`` options: ``--mail-type=END``."""

    @model_validator(mode="before")
    @classmethod
    def _few_beforehand(cls, tree: Any) -> Any:
        # Sites limit how many jobs a user may have in the queue.
        return {"attempts": 5, **tree} if isinstance(tree, dict) and tree.get("chain") == "login" else tree

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("venv", "conda", "container") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say where Python is; keep one of them")
        for name in self.variables:
            if is_secret_name(name):
                raise ValueError(f"variables.{name} looks like a secret; list its name under secrets instead")
        if self.side.prepare == "here" and (self.conda or self.container or self.modules):
            raise ValueError("side.prepare: here works in a venv only; leave conda, container and modules out")
        if self.device == "cuda" and (self.ranks_per_node or 1) > self.gpus_per_node:
            raise ValueError(
                f"ranks_per_node {self.ranks_per_node} is more than gpus_per_node {self.gpus_per_node}; one rank a GPU"
            )
        return self

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or (self.gpus_per_node if self.device == "cuda" else 1)

    @property
    def takes_whole_nodes(self) -> bool:
        """Whether jobs have their nodes to themselves."""
        return self.whole_nodes and (self.device == "cpu" or self.ranks == self.gpus_per_node)
