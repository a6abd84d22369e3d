"""Commands that only write down how they were called, for running a job script without a cluster."""

import os
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CALL = """#!/bin/sh
printf '%s\\0' "$@" >{log}/$$.{label}
"""
BEGIN = "case $4 in begin) printf %s {facts} ;; esac\n"
SEES = "/usr/bin/env -0 >{log}/$$.env\n"


@dataclass(frozen=True)
class Seen:
    """What a script did."""

    status: int
    err: str
    calls: dict[str, list[list[str]]] = field(default_factory=dict)
    """Arguments by label of the command, in no order."""
    environment: dict[str, str] = field(default_factory=dict)
    """Of a step."""
    left: list[str] = field(default_factory=list)
    """Files in the working directory afterwards."""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def run(script: str, root: Path, facts: Path, host_python: str = "python3", **environment: str) -> Seen:
    """Run ``script`` in an empty directory under ``root``, where nothing but shims and coreutils is on PATH.

    ``host_python`` answers ``begin`` with the file ``facts``.
    """
    log, programs, work = root / "log", root / "bin", root / "work"
    for folder in (log, programs, work):
        folder.mkdir(parents=True)
    quoted = shlex.quote(str(log))
    for label in ("sbatch", "scontrol", "module", "conda", "srun", "touch"):
        write(programs / label, CALL.format(log=quoted, label=label) + SEES.format(log=quoted) * (label == "srun"))
    python = CALL.format(log=quoted, label="host") + BEGIN.format(facts=shlex.quote(str(facts)))
    assert programs.joinpath(host_python).is_relative_to(root.parent), "a real interpreter is nothing to write over"
    write(programs / host_python, python)
    job = root / "job.sh"
    job.write_text(script, encoding="utf-8")
    env = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": str(work), "LANG": "C.UTF-8", **environment}
    done = subprocess.run(["bash", str(job)], cwd=work, env=env, capture_output=True, check=False, timeout=60)
    return _seen(done.returncode, done.stderr, log, work)


def _seen(status: int, err: bytes, log: Path, work: Path) -> Seen:
    calls: dict[str, list[list[str]]] = {}
    environment: dict[str, str] = {}
    for path in sorted(log.iterdir()):
        label, words = path.name.partition(".")[2], os.fsdecode(path.read_bytes()).split("\0")[:-1]
        if label == "env":
            environment = dict(word.split("=", 1) for word in words)
        else:
            calls.setdefault(label, []).append(words)
    left = sorted(str(path.relative_to(work)) for path in work.rglob("*"))
    return Seen(status, err.decode("utf-8", "replace"), calls, environment, left)
