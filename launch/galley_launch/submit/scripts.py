"""The job scripts of a run on a cluster, rendered from ``slurm/train.sbatch.j2``, and its ``cluster.json``.

Nothing is written here: everything is computed from the run, the profile and the submitter's environment.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from galley.contract import stages
from galley.contract.data_folders import root
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley_launch.base import assets
from galley_launch.cluster import guard
from galley_launch.cluster.options import MIG
from galley_launch.cluster.profile import Cluster, Container, megabytes, seconds
from galley_launch.plan.plan import common_environment, without_user_packages
from galley_launch.recipe.paths import expanded
from galley_launch.submit import host_memory
from galley_launch.submit.quoting import VARIABLE, OnNode, marked, quote

_HUB_CACHE = ("HF_HUB_CACHE", "HF_HOME")
# Jobs inherit only these variables from the submitter's environment: where the hub and its cache are.
_INHERITED = (*_HUB_CACHE, "HF_DATASETS_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME")


def _log(run: RunDir, stage: str) -> str:
    """The value of ``--output``: the log until an attempt has its own. ``%j`` becomes the job's number."""
    # sbatch(1), filename pattern: two percent signs stand for one, and a backslash turns all patterns off.
    folder = str(run.jobs.absolute() / "logs")
    if "\\" in folder:
        raise UserError(str(run.root), "Slurm takes no backslash in a log's path", "choose another runs=DIRECTORY")
    return f"{folder.replace('%', '%%')}/{stage}-%j.out"


def job_name(run: RunDir) -> str:
    """The name that all jobs of the run have; ``--dependency=singleton`` lets only one job of a name run at a time."""
    # The hash keeps runs of one name in different directories from waiting for each other.
    root = str(run.root.absolute())
    return f"galley-{run.root.absolute().name}-{hashlib.sha256(root.encode()).hexdigest()[:6]}"


def secrets_file(run: RunDir) -> Path:
    """The private file of the run's secrets: outside the run directory, which is copied and archived."""
    base = expanded(os.environ.get("XDG_CONFIG_HOME") or "~/.config")
    return base.absolute() / "galley" / "secrets" / f"{job_name(run)}.env"


def python(cluster: Cluster) -> str:
    """The Python that jobs run, in its environment."""
    if cluster.venv:
        return f"{cluster.venv}/bin/python"
    return "python" if cluster.conda or cluster.container else sys.executable


def _names_environment(cluster: Cluster) -> bool:
    return bool(cluster.venv or cluster.conda or cluster.container)


def host_python(cluster: Cluster) -> str:
    """The Python for a job's own decisions (``verdict.py``), which run on the node itself, outside any container.

    The environment's own where nodes can run that: the system's is often too old (3.6 on RHEL 8 and SLES 15).
    """
    return cluster.host_python or ("python3" if cluster.container else python(cluster))


def environment(spec: RunSpec, run: RunDir, cluster: Cluster, stage: str) -> dict[str, str]:
    """The variables that a job of ``stage`` exports to all its processes; no secrets (see :func:`secrets_file`)."""
    placement, alone = spec.placement, stage in stages.alone()
    gpus = 0 if placement.device == "cpu" else cluster.side.gpus if alone else placement.ranks_per_node
    variables = {
        **common_environment(placement),
        # An environment that the profile names is whole: what lies in ~/.local must not shadow its packages.
        **({"PYTHONNOUSERSITE": "1"} if _names_environment(cluster) else without_user_packages()),
        "GALLEY_RUN": str(run.root.absolute()),
        "GALLEY_PYTHON": python(cluster),
        "GALLEY_NODES": str(1 if alone else placement.nodes),
        "GALLEY_RANKS": str(placement.ranks_per_node),
        "GALLEY_GPUS": str(gpus),
        "GALLEY_THREADS": str(cluster.side.cores if alone else placement.threads),
        "GALLEY_PATIENCE": ",".join(f"{key}={value}" for key, value in cluster.patience.model_dump().items()),
        # Where prepare compiles operators, and training finds them: shared, one for each environment.
        "TORCH_EXTENSIONS_DIR": f"{placement.paths.cache}/operators/{_installation(cluster)}",
    }
    if cluster.scratch:
        # A pattern holds variables that only the job has; node.sh expands it there.
        pattern = VARIABLE.search(cluster.scratch)
        variables["GALLEY_SCRATCH_PATTERN" if pattern else "GALLEY_SCRATCH"] = cluster.scratch
    needed = 0 if alone else host_memory.megabytes_of_node(spec, cluster)
    if needed:
        variables["GALLEY_MEMORY_MB"] = str(needed)
    if cluster.interface:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    # The profile comes last, so that a site's value wins over the submitter's shell.
    return variables | _inherited(cluster) | cluster.variables


def _inherited(cluster: Cluster) -> dict[str, str]:
    """The submitter's variables that jobs get as well. Raises ``UserError`` where one holds a secret."""
    inherited = {name: os.environ[name] for name in _INHERITED if os.environ.get(name) and name not in cluster.secrets}
    for name, value in inherited.items():
        guard.check_variable(name, value)
    # The path of the file of secrets, which scripts name, begins with this one.
    guard.check_variable("XDG_CONFIG_HOME", os.environ.get("XDG_CONFIG_HOME", ""))
    return inherited


