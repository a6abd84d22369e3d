"""The stages of a run, in order: one table that plans, job scripts, logs, ``galley why`` and the report read.

Part of the contract; the standard library only, and the grammar of Python 3.9. To add a stage, add it here and write
its module: ``python -m MODULE RUN/run.json``, which runs its work by ``galley.ranks.stage.run_stage``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """What runs between two points of a run, as processes of its own."""

    name: str
    module: str
    """What Python runs. On a cluster ``node.sh`` runs ``galley.NAME``."""
    on_ranks: bool = False
    """On every rank, under torchrun: it saves and ends by itself when asked to stop, and each rank has a log of its
    own. Else one process on one node, which is ended when it is to stop."""
    offline: bool = True
    """Whether Hugging Face's libraries must not ask the hub: what it needs is there by then."""
    state: str = "live"
    """The word of ``galley status`` while a job of it runs."""

    @property
    def log(self) -> str:
        """Name of the log that a person reads; torchrun's own repeats what ranks say, and adds to it."""
        return "rank-0" if self.on_ranks else self.name


PREPARE = Stage("prepare", "galley.prepare", offline=False, state="preparing")
TRAIN = Stage("train", "galley.train", on_ranks=True)
EXPORT = Stage("export", "galley.export", state="exporting")
STAGES = (PREPARE, TRAIN, EXPORT)

PREFLIGHT = "preflight"
"""Of a job: what looks at each node before training begins there. Not a stage of the run."""


def named(name: str) -> Stage:
    """The stage of that name. Raises ``StopIteration`` where there is none."""
    return next(stage for stage in STAGES if stage.name == name)


def names() -> tuple[str, ...]:
    """The names of all stages, in order."""
    return tuple(stage.name for stage in STAGES)


def alone() -> tuple[str, ...]:
    """The names of stages that run in one process."""
    return tuple(stage.name for stage in STAGES if not stage.on_ranks)


def after_training() -> tuple[str, ...]:
    """The names of stages that come after the last one that runs on ranks."""
    last = max(number for number, stage in enumerate(STAGES) if stage.on_ranks)
    return tuple(stage.name for stage in STAGES[last + 1 :])
