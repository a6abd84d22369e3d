"""Attention over packed documents one by one: a dense mask costs the square of the whole sample, and is mostly zeros.

Registered with transformers as an attention implementation of its own (:data:`BY_DOCUMENT`). On a CPU it is sdpa, given
each document separately, on a GPU torch's own kernel for packed documents. Where no documents are set (an export, a
generation) it is plain sdpa.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BY_DOCUMENT = "sdpa_by_document"
# What some architectures add to the scores; sdpa cannot.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
_ROWS = 128
"""Queries that are computed at a time where torch has no kernel of its own."""


class _Current:
    """The documents of the micro-batch that is being computed.

    Not a ``ContextVar``: autograd recomputes checkpointed layers in threads of its own on a GPU, which see no context.
    """

    lengths: Sequence[int] | None = None


@contextmanager
def documents(lengths: Sequence[int] | None) -> Iterator[None]:
    """Meanwhile attention is computed by these documents' lengths, in order over the flattened micro-batch
    [samples x length]; None: none are packed.

    Lasts from a micro-batch's forward pass to the end of its backward pass, which may recompute layers. The mask is
    made outside of what is passed to layers, so that lengths cannot travel as an argument alone.
    """
    before, _Current.lengths = _Current.lengths, lengths
    try:
        yield
    finally:
        _Current.lengths = before


def _mask(*arguments: Any, **more: Any) -> torch.Tensor | None:
    """No mask where documents are set: they are kept apart by being computed apart."""
    return None if _Current.lengths is not None else sdpa_mask(*arguments, **more)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """A document's queries, some at a time, each with the keys that any of them sees: memory grows with the length,
    not with its square.
    """
    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        yield slice(start, end), slice(max(0, start - window + 1) if window else 0, end)


def _only_seen(chances: torch.Tensor, rows: slice, keys: slice, window: int | None) -> torch.Tensor:
    """``chances`` [..., rows, keys], zeroed in place where a query does not see a key: it sees itself and what came
    before, in a window the ``window - 1`` before.
    """
    ahead = rows.start - keys.start
    chances.tril_(ahead)
    return chances.triu_(ahead - window + 1) if window else chances


def _heads_first(flat: torch.Tensor, heads: int) -> torch.Tensor:
    """[length, some heads, size] as [heads, length, size]; each key head serves several of the query's."""
    parts = flat.transpose(0, 1)
    return parts if parts.shape[0] == heads else parts.repeat_interleave(heads // parts.shape[0], 0)


class _ByDocument(torch.autograd.Function):
    """Causal attention of [tokens, heads, size] inside each document.

    Forward is torch's flash kernel; backward is matrix products, because that kernel's own backward is several times
    slower on a CPU for documents of ordinary length (Dao et al., 2022, algorithm 4, without its tiles).
    """

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, lengths: Sequence[int], scale: float, window: Any) -> Any:
        heads, out, start = query.shape[1], torch.empty_like(query), 0
        sums = []
        for size in lengths:
            here = slice(start, start + abs(size))
            q, k, v = (_heads_first(each[here], heads) for each in (query, key, value))
            if size < 0:
                out[here] = v.transpose(0, 1)
            else:
                seen, total = _flash(q, k, v, scale, window)
                out[here] = seen.transpose(0, 1)
                sums.append(total)
            start += abs(size)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.facts = (lengths, scale, window)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, out, *sums = ctx.saved_tensors
        lengths, scale, window = ctx.facts
        grads = [torch.empty_like(each) for each in (query, key, value)]
        start, totals, heads = 0, iter(sums), query.shape[1]
        for size in lengths:
            here = slice(start, start + abs(size))
            grad = gradients[0][here].transpose(0, 1)
            if size < 0:
                found = (torch.zeros_like(grad), torch.zeros_like(grad), grad)
            else:
                q, k, v = (_heads_first(each[here], heads) for each in (query, key, value))
                found = _gradients(q, k, v, out[here].transpose(0, 1), next(totals), grad, scale, window)
            for whole, part in zip(grads, found, strict=True):
                fewer = whole.shape[1]
                summed = part if fewer == heads else part.view(fewer, heads // fewer, *part.shape[1:]).sum(1)
                whole[here] = summed.transpose(0, 1)
            start += abs(size)
        return (*grads, None, None, None)


def _flash(q: Any, k: Any, v: Any, scale: float, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [heads, length, size] and log of the softmax's sums [heads, length], of one document."""
    length = q.shape[1]
    if window is None or length <= window:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, total = kernel(q[None], k[None], v[None], 0.0, True, scale=scale)
        return out[0], total[0]
    out, total = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for rows, keys in _blocks(length, window):
        scores = torch.matmul(q[:, rows].float(), k[:, keys].float().transpose(1, 2)).mul_(scale)
        seen = _only_seen(torch.ones_like(scores[0], dtype=torch.bool), rows, keys, window)
        scores.masked_fill_(~seen, float("-inf"))
        out[:, rows] = torch.matmul(scores.softmax(-1), v[:, keys].float()).to(q.dtype)
        total[:, rows] = scores.logsumexp(-1)
    return out, total


def _gradients(
    q: Any, k: Any, v: Any, out: Any, total: Any, grad: Any, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one document's query, key and value, [heads, length, size] each; the softmax's in fp32."""
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    for rows, keys in _blocks(q.shape[1], window):
        few, keyed = q[:, rows], k[:, keys]
        scores = torch.matmul(few.float(), keyed.float().transpose(1, 2)).mul_(scale).sub_(total[:, rows, None])
        chances = _only_seen(scores.exp_(), rows, keys, window)
        slopes = torch.matmul(grad[:, rows], v[:, keys].transpose(1, 2)).float().sub_(delta[:, rows])
        slopes = slopes.mul_(chances).mul_(scale).to(q.dtype)
        dq[:, rows] = torch.matmul(slopes, keyed)
        dk[:, keys] += torch.matmul(slopes.transpose(1, 2), few)
        dv[:, keys] += torch.matmul(chances.to(q.dtype).transpose(1, 2), grad[:, rows])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _varlen(query: Any, key: Any, value: Any, lengths: Sequence[int], scale: float, window: int | None) -> Any:
    """The same on a GPU. A run of padding is one more document: nobody looks at it."""
    sizes = torch.tensor([0, *(abs(size) for size in lengths)], dtype=torch.int32)
    ends = sizes.cumsum(0, dtype=torch.int32).to(query.device)
    longest, back = int(sizes.max()), -1 if window is None else window - 1
    settings: dict[str, Any] = {"scale": scale, "window_size": (back, 0), "enable_gqa": True}
    return varlen_attn(query, key, value, ends, ends, longest, longest, **settings)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the documents are others in each micro-batch
def _forward(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention [samples, length, heads, size] of ``query`` [samples, heads, length, size] and fewer key heads."""
    if any(more.get(name) is not None for name in _UNSUPPORTED) or dropout:
        raise ValueError(f"attention by document does not support dropout, {', '.join(_UNSUPPORTED)}")
    lengths = _Current.lengths
    if lengths is None or attention_mask is not None:
        seen, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
        return seen, None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary angles made them fp32
    samples, heads, length, size = query.shape
    flat = [each.transpose(1, 2).reshape(samples * length, -1, size) for each in (query, key, value)]
    scale = size**-0.5 if scaling is None else scaling
    compute: Any = _varlen if query.is_cuda else _ByDocument.apply
    out: torch.Tensor = compute(*flat, lengths, scale, sliding_window)
    return out.view(samples, length, heads, size), None


AttentionInterface.register(BY_DOCUMENT, _forward)
AttentionMaskInterface.register(BY_DOCUMENT, _mask)
