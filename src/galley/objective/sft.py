"""What the model learns: the sum of next-token losses over the supervised tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from galley.data.batches import Batch
from galley.data.columns import IGNORED
from galley.model import attention, neftune

_RAISED = 2.0**14
"""What gradients of logits are multiplied by while they wait, so that fp16 does not lose small ones. Exact."""
_CHUNK = 32
"""Places whose logits are in fp32 at a time: a few MB, which caches hold."""


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


class _CrossEntropySum(torch.autograd.Function):
    """Sum of cross-entropies of ``logits`` [places, vocabulary] in fp32, a few places at a time.

    The gradient is computed with the loss, in the place of the logits: no copy of them all ever exists. Autograd would
    notice, and raise, were they still needed.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        chosen = targets.unsqueeze(1)
        ctx.raised = _RAISED if logits.dtype == torch.float16 else 1.0
        shape = (min(_CHUNK, len(targets)), logits.shape[1])
        spaces = [torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2)]
        for start in range(0, len(targets), _CHUNK):
            here = slice(start, start + _CHUNK)
            wide, chances = (each[: len(targets) - start] for each in spaces)
            torch.softmax(wide.copy_(logits[here]), -1, out=chances)
            # The largest's share is one over the sum of exponentials: their logarithm without computing them twice.
            log_sum = wide.amax(-1, keepdim=True) - chances.amax(-1, keepdim=True).log()
            total += (log_sum - wide.gather(1, chosen[here])).sum()
            if ctx.needs_input_grad[0]:
                chances.scatter_add_(1, chosen[here], chances.new_full((len(chances), 1), -1.0))
                logits[here] = chances * ctx.raised if ctx.raised != 1 else chances
        ctx.slopes = logits if ctx.needs_input_grad[0] else None
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.slopes.mul_((gradients[0] / ctx.raised).to(ctx.slopes.dtype)), None


def sft_loss_sum(model: Any, head: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Sum of cross-entropies (fp32 scalar) over the batch's supervised tokens.

    A batch without any still goes through the whole model once, with a loss of exactly 0: under ZeRO-3 every rank
    must run the same layers.
    """
    targets = batch.targets.reshape(-1)
    places = torch.nonzero(targets != IGNORED).reshape(-1)
    nothing = places.numel() == 0
    if nothing:
        places = torch.zeros(1, dtype=torch.long, device=targets.device)
    attention.use_documents(batch.documents)
    with logits_only_at(head, places), neftune.noise(model, batch):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    loss: torch.Tensor = _CrossEntropySum.apply(logits.flatten(0, 1), targets[places].clamp_min(0))  # type: ignore[no-untyped-call]
    return loss * 0.0 if nothing else loss
