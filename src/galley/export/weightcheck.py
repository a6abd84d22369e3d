"""Are the exported weights those that were trained? Tensor by tensor, to the bit: no rounding blurs this.

What is compared is what plain libraries load from the export. A trained tensor must be the checkpoint's, rounded to
the export's dtype; an untrained one, the base's; one under an adapter, what :mod:`.lowrank` says it must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig

from galley.contract.spec import Model
from galley.export import lowrank
from galley.storage.weights import weight_files

_SHOWN = 3
_VOLATILE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
"""Keys of a configuration that say how it was saved, and nothing of what the model computes."""

Difference = Callable[[str, torch.Tensor], float]
"""From a tensor's name and exported value to its distance from what it must be; 0 where rounding explains it."""


@dataclass
class Weights:
    """What comparing the tensors of an export has shown."""

    tensors: int = 0
    """Tensors that were compared."""
    largest: float = 0.0
    """The largest difference: a share of the tensor's norm, or of the adapter's change to it."""
    wrong: list[str] = field(default_factory=list)
    """What is not as it must be, a sentence each."""

    @property
    def right(self) -> bool:
        """Whether everything is as it must be."""
        return not self.wrong

    def add(self, name: str, difference: float, most: float) -> None:
        """Count one tensor that differs by ``difference``, where ``most`` is allowed."""
        self.tensors += 1
        self.largest = max(self.largest, difference if math.isfinite(difference) else math.inf)
        if not difference <= most:
            self.wrong.append(f"{name} differs from what was trained by {difference:.1e} of its size")

    def describe(self) -> str:
        """In a few words, for people."""
        if self.right:
            return f"{self.tensors} tensors are what was trained"
        more = f" and {len(self.wrong) - _SHOWN} more" if len(self.wrong) > _SHOWN else ""
        return f"{'; '.join(self.wrong[:_SHOWN])}{more}"


def unlike(value: torch.Tensor, want: torch.Tensor) -> float:
    """0 where ``value`` is ``want`` rounded to its dtype, to the bit; else their distance as a share of ``want``."""
    if value.shape != want.shape:
        return math.inf
    rounded = want.to(value.device, value.dtype)
    if torch.equal(value, rounded):
        return 0.0
    # NaN equals nothing, itself included: a buffer may hold some.
    if value.is_floating_point() and bool(((value == rounded) | (value.isnan() & rounded.isnan())).all()):
        return 0.0
    a, b = value.double(), rounded.double()
    distance = float((a - b).norm() / b.norm())
    return distance if distance > 0 and math.isfinite(distance) else math.inf


def compare_model(loaded: Any, ties: dict[str, str], difference: Difference, most: Callable[[str], float],
                  buffers: Iterable[str]) -> Weights:  # fmt: skip
    """Compare every parameter of ``loaded``, and those of its buffers that ``buffers`` names.

    ``ties`` has every name of a parameter that the model must have, tied duplicates included, and the first name of
    the same tensor. ``most`` is the difference that a tensor may have.
    """
    result, first = Weights(), dict[int, str]()
    named = dict(loaded.named_parameters(remove_duplicate=False))
    have = {name: first.setdefault(id(parameter), name) for name, parameter in named.items()}
    for name in sorted(set(ties) ^ set(have)):
        result.wrong.append(f"{name} is {'missing' if name in ties else 'there, though the base has none'}")
    for name in sorted(set(ties) & set(have)):
        if ties[name] != have[name]:
            result.wrong.append(f"{name} is {'not ' if have[name] == name else ''}tied, unlike in the base")
    tensors = {name: named[name].data for name in named if have[name] == name and ties.get(name) == name}
    held = dict(loaded.named_buffers())
    for name in buffers:
        if name in held:
            tensors[name] = held[name]
    for name, tensor in tensors.items():
        result.add(name, difference(name, tensor), most(name))
    return result


def compare_configuration(folder: str, target: Path, model: Model) -> list[str]:
    """Settings in which the exported configuration differs from the base's, a sentence each."""
    exported, base = _settings(str(target), model), _settings(folder, model)
    keys = sorted(key for key in exported.keys() | base.keys() if exported.get(key) != base.get(key))
    return [f"config.json has {key} {exported.get(key)!r}, the base {base.get(key)!r}" for key in keys]


def _settings(folder: str, model: Model) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code).to_dict()

    def stripped(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stripped(part) for key, part in value.items() if key not in _VOLATILE}
        return value

    return dict(stripped(config))


def compare_adapter(
    stored: dict[str, torch.Tensor], reloaded: dict[str, torch.Tensor], want: dict[str, torch.Tensor]
) -> Weights:
    """Compare an adapter's file with ``want`` (name in the trained model to tensor), and what peft loads with the file.

    The file's dtypes count: they are those that the forward pass of training used.
    """
    result, expected = Weights(), {stored_name(name): name for name in want}
    for key in sorted(set(stored) ^ set(expected)):
        result.wrong.append(f"{key} is {'missing from' if key in expected else 'more than was trained, in'} the file")
    for key in sorted(set(stored) & set(expected)):
        name, value = expected[key], stored[key]
        result.add(key, math.inf if value.dtype != want[name].dtype else unlike(value, want[name]), 0.0)
        if name not in reloaded:
            result.wrong.append(f"{key} is not loaded by peft")
        elif unlike(reloaded[name], value):
            result.wrong.append(f"{key} is not what peft loads")
    return result


def compare_scales(have: dict[str, float], want: dict[str, float], result: Weights) -> None:
    """Compare the factor by which peft, once it has loaded an adapter, scales each weight's change (``have``) with the
    task's (``want``); what differs is added to ``result``.
    """
    for name in sorted(have.keys() | want.keys()):
        if not math.isclose(have.get(name, 0.0), want.get(name, 0.0), rel_tol=1e-6):
            result.wrong.append(f"the adapter of {name} is scaled by {have.get(name)}, not by {want.get(name)}")


def stored_name(name: str) -> str:
    """The key of a trained parameter in ``adapter_model.safetensors``, as peft writes it."""
    key = name.replace(f".modules_to_save.{lowrank.ADAPTER}", "").replace(f".{lowrank.ADAPTER}", "")
    return key.removesuffix(".weight") if ".lora_magnitude_vector" in key else key


def tensors_of(folder: str) -> lowrank.Tensors:
    """Reads tensors of a model's folder one at a time, by the names that its files have."""
    files = weight_files(folder)

    def read(name: str) -> torch.Tensor:
        with safe_open(files[name], "pt") as file:
            value: torch.Tensor = file.get_tensor(name)
        return value

    return read