def _installation(cluster: Cluster) -> str:
    """A short name of the environment: operators that are compiled in one need not load in another."""
    where = cluster.container.image if cluster.container else cluster.conda or python(cluster)
    return hashlib.sha256(where.encode()).hexdigest()[:12]


def shared(spec: RunSpec, variables: dict[str, str]) -> list[str]:
    """Directories besides the run that its jobs write to: Galley's cache and the hub's (huggingface_hub's variables).

    Containers can mount them only once they are there.
    """
    given = [variables[name] for name in (*_HUB_CACHE, "HF_DATASETS_CACHE") if name in variables]
    hub = given or [f"{variables.get('XDG_CACHE_HOME', '~/.cache')}/huggingface"]
    return [spec.placement.paths.cache, *(str(expanded(folder).absolute()) for folder in hub)]


def _mounts(spec: RunSpec, run: RunDir, cluster: Cluster, container: Container, variables: dict[str, str]) -> list[str]:
    """What the container must see, each where it is outside, then the profile's own. Raises ``UserError``."""
    paths = spec.placement.paths
    offload = spec.placement.deepspeed.get("zero_optimization", {}).get("offload_optimizer") or {}
    data = [root(path) for path in (*paths.trained_on(), paths.held_out) if path]
    files = [paths.model, *data, paths.chat_template, offload.get("nvme_path")]
    files += [variables.get("GALLEY_MEETING")]  # where ranks meet, if not in the run
    # Each at the same path inside. Names of models and data on the hub are no absolute paths: nothing to mount.
    needed = [str(run.root.absolute()), *shared(spec, variables), *(path for path in files if path and path[0] == "/")]
    needed += [marked(cluster.scratch)] if cluster.scratch else []
    # Both runtimes take SOURCE:TARGET pairs in one word, with commas between them.
    odd = next((path for path in needed if "," in path or ":" in path), None)
    mounts = [f"{path}:{path}" for path in needed]
    mounts += [mount if ":" in mount else f"{mount}:{mount}" for mount in map(marked, container.mounts)]
    # Pyxis hands mounts on as lines of an fstab, where blanks separate fields (fstab(5)).
    spaced = next((mount for mount in mounts if container.runtime == "pyxis" and re.search(r"\s", mount)), None)
    if odd or spaced:
        what = "a comma or colon" if odd else "a space"
        raise UserError("container", f"{what} in {odd or spaced!r}: that cannot be mounted", "choose another place")
    return list(dict.fromkeys(mounts))


def _container(spec: RunSpec, run: RunDir, cluster: Cluster, variables: dict[str, str]) -> tuple[list[str], list[str]]:
    """Options of srun, and words before the command, that start it inside the cluster's container, if there is one."""
    container = cluster.container
    if container is None:
        return [], []
    names = [*variables, *_JOB_NAMES, *cluster.secrets]
    mounts = ",".join(_mounts(spec, run, cluster, container, variables))
    if container.runtime == "pyxis":
        # Pyxis lets the image's variables win over the job's, except for those in --container-env.
        options = {"image": container.image, "mounts": mounts, "env": ",".join(sorted(names))}
        return [OnNode(f"--container-{key}={value}") for key, value in options.items()], []
    # apptainer passes the environment on by itself; --nv brings the driver's libraries and devices into the container.
    gpus = ["--nv"] if spec.placement.device == "cuda" else []
    return [], ["apptainer", "exec", *gpus, "--bind", OnNode(mounts), container.image]


# Variables that a job adds as it begins (job/begin.py), so that they are in no script; Pyxis needs their names as well.
_JOB_NAMES = [f"GALLEY_{name}" for name in ("ATTEMPT", "ATTEMPT_DIR", "HEAD", "PORT", "RENDEZVOUS", "EXPORT_STEP")]


def _on_one_node(spec: RunSpec, cluster: Cluster) -> dict[str, Any]:
    """What a job beside training asks for: part of one node. Keys are those of the template."""
    side, gpus = cluster.side, 0 if spec.placement.device == "cpu" else cluster.side.gpus
    size: dict[str, Any] = {"nodes": 1, "gpus": gpus, "cores": side.cores, "whole_nodes": False, "time": side.time}
    return size | _memory(cluster, megabytes(side.memory), side.cores, side.memory)


def _size(spec: RunSpec, cluster: Cluster) -> dict[str, Any]:
    """What the job of training asks for. Keys are those of the template."""
    placement = spec.placement
    ranks, memory = placement.ranks_per_node, cluster.memory_per_rank
    whole = cluster.takes_whole_nodes and (placement.device == "cpu" or ranks == cluster.gpus_per_node)
    cores, needed = cluster.cores_per_rank * ranks, megabytes(memory) * ranks if memory else 0
    size: dict[str, Any] = {"nodes": placement.nodes, "gpus": 0 if placement.device == "cpu" else ranks, "cores": cores}
    size |= {"whole_nodes": whole, "time": cluster.time}
    if whole and cluster.memory_request == "mem":
        # --mem=0 asks for all memory of a node (sbatch(1), --mem).
        return size | {"memory": "0", "memory_request": "mem"}
    return size | _memory(cluster, needed, cores, f"{needed}M")


