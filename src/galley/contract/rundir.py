"""Every file name of a run, in one class. Part of the contract; the standard library only.

A checkpoint exists when its manifest does: the manifest is written last, and lists every other file with its size.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galley.contract.files import fsync_path, names_in, number, read_json, write_atomic

__all__ = ["UNVERIFIED", "Attempt", "Checkpoint", "RunDir", "fsync_path", "read_json", "write_atomic"]

UNVERIFIED = 3
"""Exit status of an export that was written, but whose check failed."""

_NUMBER, _STEP = re.compile(r"[0-9]{4,9}"), re.compile(r"step-[0-9]{6,12}")
"""Names of attempts and checkpoints. A run that was copied by half may hold others, which are neither."""


@dataclass(frozen=True)
class Attempt:
    """One try at a run: ``attempts/0001`` and so on."""

    root: Path

    @property
    def number(self) -> int:
        """Counted from 1."""
        return int(self.root.name)

    @property
    def placement(self) -> Path:
        """The placement that this attempt ran with."""
        return self.root / "placement.json"

    @property
    def stop(self) -> Path:
        """Whoever writes this file stops the attempt: ``{"reason", "time"}``.

        Reasons are ``user``, ``cancel``, ``walltime``, ``preemption``, ``budget``, and ``signal`` (a SIGTERM of which
        nobody knew yet what it was about).
        """
        return self.root / "ctl" / "stop"

    def stop_reason(self) -> str:
        """Why the attempt was asked to stop; empty where it was not, or the request cannot be read."""
        return str((read_json(self.stop) or {}).get("reason") or "")

    @property
    def exit(self) -> Path:
        """What became of the attempt, a :class:`~galley.contract.records.ExitRecord`."""
        return self.root / "exit.json"

    @property
    def job(self) -> Path:
        """In a job: that job, a :class:`~galley.contract.records.JobRecord`."""
        return self.root / "job.json"

    @property
    def secret(self) -> Path:
        """In a job: what its nodes know each other by before training, readable by the user alone."""
        return self.root / "secret"

    @property
    def preflight(self) -> Path:
        """In a job: ``NODE.json`` for each node, what was checked there before training."""
        return self.root / "preflight"

    @property
    def profile(self) -> Path:
        """``trace.json.gz`` and ``table.md``, where the attempt was asked for them."""
        return self.root / "profile"

    @property
    def heartbeats(self) -> Path:
        """In a job: ``rank-N.json``, where each rank was last: ``{"rank", "pid", "host", "phase", "step", "time"}``."""
        return self.root / "heartbeats"

    @property
    def trackers(self) -> Path:
        """What the trackers' libraries print: ``wandb.log``, ``mlflow.log``."""
        return self.root / "trackers"

    def is_superseded(self) -> bool:
        """Whether a later attempt has begun: from then on this one writes nothing that another reads.

        After a network cut Slurm starts the next attempt while ranks of this one may still run.
        """
        names = [path.name for path in self.root.parent.iterdir()]
        return any(_NUMBER.fullmatch(name) and int(name) > self.number for name in names)

    @property
    def logs(self) -> Path:
        """One log for each stage, and ``rank-N.log`` for each rank."""
        return self.root / "logs"

    def log(self, name: str) -> Path:
        """The log of a stage (``prepare``, ``train``, ``export``) or of a rank (``rank-0``)."""
        return self.logs / f"{name}.log"

    def error(self, who: str) -> Path:
        """Why a stage or a rank failed: ``{"who", "status", "message", "time", "host"}``."""
        return self.root / "errors" / f"{who}.json"

    def request_stop(self, reason: str) -> None:
        """Ask for a stop: the ranks save at the next step boundary and end. Asking again keeps the first reason."""
        self.stop.parent.mkdir(parents=True, exist_ok=True)
        if not self.stop.exists():
            try:
                write_atomic(self.stop, json.dumps({"reason": reason, "time": time.time()}))
            except OSError:  # of a full disk: a name without content may still fit, and it is the name that stops
                self.stop.touch()

    def errors(self) -> list[dict[str, Any]]:
        """What failed, first failure first."""
        errors = [read_json(path) for path in sorted((self.root / "errors").glob("*.json"))]
        return sorted((error for error in errors if error), key=lambda error: number(error.get("time")))


