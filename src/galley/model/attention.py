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

from galley.data.batches import Segment

BY_DOCUMENT = "sdpa_by_document"
# What some architectures add to the scores; sdpa cannot.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")
_ROWS = 128
"""Queries that are computed at a time where torch has no kernel of its own."""


class _Current:
    """The documents of the micro-batch that is being computed.

    Not a ``ContextVar``: autograd recomputes checkpointed layers in threads of its own on a GPU, which see no context.
    """

    segments: Sequence[Segment] | None = None


@contextmanager
def documents(segments: Sequence[Segment] | None) -> Iterator[None]:
    """Meanwhile attention stays inside these documents, which cover the flattened micro-batch [samples x length] in
    order; None: none are packed.

    Lasts from a micro-batch's forward pass to the end of its backward pass, which may recompute layers. The mask is
    made outside of what is passed to layers, so that lengths cannot travel as an argument alone.
    """
    before, _Current.segments = _Current.segments, segments
    try:
        yield
    finally:
        _Current.segments = before


def _mask(*arguments: Any, **more: Any) -> torch.Tensor | None:
    """No mask where documents are set: they are kept apart by being computed apart."""
    return None if _Current.segments is not None else sdpa_mask(*arguments, **more)


def _slices(segments: Sequence[Segment]) -> Iterator[tuple[slice, Segment]]:
    """Each segment with the tokens of the flattened micro-batch that it is."""
    start = 0
    for segment in segments:
        yield slice(start, start + segment.length), segment
        start += segment.length


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """A document's queries, some at a time, each with the keys that any of them sees: memory grows with the length,
    not with its square.
    """
    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        yield slice(start, end), slice(max(0, start - window + 1) if window else 0, end)


def _only_seen(values: torch.Tensor, rows: slice, keys: slice, window: int | None) -> torch.Tensor:
    """``values`` [..., rows, keys], zeroed in place where a query does not see a key: it sees itself and what came
    before, in a window the ``window - 1`` before.
    """
    # Row i is query rows.start + i, column j is key keys.start + j. The query's own key is on the diagonal
    # j - i = ahead; causality keeps what lies on or left of it, a window what lies at most window - 1 left of it.
    ahead = rows.start - keys.start
    values.tril_(ahead)
    return values.triu_(ahead - window + 1) if window else values


