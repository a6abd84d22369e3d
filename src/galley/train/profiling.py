"""``profile=3``: a trace of a few steps for a viewer, and a table of where their time and memory went."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from galley.contract.rundir import Attempt, write_atomic
from galley.ranks.world import World

SKIPPED = 3
"""Steps of the attempt before the first one that is profiled: they compile, allocate and connect."""
PHASES = ("data", "forward", "backward", "optimizer")
_KINDS = {
    "communication": r"c10d|gloo|nccl|all_?reduce|all_?gather|reduce_?scatter|broadcast",
    "matrix products": r"::(mm|bmm|addmm|baddbmm|linear|matmul|_int_mm|_grouped_mm)\b|gemm|cutlass|mkldnn_linear|xmma",
    "attention": r"attention|flash|fmha",
    "quantised weights": r"bitsandbytes|dequant|quantize|kgemm_4bit",
    "optimizer": r"adam|lion|_foreach|multi_tensor|Optimizer",
    "softmax and loss": r"softmax|CrossEntropy|::exp_?\b|nll",
    "copies and casts": r"copy|::_?to\b|::cat\b|index|gather|scatter|slice_backward|memcpy|memset|::contiguous|::clone",
    "activations and norms": r"::(mul|add|sub|div|sigmoid|pow|rsqrt|mean|sum|neg|sin|cos|native_\w+)_?\b|silu|gelu",
}
"""What an operation is, by its name: the first that matches."""
_ROWS = 12


class Profiler:
    """Profiles some steps of the first rank; its other steps, and the other ranks, are not slowed down."""

    def __init__(self, steps: int, attempt: Attempt, world: World) -> None:
        self.attempt, self.world, self.steps = attempt, world, steps
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory: dict[str, float] = {}
        self.taken, self.began = 0, 0.0
        self.torch: Any = None
        if steps and world.is_first:
            gpu = [ProfilerActivity.CUDA] if world.device.type == "cuda" else []
            plan = schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
            self.torch = profile(activities=[ProfilerActivity.CPU, *gpu], schedule=plan, on_trace_ready=self._write)
            self.torch.start()

    @property
    def _recording(self) -> bool:
        return self.torch is not None and SKIPPED <= self.taken < SKIPPED + self.steps

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Time what happens inside as ``name``, one of ``PHASES``."""
        return self._timed(name) if self._recording else nullcontext()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with record_function(f"galley: {name}"):
            yield
            self._wait_for_gpu()
        self.seconds[name] += time.perf_counter() - started
        self.memory[name] = max(self.memory.get(name, 0.0), _memory_gb(self.world.device))

    def stepped(self) -> None:
        """A step was taken."""
        if self.torch is None:
            return
        self.taken += 1
        if self.taken == SKIPPED:
            self._wait_for_gpu()
            self.began = time.perf_counter()
        if self.taken == SKIPPED + self.steps:
            self.seconds["all"] = time.perf_counter() - self.began
        self.torch.step()
        if self.taken == SKIPPED + self.steps:
            self.close()

    def close(self) -> None:
        """Stop; what was recorded until then is written."""
        if self.torch is not None:
            done, self.torch = self.torch, None
            done.stop()

    def _wait_for_gpu(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()

    def _write(self, recorded: Any) -> None:
        steps = self.taken - SKIPPED
        if steps < 1:
            return
        self.seconds.setdefault("all", time.perf_counter() - self.began)
        folder = self.attempt.profile
        folder.mkdir(exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json.gz"))
        gpu = self.world.device.type == "cuda"
        averages = recorded.key_averages()
        times: list[tuple[str, float, int]] = []
        for operation in averages:
            if not operation.key.startswith(("galley: ", "ProfilerStep")):
                spent = operation.self_device_time_total if gpu else operation.self_cpu_time_total  # microseconds
                times.append((operation.key, spent / 1e6, operation.count))
        write_atomic(folder / "table.md", table(times, self.seconds, self.memory, steps))
        print(f"profiled {steps} steps: {folder / 'table.md'}", flush=True)


def _memory_gb(device: torch.device) -> float:
    """Memory that is held now: allocated on the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096 / 1e9


def kind(operation: str) -> str:
    """Which kind of work an operation is."""
    return next((name for name, pattern in _KINDS.items() if re.search(pattern, operation, re.IGNORECASE)), "other")


def table(times: list[tuple[str, float, int]], seconds: dict[str, float], memory: dict[str, float], steps: int) -> str:
    """The table as Markdown: ``times`` are operations with their own seconds and calls, ``seconds`` and ``memory`` (GB)
    are by phase, all over ``steps`` steps.
    """
    whole = seconds["all"] / steps
    lines = [f"# Where a step's time went: {whole:.3f} s, the mean of {steps} steps of rank 0", ""]
    lines += ["| phase | s a step | share | GB held at its end |", "|---|---:|---:|---:|"]
    rest = seconds["all"] - sum(seconds[name] for name in PHASES)
    for name, spent in [*((name, seconds[name]) for name in PHASES), ("sums, log, saving", rest)]:
        held = f"{memory[name]:.2f}" if name in memory else ""
        lines.append(f"| {name} | {spent / steps:.3f} | {spent / seconds['all']:.1%} | {held} |")
    kinds: dict[str, float] = defaultdict(float)
    for operation, spent, _ in times:
        kinds[kind(operation)] += spent
    busy = sum(kinds.values()) or 1.0
    lines += ["", "| kind of operation | s a step | share of all operations |", "|---|---:|---:|"]
    lines += [f"| {name} | {spent / steps:.3f} | {spent / busy:.1%} |" for name, spent in _largest(kinds.items())]
    lines += ["", "| operation | s a step | calls a step |", "|---|---:|---:|"]
    top = sorted(times, key=lambda operation: -operation[1])[:_ROWS]
    lines += [f"| `{name}` | {spent / steps:.3f} | {calls / steps:.0f} |" for name, spent, calls in top]
    lines += ["", "`trace.json.gz`, beside this file, opens in Perfetto (ui.perfetto.dev) and in chrome://tracing."]
    return "\n".join(lines) + "\n"


def _largest(pairs: Any) -> list[tuple[str, float]]:
    return sorted(pairs, key=lambda pair: -pair[1])
