"""The files of a run's jobs: what ``slurm/train.sbatch.j2`` becomes for a run on a cluster. Pure."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from galley.contract import stages
from galley.contract.errors import UserError
from galley.contract.rundir import RunDir
from galley.contract.spec import RunSpec
from galley_launch.base import assets
from galley_launch.base.grammar import is_text
from galley_launch.cluster import guard
from galley_launch.cluster.options import MIG
from galley_launch.cluster.profile import Cluster, Container, megabytes, seconds
from galley_launch.plan.plan import common_environment, without_user_packages
from galley_launch.recipe.paths import expanded
from galley_launch.submit import host_memory

_HUB_CACHE = ("HF_HUB_CACHE", "HF_HOME")
# Of the submitter's environment, jobs get these only: where the hub and its cache are.
_INHERITED = (*_HUB_CACHE, "HF_DATASETS_CACHE", "HF_ENDPOINT", "XDG_CACHE_HOME")


_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?", re.ASCII)


class OnNode(str):
    """A word with the names of variables between NULs, whose values are put in on the node."""

    __slots__ = ()


def _marked(text: str) -> str:
    return _VARIABLE.sub("\0\\1\0", text)


def quote(value: object) -> str:
    """``value`` as one word of a shell, or of an ``#SBATCH`` line: sbatch reads quotes as a shell does, but takes out
    backslashes, which those values must not hold.

    Everything that a template fills in goes through here. Raises ``UserError`` for what could leave its line.
    """
    text = str(value)
    if isinstance(value, OnNode):
        parts = text.split("\0")  # text, name, text, name, ..., text
        return "".join(f'"${{{part}}}"' if number % 2 else part and quote(part) for number, part in enumerate(parts))
    if any(ord(letter) < 32 or letter in "\x7f\x85\u2028\u2029" for letter in text):
        raise UserError("job script", f"{text!r} holds a newline or another control character", "remove it")
    if not is_text(text):
        raise UserError("job script", f"{text!r} is not UTF-8", "choose another name")
    return shlex.quote(text)


def _log(run: RunDir, stage: str) -> str:
    """What Slurm writes before an attempt has its own logs. Slurm fills in ``%x``, so a percent sign is doubled."""
    folder = str(run.jobs.absolute() / "logs")
    if "\\" in folder:
        raise UserError(str(run.root), "Slurm takes no backslash in a log's path", "choose another runs=DIRECTORY")
    return f"{folder.replace('%', '%%')}/{stage}-%j.out"


def job_name(run: RunDir) -> str:
    """Name of all of the run's jobs: only one of them runs at a time (``--dependency=singleton``)."""
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
    """What decides in a job, outside any container: the environment's own Python where nodes can run it.

    The system's is 3.6 on RHEL 8 and SLES 15.
    """
    return cluster.host_python or ("python3" if cluster.container else python(cluster))


def environment(spec: RunSpec, run: RunDir, cluster: Cluster, stage: str) -> dict[str, str]:
    """What every process of a job of ``stage`` has in its environment. No secret is among it."""
    place, alone = spec.placement, stage in stages.alone()
    gpus = 0 if place.device == "cpu" else cluster.side.gpus if alone else place.ranks_per_node
    variables = {
        **common_environment(place),
        # An environment that the profile names is whole: what lies in ~/.local must not shadow its packages.
        **({"PYTHONNOUSERSITE": "1"} if _names_environment(cluster) else without_user_packages()),
        "GALLEY_RUN": str(run.root.absolute()),
        "GALLEY_PYTHON": python(cluster),
        "GALLEY_NODES": str(1 if alone else place.nodes),
        "GALLEY_RANKS": str(place.ranks_per_node),
        "GALLEY_GPUS": str(gpus),
        "GALLEY_THREADS": str(cluster.side.cores if alone else place.threads),
        "GALLEY_PATIENCE": ",".join(f"{key}={value}" for key, value in cluster.patience.model_dump().items()),
        # Where prepare compiles operators, and training finds them: shared, one for each environment.
        "TORCH_EXTENSIONS_DIR": f"{place.paths.cache}/operators/{_installation(cluster)}",
    }
    if cluster.scratch:
        variables["GALLEY_SCRATCH_PATTERN" if _VARIABLE.search(cluster.scratch) else "GALLEY_SCRATCH"] = cluster.scratch
    needed = 0 if alone else host_memory.megabytes_of_node(spec, cluster)
    if needed:
        variables["GALLEY_MEMORY_MB"] = str(needed)
    if cluster.interface:
        variables |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    inherited = {name: os.environ[name] for name in _INHERITED if os.environ.get(name) and name not in cluster.secrets}
    for name, value in inherited.items():
        guard.check_variable(name, value)
    return variables | inherited | cluster.variables