def _heads_first(part: torch.Tensor, heads: int) -> torch.Tensor:
    """[length, some heads, size] as [heads, length, size]; each key head is repeated for the queries that it serves."""
    part = part.transpose(0, 1)
    return part if part.shape[0] == heads else part.repeat_interleave(heads // part.shape[0], 0)


def _grouped(gradient: torch.Tensor, key_heads: int) -> torch.Tensor:
    """[heads, length, size] as [key heads, length, size]: what a head that was repeated gets is the sum over its
    copies, which ``repeat_interleave`` laid side by side.
    """
    heads = gradient.shape[0]
    if key_heads == heads:
        return gradient
    return gradient.view(key_heads, heads // key_heads, *gradient.shape[1:]).sum(1)


class _ByDocument(torch.autograd.Function):
    """Causal attention inside each document of a flattened micro-batch.

    ``query`` is [tokens, heads, size], ``key`` and ``value`` are [tokens, key heads, size] (grouped queries: heads are
    a multiple of key heads), the output is as ``query``. ``segments`` cover the tokens in order. For a document of L
    tokens:

    - its rows of query, key and value, as [heads, L, size], which is what kernels take (a batch of heads);
    - forward: out = softmax(scale · q kᵀ + mask) v by torch's flash kernel, which never holds [heads, L, L] and also
      returns log(sum of exponentials) of each row, [heads, L];
    - backward: from these logarithms the probabilities of 128 rows at a time are computed again, [heads, 128, L].

    A token that is a document of its own attends to itself with a probability of 1: its output is its value, the
    gradient of the output is its value's, and query and key get none. So a run of them costs a copy.

    The backward pass is matrix products, because the flash kernel's own is several times slower on a CPU for documents
    of ordinary length (Dao et al., 2022, algorithm 4, without its tiles).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, segments: Sequence[Segment], scale: float, window: Any
    ) -> Any:
        heads, out = query.shape[1], torch.empty_like(query)  # every token is in a segment, so all of it gets filled
        log_sums = []  # of documents only, in their order
        for tokens, segment in _slices(segments):
            q, k, v = (_heads_first(tensor[tokens], heads) for tensor in (query, key, value))
            if segment.single_tokens:
                out[tokens] = v.transpose(0, 1)
            else:
                attended, log_sum = _flash(q, k, v, scale, window)
                out[tokens] = attended.transpose(0, 1)
                log_sums.append(log_sum)
        # Saved through autograd, not as attributes, so that activation checkpointing can drop and recompute them.
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.settings = (segments, scale, window)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        query, key, value, out, *log_sums = ctx.saved_tensors
        segments, scale, window = ctx.settings
        inputs, remaining, heads = (query, key, value), iter(log_sums), query.shape[1]
        of_inputs = [torch.empty_like(tensor) for tensor in inputs]
        for tokens, segment in _slices(segments):
            gradient = gradients[0][tokens].transpose(0, 1)
            if segment.single_tokens:
                parts = (torch.zeros_like(gradient), torch.zeros_like(gradient), gradient)
            else:
                q, k, v = (_heads_first(tensor[tokens], heads) for tensor in inputs)
                attended = out[tokens].transpose(0, 1)
                parts = _gradients(q, k, v, attended, next(remaining), gradient, scale, window)
            for whole, part in zip(of_inputs, parts, strict=True):
                whole[tokens] = _grouped(part, whole.shape[1]).transpose(0, 1)
        return (*of_inputs, None, None, None)


def _flash(q: Any, k: Any, v: Any, scale: float, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [heads, length, size] and log of the softmax's sums [heads, length], of one document."""
    length = q.shape[1]
    if window is None or length <= window:  # torch's kernel knows no window, and a short document does not fill it
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = kernel(q[None], k[None], v[None], 0.0, True, scale=scale)
        return out[0], log_sum[0]
    out, log_sum = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for rows, keys in _blocks(length, window):
        scores = torch.matmul(q[:, rows].float(), k[:, keys].float().transpose(1, 2)).mul_(scale)
        seen = _only_seen(torch.ones_like(scores[0], dtype=torch.bool), rows, keys, window)
        scores.masked_fill_(~seen, float("-inf"))
        out[:, rows] = torch.matmul(scores.softmax(-1), v[:, keys].float()).to(q.dtype)
        log_sum[:, rows] = scores.logsumexp(-1)
    return out, log_sum


def _gradients(
    q: Any, k: Any, v: Any, out: Any, log_sum: Any, gradient: Any, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of one document's query, key and value, [heads, length, size] each; the softmax's in fp32.

    With S the scaled scores, P = exp(S - log_sum) the probabilities and dO the gradient of the output (Dao et al.,
    2022, appendix B): dV = Pᵀ dO, dP = dO Vᵀ, dS = P · (dP - delta) with delta = rowsum(dO · O), and dQ = scale · dS K,
    dK = scale · dSᵀ Q.
    """
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    delta = (gradient.float() * out.float()).sum(-1, keepdim=True)  # [heads, length, 1]
    for rows, keys in _blocks(q.shape[1], window):  # a key is seen from several blocks of rows: dk and dv add up
        q_rows, k_seen = q[:, rows], k[:, keys]
        scores = torch.matmul(q_rows.float(), k_seen.float().transpose(1, 2)).mul_(scale).sub_(log_sum[:, rows, None])
        probabilities = _only_seen(scores.exp_(), rows, keys, window)  # [heads, rows, keys], as what follows
        of_scores = torch.matmul(gradient[:, rows], v[:, keys].transpose(1, 2)).float().sub_(delta[:, rows])
        of_scores = of_scores.mul_(probabilities).mul_(scale).to(q.dtype)
        dq[:, rows] = torch.matmul(of_scores, k_seen)
        dk[:, keys] += torch.matmul(of_scores.transpose(1, 2), q_rows)
        dv[:, keys] += torch.matmul(probabilities.to(q.dtype).transpose(1, 2), gradient[:, rows])
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _varlen(query: Any, key: Any, value: Any, segments: Sequence[Segment], scale: float, window: int | None) -> Any:
    """The same on a GPU. A run of padding is one more document there: nobody reads its output."""
    # The kernel takes where each document ends, [0, L1, L1 + L2, …], in int32 on the device, and the longest length.
    sizes = torch.tensor([0, *(segment.length for segment in segments)], dtype=torch.int32)
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
    segments = _Current.segments
    if segments is None or attention_mask is not None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
        return out, None
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary angles made them fp32
    samples, heads, length, size = query.shape
    # [samples, heads, length, size] to [samples x length, heads, size]: documents follow one another, as segments do.
    flat = [tensor.transpose(1, 2).reshape(samples * length, -1, size) for tensor in (query, key, value)]
    scale = size**-0.5 if scaling is None else scaling
    compute: Any = _varlen if query.is_cuda else _ByDocument.apply
    attended: torch.Tensor = compute(*flat, segments, scale, sliding_window)
    return attended.view(samples, length, heads, size), None


AttentionInterface.register(BY_DOCUMENT, _forward)
AttentionMaskInterface.register(BY_DOCUMENT, _mask)