@dataclass(frozen=True)
class Checkpoint:
    """``checkpoints/step-000010``: rank files, ``probes.safetensors``, and the manifest that makes it exist."""

    root: Path

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was written."""
        return int(self.root.name.removeprefix("step-"))

    @property
    def manifest(self) -> Path:
        """``{"files": {name: bytes}, "step", "world", "zero_stage", "held_out_loss", "state"}``; written last."""
        return self.root / "manifest.json"

    def verifies(self) -> bool:
        """Whether the manifest stands and every file that it lists has its size."""
        manifest = read_json(self.manifest)
        if manifest is None:
            return False
        files: object = manifest.get("files", {})
        if not isinstance(files, dict):
            return False
        try:
            return all((self.root / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError):  # missing, or no name that a file can have
            return False


@dataclass(frozen=True)
class RunDir:
    """A run's directory, and the name of everything in it."""

    root: Path

    @property
    def spec(self) -> Path:
        """The :class:`~galley.contract.spec.RunSpec`."""
        return self.root / "run.json"

    @property
    def data(self) -> Path:
        """Prepared data: ``manifest.json``, ``train/``, ``held_out/``. Complete when the manifest is there."""
        return self.root / "data"

    @property
    def data_manifest(self) -> Path:
        """What prepare made; written last."""
        return self.data / "manifest.json"

    @property
    def adapter_init(self) -> Path:
        """How the adapter begins, where ``method.init`` is ``pissa``."""
        return self.root / "adapter_init.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, a :class:`~galley.contract.metrics.MetricsRow`."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard events."""
        return self.root / "tensorboard"

    @property
    def tracker(self) -> Path:
        """What trackers know the run by, in every attempt: ``{"id"}``."""
        return self.root / "tracker.json"

    @property
    def export(self) -> Path:
        """``model/`` (a full model, merged where there is an adapter), ``adapter/``, ``export.json``."""
        return self.root / "export"

    @property
    def unverified(self) -> Path:
        """As ``export``: the parts of the newest export whose check failed."""
        return self.root / "export.unverified"

    @property
    def base(self) -> Path:
        """The model that the exported adapter is for, where it was converted from a GGUF file."""
        return self.root / "base"

    @property
    def lock(self) -> Path:
        """Locked (flock, exclusive) by the launcher for as long as an attempt runs."""
        return self.root / ".launcher.lock"

    @property
    def ranks_lock(self) -> Path:
        """Locked (flock, shared) by every rank: ranks that outlive their launcher still hold the run."""
        return self.root / ".ranks.lock"

    @property
    def code(self) -> Path:
        """What a job runs, as it was when the run was submitted."""
        return self.root / "code"

    @property
    def cluster(self) -> Path:
        """The cluster that the run was submitted to; no file: it runs on one box."""
        return self.root / "cluster.json"

    @property
    def jobs(self) -> Path:
        """Job scripts, and ``logs/`` of jobs that ended before their attempt began."""
        return self.root / "jobs"

    @property
    def submitted(self) -> Path:
        """Every job of the run, a JSON object a line: ``{"job", "stage", "time"}``."""
        return self.jobs / "submitted.jsonl"

    @property
    def end(self) -> Path:
        """Whoever writes this file ends the run: no attempt follows. ``{"reason": stop|cancel, "time"}``."""
        return self.root / "ctl" / "end"

    @property
    def excluded(self) -> Path:
        """Nodes that the next jobs avoid: ``{node: {"until", "why"}}``."""
        return self.root / "excluded.json"

    def begin_attempt(self) -> Attempt:
        """Make the directory of the next attempt, which ends every earlier one's right to write."""
        (self.root / "attempts").mkdir(parents=True, exist_ok=True)
        while True:
            attempts = self.attempts()
            attempt = self.attempt(attempts[-1].number + 1 if attempts else 1)
            try:
                attempt.root.mkdir()
            except FileExistsError:
                continue  # another job was quicker
            fsync_path(attempt.root.parent)
            return attempt

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``, whether or not it exists."""
        return Checkpoint(self.root / "checkpoints" / f"step-{step:06d}")

    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that verify, oldest first."""
        folder = self.root / "checkpoints"
        checkpoints = [Checkpoint(folder / name) for name in names_in(folder) if _STEP.fullmatch(name)]
        whole = (checkpoint for checkpoint in checkpoints if checkpoint.verifies())
        return sorted(whole, key=lambda checkpoint: checkpoint.step)

    def attempts(self) -> list[Attempt]:
        """Attempts so far, oldest first."""
        folder = self.root / "attempts"
        attempts = [Attempt(folder / name) for name in names_in(folder) if _NUMBER.fullmatch(name)]
        attempts = [attempt for attempt in attempts if attempt.root.is_dir()]
        return sorted(attempts, key=lambda attempt: attempt.number)

    def attempt(self, number: int) -> Attempt:
        """The attempt of that number, whether or not it exists."""
        return Attempt(self.root / "attempts" / f"{number:04d}")
