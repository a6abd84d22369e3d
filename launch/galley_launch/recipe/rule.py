"""The type of a rule about wrong combinations, and what a rule is given to judge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from galley_launch.recipe.schema import Recipe


@dataclass(frozen=True)
class Case:
    """What rules judge: the recipe, the device, and the DeepSpeed configuration as the user wrote it."""

    recipe: Recipe
    device: str
    deepspeed: dict[str, Any]

    def zero(self, key: str) -> Any:
        """A value of the ``zero_optimization`` block."""
        return self.block("zero_optimization").get(key)

    @property
    def stage(self) -> Any:
        """The ZeRO stage: 0 to 3, or what else the file has there."""
        return self.zero("stage") or 0

    def offload(self, what: str) -> str:
        """Where ``param`` or ``optimizer`` is offloaded to: ``none``, ``cpu`` or ``nvme``."""
        return str(self.option(f"offload_{what}", "device") or "none")

    def option(self, block: str, key: str) -> Any:
        """A value of a block inside ``zero_optimization``; None where there is none."""
        inside = self.zero(block)
        return inside.get(key) if isinstance(inside, dict) else None

    @property
    def predivides(self) -> bool:
        """Whether gradients are divided by something before they are reduced."""
        return self.deepspeed.get("gradient_predivide_factor") not in (None, 1)

    def block(self, name: str) -> dict[str, Any]:
        """A top-level block of the configuration; empty where there is none."""
        block = self.deepspeed.get(name)
        return block if isinstance(block, dict) else {}


@dataclass(frozen=True)
class Rule:
    """A combination that is refused."""

    where: str
    """The key that messages name."""
    broken: Callable[[Case], bool]
    what: str
    """Why the combination is wrong."""
    todo: str
    """What to change."""
