"""Parts of a multimodal model that text never passes through: vision and audio towers, and what joins them to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def auto_class(config: Any) -> Any:
    """transformers' factory for a model of ``config`` that writes text; one that also sees where there is no other."""
    return AutoModelForImageTextToText if sees(config.model_type) else AutoModelForCausalLM


def sees(kind: str) -> bool:
    """Whether transformers has a model of this type that sees and writes text, and none that only writes."""
    return kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def unused_by_text(model: Any) -> list[str]:
    """Names of the topmost modules, with parameters, that text alone does not pass through; none in a text model."""
    text = _text_model(model)
    if text is None:
        return []
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    used = {id(module) for module in [text, *ends] if module is not None}
    unused: list[str] = []

    def descend(path: str, module: torch.nn.Module) -> None:
        for key, child in module.named_children():
            name = f"{path}.{key}" if path else key
            if id(child) in used:
                continue
            if any(id(part) in used for part in child.modules()):
                descend(name, child)
            elif any(True for _ in child.parameters()):
                unused.append(name)

    descend("", model)
    return unused


def _text_model(model: Any) -> Any:
    """The language model inside a multimodal one; None where the model is nothing else, or the part is not known."""
    parts = getattr(model.config, "sub_configs", {})
    if not any("text" not in part and getattr(model.config, part, None) is not None for part in parts):
        return None
    kind = type(model.config.get_text_config(decoder=True))
    wanted = model.get_input_embeddings()
    holding = (
        module for module in model.modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is kind and module is not model
        and any(part is wanted for part in module.modules())
    )  # fmt: skip
    return next(holding, None)


def freeze_unused(model: Any) -> str | None:
    """Freeze what text does not pass through, which weight decay would shrink; returns what that is, for the log."""
    names = unused_by_text(model)
    parameters = [weight for name in names for weight in model.get_submodule(name).parameters()]
    for parameter in parameters:
        parameter.requires_grad_(False)
    count = sum(math.prod(getattr(weight, "ds_shape", weight.shape)) for weight in parameters)
    return f"{count / 1e6:.1f}M parameters of {', '.join(names)}" if names else None
