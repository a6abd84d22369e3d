"""The objectives by the names that ``task.objective`` may have."""

from __future__ import annotations

from galley.contract.task import Task
from galley.objective import sft
from galley.objective.base import Objective

OBJECTIVES: dict[str, Objective] = {"sft": sft}


def of(task: Task) -> Objective:
    """What the task minimises."""
    return OBJECTIVES[task.objective]
