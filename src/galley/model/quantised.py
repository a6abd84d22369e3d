"""How much of a model bitsandbytes quantises: plain linear layers, but no experts that are one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from galley.contract.errors import UserError
from galley.model.adapter import fused_experts
from galley.model.loading import shorten

BITS = {"qlora": "four bits (NF4)", "lora_int8": "eight bits"}
"""Kinds of method whose base is quantised, and to what."""


@dataclass(frozen=True)
class Share:
    """Numbers of weights."""

    quantised: int
    total: int
    experts: int
    """Of a mixture whose experts are one parameter: they stay whole."""
    names: list[str]
    """Those experts' parameters."""
    transposed: list[str]
    """Layers that hold their matrix the other way round, as GPT-2's do."""


def share(model: Any) -> Share:
    """What would be quantised of ``model``, which is not yet; on the meta device, or anywhere."""
    skipped = get_keys_to_not_convert(model)
    quantised, transposed = 0, []
    for name, module in model.named_modules():
        if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped):
            quantised += module.weight.numel()
            if isinstance(module, Conv1D):
                transposed.append(name)
    names = fused_experts(model)
    experts = sum(model.get_parameter(name).numel() for name in names)
    total = sum(parameter.numel() for parameter in model.parameters())
    return Share(quantised, total, experts, names, transposed)


def check_quantisation(kind: str, model: Any) -> float | None:
    """Print how much of ``model`` (on the meta device) the ``kind`` of method quantises, and return the share.

    None for kinds that quantise nothing. Raises :class:`UserError` where nothing would be quantised, and for layers
    whose quantised weights cannot be merged into what is exported.
    """
    if kind not in BITS:
        return None
    counts, name = share(model), model.config.model_type
    if counts.transposed:
        layers = shorten(counts.transposed)
        what = f"the layers of a {name} model are Conv1D ({layers}), which cannot be exported quantised"
        raise UserError("method.kind", what, "use method.kind=lora")
    if not counts.quantised:
        what = f"nothing of a {name} model would be quantised: it has no plain linear layers"
        raise UserError("method.kind", what, "use method.kind=lora")
    part = counts.quantised / counts.total
    print(f"model: {part:.1%} of its {counts.total / 1e6:,.1f}M weights are in {BITS[kind]}", flush=True)
    if counts.experts:
        share_of_experts = f"{counts.experts / counts.total:.1%} of the weights"
        whole = f"{share_of_experts}, its experts ({shorten(counts.names)}), are not quantised"
        print(f"warning: method.kind: {whole}: they take two bytes each (four in fp32)", flush=True)
    return part
