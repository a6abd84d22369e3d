"""What an adapter makes of the weights that it is on, computed in fp32 and apart from peft's own merging.

Merging is right where each weight is base + scale · B · A, rounded once to the model's dtype. Rounding alone can move
a weight by half a unit in its last place; what differs by more is counted, against the size of the change. So a scale
that is off by a tenth shows even where the change is much smaller than the weights' own rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from galley.contract.spec import Method

ADAPTER = "default"
PREFIX = "base_model.model."
TOLERANCE = 2e-4
"""Largest share of the change of a weight that may differ from what it should be."""
_ROWS = 2048
"""Rows of a matrix that are compared at a time."""
_EPS = 2.0**-24
"""Half of the last place of fp32."""

Tensors = Callable[[str], torch.Tensor]
"""Name to tensor."""


@dataclass(frozen=True)
class Layer:
    """A weight of the base that an adapter changes."""

    parameter: str
    """Its name in the base model."""
    down: str
    """Name of A in the adapted model, [rank · experts, inputs]."""
    up: str
    """Name of B, [outputs, rank · experts]."""
    magnitude: str | None
    """DoRA's magnitude, [outputs]."""
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    """Of A and B."""
    transposed: bool
    """The weight is [inputs, outputs], not [outputs, inputs]."""
    experts: int
    """Matrices in the weight; those of a mixture are one parameter."""

    @property
    def rank(self) -> int:
        """Of one matrix."""
        return self.shapes[0][0] // self.experts


def inside(path: str) -> str:
    """The module of the base model that a module of the adapted model wraps, by name."""
    return ".".join(part for part in path.removeprefix(PREFIX).split(".") if part != "base_layer")


def layers(wrapped: Any) -> dict[str, Layer]:
    """Each adapted weight of ``wrapped``, by its name in the base model. Convolutions are not among them."""
    adapted = (_layer(path, module) for path, module in wrapped.named_modules() if isinstance(module, BaseTunerLayer))
    return {layer.parameter: layer for layer in adapted if layer}


def _layer(path: str, module: Any) -> Layer | None:
    # What peft adapts is a module's `weight`, or the parameter that a ParamWrapper names: experts that are one tensor.
    parameter = getattr(module, "parameter_name", None) or "weight"
    name, base = f"{inside(path)}.{parameter}", module.get_base_layer()
    if ADAPTER in getattr(module, "lora_embedding_A", {}):
        pair = module.lora_embedding_A[ADAPTER], module.lora_embedding_B[ADAPTER]
        ends, transposed, experts = ("lora_embedding_A.default", "lora_embedding_B.default"), True, 1
    elif ADAPTER in getattr(module, "lora_A", {}):
        pair = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        ends, experts = ("lora_A.default.weight", "lora_B.default.weight"), getattr(module, "num_experts", 1)
        fused = experts > 1  # peft: (experts, outputs, inputs) unless the module says that it is transposed
        transposed = getattr(base, "is_transposed", False) if fused else getattr(module, "fan_in_fan_out", False)
    else:
        return None
    if any(factor.dim() != 2 for factor in pair):  # a convolution's A has the kernel's dimensions, too
        return None
    has_magnitude = ADAPTER in getattr(module, "lora_magnitude_vector", {})
    return Layer(
        parameter=name,
        down=f"{path}.{ends[0]}",
        up=f"{path}.{ends[1]}",
        magnitude=f"{path}.lora_magnitude_vector.default.weight" if has_magnitude else None,
        shapes=(tuple(pair[0].shape), tuple(pair[1].shape)),
        transposed=bool(transposed),
        experts=experts,
    )


def scale(layer: Layer, method: Method) -> float:
    """What the task scales the product of ``layer`` by.

    peft gives a fused pair of matrices (gate and up) twice the rank, and twice the alpha with it.
    """
    alpha = method.alpha * layer.rank / method.rank
    return float(alpha / (math.sqrt(layer.rank) if method.rslora else layer.rank))


def scales(wrapped: Any) -> dict[str, float]:
    """What peft scales the product of each adapted weight by."""
    factors = {}
    for path, module in wrapped.named_modules():
        layer = _layer(path, module) if isinstance(module, BaseTunerLayer) else None
        if layer:
            factors[layer.parameter] = float(module.scaling[ADAPTER])
    return factors


@torch.no_grad()
def merge(wrapped: Any) -> Any:
    """Merge the adapter of ``wrapped`` into its base, each weight rounded once; returns the base.

    peft rounds the change to the adapter's dtype or the weight's before it adds the two.
    """
    # So both are made fp32 before, and the sum is rounded to the weight's dtype after.
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    for module in wrapped.modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module, "merge"):
            continue
        base, name = module.get_base_layer(), getattr(module, "parameter_name", None) or "weight"
        weight = getattr(base, name)
        dtype = weight.dtype
        weight.data = weight.data.float()
        module.merge()
        weight = getattr(base, name)
        weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return wrapped.merge_and_unload()