def _installation(cluster: Cluster) -> str:
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
    files = [paths.model, paths.data, paths.held_out, paths.chat_template, offload.get("nvme_path")]
    files += [variables.get("GALLEY_MEETING")]  # where ranks meet, if not in the run
    needed = [str(run.root.absolute()), *shared(spec, variables), *(path for path in files if path and path[0] == "/")]
    needed += [_marked(cluster.scratch)] if cluster.scratch else []
    odd = next((path for path in needed if "," in path or ":" in path), None)
    mounts = [f"{path}:{path}" for path in needed]
    mounts += [mount if ":" in mount else f"{mount}:{mount}" for mount in map(_marked, container.mounts)]
    # Pyxis hands them on as lines of an fstab.
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
        # Without --container-env the image's own environment would win.
        options = {"image": container.image, "mounts": mounts, "env": ",".join(sorted(names))}
        return [OnNode(f"--container-{key}={value}") for key, value in options.items()], []
    gpus = ["--nv"] if spec.placement.device == "cuda" else []
    return [], ["apptainer", "exec", *gpus, "--bind", OnNode(mounts), container.image]


# What begin.py adds, which containers have to be told of.
_JOB_NAMES = [f"GALLEY_{name}" for name in ("ATTEMPT", "ATTEMPT_DIR", "HEAD", "PORT", "RENDEZVOUS", "EXPORT_STEP")]


def _on_one_node(spec: RunSpec, cluster: Cluster) -> dict[str, Any]:
    """How much of one node the jobs beside training take."""
    side, gpus = cluster.side, 0 if spec.placement.device == "cpu" else cluster.side.gpus
    size: dict[str, Any] = {"nodes": 1, "gpus": gpus, "cores": side.cores, "whole_nodes": False, "time": side.time}
    return size | _memory(cluster, megabytes(side.memory), side.cores, side.memory)


def _size(spec: RunSpec, cluster: Cluster) -> dict[str, Any]:
    """How much of how many nodes training takes."""
    place = spec.placement
    ranks, memory = place.ranks_per_node, cluster.memory_per_rank
    whole = cluster.takes_whole_nodes and (place.device == "cpu" or ranks == cluster.gpus_per_node)
    cores, needed = cluster.cores_per_rank * ranks, megabytes(memory) * ranks if memory else 0
    size: dict[str, Any] = {"nodes": place.nodes, "gpus": 0 if place.device == "cpu" else ranks, "cores": cores}
    size |= {"whole_nodes": whole, "time": cluster.time}
    if whole and cluster.memory_request == "mem":
        return size | {"memory": "0", "memory_request": "mem"}
    return size | _memory(cluster, needed, cores, f"{needed}M")


def _memory(cluster: Cluster, needed: int, cores: int, text: str) -> dict[str, Any]:
    """``needed`` MiB of a node, in the site's way."""
    if cluster.memory_request == "none" or not needed:
        return {"memory": None, "memory_request": "none"}
    if cluster.memory_request == "mem-per-cpu":
        return {"memory": f"{-(-needed // cores)}M", "memory_request": "mem-per-cpu"}
    return {"memory": text, "memory_request": "mem"}


def _where(cluster: Cluster, stage: str) -> list[tuple[str, str]]:
    """Options that say where a job of ``stage`` goes, and for whom."""
    side, names = cluster.side, ("partition", "account", "qos", "constraint", "reservation")
    wanted = {name: getattr(cluster, name) for name in names}
    if stage in stages.alone():
        own = {name: getattr(side, name) for name in names}
        elsewhere = side.partition not in (None, cluster.partition)
        # A constraint of training's names its GPUs; its QOS and reservation belong to its partition.
        lost = ("constraint", "qos", "reservation") if elsewhere else ("constraint",)
        wanted = {name: wanted[name] if value is None and name not in lost else value for name, value in own.items()}
    return [(name, value) for name, value in wanted.items() if value]


def _check_slices(spec: RunSpec, cluster: Cluster) -> None:
    """Raise ``UserError`` for several ranks on slices of GPUs: CUDA shows a process one slice, and NCCL joins none."""
    place = spec.placement
    if place.device == "cuda" and cluster.gpu_type and MIG.fullmatch(cluster.gpu_type) and place.ranks_per_node > 1:
        what = f"{cluster.gpu_type!r} is a slice of a GPU (MIG): a process sees one, and {place.ranks_per_node} ranks"
        raise UserError(
            "cluster.gpu_type", f"{what} of a node cannot share their slices", "write ranks=1, or whole GPUs"
        )


def _context(spec: RunSpec, run: RunDir, cluster: Cluster, stage: str) -> dict[str, Any]:
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
    import jinja2  # Slow to import, and few verbs need it.

    folder = assets.folder("slurm")
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        finalize=quote,  # Nothing reaches the script unquoted, whatever the template says.
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
