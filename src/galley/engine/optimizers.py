"""Optimizers by name, and what of their state a checkpoint holds for each flat tensor that they step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from galley.contract.spec import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""fp32, one value for each weight: any ranks can read any slice of them."""
PACKED = ("state1", "state2", "absmax1", "absmax2")
"""bitsandbytes' 8-bit moments, and the scale of each block of 256 values of a flat tensor: of no use to another."""
STEP = "step"

Groups = list[dict[str, Any]]


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2023): the sign of a mean of gradients. One fp32 moment for each weight, ``exp_avg``."""

    def __init__(self, groups: Groups, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move each weight by the rate, against the sign."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, weight.grad, group)

    def _step(self, weight: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state[MOMENTS[0]] = torch.zeros_like(weight)
        mean = state[MOMENTS[0]]
        fast, slow = group["betas"]
        # The step goes by the sign of a quick mean (beta 1), the state follows as a slow one (beta 2): one moment
        # serves both, where Adam keeps two. Decay is decoupled, as in AdamW.
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(mean.mul(fast).add_(gradient, alpha=1 - fast).sign_(), alpha=-group["lr"])
        mean.mul_(slow).add_(gradient, alpha=1 - slow)


def make(groups: Groups, optimizer: Optimizer, offloaded: bool) -> torch.optim.Optimizer:
    """The optimizer of a task over parameter groups; ``offloaded``: its state and its steps are the CPU's."""
    settings: dict[str, Any] = {"lr": optimizer.lr, "betas": optimizer.betas, "eps": optimizer.eps}
    if optimizer.name == "lion":
        return Lion(groups, optimizer.lr, optimizer.betas)
    if optimizer.name != "adamw":
        import bitsandbytes

        kind = bitsandbytes.optim.PagedAdamW8bit if optimizer.name.startswith("paged") else bitsandbytes.optim.AdamW8bit
        eight: torch.optim.Optimizer = kind(groups, **settings)
        return eight
    if offloaded:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        on_cpu: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return on_cpu
    return torch.optim.AdamW(groups, fused=True, **settings)


def packs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its state is bitsandbytes' 8-bit one."""
    return hasattr(optimizer, "name2qmap")


def saved(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a checkpoint keeps of the state of one flat tensor, each flattened; nothing before the first step."""
    state = optimizer.state.get(flat, {})
    kept = {key: state[key] for key in (*MOMENTS, *PACKED) if state.get(key) is not None}
    if packs(optimizer) and kept:  # AdamW's own count of steps follows from the run's
        kept[STEP] = torch.tensor([int(state[STEP])])
    return {key: value.detach().reshape(-1) for key, value in kept.items()}


def fresh(optimizer: torch.optim.Optimizer, flat: torch.Tensor, step: int) -> dict[str, Any]:
    """State to fill for a flat tensor that no step was taken with: of AdamW or Lion."""
    if isinstance(optimizer, Lion):
        return {MOMENTS[0]: torch.zeros_like(flat)}
    # The count of steps corrects Adam's moments for their beginning at 0: DeepSpeed's is an int, torch's fused AdamW
    # wants a tensor on the weight's own device.
    native = type(optimizer).__name__ == "DeepSpeedCPUAdam"
    count = step if native else torch.tensor(float(step), device=flat.device)
    return {STEP: count} | {moment: torch.zeros_like(flat) for moment in MOMENTS}


def restore_packed(optimizer: Any, flats: list[torch.Tensor], file: Any) -> None:
    """Put 8-bit state back as it was saved, for the same flat tensors in the same order.

    ``file`` is an open safetensors file. bitsandbytes keeps the state of small tensors in fp32, without scales.
    """
    keys = set(file.keys())
    for number, flat in enumerate(flats):
        saved = {key: file.get_tensor(f"{key}.{number}") for key in (*PACKED, STEP) if f"{key}.{number}" in keys}
        if not saved:
            continue
        state = {STEP: int(saved.pop(STEP))} | {key: value.to(flat.device) for key, value in saved.items()}
        # A moment is one byte a weight: an index into a table of 256 values (qmap), times the scale (absmax) of its
        # block. The first moment has a sign, the second has none (Dettmers et al., 2022). Tables are not saved.
        for which, code in (("1", "dynamic"), ("2", "udynamic")):
            state[f"state{which}"] = _buffer(optimizer, flat, saved[f"state{which}"])
            if f"absmax{which}" in saved:
                state[f"qmap{which}"] = optimizer.name2qmap[code].to(flat.device)
        optimizer.state[flat] = state


def _buffer(optimizer: Any, flat: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` in memory as the optimizer has it: paged, where it pages."""
    buffer: torch.Tensor = optimizer.get_state_buffer(flat, dtype=value.dtype)
    if flat.is_cuda:
        torch.cuda.synchronize()  # it is filled with zeros meanwhile
    buffer.view(-1).copy_(value)
    return buffer
