"""Liger's Triton kernels (Hsu et al., 2024) in place of a model's own layers."""

from __future__ import annotations

import importlib.util
from typing import Any

from galley.contract.errors import UserError
from galley.contract.spec import RunSpec

_GATED = {"swiglu": ("silu", "swish"), "geglu": ("gelu_pytorch_tanh",)}
"""What kernels of gated layers compute: Liger puts them into a model that is there without asking for its own."""


def check_installed(spec: RunSpec) -> None:
    """Raise ``UserError`` where ``spec`` asks for kernels that are not installed here."""
    for module, package in (("liger_kernel", "liger-kernel"), ("triton", "triton")):
        if spec.placement.liger and importlib.util.find_spec(module) is None:
            what = f"the Python package {package} is not installed here"
            raise UserError("liger", what, "pip install liger-kernel, or use liger=false")


def use_liger(model: Any) -> None:
    """Put the kernels for norms, rotary embeddings and gated layers into ``model``, before its adapter; the loss has
    pieces of its own.

    Raises ``UserError`` where liger-kernel has none for this kind of model.
    """
    from liger_kernel.transformers import monkey_patch

    config = model.config
    kind = config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError("liger", f"liger-kernel has no kernels for {kind!r}", "use liger=false")
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    off = {name: False for name, activations in _GATED.items() if activation not in activations}
    monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False, **off)
