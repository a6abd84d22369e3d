"""The ``optimizer`` and ``scheduler`` blocks of a user's DeepSpeed JSON: the recipe's keys say these things here."""

from __future__ import annotations

import json
from typing import Any

from galley.errors import UserError
from galley_launch.arguments import nearest
from galley_launch.recipe import Recipe

# Whatever DeepSpeed's builder would make of these, the loop's own optimizer is what runs.
_TYPES = {"adamw": ("adamw", "adam"), "lion": ("lion",)}
_IGNORED = {"torch_adam": "", "adam_w_mode": "", "bias_correction": "", "warmup_type": ""}
_CURVES = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def _optimizer(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    """A parameter of DeepSpeed's, the recipe's value, the recipe's key."""
    ours = recipe.optimizer
    return {
        "lr": (ours.lr, "optimizer.lr"),
        "betas": (list(ours.betas), "optimizer.betas"),
        "eps": (ours.eps, "optimizer.eps"),
        "weight_decay": (ours.weight_decay, "optimizer.weight_decay"),
    }


def _scheduler(recipe: Recipe) -> dict[str, tuple[Any, str]]:
    ours = recipe.schedule
    return {
        "warmup_min_lr": (0, "schedule.warmup"),
        "warmup_max_lr": (recipe.optimizer.lr, "optimizer.lr"),
        "warmup_num_steps": (0 if ours.warmup == 0 else "a share of the steps", "schedule.warmup"),
        "warmup_min_ratio": (0, "schedule.warmup"),
        "cos_min_ratio": (ours.min_lr_ratio, "schedule.min_lr_ratio"),
        "total_num_steps": (recipe.duration.steps, "duration.steps"),
    }


def drop_optimizer_and_scheduler(config: dict[str, Any], label: str, recipe: Recipe) -> None:
    """Take both blocks out of ``config``. Raises ``UserError`` where one says something else than the recipe."""
    where = f"deepspeed {label}"
    optimizer, scheduler = config.pop("optimizer", None) or {}, config.pop("scheduler", None) or {}
    kind = str(optimizer.get("type", "auto"))
    name = recipe.optimizer.name
    if kind.lower() not in (*_TYPES.get(name, ()), "auto"):
        what = f"optimizer.type {kind!r}, but the recipe says optimizer.name {name}"
        raise UserError(where, what, "take the optimizer block out")
    _compare(optimizer, _optimizer(recipe), f"{where}: optimizer")
    concrete = _compare(scheduler, _scheduler(recipe), f"{where}: scheduler")
    curve = _CURVES.get(str(scheduler.get("type")))
    if concrete and curve != recipe.schedule.kind:
        what = f"scheduler.type {scheduler.get('type')!r}, but the recipe says schedule.kind {recipe.schedule.kind}"
        raise UserError(where, what, f"set schedule.kind={curve or 'cosine, linear or constant'}")


def _compare(block: dict[str, Any], ours: dict[str, tuple[Any, str]], where: str) -> bool:
    """Whether ``block`` says anything concrete; all of it must then be what the recipe says."""
    concrete, params = False, block.get("params") or {}
    if params == "auto":
        return False
    if not isinstance(params, dict):
        raise UserError(where, f"params {json.dumps(params)} is not an object", f"its keys: {', '.join(ours)}")
    for name, value in params.items():
        if name not in ours and name not in _IGNORED:
            raise UserError(where, f"no parameter {name!r}", nearest(name, ours))
        if value == "auto" or name in _IGNORED:
            continue
        want, key = ours[name]
        if value != want:
            what = f"params.{name} {json.dumps(value)}, but the recipe says {json.dumps(want)}"
            raise UserError(where, what, f'write "auto" there and set {key} in the recipe')
        concrete = True
    return concrete
