"""The ranks of one attempt: this one's number and device, sums and messages over all, and the lock on the run."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import json
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store

from galley.contract.errors import UserError
from galley.contract.files import open_lock
from galley.contract.rundir import Attempt, RunDir
from galley.contract.spec import Placement
from galley.ranks import operators
from galley.ranks.stage import Superseded
from galley.ranks.store import STORE, await_keys

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""Time limit of every collective: ranks wait for one that writes a large checkpoint or reads from a cold disk."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT = 32 << 20
"""Bytes. Freed blocks up to this size stay with the process: the largest threshold that glibc takes."""
REACH = 60.0
"""Seconds in which ranks that are all there must have added up once: longer means that a network is cut."""


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

    def print_once(self, line: str) -> None:
        """Print a line on rank 0, whose log is the one that people read."""
        if self.is_first:
            print(line, flush=True)

    def sum(self, *values: float) -> list[float]:
        """Sum each value over all ranks (collective), in float64 so that counts stay exact."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set on any rank (collective)."""
        return self.sum(float(flag))[0] > 0

    def gather(self, value: T) -> list[T]:
        """One JSON value from each rank, on every rank, in rank order (collective). Nothing is unpickled."""
        # all_gather wants tensors of one size: first the sizes, [1] each, then the bytes, padded to the longest.
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([text.numel()], device=self.device))
        longest = max(int(size) for size in sizes)
        texts = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        dist.all_gather(texts, torch.nn.functional.pad(text, (0, longest - text.numel())))
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]

    def barrier(self) -> None:
        """Wait for all ranks (collective)."""
        dist.barrier()

    def fence(self, attempt: Attempt) -> None:
        """Raise ``Superseded`` on every rank where rank 0 sees that a later attempt has begun (collective)."""
        if self.any(self.is_first and attempt.is_superseded()):
            raise Superseded(attempt)


def join(placement: Placement) -> World:
    """Join the process group in the file that ``galley.launch_ranks`` names, once every rank is there.

    Raises ``UserError`` when the world is not the one that the placement was made for (training with another world
    size would silently change the global batch), or when two ranks are on one GPU. Raises ``RuntimeError``, naming
    this rank and its host, when the ranks cannot reach each other.
    """
    world = _place(placement)
    operators.adopt(placement)  # before DeepSpeed looks for one
    store = _store()
    if placement.nodes == 1:
        stay_inside()  # before the backend chooses an interface to listen on
    meet(store, world, _gpu(world.device))
    if problem := _within(REACH, lambda: _connect(store, world)):
        what = f"ranks could not reach each other within {REACH:g} s: {problem}"
        raise RuntimeError(f"rank {world.rank} on {platform.node()}: {what}")
    deepspeed.init_distributed(dist_backend=dist.get_backend(), timeout=PATIENCE, verbose=False)
    return world


def _store() -> Store:
    path = os.environ.get(STORE)
    if not path:
        raise UserError("environment", f"{STORE} is not set, so ranks cannot find each other", "start runs with galley")
    store = FileStore(path, -1)  # -1: it does not count its users, and leaves the file where it is
    store.set_timeout(PATIENCE)
    return PrefixStore("ranks", store)


def stay_inside() -> None:
    """Have gloo and NCCL listen on the loopback interface only, unless the user named another."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")


def _place(placement: Placement) -> World:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    planned = placement.nodes * placement.ranks_per_node
    if size != planned:
        raise UserError(
            "placement", f"run.json is for {planned} ranks, but {size} started", "start the run with galley"
        )
    torch.set_num_threads(placement.threads)
    if placement.device == "cpu":
        keep_memory()
        return World(rank, size, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        have = torch.cuda.device_count()
        raise UserError("gpus", f"rank {rank} needs GPU {local_rank}, but {have} are visible", "ask for fewer")
    torch.cuda.set_device(local_rank)
    return World(rank, size, torch.device("cuda", local_rank))


def keep_memory() -> None:
    """Have the C library keep memory that was freed: a step takes what the step before gave back, and asking the kernel
    for it anew costs a page fault for every 4 KB (mallopt(3); a library without it does without).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT)
        mallopt(_M_TRIM_THRESHOLD, -1)


def _gpu(device: torch.device) -> str:
    """A name of the GPU that is the same for every rank on it, whatever index it has for each; empty on a CPU."""
    if device.type == "cpu":
        return ""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid} of {platform.node()}"


def meet(store: Store, world: World, gpu: str) -> None:
    """Wait in ``store`` until every rank is there: imports from a cold disk can be minutes apart.

    Raises ``UserError`` on every rank where two named the same ``gpu``. (NCCL, too, refuses that, in its own words.)
    """
    store.set(f"galley/gpu/{world.rank}", gpu)
    if world.is_first:
        keys = [f"galley/gpu/{rank}" for rank in range(world.size)]
        await_keys(store, keys, PATIENCE.total_seconds())
        store.set("galley/met", json.dumps(_shared([store.get(key).decode() for key in keys])))
    await_keys(store, ["galley/met"], PATIENCE.total_seconds())
    if shared := json.loads(store.get("galley/met")):
        raise UserError("gpus", shared, "give each rank a GPU of its own: see what else this job starts on that node")


def _shared(gpus: list[str]) -> str | None:
    for rank, gpu in enumerate(gpus):
        if gpu and gpu in gpus[:rank]:
            return f"ranks {gpus.index(gpu)} and {rank} are both on {gpu}"
    return None


def _connect(store: Store, world: World) -> None:
    """Make the process group, and add up over it."""
    # The first all-reduce is part of connecting: Gloo and NCCL connect pairs of ranks when these first exchange data.
    bound: dict[str, Any] = {}
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)  # of this thread
        bound = {"device_id": world.device} if world.size > 1 else {}  # as DeepSpeed does: NCCL connects at once
    backend, prefixed = "nccl" if world.device.type == "cuda" else "gloo", PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=prefixed, rank=world.rank, world_size=world.size, timeout=PATIENCE, **bound)
    total = world.sum(1.0)[0]
    if total != world.size:
        raise RuntimeError(f"an all-reduce over {world.size} ranks gives {total:g}")


def _within(limit: float, work: Callable[[], None]) -> str | None:
    """Do ``work``; returns what went wrong, if something did.

    In a thread, for neither backend promises an end: Gloo waits for a peer that does not answer as long as a collective
    may take, and NCCL connects in calls that have no timeout.
    """
    problem: list[str] = ["no answer"]

    def run() -> None:
        try:
            work()
            problem.clear()
        except Exception as error:
            problem[:] = [f"{type(error).__name__}: {error}".splitlines()[0]]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if thread.is_alive():
        atexit.register(_end_at_once)
    return problem[0] if problem else None


def _end_at_once() -> None:
    """A library's own clean-up would wait for the thread that still waits for other ranks."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def hold_run(run: RunDir) -> int:
    """Take the run's shared lock for the life of this process, so that no launcher starts a second set of ranks."""
    descriptor = open_lock(run.ranks_lock, 0o600)
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
