"""The ranks of one attempt: who am I, agree with the others, and hold the run while alive."""

from __future__ import annotations

import fcntl
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist

from galley import operators
from galley.errors import UserError
from galley.rundir import Attempt, RunDir
from galley.spec import Placement
from galley.stage import Superseded

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""Of every collective: ranks wait for one that writes a large checkpoint or reads from a cold disk."""


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what is written once."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks (collective), in float64 so that counts stay exact."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def any(self, flag: bool) -> bool:
        """Whether any rank says so (collective)."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: T) -> list[T]:
        """One value (it is pickled) from each rank, on every rank, in rank order (collective)."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        dist.barrier()

    def fence(self, attempt: Attempt) -> None:
        """Raise ``Superseded`` on every rank where rank 0 sees that a later attempt has begun (collective)."""
        if self.any(self.is_first and attempt.is_superseded()):
            raise Superseded(attempt)


def join(placement: Placement) -> World:
    """Join the process group that torchrun's environment describes.

    Raises ``UserError`` when the world is not the one that the placement was made for: training with another
    world size would silently change the global batch.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    want = placement.nodes * placement.ranks_per_node
    if size != want:
        raise UserError("placement", f"run.json is for {want} ranks, but {size} started", "start the run with galley")
    if placement.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            have = torch.cuda.device_count()
            raise UserError("gpus", f"rank {rank} needs GPU {local_rank}, but {have} are visible", "ask for fewer")
        torch.cuda.set_device(local_rank)
    torch.set_num_threads(placement.threads)
    operators.adopt()
    backend = "nccl" if placement.device == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, timeout=PATIENCE, verbose=False)
    device = torch.device("cuda", local_rank) if placement.device == "cuda" else torch.device("cpu")
    return World(rank, size, device)


def hold_run(run: RunDir) -> int:
    """Take the run's shared lock for the life of this process, so that no launcher starts a second set of ranks."""
    descriptor = os.open(run.ranks_lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def redirect_output(path: Path) -> None:
    """Send this process's standard output and error, C++ libraries' included, to ``path`` (appending)."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
