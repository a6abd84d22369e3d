"""Whether the Python that jobs will use can train, as far as the host of ``galley submit`` can tell."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from shutil import which
from typing import Any

from galley.contract.errors import UserError
from galley_launch.cluster.profile import Cluster
from galley_launch.plan.compose import version
from galley_launch.submit import scripts

_SECONDS = 60
_LOOK = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except Exception:
        return ""
found = {name: importlib.util.find_spec(name) is not None for name in ("torch", "deepspeed", "transformers")}
print(json.dumps({"python": list(sys.version_info[:2]), "found": found, "galley": version("galley-tune")}))
"""
_OLD = "name a newer one of the nodes: cluster.host_python=/usr/bin/python3.11"


def check(cluster: Cluster) -> list[str]:
    """Raise ``UserError`` for what is certainly missing; returns what may be, a line each.

    Modules and a set-up file may bring what a login node's shell does not show: then nothing is certain.
    """
    _check_files(cluster)
    told = _check_host_python(cluster)
    python = _interpreter(cluster)
    if python is None:
        return told
    seen = _look(python, user_packages=not (cluster.venv or cluster.conda))
    if seen is None:
        return [*told, f"{python} could not be looked into, so whether it can train is not known"]
    missing = [name for name, there in seen["found"].items() if not there]
    if missing:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed in {python}"
        todo = f"{python} -m pip install 'galley-tune[train]', or name another environment: cluster.venv=PATH"
        if not (cluster.modules or cluster.setup):
            raise UserError("environment", f"{what}, so nothing can be trained", todo)
        told.append(f"{what}, unless cluster.modules or cluster.setup bring it: {todo}")
    if seen["galley"] not in ("", version()):
        told.append(f"{python} has the packages of Galley {seen['galley']}, but jobs run the code of this {version()}")
    return told


def _check_files(cluster: Cluster) -> None:
    """A missing interpreter is found here instead of on every node: the disk is shared."""
    if cluster.venv and not os.access(f"{cluster.venv}/bin/python", os.X_OK):
        todo = "make it (python3 -m venv), or name another: cluster.venv=PATH"
        raise UserError("cluster.venv", f"no Python at {cluster.venv}/bin/python", todo)
    image = cluster.container.image if cluster.container else ""
    if image.startswith("/") and not Path(image).exists():
        raise UserError("cluster.container.image", f"no file {image}", "build it, or name another")
    if cluster.setup and not Path(cluster.setup).is_file():
        raise UserError("cluster.setup", f"no file {cluster.setup}", "write it, or leave setup out")


def _interpreter(cluster: Cluster) -> str | None:
    """The environment's Python, where it can be known here."""
    if cluster.container:
        return None
    if not cluster.conda:
        return scripts.python(cluster)
    base = Path(os.environ.get("CONDA_EXE", "/none/bin/conda")).parent.parent
    folder = Path(cluster.conda) if cluster.conda.startswith("/") else base / "envs" / cluster.conda
    python = folder / "bin" / "python"
    return str(python) if os.access(python, os.X_OK) else None


def _look(python: str, user_packages: bool) -> dict[str, Any] | None:
    env = {**os.environ, "PYTHONSAFEPATH": "1"} | ({} if user_packages else {"PYTHONNOUSERSITE": "1"})
    try:
        done = subprocess.run(
            [python, "-c", _LOOK], env=env, timeout=_SECONDS, capture_output=True, text=True, check=False, cwd="/"
        )
        found: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return found


def _check_host_python(cluster: Cluster) -> list[str]:
    """The nodes' own Python, beside a container: the login node's is most often the same."""
    name = scripts.host_python(cluster)
    if not (cluster.container or cluster.host_python):
        return []
    python = name if name.startswith("/") else which(name)
    if python is None or not os.access(python, os.X_OK):
        return [f"there is no {name} here; nodes need it, 3.9 or newer: {_OLD}"]
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-c", ask], timeout=_SECONDS, capture_output=True, text=True, check=False)
        version = tuple(int(part) for part in done.stdout.strip().rpartition("\n")[2].split("."))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return [f"{python} did not report its version; nodes need 3.9 or newer: {_OLD}"]
    if version >= (3, 9):
        return []
    what = f"{name} is Python {'.'.join(map(str, version))} here, older than the 3.9 that jobs need"
    if name.startswith("/") or not (cluster.modules or cluster.setup):
        raise UserError("cluster.host_python", what, _OLD)
    return [f"{what}, unless cluster.modules or cluster.setup bring another: {_OLD}"]
