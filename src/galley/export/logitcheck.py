"""Does the exported model compute what was trained? A comparison of logits that tells a wrong export from rounding.

Two healthy computations of one model in bf16 differ by percents, and by how much depends on the processor, its kernels
and the model. What does not depend on those is fp32. So both are held against the exported weights computed in fp32:
the trained model may be a few times as far from it as the exported model itself is, and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

TIMES = 4.0
"""The trained model may be this many times as far from fp32 as the exported one."""
FLOOR = {"float32": 2.5e-5, "float16": 1e-3, "bfloat16": 5e-3}
"""By dtype: rounding below this is taken for this (relative, logits)."""
MOST = 0.5
"""No rounding excuses more than this (relative, logits): two models that have nothing in common differ by 1.4."""


@dataclass(frozen=True)
class Agreement:
    """How the trained model's logits and the exported model's agree."""

    difference: float
    """Between the trained model's and fp32 (relative; the median over probes)."""
    tolerance: float
    """The largest difference that counts as rounding."""
    rounding: float
    """Between the exported model's and fp32 (relative; the median over probes)."""
    direct: float
    """Between the trained model's and the exported model's (relative; the median over probes)."""
    divergence: float
    """KL divergence of the trained model's likelihoods from those of fp32, in nats (the median over probes)."""
    same_top: float
    """Share of probes on which the exported model's likeliest next token is the trained model's."""
    agree: int
    """Probes on which logits, likelihoods and the likeliest token agree."""
    probes: int

    @property
    def right(self) -> bool:
        """Whether at least half of the probes agree: a mixture that is right may send a token to another expert."""
        return 2 * self.agree >= self.probes


def relative_differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """‖a - b‖ / ‖b‖ of each probe ([probes]), over centred logits [probes, vocabulary]: an offset means nothing."""
    # Adding one number to all logits of a token changes no probability, so the mean over the vocabulary is taken out.
    a, b = (logits.double() - logits.double().mean(dim=-1, keepdim=True) for logits in (a, b))
    differences: torch.Tensor = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return differences


def divergences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """KL(b ‖ a) of each probe, in nats, from logits [probes, vocabulary]."""
    log_a, log_b = (logits.double().log_softmax(-1) for logits in (a, b))
    nats: torch.Tensor = (log_b.exp() * (log_b - log_a)).sum(-1)
    return nats


def agreement(trained: torch.Tensor, exported: torch.Tensor, exact: torch.Tensor, dtype: str) -> Agreement:
    """Compare logits [probes, vocabulary] of the trained and the exported model, given those of fp32 (``exact``)."""
    # All that follows is [probes]. Judged twice, by the logits and by the likelihoods that they make: a wrong export
    # can move a few likely tokens, of which a norm over the vocabulary shows little.
    floor = FLOOR[dtype]
    off, own = relative_differences(trained, exact), relative_differences(exported, exact)
    rounding = float(own.nan_to_num(nan=math.inf).median())
    allowed = (TIMES * own.clamp_min(max(rounding, floor))).clamp_max(MOST)
    # Noise of a relative size r on logits of variance v makes a divergence of about r² v / 2: so TIMES counts squared.
    spread = (exact - exact.mean(-1, keepdim=True)).double().square().mean(-1)  # variance of the logits
    divergence, own_divergence = divergences(trained, exact), divergences(exported, exact)
    typical = float(own_divergence.nan_to_num(nan=math.inf).median())
    near = divergence <= TIMES**2 * own_divergence.clamp_min(typical).maximum(0.5 * floor**2 * spread)
    finite = exported.isfinite().all(-1) & exact.isfinite().all(-1)
    good = finite & (off <= allowed) & near & _same_where_clear(trained, exported, exact, floor * spread.sqrt())
    return Agreement(
        difference=float(off.median()),
        tolerance=float(allowed.median()),
        rounding=rounding,
        direct=float(relative_differences(trained, exported).median()),
        divergence=float(divergence.median()),
        same_top=float((trained.argmax(-1) == exported.argmax(-1)).double().mean()),
        agree=int(good.sum()),
        probes=len(good),
    )


def _same_where_clear(
    trained: torch.Tensor, exported: torch.Tensor, exact: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Whether the likeliest token is fp32's ([probes]); True where the first two are too near each other to tell."""
    best = exact.double().topk(2, dim=-1).values
    noise = (exported.double() - exact.double()).abs().amax(-1).maximum(floor)
    unclear = best[:, 0] - best[:, 1] <= 2 * TIMES * noise
    return unclear | (trained.argmax(-1) == exact.argmax(-1))


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Meanwhile ``model`` computes in fp32, with the weights that it has.

    One layer at a time is held in fp32, besides what is in none: no second copy of a large model is ever needed.
    Weights in four and eight bits stay as they are, and are multiplied in fp32.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    kept = _widen(outside)
    computing = [module for module in model.modules() if hasattr(module, "compute_dtype")]  # bitsandbytes' 4-bit layers
    dtypes = [module.compute_dtype for module in computing]
    handles = [handle for layer in layers for handle in _widened_while_used(layer)]
    for module in computing:
        module.compute_dtype = torch.float32
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, dtype in zip(computing, dtypes, strict=True):
            module.compute_dtype = dtype
        _restore(kept)


def _widened_while_used(layer: torch.nn.Module) -> Iterator[Any]:
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def before(*_: Any) -> None:
        kept.extend(_widen(layer.parameters()))

    def after(*_: Any) -> None:
        _restore(kept)
        kept.clear()

    yield layer.register_forward_pre_hook(before)
    yield layer.register_forward_hook(after, always_call=True)


def _widen(parameters: Any) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Turn parameters into fp32; returns them with what they held."""
    kept = []
    for parameter in parameters:
        narrow = parameter.is_floating_point() and parameter.dtype != torch.float32
        # bitsandbytes may store packed four-bit weights in bf16, two or more of them a number: those are no values.
        if narrow and not hasattr(parameter, "quant_state"):
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.float()
    return kept


def _restore(kept: list[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    for parameter, data in kept:
        parameter.data = data
