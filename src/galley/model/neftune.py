"""NEFTune (Jain et al., 2023): noise on the embeddings of what is trained on, never of what is measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from galley.data.batches import Batch

ALPHA = "neftune_alpha"
"""Attribute of a model whose embeddings get noise: its alpha."""


def document_sizes(batch: Batch) -> torch.Tensor:
    """Length of the document that each token belongs to, int64 [samples, length]; padding may have any from 1."""
    if batch.documents is None:
        rows = torch.tensor(batch.rows or [batch.tokens.shape[1]] * len(batch.tokens)).clamp_min(1)
        return rows.unsqueeze(1).expand(batch.tokens.shape).to(batch.tokens.device)
    lengths = torch.tensor([segment.length for segment in batch.documents])
    sizes = torch.tensor([1 if segment.single_tokens else segment.length for segment in batch.documents])
    return sizes.repeat_interleave(lengths).view(batch.tokens.shape).to(batch.tokens.device)


@contextmanager
def noise(model: Any, batch: Batch) -> Iterator[None]:
    """Add noise from ±alpha / sqrt(length of the token's document x hidden size) to each embedding, while it trains.

    It comes from torch's own generator, which the loop seeds anew for each step and rank.
    """
    inner = getattr(model, "module", model)
    alpha = float(getattr(inner, ALPHA, 0.0))
    if not alpha or not inner.training:
        yield
        return
    sizes = document_sizes(batch).unsqueeze(-1)  # [samples, length, 1], beside embeddings [samples, length, hidden]

    def add(_: torch.nn.Module, __: tuple[torch.Tensor, ...], embedded: torch.Tensor) -> torch.Tensor:
        drawn = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
        return embedded + (drawn * (alpha / (sizes * embedded.shape[-1]).sqrt())).to(embedded.dtype)

    handle = inner.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
