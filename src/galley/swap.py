"""Optimizer state on an NVMe disk (ZeRO-Infinity, Rajbhandari et al., 2021): where it lies, and how to get at it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from galley.cache import digest
from galley.errors import UserError


def own_folder(path: str, run: str) -> str:
    """A private folder below ``path`` for this rank of ``run``, without what a killed attempt left there. It goes when
    the process ends.

    In a job it is in the job's own temporary folder, where that lies below ``path``: the node clears that after a kill.
    Raises ``UserError`` where there can be none.
    """
    job, place = Path(tempfile.gettempdir()), Path(path)
    own = (job if job.is_relative_to(place) else place) / f"galley-swap-{digest(run)}-{torch.distributed.get_rank()}"
    try:
        if own.exists():
            shutil.rmtree(own)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.mkdir(mode=0o700)
    except OSError as error:
        what = f"{path!r} cannot be written to: {error.strerror}"
        raise UserError("deepspeed offload_optimizer.nvme_path", what, "name a folder on a local disk") from None
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return str(own)


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
