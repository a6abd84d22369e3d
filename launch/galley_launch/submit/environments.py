"""Whether the Python that jobs will use can train, as far as that can be checked on the host of ``galley submit``."""

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
"""Time-out of a Python that is asked something."""
# Run by the environment's Python, which may be of any version. find_spec looks for a package without importing it.
_PROBE = """
import importlib.metadata, importlib.util, json, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except Exception:
        return ""
installed = {name: importlib.util.find_spec(name) is not None for name in ("torch", "deepspeed", "transformers")}
print(json.dumps({"python": list(sys.version_info[:2]), "installed": installed, "galley": version("galley-tune")}))
"""
_OLD = "name a newer one of the nodes: cluster.host_python=/usr/bin/python3.11"


def check(cluster: Cluster) -> list[str]:
    """Raise ``UserError`` for what is certainly missing; returns what may be missing, a line each.

    A profile's ``modules`` and ``setup`` may bring packages that this host's shell lacks: then nothing is certain.
    """
    _check_files(cluster)
    notes = _check_host_python(cluster)
    python = _interpreter(cluster)
    if python is None:
        return notes
    facts = _probe(python, user_packages=not (cluster.venv or cluster.conda))
    if facts is None:
        return [*notes, f"{python} could not be looked into, so whether it can train is not known"]
    missing = [name for name, installed in facts["installed"].items() if not installed]
    if missing:
        what = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed in {python}"
        todo = f"{python} -m pip install 'galley-tune[train]', or name another environment: cluster.venv=PATH"
        if not (cluster.modules or cluster.setup):
            raise UserError("environment", f"{what}, so nothing can be trained", todo)
        notes.append(f"{what}, unless cluster.modules or cluster.setup bring it: {todo}")
    # The code is copied into the run, but its dependencies are those that the environment was made with.
    if facts["galley"] not in ("", version()):
        notes.append(
            f"{python} has the packages of Galley {facts['galley']}, but jobs run the code of this {version()}"
        )
    return notes


def _check_files(cluster: Cluster) -> None:
    """Raise ``UserError`` for a missing file of the profile: the disk is shared, so nodes would miss it as well."""
    if cluster.venv and not os.access(f"{cluster.venv}/bin/python", os.X_OK):
        todo = "make it (python3 -m venv), or name another: cluster.venv=PATH"
        raise UserError("cluster.venv", f"no Python at {cluster.venv}/bin/python", todo)
    # Only an image with an absolute path is a file; docker://… and registry#image are pulled by the runtime.
    image = cluster.container.image if cluster.container else ""
    if image.startswith("/") and not Path(image).exists():
        raise UserError("cluster.container.image", f"no file {image}", "build it, or name another")
    if cluster.setup and not Path(cluster.setup).is_file():
        raise UserError("cluster.setup", f"no file {cluster.setup}", "write it, or leave setup out")


def _interpreter(cluster: Cluster) -> str | None:
    """The environment's Python; None where this host cannot tell (containers, conda environments elsewhere)."""
    if cluster.container:
        return None
    if not cluster.conda:
        return scripts.python(cluster)
    # conda sets CONDA_EXE to BASE/bin/conda; a named environment lies in BASE/envs, unless its user configured another.
    base = Path(os.environ.get("CONDA_EXE", "/none/bin/conda")).parent.parent
    folder = Path(cluster.conda) if cluster.conda.startswith("/") else base / "envs" / cluster.conda
    python = folder / "bin" / "python"
    return str(python) if os.access(python, os.X_OK) else None


def _probe(python: str, user_packages: bool) -> dict[str, Any] | None:
    """What ``python`` answers to :data:`_PROBE`, or None. ``user_packages``: whether those in ``~/.local`` count."""
    # PYTHONSAFEPATH and cwd="/": a folder called torch where the user stands is not taken for the package.
    env = {**os.environ, "PYTHONSAFEPATH": "1"} | ({} if user_packages else {"PYTHONNOUSERSITE": "1"})
    try:
        process = subprocess.run(
            [python, "-c", _PROBE], env=env, timeout=_SECONDS, capture_output=True, text=True, check=False, cwd="/"
        )
        # Only the last line: whatever Python prints as it starts (sitecustomize, .pth files) comes before it.
        facts: dict[str, Any] = json.loads(process.stdout.strip().rpartition("\n")[2])
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
    return facts


def _check_host_python(cluster: Cluster) -> list[str]:
    """The Python outside of the environment that a job's own decisions run in; this host's is most often the same.

    Raises ``UserError`` where it is too old; returns what may be wrong, a line each.
    """
    name = scripts.host_python(cluster)
    if not (cluster.container or cluster.host_python):
        return []
    python = name if name.startswith("/") else which(name)
    if python is None or not os.access(python, os.X_OK):
        return [f"there is no {name} here; nodes need it, 3.9 or newer: {_OLD}"]
    program = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        process = subprocess.run([python, "-c", program], timeout=_SECONDS, capture_output=True, text=True, check=False)
        version = tuple(int(part) for part in process.stdout.strip().rpartition("\n")[2].split("."))
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return [f"{python} did not report its version; nodes need 3.9 or newer: {_OLD}"]
    if version >= (3, 9):
        return []
    what = f"{name} is Python {'.'.join(map(str, version))} here, older than the 3.9 that jobs need"
    # A name is looked up in PATH, which modules and setup change in a job; an absolute path means the same there.
    if name.startswith("/") or not (cluster.modules or cluster.setup):
        raise UserError("cluster.host_python", what, _OLD)
    return [f"{what}, unless cluster.modules or cluster.setup bring another: {_OLD}"]
