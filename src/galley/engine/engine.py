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
"""The number of a layer in a parameter's name: ``model.layers.11.mlp.up_proj.weight``."""


def layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Each trained parameter's share of the learning rate: 1 above the layers, ``decay`` per layer below the top one,
    and for embeddings once more.
    """
    numbers = {name: int(match[1]) for name, _ in model.named_parameters() if (match := _LAYER.search(name))}
    layers = 1 + max(numbers.values(), default=-1)
    modules = model.named_modules()
    embeddings = tuple(f"{path}." for path, module in modules if isinstance(module, torch.nn.Embedding))

    def depth(name: str) -> int:
        """Layers above a parameter: 0 for the top layer's own, and for what comes after the layers."""
        if name in numbers:
            return layers - 1 - numbers[name]
        return layers if name.startswith(embeddings) else 0

    return {name: decay ** depth(name) for name in trained(model)}


def _groups(model: Any, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay; norms, biases and other vectors do not. Each with its share of the rate."""
    scales = layer_scales(model, optimizer.layer_decay)
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in trained(model).items():
        is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2  # under ZeRO-3 its own shape is [0]
        groups.setdefault((scales[name], is_vector), []).append(parameter)
    # Sorted, so that every rank and every attempt has the groups in one order: flat tensors are made group by group.
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[1] else optimizer.weight_decay, SHARE: key[0]}
        for key in sorted(groups)
    ]


def build(model: Any, spec: RunSpec) -> Engine:
    """Wrap ``model`` in a DeepSpeed engine with the task's optimizer; the loop sets the learning rate."""
    # A copy: DeepSpeed writes into the configuration that it is given, and so does `settle`.
    config = copy.deepcopy(spec.placement.deepspeed)
    config["gradient_clipping"] = spec.task.optimizer.clip or NO_CLIP
    zero = config.get("zero_optimization", {})
    offload = zero.get("offload_optimizer") or {}
    if offload.get("device") == "nvme":
        swap.settle(zero, spec, list(trained(model).values()))
    wanted = spec.task.optimizer
    # DeepSpeed knows AdamW; of another optimizer it would refuse to shard the state without this (runtime/engine.py).
    config["zero_allow_untested_optimizer"] = wanted.name != "adamw"
    optimizer = optimizers.make(_groups(model, wanted), wanted, offload.get("device") in ("cpu", "nvme"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def set_learning_rate(engine: Engine, rate: float) -> None:
    """Set the rate of every parameter group for the next step: its share of ``rate``."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group[SHARE]


def step(engine: Engine) -> float:
    """Take the optimizer step; returns the global gradient norm before clipping."""
    # With ZeRO the optimizer has the norm, over all ranks' slices, before clipping; where it is not finite, DeepSpeed
    # leaves the step out by itself.
    if engine.zero_optimization_stage() > 0:
        engine.step()
        return float(engine.get_global_grad_norm())
    # Without ZeRO DeepSpeed tells no norm, and steps on gradients that are not finite.
    gradients = [weight.grad for weight in trained(engine.module).values() if weight.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if isfinite(norm):
        engine.step()
    return norm


LEAST_SCALE = 1.0
"""DeepSpeed lowers a loss's scale no further."""
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def has_skipped(engine: Engine) -> bool:
    """Whether the last step was left out because its gradients overflowed fp16."""
    return bool(engine.fp16_enabled() and engine.optimizer.overflow)


def loss_scale(engine: Engine) -> dict[str, float] | None:
    """With fp16: the scale of the next loss, and the counters by which DeepSpeed will change it. None without."""
    if not (engine.fp16_enabled() and engine.optimizer.loss_scaler.dynamic):
        return None
    return {key: getattr(engine.optimizer.loss_scaler, key) for key in _SCALE}


def set_loss_scale(engine: Engine, state: dict[str, float] | None) -> None:
    """Go on with what :func:`loss_scale` returned when a checkpoint was saved."""
    for key, value in (state or {}).items():
        setattr(engine.optimizer.loss_scaler, key, value)


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """The optimizer inside whatever ZeRO wraps around it; its state is keyed by flat fp32 tensors (or parameters)."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


@dataclass(frozen=True)
class Fragment:
    """A slice of one parameter that this rank's optimizer holds in fp32.

    ``parameter.view(-1)[start : start + numel]`` is ``flat.view(-1)[offset : offset + numel]``, and the optimizer's
    moments of ``flat`` have the same layout.
    """

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
    """ZeRO-1 and 2: all parameters of a group lie one after another in one flat tensor, of which each rank has a
    stretch. The stretch may begin or end inside a parameter, and may hold nothing of it at all.

    DeepSpeed notes both addresses on the parameter (utils/mixed_precision_linkage.py): ``lp_fragment_address`` is the
    slice of the parameter, ``hp_fragment_address`` the same elements in this rank's fp32 stretch.
    """
    mapping = parameter._hp_mapping
    if mapping is not None:  # None: no element of this parameter lies in this rank's stretch
        flat = base_optimizer(engine).param_groups[mapping.param_group_index]["params"][0]
        in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        yield Fragment(name, in_parameter.start, in_parameter.numel, flat, in_flat.start)


def _zero3_fragment(engine: Engine, name: str, parameter: Any) -> Fragment:
    """ZeRO-3: each parameter is cut into as many equal partitions as there are ranks, and a rank's partitions of a
    sub-group of parameters lie one after another in one flat tensor.

    Of a parameter with N = 10 elements over 4 ranks, a partition has ceil(10 / 4) = 3: ranks hold 0-2, 3-5, 6-8, and 9
    with two elements of padding, which belong to no parameter. With more ranks than elements a rank holds padding only:
    its fragment then has no elements.

    ``grad_position`` (runtime/zero/stage3.py, ``set_grad_positions``) has for each parameter: which sub-group, where in
    its flat tensor the partition starts, and the partition's size, padding included.
    """
    optimizer = engine.optimizer
    sub_group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = zero3_load.partition_start(parameter)
    numel = max(0, min(size, parameter.ds_numel - start))
    return Fragment(name, start, numel, optimizer.fp32_partitioned_groups_flat[sub_group], offset)


def set_weight(parameter: Any, whole: torch.Tensor) -> None:
    """Put ``whole`` (fp32, flattened) into the weight that the forward pass uses, in its own dtype and sharding."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: its partition of the parameter, whose own data are empty
        zero3_load.copy_partition(parameter, whole)
    else:
        parameter.data.view(-1).copy_(whole)


def refresh_gathered(engine: Engine, before: bool) -> None:
    """ZeRO-3 keeps small parameters gathered: release them before their partitions change, gather them after."""
    # Below stage3_param_persistence_threshold elements. They are gathered and released all together, whichever of them
    # the method is called on (runtime/zero/stage3.py, `checkpoint_event_epilogue`).
    small = getattr(engine.optimizer, "persistent_parameters", [])
    if small and before:
        small[0].partition(small)
    elif small:
        small[0].all_gather(small)
