"""What a device can do, measured in a process of its own, so that no memory of it stays taken."""

from __future__ import annotations

import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

WARMUP, TIMES = 3, 10


def in_child(work: Any, *arguments: Any) -> Any:
    """The result of ``work(*arguments)``, computed in a fresh process that then ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def gpus() -> list[str]:
    """Name, driver, memory and power limit of each GPU, as nvidia-smi says; empty where there is none."""
    fields = "name,driver_version,memory.total,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def rates(device: str) -> dict[str, Any]:
    """bf16 operations a second of ``device``: ``sheet`` (the maker's; on a CPU None) and ``measured``.

    Measured is the median of ten products of two square matrices of random numbers, after three: 8192 x 8192 on a GPU.
    """
    import torch

    from galley.train.metrics import peak_flops

    size = 8192 if device == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(WARMUP + TIMES):
        _wait(device)
        started = time.perf_counter()
        left @ right
        _wait(device)
        seconds.append(time.perf_counter() - started)
    sheet = peak_flops(torch.device(device), torch.bfloat16) if device == "cuda" else None
    return {"sheet": sheet, "measured": 2 * size**3 / statistics.median(seconds[WARMUP:]), "size": size}


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
