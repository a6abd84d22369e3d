"""PiSSA (Meng et al., 2024): an adapter that begins as the largest singular values of the weights it is on.

The base keeps the rest, so that the model computes the same at first. Prepare writes the beginning to a file once; a
resumed run and the export take it from there, for another machine's decomposition would differ in its last digits.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from galley.contract.errors import UserError
from galley.contract.files import follow_umask, fsync_path
from galley.contract.spec import Method
from galley.model import zero3_load

_ADAPTER = "default"
_MORE, _ROUNDS = 8, 16
"""Columns beyond the rank, and power iterations, of the randomised decomposition (Halko et al., 2011)."""


def adapted(wrapped: Any) -> Iterator[tuple[str, Any]]:
    """Name and layer of each adapter. Raises ``UserError`` where one is on something else than a linear layer."""
    for name, layer in wrapped.named_modules():
        if isinstance(layer, LoraLayer) and _ADAPTER in layer.lora_A:
            if not isinstance(layer.get_base_layer(), torch.nn.Linear):
                what = f"pissa needs linear layers, and {name!r} is a {type(layer.get_base_layer()).__name__}"
                raise UserError("method.init", what, "use method.init=zero, or other method.targets")
            yield name, layer


@torch.no_grad()
def make(wrapped: Any, seed: int, path: Path) -> None:
    """Decompose the base's weights into the beginning of each adapter, and write them to ``path``."""
    tensors = {}
    torch.manual_seed(seed)
    for name, layer in adapted(wrapped):
        weight, rank = layer.get_base_layer().weight.float(), layer.r[_ADAPTER]
        columns = min(rank + _MORE, *weight.shape)
        # W [out, in] ~ left [out, q] · diag(values [q]) · right [in, q]ᵀ. The adapter adds scaling · B A, of
        # A [rank, in] and B [out, rank]: each gets the root of value / scaling, so that this is W's first `rank` parts.
        left, values, right = torch.svd_lowrank(weight, q=columns, niter=_ROUNDS)
        root = (values[:rank] / layer.scaling[_ADAPTER]).sqrt()
        down, up = root[:, None] * right[:, :rank].T, left[:, :rank] * root
        missing = rank - len(root)  # of a layer with fewer rows or columns: directions that add nothing
        tensors[f"{name}.A"] = torch.nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        tensors[f"{name}.B"] = torch.nn.functional.pad(up, (0, missing)).contiguous()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, beside)
    follow_umask(beside)
    fsync_path(beside)
    beside.replace(path)
    fsync_path(path.parent)


@torch.no_grad()
def apply(wrapped: Any, path: Path, dtype: torch.dtype) -> None:
    """Give the adapters their beginning, and take it out of the base, which may be sharded by ZeRO-3."""
    with safe_open(path, "pt") as file:
        for name, layer in adapted(wrapped):
            # As the forward pass rounds them, so that what is taken out of the base is what the adapter adds at first.
            down, up = (file.get_tensor(f"{name}.{which}").to(dtype) for which in "AB")
            layer.lora_A[_ADAPTER].weight.data.copy_(down)
            layer.lora_B[_ADAPTER].weight.data.copy_(up)
            weight = layer.get_base_layer().weight
            taken = layer.scaling[_ADAPTER] * (up.float() @ down.float())
            if hasattr(weight, "ds_tensor"):
                zero3_load.subtract(weight, taken)
            else:
                weight.data = (weight.data.float() - taken.to(weight.device)).to(weight.dtype)


def doubled(tensors: dict[str, torch.Tensor], path: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What :func:`as_lora` makes of an adapter's tensors (by their names in the trained model)."""
    joined = dict(tensors)
    for key, value in load_file(path).items():
        name, _, which = key.rpartition(".")
        parameter = f"{name}.lora_{which}.{_ADAPTER}.weight"
        joined[parameter] = _joined(which, tensors[parameter], value.to(dtype))
    return joined


def _joined(which: str, last: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """A or B (``which``) of an adapter of twice the rank: [A last; A first] and [B last, -B first], whose product is
    B A after training less B A before it, which is what training changed.
    """
    first = first.to(last.dtype)
    return torch.cat([last, first], 0) if which == "A" else torch.cat([last, -first], 1)


def as_lora(folder: Path, path: Path, method: Method, dtype: torch.dtype) -> None:
    """Turn a saved adapter, which adds to the base less the adapter's beginning, into one of twice the rank that adds
    to the base itself.
    """
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    tensors, began = load_file(weights), load_file(path)
    for key, value in began.items():
        name, _, which = key.rpartition(".")
        parameter = f"{name}.lora_{which}.weight"  # as peft names it in a file
        tensors[parameter] = _joined(which, tensors[parameter], value.to(dtype))
    save_file(tensors, weights, metadata={"format": "pt"})
    facts = json.loads(config.read_text(encoding="utf-8"))
    # The scaling must stay alpha / r (rsLoRA: alpha / sqrt(r)) as r doubles.
    facts |= {"r": 2 * method.rank, "lora_alpha": method.alpha * (math.sqrt(2) if method.rslora else 2)}
    config.write_text(json.dumps(facts, indent=2, sort_keys=True), encoding="utf-8")
