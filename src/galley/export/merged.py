"""What each tensor of an exported model must be, given the checkpoint and the base."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file

from galley.export import lowrank
from galley.export.trained import Trained
from galley.export.weightcheck import Weights, compare_model, unlike
from galley.model import model

_REPLACED = re.compile(r"^(.*)\.modules_to_save\.default\.(.*)$")
_ROWS = re.compile(r"^(.*)\.token_adapter\.trainable_tokens_delta\.default$")


@dataclass
class Merged:
    """Compares an exported model with the base, the checkpoint and the adapter's layers (none: all weights)."""

    trained: Trained
    layers: dict[str, lowrank.Layer]

    def __post_init__(self) -> None:
        names = self.trained.reader.names()
        method = self.trained.spec.task.method
        self.adapted = adapter = method.kind != "full"
        self.replaced = {} if adapter else {name: name for name in names}
        self.rows: dict[str, str] = {}
        known = {part for layer in self.layers.values() for part in (layer.down, layer.up, layer.magnitude)}
        self.others: set[str] = set()
        if adapter:
            for name in names:
                self._sort(name, known)
        self.began = load_file(self.trained.run.adapter_init) if method.init == "pissa" and adapter else {}

    def _sort(self, name: str, known: set[str | None]) -> None:
        """File a parameter of the checkpoint under the tensor of the merged model that it changes."""
        if match := _REPLACED.match(name):  # a module that was trained in full
            self.replaced[f"{lowrank.inside(match[1])}.{match[2]}"] = name
        elif match := _ROWS.match(name):  # rows of added tokens
            self.rows[f"{lowrank.inside(match[1])}.weight"] = name
        elif name not in known:  # of an adapter on a convolution
            self.others.add(f"{lowrank.inside(name.partition('.lora_')[0])}.weight")

    def compare(self, loaded: Any) -> Weights:
        """Every tensor of ``loaded``, as plain transformers has loaded it."""
        self.base, buffers = self.trained.base_tensors()
        ties = model.parameter_names(self.trained.folder, self.trained.spec.task.model)
        if self.others:
            print(f"adapters on {len(self.others)} convolutions are compared by logits only", flush=True)
        return compare_model(loaded, ties, self._difference, self._most, buffers)

    def _most(self, name: str) -> float:
        if name in self.others:
            return math.inf
        return lowrank.TOLERANCE if name in self.layers else 0.0

    def _difference(self, name: str, tensor: torch.Tensor) -> float:
        trained = self.trained.as_trained
        if name in self.replaced:
            want = trained(self.replaced[name]) if self.adapted else self.trained.reader.whole(name)
            return unlike(tensor, want.view(tensor.shape)) if want.numel() == tensor.numel() else math.inf
        if name in self.layers:
            layer = self.layers[name]
            base = self.base(name).to(tensor.device, tensor.dtype)
            method = self.trained.spec.task.method
            return lowrank.error(layer, lambda part: trained(part).float(), self._began(layer), method, base, tensor)
        base = self.base(name)
        if name in self.rows:
            base = base.to(tensor.dtype, copy=True)
            ids = self.trained.manifest.model.added_token_ids
            base[ids] = trained(self.rows[name]).view(len(ids), -1).to(base.device, base.dtype)
        return unlike(tensor, base) if name not in self.others else 0.0

    def _began(self, layer: lowrank.Layer) -> lowrank.Tensors | None:
        """The A and B that PiSSA took out of the base, rounded as the forward pass rounds them."""
        if not self.began:
            return None
        path = layer.down.removesuffix(".lora_A.default.weight")
        return lambda which: self.began[f"{path}.{which}"].to(self.trained.dtype).float()
