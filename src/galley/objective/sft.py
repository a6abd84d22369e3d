"""Supervised fine-tuning: the sum of next-token cross-entropies over the supervised tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from galley.data.batches import Batch
from galley.data.columns import IGNORED, Split
from galley.model import neftune

_RAISED = 2.0**14
"""What gradients of fp16 logits are multiplied by between forward and backward, so that those below 6e-8, fp16's
least number, are not lost; a power of two, so the product is exact."""
_CHUNK = 32
"""Tokens whose logits are in fp32 at a time: a few MB, which caches hold."""
PROBES, PROBE_TOKENS = 4, 64


def output_head(model: Any) -> torch.nn.Module:
    """The layer that turns hidden states into logits, under whatever wraps the model (an engine, an adapter)."""
    inner = getattr(model, "module", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    head: torch.nn.Module = inner.get_output_embeddings()
    return head


@contextmanager
def logits_only_at(head: torch.nn.Module, indices: torch.Tensor) -> Iterator[None]:
    """Let ``head`` see only the hidden states at ``indices`` (flat indices into [samples, length]).

    The vocabulary is the widest axis of the model: computing it where nothing is supervised is waste. A hook keeps
    whatever the architecture does around its head (scaling, soft caps), which calling the head ourselves would lose.
    """

    def pick(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, indices).unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


class _CrossEntropySum(torch.autograd.Function):
    """Sum of cross-entropies of ``logits`` [tokens, vocabulary] with ``targets`` [tokens], in fp32, some at a time.

    The gradient, softmax - one-hot, is computed with the loss and written over the logits: no second tensor of
    [tokens, vocabulary] ever exists. Were the logits still needed by another node, autograd would notice and raise.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        chosen = targets.unsqueeze(1)
        ctx.raised = _RAISED if logits.dtype == torch.float16 else 1.0
        shape = (min(_CHUNK, len(targets)), logits.shape[1])
        buffers = [torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2)]
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            wide, probabilities = (buffer[: len(targets) - start] for buffer in buffers)
            torch.softmax(wide.copy_(logits[rows]), -1, out=probabilities)
            # The largest probability is exp(max) / sum of exponentials: so the log of the sum costs no second pass.
            log_sum = wide.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
            total += (log_sum - wide.gather(1, chosen[rows])).sum()
            if ctx.needs_input_grad[0]:
                probabilities.scatter_add_(1, chosen[rows], probabilities.new_full((len(probabilities), 1), -1.0))
                logits[rows] = probabilities * ctx.raised if ctx.raised != 1 else probabilities
        ctx.gradients = logits if ctx.needs_input_grad[0] else None
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradients.mul_((gradients[0] / ctx.raised).to(ctx.gradients.dtype)), None


def units(batch: Batch) -> int:
    """Supervised tokens."""
    return batch.supervised


def loss(model: Any, batch: Batch) -> torch.Tensor:
    """Sum of cross-entropies (fp32 scalar) over the batch's supervised tokens; 0 where it has none."""
    targets = batch.targets.reshape(-1)
    indices = torch.nonzero(targets != IGNORED).reshape(-1)
    nothing = indices.numel() == 0
    if nothing:  # one token still goes through the head, which ZeRO-3 gathers on all ranks together
        indices = torch.zeros(1, dtype=torch.long, device=targets.device)
    with logits_only_at(output_head(model), indices), neftune.noise(model, batch):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    total: torch.Tensor = _CrossEntropySum.apply(logits.flatten(0, 1), targets[indices].clamp_min(0))  # type: ignore[no-untyped-call]
    return total * 0.0 if nothing else total


def probe_batch(split: Split, device: torch.device) -> Batch:
    """The beginnings of the first few documents, one a row: the same on every rank."""
    starts = []
    for i in range(min(PROBES, len(split))):
        sample = split.sample(i)
        end = int(sample.document_starts[1]) if len(sample.document_starts) > 1 else len(sample.tokens)
        starts.append(torch.from_numpy(sample.tokens[: min(end, PROBE_TOKENS)].astype("int64")))
    length = max(len(each) for each in starts)
    tokens = torch.zeros(len(starts), length, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for row, each in enumerate(starts):
        tokens[row, : len(each)] = each
        targets[row, len(each) - 1] = 0  # marks the last token, whose logits are kept
    positions = torch.arange(length).repeat(len(starts), 1)
    return Batch([], tokens.to(device), positions.to(device), targets.to(device), tokens.numel())


@torch.no_grad()
def probe_outputs(model: Any, batch: Batch) -> torch.Tensor:
    """Logits (fp32, [probes, vocabulary], on the CPU) after the last token of each probe."""
    indices = torch.nonzero(batch.targets.reshape(-1) != IGNORED).reshape(-1)
    training = model.training
    model.eval()
    with logits_only_at(output_head(model), indices):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    model.train(training)
    last: torch.Tensor = logits[0].float().cpu()
    return last
