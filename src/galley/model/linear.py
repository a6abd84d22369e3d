"""Which linear layers of a model can have an adapter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from galley.model.towers import unused_by_text

_MAMBA = "Mamba's kernels use these matrices without calling the layers"
_KERNELS = ("x_proj", "dt_proj", "out_proj")
_STATE = ("A_log", "D")
"""What a Mamba layer has; gated delta nets (Qwen3-Next) have no ``D``, and call their layers."""
_OTHER = "they compute something else than a linear layer, which peft cannot wrap"
_TOWER = "text does not pass through them"


def all_linear(model: Any) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers to adapt, all but the output head; and of those left out, each with the reason.

    What peft's ``all-linear`` would take is the sum of both.
    """
    head, towers = model.get_output_embeddings(), unused_by_text(model)
    wanted, without = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear | Conv1D) or module is head:
            continue
        reason = _why_not(model, name, module, towers)
        if reason is None:
            wanted.append(name)
        else:
            without[name] = reason
    return wanted, without


def _why_not(model: Any, name: str, module: Any, towers: list[str]) -> str | None:
    if any(name == tower or name.startswith(f"{tower}.") for tower in towers):
        return _TOWER
    parent = model.get_submodule(name.rpartition(".")[0])
    if name.rpartition(".")[2] in _KERNELS and all(hasattr(parent, state) for state in _STATE):
        return _MAMBA
    own = type(module).forward not in (torch.nn.Linear.forward, Conv1D.forward)
    quantised = type(module).__module__.startswith("bitsandbytes")
    return _OTHER if own and not quantised and not _is_linear(module) else None


def _is_linear(module: Any) -> bool:
    """Whether a subclass with a forward pass of its own turns [1, 3, in] into [1, 3, out]; tried on the meta device."""
    stand_in = copy.copy(module)  # shallow: shares everything with the layer but its parameters
    parameters = module._parameters.items()
    stand_in._parameters = {key: None if weight is None else _empty(weight) for key, weight in parameters}
    try:
        out = type(module).forward(stand_in, torch.empty(1, 3, module.in_features, device="meta"))
    except Exception:  # modelling code may raise anything
        return False
    return isinstance(out, torch.Tensor) and list(out.shape) == [1, 3, module.out_features]


def _empty(parameter: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta"), False)
