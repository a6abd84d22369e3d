"""Optimizer state on an NVMe disk (ZeRO-Infinity, Rajbhandari et al., 2021): where it lies, and how to get at it."""

from __future__ import annotations

import atexit
import ctypes
import math
import mmap
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from galley.contract.errors import UserError
from galley.contract.spec import RunSpec
from galley.storage.cache import digest

_WHERE = "deepspeed offload_optimizer"
_ON_DISK = 16
"""Bytes of each weight: itself, two moments and the gradient, in fp32."""
_LARGEST = 10**9
"""DeepSpeed's own ``sub_group_size``."""


def settle(zero: dict[str, Any], spec: RunSpec, parameters: list[Any]) -> None:
    """Give the block ``offload_optimizer`` of ``zero`` a folder of this rank's own as ``nvme_path``.

    It is below the path that is there, else below the job's scratch directory, else in the run's. Raises ``UserError``
    where that folder cannot be used or lacks room, and where memory for DeepSpeed's buffers cannot be locked (DeepSpeed
    itself would abort without a reason).
    """
    offload, run = zero["offload_optimizer"], spec.placement.paths.run
    path = offload.get("nvme_path") or os.environ.get("GALLEY_SCRATCH") or f"{run}/swap"
    try:
        folder = own_folder(Path(path), run)
    except OSError as error:
        what = f"{str(path)!r} does not do for direct access (open(2), O_DIRECT): {error.strerror or error}"
        raise UserError(_WHERE, what, "let nvme_path name a folder on a local disk") from None
    world = torch.distributed.get_world_size()
    shares = [math.ceil(getattr(weight, "ds_numel", weight.numel()) / world) for weight in parameters]
    _check_room(folder, _ON_DISK * sum(shares) * spec.placement.ranks_per_node)
    # DeepSpeed closes a sub-group once it has sub_group_size elements, so that the last parameter may carry it beyond.
    # Its pinned buffers hold one sub-group in fp32 each: 4 bytes an element.
    largest = min(sum(shares), zero.get("sub_group_size", _LARGEST) + max(shares))
    _check_memory(4 * largest * offload.get("buffer_count", 4))
    offload["nvme_path"] = str(folder)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"{str(folder.parent)!r} has room for {free / 1e9:.1f} GB, and a node's state takes {needed / 1e9:.1f}"
        raise UserError(_WHERE, what, "make room, or let nvme_path name another disk")


def _check_memory(buffers: int) -> None:
    if not may_lock(buffers):
        what = f"this process may not lock the {buffers / 1e9:.1f} GB of memory that swapping takes"
        raise UserError(_WHERE, what, "raise its limit (ulimit -l), or make sub_group_size smaller")


def own_folder(path: Path, run: str) -> Path:
    """A private folder for this rank of ``run``, which goes when the process ends; what killed attempts left goes now.

    In a job it is in the job's own temporary folder, where that lies below ``path``: the node clears that after a kill.
    Raises ``OSError`` where there can be none, or none that direct access works in.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    path.mkdir(exist_ok=True)  # not its parents: a disk that is not mounted is a fault
    job, name = Path(tempfile.gettempdir()), f"galley-swap-{digest(run)}-"
    parent = job if job.is_relative_to(path) else path
    for left in parent.glob(f"{name}*"):
        if int(left.name.removeprefix(name)) % world == rank:
            shutil.rmtree(left)
    folder = parent / f"{name}{rank}"
    folder.mkdir(mode=0o700)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _try_direct_access(folder / "probe")
    return folder


def _try_direct_access(path: Path) -> None:
    """Write and read as DeepSpeed does, which ignores errors of its own: also into memory that is not aligned.

    Some file systems refuse O_DIRECT as a whole, others only buffers that do not begin at a block's boundary.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        page = memoryview(mmap.mmap(-1, 2 * mmap.PAGESIZE))
        os.pwritev(file, [page[: mmap.PAGESIZE]], 0)
        os.preadv(file, [page[4 : 4 + 1024]], 0)
    finally:
        os.close(file)
        path.unlink()


def may_lock(size: int) -> bool:
    """Whether this process, with its limit raised as far as it may, can lock ``size`` bytes (mlock(2))."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    memory = mmap.mmap(-1, size)
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # Locked as a trial only: the mapping, and the lock with it, goes when `memory` does.
    failed: int = ctypes.CDLL(None).mlock(ctypes.c_void_p(at), ctypes.c_size_t(size))
    return failed == 0


def is_used(engine: Any) -> bool:
    """Whether the optimizer's state lies on a disk."""
    return bool(getattr(engine.optimizer, "swap_optimizer", False))


@contextmanager
def resident(engine: Any, flat: Any, changes: bool = False) -> Iterator[None]:
    """Meanwhile ``flat`` and its state are in memory; ``changes`` to them go back to the disk."""
    swapper = engine.optimizer.optimizer_swapper if is_used(engine) else None
    if swapper is None or flat.ds_id not in swapper.swap_params_info:  # too small to be worth it
        yield
        return
    swapper.swap_in_optimizer_state(parameter=flat)
    yield
    if changes:
        swapper.swap_out_optimizer_state(parameter=flat)
    else:
        swapper.release_swap_buffers(parameter=flat)
    flat.grad = None  # the last step's, which comes along
