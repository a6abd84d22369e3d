"""Which devices this box offers, and which of them a run takes."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from galley.contract.errors import UserError

_QUERY = "index,uuid,name,memory.total,memory.used"
# A desktop's compositor and a driver's own context stay below this; a training process does not.
_BUSY_MIB = 1024


@dataclass(frozen=True)
class Gpu:
    """One visible GPU."""

    index: str
    """Its number, or a MIG device's own id: what ``CUDA_VISIBLE_DEVICES`` takes."""
    uuid: str = ""
    name: str = "GPU"
    total_mib: int = 0
    used_mib: int = 0

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is this GPU's index or (the beginning of) its UUID."""
        return name == self.index or (len(name) > 4 and self.uuid.startswith(name))


@dataclass(frozen=True)
class Devices:
    """What a run gets."""

    kind: str
    """``cuda`` or ``cpu``."""
    ranks: int
    """Ranks on each node."""
    gpus: tuple[str, ...] | None
    """One GPU for each rank; None on the CPU, and where a scheduler chooses."""
    notes: tuple[str, ...] = ()
    """What the user should know; one line each."""
    nodes: int = 1
    threads: int | None = None
    """CPU threads of each rank; None: this machine's cores divided by its ranks."""


def _query() -> list[Gpu]:
    """Every GPU that ``nvidia-smi`` lists; empty where it is missing or fails."""
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return [_gpu(row) for row in rows if len(row) == 5]


def _gpu(row: list[str]) -> Gpu:
    # Memory is a plain number of MiB (nounits), or text such as "[N/A]" where the driver does not report it.
    index, uuid, name, total, used = row
    return Gpu(index, uuid, name, int(total) if total.isdigit() else 0, int(used) if used.isdigit() else 0)


def _mask() -> str | None:
    """The list of devices that this process may use, separated by commas; None: all of the machine."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Inside a job without a mask the allocation is the limit; a job that was given no GPU gets an empty list, not all.
    if mask is None and "SLURM_JOB_ID" in os.environ:
        return os.environ.get("SLURM_STEP_GPUS", os.environ.get("SLURM_JOB_GPUS", ""))
    return mask


def visible() -> list[Gpu]:
    """The GPUs that this process may use, in the order of ``CUDA_VISIBLE_DEVICES``."""
    mask = _mask()
    if mask is None:
        return _query()
    gpus: list[Gpu] = []
    names = [name.strip() for name in mask.split(",") if name.strip()]
    present = _query() if names else []  # an empty mask hides every GPU, so there is nothing to ask
    for name in names:
        match = [gpu for gpu in present if gpu.is_called(name)]
        if match:
            gpus.append(match[0])
        elif name.startswith("MIG-"):
            # A slice of a GPU has an id of its own, which the query above, for whole GPUs, does not list.
            gpus.append(Gpu(name, name, "MIG device"))
        else:
            break  # CUDA ignores everything from the first unknown device on.
    return gpus


def _busy_notes(gpus: list[Gpu]) -> tuple[str, ...]:
    busy = [gpu for gpu in gpus if gpu.used_mib > _BUSY_MIB]
    return tuple(
        f"GPU {gpu.index} ({gpu.name}) is in use: {gpu.used_mib} of {gpu.total_mib} MiB are taken" for gpu in busy
    )


def _pick(present: list[Gpu], names: list[str], ranks: int | None) -> list[Gpu]:
    """The first ``ranks`` of ``present``, or of those with ``names`` (indices or UUIDs). Raises ``UserError``."""
    listing = ", ".join(gpu.index for gpu in present)
    chosen = []
    for name in names or [gpu.index for gpu in present]:
        match = [gpu for gpu in present if gpu.is_called(name)]
        if not match:
            raise UserError("gpus", f"too few devices: no GPU {name} among the visible ones", f"choose from {listing}")
        if match[0] in chosen:
            raise UserError("gpus", f"GPU {name} is given twice", "one rank takes one GPU")
        chosen.append(match[0])
    if ranks is not None and ranks > len(chosen):
        what = f"too few devices: {ranks} ranks for {len(chosen)} GPUs ({', '.join(gpu.index for gpu in chosen)})"
        raise UserError("ranks", what, f"use ranks={len(chosen)} or fewer: one rank takes one GPU")
    return chosen[:ranks]


def on_cpu(ranks: int | None, gpus: list[str]) -> Devices:
    """``ranks`` ranks on the CPU (one by default), which is only used where the user asks for it."""
    if gpus:
        raise UserError("gpus", f"given as {','.join(gpus)} with device=cpu", "remove one of the two")
    return Devices("cpu", ranks or 1, None)


def on_gpus(ranks: int | None, gpus: list[str]) -> Devices:
    """All visible GPUs, or those that are asked for. Raises ``UserError`` where they are not there."""
    return _devices(visible(), ranks, gpus)


def _devices(present: list[Gpu], ranks: int | None, gpus: list[str]) -> Devices:
    if not present:
        todo = f"use device=cpu ranks={ranks or 1} to train on the CPU"
        raise UserError("device", "no GPU is visible here", todo)
    chosen = _pick(present, gpus, ranks)
    return Devices("cuda", len(chosen), tuple(gpu.index for gpu in chosen), _busy_notes(chosen))


def imagined(ranks: int | None, gpus: list[str]) -> Devices:
    """For ``plan`` where there is no GPU: the GPUs that were asked for, or one."""
    present = visible()
    if present:
        return _devices(present, ranks, gpus)
    count = ranks or len(gpus) or 1
    names = tuple(gpus[:count]) or tuple(str(index) for index in range(count))
    if len(names) < count:
        raise UserError("ranks", f"too few devices: {count} ranks for {len(names)} GPUs", "one rank takes one GPU")
    note = f"no GPU is visible here; planned for GPU {','.join(names)} (run would need device=cpu here)"
    return Devices("cuda", count, names, (note,))
