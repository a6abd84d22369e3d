"""What a checkpoint keeps for its export to be checked with: a probe batch, and what the trained model makes of it."""

from __future__ import annotations

from typing import Any

import torch

from galley.data.batches import Batch
from galley.data.columns import Split
from galley.objective.base import Objective

Probes = dict[str, torch.Tensor]
"""``tokens`` and ``targets`` [probes, length], and ``logits`` [probes, vocabulary]: ``probes.safetensors``."""


def measure(objective: Objective, engine: Any, split: Split, device: torch.device) -> Probes:
    """Probe the model that is being trained (collective under ZeRO-3)."""
    # Unpacked on purpose, one document a row: whoever loads the export computes them so, without attention by document.
    batch = objective.probe_batch(split, device)
    with torch.compiler.set_stance("force_eager"):  # as an export computes them; and compiling took a while
        logits = objective.probe_outputs(engine, batch)
    return {"tokens": batch.tokens.cpu(), "targets": batch.targets.cpu(), "logits": logits}


def again(objective: Objective, model: Any, probes: Probes, device: torch.device | str) -> torch.Tensor:
    """What ``model`` makes of kept probes (fp32, [probes, vocabulary], on the CPU)."""
    tokens, targets = probes["tokens"].to(device), probes["targets"].to(device)
    positions = torch.arange(tokens.shape[1], device=device).repeat(len(tokens), 1)
    return objective.probe_outputs(model, Batch([], tokens, positions, targets, tokens.numel()))