def _memory(cluster: Cluster, needed: int, cores: int, text: str) -> dict[str, Any]:
    """The request for ``needed`` MiB of a node, in the site's way. ``text``: the same amount as ``--mem`` takes it."""
    if cluster.memory_request == "none" or not needed:
        return {"memory": None, "memory_request": "none"}
    if cluster.memory_request == "mem-per-cpu":
        # -(-a // b) rounds up, so that all cores together have at least what is needed.
        return {"memory": f"{-(-needed // cores)}M", "memory_request": "mem-per-cpu"}
    return {"memory": text, "memory_request": "mem"}


def _where(cluster: Cluster, stage: str) -> list[tuple[str, str]]:
    """Options of sbatch for where a job of ``stage`` runs and who pays: partition, account and so on, if set."""
    side, names = cluster.side, ("partition", "account", "qos", "constraint", "reservation")
    wanted = {name: getattr(cluster, name) for name in names}
    if stage in stages.alone():
        own = {name: getattr(side, name) for name in names}
        elsewhere = side.partition not in (None, cluster.partition)
        # A constraint of training's names its GPUs; its QOS and reservation belong to its partition.
        dropped = ("constraint", "qos", "reservation") if elsewhere else ("constraint",)
        wanted = {name: wanted[name] if value is None and name not in dropped else value for name, value in own.items()}
    return [(name, value) for name, value in wanted.items() if value]


def _check_slices(spec: RunSpec, cluster: Cluster) -> None:
    """Raise ``UserError`` for several ranks of a node on slices of GPUs.

    A process can use one slice only (NVIDIA's MIG User Guide, CUDA Device Enumeration), and NCCL cannot connect slices.
    """
    ranks = spec.placement.ranks_per_node
    sliced = cluster.gpu_type and MIG.fullmatch(cluster.gpu_type)
    if spec.placement.device == "cuda" and sliced and ranks > 1:
        what = f"{cluster.gpu_type!r} is a slice of a GPU (MIG): a process sees one, and {ranks} ranks"
        raise UserError(
            "cluster.gpu_type", f"{what} of a node cannot share their slices", "write ranks=1, or whole GPUs"
        )


def _context(spec: RunSpec, run: RunDir, cluster: Cluster, stage: str) -> dict[str, Any]:
    """Every variable of the template, for the job of ``stage``. Raises ``UserError``."""
    _check_slices(spec, cluster)
    variables = environment(spec, run, cluster, stage)
    srun, launcher = _container(spec, run, cluster, variables)
    return (_on_one_node(spec, cluster) if stage in stages.alone() else _size(spec, cluster)) | {
        "stage": stage,
        "name": spec.name,
        "version": spec.origin.version,
        "job_name": job_name(run),
        "gpu_request": cluster.gpu_request,
        "gpu_type": cluster.gpu_type,
        "ntasks": cluster.ntasks,
        "where": _where(cluster, stage),
        "requeue": cluster.requeue or stage in stages.alone(),
        # Seconds before the time limit at which Slurm sends USR1 (sbatch(1), --signal), in a short job half of it.
        "lead": max(1, min(300, seconds(cluster.time) // 2)),
        "log": _log(run, stage),
        "directives": [_split(directive) for directive in cluster.directives],
        "run": str(run.root.absolute()),
        "host_python": host_python(cluster),
        "setup": cluster.setup,
        "modules": cluster.modules,
        "modulepath": [path for path in os.environ.get("MODULEPATH", "").split(":") if path] if cluster.modules else [],
        "conda": cluster.conda,
        "secrets": str(secrets_file(run)),
        "environment": list(variables.items()),
        "srun": [*cluster.srun, *srun],
        "launcher": launcher,
    }


def _split(directive: str) -> tuple[str, str | None]:
    option, equals, value = directive.partition("=")
    return option, value if equals else None


def scripts(spec: RunSpec, run: RunDir, cluster: Cluster) -> dict[str, str]:
    """``jobs/STAGE.sbatch`` of each stage, by path in the run directory."""
    import jinja2  # slow to import, and few verbs need it

    folder = assets.folder("slurm")
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        finalize=quote,  # called for every {{ value }}: nothing reaches the script unquoted
        keep_trailing_newline=True,
        autoescape=False,
    )
    template = engine.get_template("train.sbatch.j2")
    return {f"jobs/{stage}.sbatch": template.render(_context(spec, run, cluster, stage)) for stage in stages.names()}


def facts(run: RunDir, name: str, cluster: Cluster, attempt: int) -> str:
    """The bytes of ``cluster.json``: what jobs know of the cluster. ``attempt``: the first after this submission."""
    body = {"name": name, **cluster.model_dump(mode="json", exclude={"about", "default"})}
    body |= {"limit_s": seconds(cluster.time), "first_attempt": attempt, "secrets_file": str(secrets_file(run))}
    body["job_name"] = job_name(run)
    return json.dumps(body, indent=1) + "\n"
