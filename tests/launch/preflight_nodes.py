"""The nodes of a job as processes on 127.0.0.1, each with preflight in it."""

import json
import os
import random
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from galley.contract.rundir import Attempt

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"node{number}" for number in range(5)]
HEALTHY = "{}, GPU-aaaa-{}, NVIDIA H200, 143771, 3, {}, 31"

Start = Callable[..., subprocess.Popen[str]]


def free_port() -> int:
    """Above the range from which the kernel gives ports to others."""
    while True:
        port = random.randint(61001, 65000)
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def starting(attempt: Attempt, tmp_path: Path) -> Iterator[Start]:
    """For a fixture: start preflight as one node of a job.

    ``under`` is a shell's command line, of which ``"$@"`` is preflight.
    """
    begun: list[subprocess.Popen[str]] = []
    base = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'launch'}:{ROOT / 'src'}",
        "PYTHONSAFEPATH": "1",
        "SLURM_JOB_ID": "7",
        "GALLEY_HEAD": "127.0.0.1",
    }

    def go(
        number: int, nodes: int, port: int, under: str = 'exec "$@"', options: str = "--loopback", **more: Any
    ) -> subprocess.Popen[str]:
        preexec, tried = more.pop("preexec", None), more.pop("attempt", attempt)
        node = {"SLURM_NODEID": number, "SLURMD_NODENAME": NAMES[number], "GALLEY_NODES": nodes, "GALLEY_PORT": port}
        env = base | {name: str(value) for name, value in (node | {"GALLEY_PREFLIGHT_S": 30} | more).items()}
        module = [sys.executable, "-m", "galley_launch.job.node.preflight", *options.split(), str(tried.root)]
        command = ["sh", "-c", under, "sh", *module]
        done = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=preexec)
        begun.append(done)
        return done

    yield go
    for process in begun:
        process.kill()
        process.communicate()


def smi_putter(tmp_path: Path) -> Callable[[str], None]:
    """Put an ``nvidia-smi`` on the nodes' PATH: a shell script."""

    def put(script: str) -> None:
        path = tmp_path / "bin" / "nvidia-smi"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def rows(*lines: str) -> str:
    return "cat <<'E'\n" + "\n".join(lines) + "\nE"


def end(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status and output of each."""
    outputs = [process.communicate(timeout=30)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def report(attempt: Attempt, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((attempt.preflight / f"node{number}.json").read_text())
    return found


def checks(attempt: Attempt, number: int = 0) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in report(attempt, number)["checks"]}
