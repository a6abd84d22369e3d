"""Supervised fine-tuning: the sum of next-token cross-entropies over the supervised tokens of one micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from galley.contract.errors import UserError
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

    Of one token with logits z [vocabulary] and target t: the loss is logsumexp(z) - z[t], its gradient with respect to
    z is softmax(z) - onehot(t). The softmax that the loss needs is the gradient but for one element: so the gradient is
    computed with the loss and written over the logits, in their own dtype. For 8,192 tokens and a vocabulary of 128,256
    in bf16 that is one tensor of 2.1 GB; a softmax in fp32 beside it, as plain cross-entropy makes, would be 4.2 GB,
    and its gradient as much again. Were the logits still needed by another node, autograd would notice and raise.

    ``backward`` only multiplies by the gradient of the sum, a scalar: the loop's scaling of the loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        columns = targets.unsqueeze(1)  # [tokens, 1], as gather and scatter take them
        ctx.raised = _RAISED if logits.dtype == torch.float16 else 1.0
        shape = (min(_CHUNK, len(targets)), logits.shape[1])
        buffers = [torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2)]
        for start in range(0, len(targets), _CHUNK):
            rows = slice(start, start + _CHUNK)
            wide, probabilities = (buffer[: len(targets) - start] for buffer in buffers)  # [at most _CHUNK, vocabulary]
            torch.softmax(wide.copy_(logits[rows]), -1, out=probabilities)
            # The largest probability is exp(max) / sum of exponentials: so the log of the sum costs no second pass.
            log_sum = wide.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log()
            total += (log_sum - wide.gather(1, columns[rows])).sum()
            if ctx.needs_input_grad[0]:
                # Only now: the buffer becomes the gradient, and these rows of the logits are not read again.
                probabilities.scatter_add_(1, columns[rows], probabilities.new_full((len(probabilities), 1), -1.0))
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
    targets = batch.targets.reshape(-1)  # [samples x length], as hidden states are flattened by the hook
    indices = torch.nonzero(targets != IGNORED).reshape(-1)
    nothing = indices.numel() == 0
    # One token still goes through the head, which ZeRO-3 gathers on all ranks together; times 0 its gradient is none.
    if nothing:
        indices = torch.zeros(1, dtype=torch.long, device=targets.device)
    with logits_only_at(output_head(model), indices), neftune.noise(model, batch):
        logits = model(input_ids=batch.tokens, position_ids=batch.positions, use_cache=False).logits
    # Logits are [1, supervised tokens, vocabulary].
    if logits.dim() != 3 or logits.shape[0] * logits.shape[1] != len(indices):
        what = f"the model's logits have the shape {[*logits.shape]}, not [1, {len(indices)} tokens, vocabulary]"
        raise UserError("model.path", what, "use a causal language model")
    total: torch.Tensor = _CrossEntropySum.apply(logits.flatten(0, 1), targets[indices].clamp_min(0))  # type: ignore[no-untyped-call]
    return total * 0.0 if nothing else total


def probe_batch(split: Split, device: torch.device) -> Batch:
    """The beginnings of the first few documents, one a row: the same on every rank."""
    prompts = []
    for i in range(min(PROBES, len(split))):
        sample = split.sample(i)
        end = int(sample.document_starts[1]) if len(sample.document_starts) > 1 else len(sample.tokens)
        prompts.append(torch.from_numpy(sample.tokens[: min(end, PROBE_TOKENS)].astype("int64")))
    length = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        targets[row, len(prompt) - 1] = 0  # any token: marks the last place of the prompt, whose logits are kept
    positions = torch.arange(length).repeat(len(prompts), 1)
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
