"""What is measured and recorded of a run: one JSON line a step, TensorBoard, lines in the log, and trackers."""

from __future__ import annotations

import resource
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from galley.checkpoint.pending import Pending
from galley.contract.metrics import MetricsRow, drop_after, row_line
from galley.contract.rundir import Attempt, RunDir
from galley.contract.spec import RunSpec
from galley.track import trackers

PEAK_BF16_TFLOPS = {
    "H200": 989.0, "H100": 989.0, "H100 PCIe": 756.0, "B200": 2250.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0,
    "L4": 121.0, "A10G": 70.0, "A10": 125.0, "A6000": 155.0, "4090": 165.0, "3090": 71.0, "V100": 125.0, "T4": 65.0,
}  # fmt: skip
"""Dense bf16 (fp16 where there is no bf16) peak of a GPU whose name contains the key, from the makers' data sheets."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second that a rank could do: the data sheet's, or on a CPU a matrix product's.

    None for a GPU that is not in the table.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = f" {name.replace('-', ' ')} "
        longest_first = sorted(PEAK_BF16_TFLOPS.items(), key=lambda item: -len(item[0]))  # H100 PCIe before H100
        known = [value for key, value in longest_first if f" {key} " in words]
        scale = 0.5 if dtype == torch.float32 else 1.0  # TF32 has half of bf16's
        return known[0] * scale * 1e12 if known else None
    # A product of two [768, 768] matrices, 2 · 768³ operations: large enough for full speed, a few milliseconds long.
    size = 768
    left = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - started)
    return float(2 * size**3 / best)


def flops_per_token(model: Any, parameters: int, trains_all: bool, length: float) -> float:
    """Operations per token of forward and backward: 6 per weight when all train, 4 when most are frozen
    (no gradient of frozen weights), plus attention's 12·layers·hidden·length (Chowdhery et al., 2022, appendix B).
    """
    config = model.config.get_text_config()
    weights = parameters
    # Looking an embedding up is no matrix product. A tied one is also the output head, which is.
    if not getattr(config, "tie_word_embeddings", False):
        weights -= config.vocab_size * config.hidden_size
    attention = 12.0 * config.num_hidden_layers * config.hidden_size * length / 2  # causal: half of all pairs
    return float((6.0 if trains_all else 4.0) * weights + attention)


def peak_memory_gb(device: torch.device) -> float:
    """Most memory that this rank has used: allocated on its GPU, or resident on a CPU. In GB (10⁹ bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # Linux counts ru_maxrss in KiB (getrusage(2)).
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@dataclass(frozen=True)
class Utilisation:
    """What the speed of training is held against."""

    peak_flops: float | None
    """Of one rank, see :func:`peak_flops`."""
    flops_per_token: float
    ranks: int

    def of(self, tokens_per_s: float) -> float | None:
        """Model FLOPs utilisation (0 to 1) at a speed of all ranks together; None where the peak is not known."""
        if not self.peak_flops:
            return None
        return round(tokens_per_s * self.flops_per_token / (self.peak_flops * self.ranks), 4)


class TakenStep(NamedTuple):
    """An optimizer step that was taken, over the global batch of all ranks."""

    step: int
    epoch: float
    loss: float
    rate: float
    norm: float
    """Of the gradient before clipping; 0 where fp16 overflowed and nothing changed."""
    supervised: int
    """Units that the loss is the mean of."""
    tokens: int
    """Without padding."""
    seconds: float


class Recorder:
    """Writes what happens to the log, ``metrics.jsonl``, TensorBoard and trackers. Rank 0 has one, others do not."""

    def __init__(
        self,
        spec: RunSpec,
        run: RunDir,
        attempt: Attempt,
        utilisation: Utilisation,
        device: torch.device,
        step: int,
        steps: int,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A kill may have come after rows that no checkpoint covers: their steps will be taken, and recorded, again.
        drop_after(run.metrics, step)
        self.file = run.metrics.open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(run.tensorboard), purge_step=step + 1)
        self.trackers = trackers.start(spec, run, attempt, at=run.metrics.stat().st_size)
        self.utilisation, self.device = utilisation, device
        self.steps, self.log_every = steps, spec.cadence.log_every
        self.recent: deque[float] = deque(maxlen=20)
        self.stall = (0, 0.0)  # the step after which training stood still, and for how long

    def step(self, taken: TakenStep) -> None:
        """Record an optimizer step; the time left follows from the last twenty."""
        self.recent.append(round(taken.seconds, 4))
        left = (self.steps - taken.step) * sum(self.recent) / len(self.recent)
        speed, memory = taken.tokens / taken.seconds, peak_memory_gb(self.device)
        mfu = self.utilisation.of(speed)
        row = MetricsRow(
            step=taken.step,
            steps=self.steps,
            epoch=round(taken.epoch, 4),
            loss=taken.loss,
            lr=taken.rate,
            grad_norm=taken.norm,
            supervised_tokens=taken.supervised,
            tokens=taken.tokens,
            tokens_per_s=round(speed, 1),
            mfu=mfu,
            peak_memory_gb=round(memory, 3),
            step_s=round(taken.seconds, 4),
            left_s=round(left, 1),
        )
        self._write(row)
        if taken.step % self.log_every == 0 or taken.step in (1, self.steps):
            print(
                f"step {taken.step}/{self.steps}  loss {taken.loss:.4f}  lr {taken.rate:.2e}  "
                f"grad norm {taken.norm:.3f}  {speed:.0f} tokens/s  {_share(mfu)}{memory:.1f} GB  {_clock(left)} left",
                flush=True,
            )

    def evaluation(self, step: int, loss: float, tokens: int, best: bool) -> None:
        """Record one measurement of the held-out loss."""
        self._write(MetricsRow(step, held_out_loss=loss, held_out_tokens=tokens))
        print(f"step {step}/{self.steps}  held-out loss {loss:.4f}{' (best)' if best else ''}", flush=True)

    def stalled(self, step: int, seconds: float) -> None:
        """Record how long training stood still after ``step``: for the end of a save, and for the copy of another."""
        # One number a step, whatever it is made of: the last row of a step counts when rows are merged.
        before = self.stall[1] if self.stall[0] == step else 0.0
        self.stall = (step, before + seconds)
        self._write(MetricsRow(step, stall_s=round(self.stall[1], 4)))

    def saved(self, step: int, save: Pending) -> None:
        """Record after ``step`` how long a save took: how early a job must learn of its end follows from that."""
        saved = save.state.step
        self._write(MetricsRow(step, save_s=round(save.seconds, 4), saved_step=saved))
        print(f"saved step {saved} in {save.seconds:.1f} s; training waited {save.stall:.1f} s", flush=True)

    def _write(self, row: MetricsRow) -> None:
        self.file.write(row_line(row))
        for name, value in trackers.numbers(row).items():
            self.board.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Flush everything; trackers go on sending, see :meth:`wait`."""
        self.file.close()
        self.board.close()
        self.trackers.end()

    def wait(self) -> None:
        """Wait until trackers have sent what was recorded, or have had their time."""
        self.trackers.wait()


def _share(mfu: float | None) -> str:
    return "" if mfu is None else f"mfu {mfu:.1%}  "


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