@torch.no_grad()
def error(layer: Layer, trained: Tensors, began: Tensors | None, method: Method, base: torch.Tensor,
          merged: torch.Tensor) -> float:  # fmt: skip
    """How far ``merged`` is from what the adapter makes of ``base``, by norm, as a share of the change; 0: rounding.

    ``trained`` gives the checkpoint's tensors as the forward pass rounded them. ``began`` (PiSSA) gives the A and B
    that were taken out of the base before training, and the base is rounded to its dtype after that.
    """
    if merged.shape != base.shape:
        return math.inf
    factor = scale(layer, method)
    down, up = (trained(name).view(shape).to(merged.device) for name, shape in zip(
        (layer.down, layer.up), layer.shapes, strict=True))  # fmt: skip
    magnitude = trained(layer.magnitude).to(merged.device) if layer.magnitude else None
    # Sums of squares over the whole weight: of what is off by more than rounding, and of the change itself. fp32, a few
    # thousand rows at a time, [rows, inputs]: of a large matrix several copies would not fit.
    wrong = changed = 0.0
    for expert, before, after in _matrices(layer, base.to(merged.device), merged):
        first = before.float()  # [outputs, inputs]
        # PiSSA trained on the base less the adapter's beginning, rounded to the base's dtype.
        if began is not None:
            first = (first - factor * (began("B").to(first) @ began("A").to(first))).to(base.dtype).float()
        a, b = _factors(layer, down, up, expert)
        for start in range(0, len(after), _ROWS):
            rows = slice(start, start + _ROWS)
            part = None if magnitude is None else magnitude[rows]
            want = _expected(first[rows], a, b[rows], factor, part)
            odd = want.to(merged.dtype) != after[rows]
            if bool(odd.any()):  # rarely: where fp32's own rounding decides between two neighbours
                most = half_ulp(want[odd], merged.dtype) + _slack(want, a, b[rows], factor, part)[odd]
                off = (after[rows][odd].float() - want[odd]).abs()
                wrong += float(off[~(off <= most)].double().square().sum())
            changed += float(torch.linalg.vector_norm(want - before[rows].float())) ** 2
    if wrong == 0:
        return 0.0
    return math.sqrt(wrong / changed) if changed > 0 else math.inf


def _matrices(layer: Layer, *weights: torch.Tensor) -> Iterator[tuple[Any, ...]]:
    """Each matrix of the weights, [outputs, inputs], with its number."""
    for expert in range(layer.experts):
        matrices = [weight[expert] if layer.experts > 1 else weight for weight in weights]
        yield (expert, *(matrix.T if layer.transposed else matrix for matrix in matrices))


def _factors(layer: Layer, down: torch.Tensor, up: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, inputs] and B [outputs, rank] of one matrix.

    peft joins those of a mixture's experts, and differently: A is [experts · rank, inputs], expert by expert, and B is
    [outputs, rank · experts], with the experts' columns interleaved.
    """
    if layer.experts == 1:
        return down, up
    return down.view(layer.experts, layer.rank, -1)[expert], up.view(len(up), layer.rank, layer.experts)[..., expert]


def _expected(
    base: torch.Tensor, down: torch.Tensor, up: torch.Tensor, factor: float, magnitude: torch.Tensor | None
) -> torch.Tensor:
    """The weight in fp32, [rows, inputs]: base + factor · B A. DoRA scales each row to the norm in ``magnitude``."""
    want = base + factor * (up @ down)
    return want if magnitude is None else want * (magnitude / torch.linalg.norm(want, dim=1)).unsqueeze(1)


def _slack(
    want: torch.Tensor, down: torch.Tensor, up: torch.Tensor, factor: float, magnitude: torch.Tensor | None
) -> torch.Tensor:
    """By how much fp32's own rounding can move a weight, whoever computes it.

    A sum of ``rank`` products is off by at most (rank + a few) · 2⁻²⁴ · sum of |products| (Higham, 2002, section 3.1),
    whatever the order of summation; the addition to the base and the scaling round once more each. DoRA's norm over a
    row adds some tens of roundings.
    """
    slack = (len(down) + 4) * _EPS * factor * (up.abs() @ down.abs()) + 2 * _EPS * want.abs()
    return slack if magnitude is None else slack + 64 * _EPS * want.abs()


def half_ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half a unit in the last place that ``dtype`` has for numbers of the size of ``value`` (fp32)."""
    info = torch.finfo(dtype)
    # eps is the distance of 1 to the next number, so numbers in [1, 2) are eps apart, those in [2^(e-1), 2^e) are
    # eps · 2^(e-1): half of that is eps / 4 · 2^e. Below the smallest normal number the distance stays as it is there.
    exponent = torch.frexp(value).exponent  # value = mantissa · 2^exponent, the mantissa in [0.5, 1)
    half = torch.ldexp(torch.full_like(value, info.eps / 4), exponent)
    return half.clamp_min(info.smallest_normal * info.eps / 2)
