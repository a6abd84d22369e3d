"""The contract between the two planes: what one run is, in one file that every rank reads.

The control plane (``galley_launch``) writes a :class:`RunSpec` as ``run.json``; the data plane (``galley``) reads it
and nothing else. This module imports pydantic and the standard library only, so that a login node can use it.

A ``RunSpec`` is complete (no ``auto``, no environment look-up), frozen, holds no secret and knows nothing of a
scheduler. Its two halves differ in how long they live: ``task`` *is* the run and never changes; ``placement`` may
change from one attempt to the next.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from galley.contract.files import read_text
from galley.contract.part import Fraction, Part, Positive
from galley.contract.sensitive import secret_in
from galley.contract.task import (
    Batch,
    Duration,
    Method,
    Model,
    Optimizer,
    Schedule,
    Task,
)
from galley.contract.task_data import Data

__all__ = [
    "Batch", "Cadence", "Data", "Duration", "Fraction", "Method", "Mlflow", "Model", "Optimizer", "Origin", "Part",
    "Paths", "Placement", "Positive", "RunSpec", "Schedule", "Task", "Tracking", "Wandb",
]  # fmt: skip

SCHEMA: Literal[1] = 1
_OLDER_DEGREES = frozenset({"sequence", "tensor", "expert"})


class Cadence(Part):
    """How often to log, measure and save. May change between attempts without changing the result."""

    log_every: Positive = 1
    """Steps between lines in the log; ``metrics.jsonl`` has every step."""
    eval_every: Positive | None = None
    """Steps between measurements of the held-out loss; one more at the end. None: only at the end."""
    save_every: Positive | None = None
    """Steps between checkpoints; one more at the end. None: only at the end."""
    keep: Positive = 2
    """Checkpoints kept: the newest this many that verify, and the best by held-out loss."""


class Wandb(Part):
    """Weights & Biases. Its key comes from ``WANDB_API_KEY``, and ``WANDB_MODE=offline`` is respected."""

    project: str
    """W&B project; created if it does not exist."""
    entity: str | None = None
    """W&B team or user. None: the key's own."""
    group: str | None = None
    """Runs of one group are shown together."""


class Mlflow(Part):
    """MLflow. Who may write comes from ``MLFLOW_TRACKING_TOKEN``, or ``…_USERNAME`` and ``…_PASSWORD``."""

    experiment: str
    """MLflow experiment; created if it does not exist."""
    uri: str | None = None
    """Tracking server (``https://…``) or folder (``file:/…``). None: ``MLFLOW_TRACKING_URI``, else MLflow's own."""

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri and (kind := secret_in(uri)):
            todo = "give it in MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            raise ValueError(f"holds {kind}; {todo}")
        return uri


class Tracking(Part):
    """Experiment trackers beside TensorBoard. May change between attempts without changing the result."""

    wandb: Wandb | None = None
    """Weights & Biases: its project, and optionally entity and group. None: not used."""
    mlflow: Mlflow | None = None
    """MLflow: its experiment, and optionally the server's uri. None: not used."""

    @property
    def names(self) -> list[str]:
        """Trackers in use; each is also the name of its Python package."""
        return [name for name in type(self).model_fields if getattr(self, name)]


class Paths(Part):
    """Absolute paths on this machine; they may differ on the next."""

    run: str
    """The run directory."""
    model: str
    """``model.path`` as found here: an absolute path, or the hub id."""
    data: str | None = None
    """``data.path`` as found here: an absolute path, or the hub id; None where there are ``sources``."""
    sources: list[str] = Field(default_factory=list)
    """The path of each of ``data.sources`` as found here."""
    held_out: str | None = None
    """``data.held_out_path`` as found here."""
    chat_template: str | None = None
    """``model.chat_template`` as found here: a shipped template's name, or an absolute path."""
    cache: str
    """Where prepared data, converted models and pinned tokenizers are shared between runs."""

    def trained_on(self) -> list[str]:
        """Where the rows come from, in the order of ``Data.listed``."""
        return [self.data] if self.data is not None else self.sources


