"""DeepSpeed: make the engine, and know which slice of which parameter this rank's optimizer holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from typing import Any

import deepspeed
import torch

from galley.contract.spec import Optimizer, RunSpec
from galley.engine import optimizers, swap
from galley.model import zero3_load
from galley.model.model import trained

Engine = Any
SHARE = "share"
"""Key of a parameter group: its share of the learning rate."""
NO_CLIP = 1e30
"""Clipping at this norm changes nothing, and makes every ZeRO stage compute the norm that the log shows."""


_LAYER = re.compile(r"\.(\d+)\.")


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Each trained parameter's share of the learning rate: 1 above the layers, ``decay`` per layer below the top one,
    and for embeddings once more.
    """
    found = {name: _LAYER.search(name) for name, _ in model.named_parameters()}
    layers = 1 + max((int(each[1]) for each in found.values() if each), default=-1)
    embeddings = tuple(f"{path}." for path, each in model.named_modules() if isinstance(each, torch.nn.Embedding))
    scales = {}
    for name in trained(model):
        layer = found[name]
        below = layers - 1 - int(layer[1]) if layer else layers * name.startswith(embeddings)
        scales[name] = decay**below
    return scales


def _groups(model: Any, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; norms, biases and other vectors do not. Each with its share of the rate."""
    scales = layer_scales(model, optimizer.layer_decay)
    found: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, each in trained(model).items():
        vector = len(getattr(each, "ds_shape", each.shape)) < 2
        found.setdefault((scales[name], vector), []).append(each)
    return [
        {"params": found[key], "weight_decay": 0.0 if key[1] else optimizer.weight_decay, SHARE: key[0]}
        for key in sorted(found)
    ]


def build(model: Any, spec: RunSpec) -> Engine:
    """Wrap ``model`` in a DeepSpeed engine with our optimizer; the loop sets the learning rate."""
    config = copy.deepcopy(spec.placement.deepspeed)
    config["gradient_clipping"] = spec.task.optimizer.clip or NO_CLIP
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        swap.settle(zero, spec, list(trained(model).values()))
    ours = spec.task.optimizer
    config["zero_allow_untested_optimizer"] = ours.name != "adamw"
    optimizer = optimizers.make(_groups(model, ours), ours, offload.get("device") in ("cpu", "nvme"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Set the rate of every parameter group for the next step: its share of ``rate``."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group[SHARE]


def step(engine: Engine) -> float:
    """Take the optimizer step; returns the global gradient norm before clipping."""
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return float(engine.get_global_grad_norm())
    gradients = [each.grad for each in trained(engine.module).values() if each.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if isfinite(norm):  # with ZeRO, DeepSpeed itself leaves such a step out
        engine.step()
    return norm


LEAST_SCALE = 1.0
"""DeepSpeed lowers a loss's scale no further."""
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def has_skipped(engine: Engine) -> bool:
    """Whether the last step was left out because its gradients overflowed fp16."""
    return bool(engine.fp16_enabled() and engine.optimizer.overflow)


def loss_scale(engine: Engine) -> dict[str, float] | None:
    """With fp16: what the scale of the next loss follows from."""
    if not (engine.fp16_enabled() and engine.optimizer.loss_scaler.dynamic):
        return None
    return {key: getattr(engine.optimizer.loss_scaler, key) for key in _SCALE}


def set_loss_scale(engine: Engine, state: dict[str, float] | None) -> None:
    """Go on with what ``loss_scale`` gave."""
    for key, value in (state or {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer inside whatever ZeRO wraps around it; its state is keyed by flat fp32 tensors (or parameters)."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


@dataclass(frozen=True)
class Fragment:
    """A slice of one parameter that this rank's optimizer holds in fp32."""

    name: str
    """The parameter."""
    start: int
    """First element in the flattened parameter."""
    numel: int
    """Elements."""
    flat: torch.Tensor
    """The fp32 tensor that the optimizer steps: one parameter, or many one after another."""
    offset: int
    """First element in ``flat``, flattened."""


def fragments(engine: Engine) -> Iterator[Fragment]:
    """What this rank holds: whole parameters without ZeRO, slices under ZeRO-1, 2 and 3."""
    for name, parameter in trained(engine.module).items():
        if engine.zero_optimization_stage() == 3:
            yield _zero3_fragment(engine, name, parameter)
        elif engine.zero_optimization_stage() > 0:
            yield from _zero12_fragment(engine, name, parameter)
        else:
            yield Fragment(name, 0, parameter.numel(), parameter, 0)


def _zero12_fragment(engine: Engine, name: str, parameter: Any) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is not None:
        flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(name, here.start, here.numel, flat, there.start)


def _zero3_fragment(engine: Engine, name: str, parameter: Any) -> Fragment:
    optimizer = engine.optimizer
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = zero3_load.partition_start(parameter)
    numel = max(0, min(size, parameter.ds_numel - start))
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def set_weight(parameter: Any, whole: torch.Tensor) -> None:
    """Put ``whole`` (fp32, flattened) into the weight that the forward pass uses, in its own dtype and sharding."""
    if hasattr(parameter, "ds_tensor"):
        zero3_load.copy_partition(parameter, whole)
    else:
        parameter.data.view(-1).copy_(whole)


def refresh_gathered(engine: Engine, before: bool) -> None:
    """ZeRO-3 keeps small parameters gathered: release them before their partitions change, gather them after."""
    small = getattr(engine.optimizer, "persistent_parameters", [])
    if small and before:
        small[0].partition(small)
    elif small:
        small[0].all_gather(small)
