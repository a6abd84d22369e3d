"""What every objective offers. Training, evaluation, checkpoints and exports know only this."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from galley.data.batches import Batch
from galley.data.columns import Split


class Objective(Protocol):
    """A loss that is a sum over a countable number of terms; a module of functions can be one (``sft``).

    ``loss`` is called inside ``attention.documents(batch.documents)``, which lasts through the backward pass.
    """

    def units(self, batch: Batch) -> int:
        """Terms that ``loss`` sums over, known before the forward pass: the global batch's loss is their mean."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """Sum of the loss (fp32 scalar). A batch of no units goes through the whole model once, and gives exactly 0:
        under ZeRO-3 every rank must run the same layers.
        """

    def probe_batch(self, split: Split, device: torch.device) -> Batch:
        """A few samples, the same on every rank, whose outputs are kept for the export to be checked with."""

    def probe_outputs(self, model: Any, batch: Batch) -> torch.Tensor:
        """Logits (fp32, [probes, vocabulary], on the CPU) of a probe batch, out of training."""