class Placement(Part):
    """Where and how this attempt runs. Changing it changes speed and memory, not what is learned."""

    device: Literal["cuda", "cpu"]
    nodes: Positive = 1
    ranks_per_node: Positive = 1
    gpus: list[str] | None = None
    """Devices of this node by index or UUID, one for each rank; None on the CPU, and where a scheduler chooses."""
    micro_batch: Positive = 1
    """Samples that one rank takes through one forward and backward."""
    accumulation: Positive = 1
    """Micro-batches a rank takes before one optimizer step."""
    threads: Positive = 1
    """CPU threads of each rank."""
    activation_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    compile: bool = False
    """Compile each layer of the model (torch.compile): a slow first step, quicker ones after it."""
    liger: bool = False
    """Liger's Triton kernels for norms, rotary embeddings and gated layers."""
    profile: Annotated[int, Field(ge=0, le=100)] = 0
    """Steps to profile, after the first few."""
    deepspeed: dict[str, Any]
    """The finished DeepSpeed configuration: no ``auto``, no optimizer, no scheduler."""
    paths: Paths

    @property
    def data_parallel(self) -> int:
        """Ranks that see different samples."""
        return self.nodes * self.ranks_per_node

    @property
    def zero_stage(self) -> int:
        """ZeRO stage (0 to 3) of this attempt."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @model_validator(mode="before")
    @classmethod
    def _older_degrees(cls, given: Any) -> Any:
        """Older files have a degree of each kind of parallelism, of which only 1 was ever possible."""
        if not isinstance(given, dict):
            return given
        for name in sorted(_OLDER_DEGREES & given.keys()):
            if given[name] != 1:
                raise ValueError(f"{name} is {given[name]!r}; there is no {name} parallelism, so take it out")
        return {name: value for name, value in given.items() if name not in _OLDER_DEGREES}

    @field_validator("deepspeed")
    @classmethod
    def _has_a_stage(cls, config: dict[str, Any]) -> dict[str, Any]:
        zero = config.get("zero_optimization", {})
        stage = zero.get("stage", 0) if isinstance(zero, dict) else None
        if type(stage) is not int or not 0 <= stage <= 3:
            raise ValueError("zero_optimization.stage is not one of 0, 1, 2 and 3")
        return config

    @model_validator(mode="after")
    def _arithmetic(self) -> Self:
        product = self.micro_batch * self.accumulation * self.data_parallel
        train = self.deepspeed.get("train_batch_size")
        if product != train:
            raise ValueError(
                f"micro_batch {self.micro_batch} x accumulation {self.accumulation} x ranks {self.data_parallel} "
                f"= {product}, but deepspeed.train_batch_size is {train}"
            )
        return self


class Origin(Part):
    """Where the run came from; for people, never read by a rank."""

    recipe: str
    """Recipe file or name."""
    overrides: list[str] = Field(default_factory=list)
    """``key=value`` words of the command line."""
    version: str
    """Version of Galley."""
    commit: str | None = None
    """Git commit of a checkout, with ``+dirty`` where it was changed."""


class RunSpec(Part):
    """One run, complete. Written once for each attempt as ``run.json``, read by every rank."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run and of its directory."""
    task: Task
    placement: Placement
    cadence: Cadence = Cadence()
    tracking: Tracking = Tracking()
    origin: Origin

    @model_validator(mode="after")
    def _batch(self) -> Self:
        want, have = self.task.samples_per_step, self.placement.deepspeed.get("train_batch_size")
        if want != have:
            raise ValueError(f"the task wants {want} samples a step, the placement makes {have}")
        return self

    def to_json(self) -> str:
        """The bytes of ``run.json``."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RunSpec:
        """Read a ``run.json``. Raises ``OSError``, or ``ValueError`` (pydantic's ``ValidationError`` is one)."""
        return cls.model_validate_json(read_text(Path(path)))
