"""What the model learns: the sum of next-token losses over the supervised tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from galley import attention
from galley.batches import Batch
from galley.data import IGNORED


def output_head(model: Any) -> torch.nn.Module:
    """The layer that turns hidden states into logits, under whatever wraps the model (an engine, an adapter)."""
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    head: torch.nn.Module = inner.get_output_embeddings()
    return head


@contextmanager
def logits_only_at(head: torch.nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Let ``head`` see only the hidden states at ``places`` (flat indices into [samples, length]).

    The vocabulary is the widest axis of the model: computing it where nothing is supervised is waste. A hook keeps
    whatever the architecture does around its head (scaling, soft caps), which calling the head ourselves would lose.
    """

    def pick(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, places).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def sft_loss_sum(model: Any, head: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of cross-entropies (fp32 scalar) over the batch's supervised tokens.

    A batch without any still goes through the whole model once, with a loss of exactly 0: under ZeRO-3 every rank
    must run the same layers.
    """
    targets = batch.targets.reshape(-1)
    places = torch.nonzero(targets != IGNORED).reshape(-1)
    if places.numel() == 0:
        places = torch.zeros(1, dtype=torch.long, device=targets.device)
    attention.use_documents(batch.documents)
    with logits_only_at(head, places):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    return F.cross_entropy(logits[0].float(), targets[places], ignore_index=IGNORED, reduction="sum")
