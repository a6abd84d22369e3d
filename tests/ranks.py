"""Fork ranks from a process that has imported everything once: 1 to 2 seconds a start instead of 10.

Run as a program it is the server: one JSON job a line on stdin, one JSON answer with the process ids, then one with
the exit statuses. It computes nothing itself, so that no OpenMP thread exists when it forks.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRELOAD = (
    "torch", "numpy", "safetensors.torch", "transformers", "peft", "deepspeed",
    "transformers.models.llama.modeling_llama", "torch.utils.tensorboard", "galley.train.train", "galley.export.export",
)  # fmt: skip
GRACE = 20.0


def _become_rank(job: dict[str, Any], rank: int) -> None:
    world = job["world"]
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "GALLEY_STORE": job["store"],
    } | job["env"]  # fmt: skip
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 1
    atexit._clear()  # what the server would do at its end
    try:
        module, function = job["call"].split(":")
        status = int(getattr(importlib.import_module(module), function)(job["argv"]) or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int]) -> list[int]:
    """Exit statuses (minus the signal for a killed rank); once one fails, the others get ``GRACE`` seconds."""
    statuses: dict[int, int] = {}
    deadline = float("inf")
    while len(statuses) < len(pids):
        pid, raw = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[pid] = os.waitstatus_to_exitcode(raw)
            if statuses[pid] != 0:
                deadline = min(deadline, time.monotonic() + GRACE)
        else:
            time.sleep(0.01)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(statuses):
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
    return [statuses[pid] for pid in pids]


def know_the_processor() -> None:
    """Ask once: DeepSpeed asks a second long, in a process of its own, each time that it loads an operator."""
    import cpuinfo

    facts = cpuinfo.get_cpu_info()
    cpuinfo.get_cpu_info = lambda: facts


def serve() -> None:
    for name in (*PRELOAD, *sys.argv[1:]):
        importlib.import_module(name)
    know_the_processor()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in range(job["world"]):
            pid = os.fork()
            if pid == 0:
                _become_rank(job, rank)
            pids.append(pid)
        answers.write(json.dumps(pids) + "\n")
        answers.write(json.dumps(_wait(pids)) + "\n")


@dataclass
class Ranks:
    """A client of the server; use one for many jobs."""

    extra_env: dict[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    """Modules to import beside ``PRELOAD``."""

    def __post_init__(self) -> None:
        self.folder, self.stores = tempfile.TemporaryDirectory(), 0
        root = Path(__file__).resolve().parents[1]
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(root / each) for each in ("src", "launch", "tests", "tests/train")),
            "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        } | self.extra_env  # fmt: skip
        self.server = subprocess.Popen(
            [sys.executable, __file__, *self.preload],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
        )  # fmt: skip

    def start(self, call: str, argv: list[str], world: int, log: Path, env: dict[str, str] | None = None) -> list[int]:
        """Start ``world`` ranks on ``module:function``; returns their process ids. One job at a time."""
        job = {"call": call, "argv": argv, "world": world, "log": str(log), "env": env or {}}
        self.stores += 1
        job["store"] = str(Path(self.folder.name) / f"store-{self.stores}")
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def wait(self) -> list[int]:
        """Exit statuses of the job started last."""
        return self._answer()

    def run(self, call: str, argv: list[str], world: int, log: Path, env: dict[str, str] | None = None) -> list[int]:
        self.start(call, argv, world, log, env)
        return self.wait()

    def _answer(self) -> list[int]:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the rank server died"
        answer: list[int] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)


if __name__ == "__main__":
    serve()
